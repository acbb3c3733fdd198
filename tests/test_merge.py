from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import neuronlens as nl
from handmade import site, token_map
from neuronlens import atlas as atlases
from neuronlens import testbed
from neuronlens.atlas import Shard, new_folder
from neuronlens.errors import AtlasError, DataError, OutputError, SkippedError
from neuronlens.running import ABSENT, COUNTED, Incoming, Layout, SiteStatistics, reduce
from neuronlens.tokens import Role

SITES = ["vision.0", "language.0"]

# A batch of one is the same batch in every scan, so that all is equal to the bit.
ALONE = {"sites": SITES, "n": 5, "batch_size": 1}

Scan = Callable[..., nl.Atlas]


@pytest.fixture
def scan(vlm, tmp_path) -> Scan:
    """Scan into a new folder of the given name."""

    def scanned(name: str, samples: Sequence[nl.Sample], **choices) -> nl.Atlas:
        return nl.scan(vlm, samples, out=tmp_path / name, **(ALONE | choices))

    return scanned


@pytest.fixture(scope="module")
def parts(vlm, scenes, tmp_path_factory) -> list[nl.Atlas]:
    """Scans of different samples: 5, 3 and 4 of them."""
    folder = tmp_path_factory.mktemp("parts")
    cuts = (scenes[:5], scenes[5:8], scenes[8:12])
    return [
        nl.scan(vlm, some, out=folder / name, **ALONE)
        for name, some in zip("abc", cuts, strict=True)
    ]


def contents(atlas: nl.Atlas) -> dict[str, bytes]:
    """Every file, the manifest among them; how a scan went is no part of the result."""
    found = {
        str(path.relative_to(atlas.path)): path.read_bytes()
        for path in sorted(atlas.path.rglob("*"))
        if path.is_file() and path.name != "runs.jsonl"
    }
    assert {"manifest.json", "samples.jsonl"} < set(found)
    assert len(found) == 2 + len(atlas.sites)
    return found


def in_order(several: Sequence[nl.Atlas]) -> list[nl.Atlas]:
    """Scans in the order in which merging puts them."""
    return sorted(several, key=lambda atlas: (atlas.manifest.data, atlas.manifest.parts[0].plan))


def scanned_in(several: Sequence[nl.Atlas], scenes: Sequence[nl.Sample]) -> list[nl.Sample]:
    """The samples of several scans one behind the other, as merging orders them."""
    by_id = {sample.id: sample for sample in scenes}
    return [by_id[r.id] for atlas in in_order(several) for r in atlas.samples.values()]


def altered(atlas: nl.Atlas, folder: Path, **manifest) -> nl.Atlas:
    """A copy whose manifest says something else."""
    path = shutil.copytree(atlas.path, folder) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | manifest))
    return nl.Atlas.open(folder)


def joined(*several: nl.Atlas | str | Path, out: Path) -> nl.Atlas:
    return nl.Atlas.merge(several, out)


# Different samples.


def test_merging_scans_is_one_scan_of_their_samples(scan, parts, scenes, tmp_path):
    merged = nl.Atlas.merge(parts, tmp_path / "merged")
    merged.verify()
    whole = scan("whole", scanned_in(parts, scenes))
    one, other = contents(merged), contents(whole)
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {"manifest.json"}
    # The manifest says of how many scans it is, and nothing else differs.
    assert merged.manifest.parts == tuple(a.manifest.parts[0] for a in in_order(parts))
    parts_of_one = {"parts": whole.manifest.parts}
    assert merged.manifest.model_copy(update=parts_of_one) == whole.manifest


def test_merging_does_not_depend_on_order_or_grouping(parts, tmp_path):
    a, b, c = parts
    expected = contents(joined(a, b, c, out=tmp_path / "abc"))
    ab, bc = joined(a, b, out=tmp_path / "ab"), joined(c, b, out=tmp_path / "bc")
    ac = joined(a.path, str(c.path), out=tmp_path / "ac")
    assert contents(ab) == contents(joined(b, a, out=tmp_path / "ba"))
    for number, group in enumerate(([c, b, a], [ab, c], [c, ab], [a, bc], [bc, a], [b, ac])):
        assert contents(joined(*group, out=tmp_path / str(number))) == expected


def test_merging_leaves_what_was_merged_as_it_was(parts, tmp_path):
    before = [contents(atlas) for atlas in parts]
    nl.Atlas.merge(iter(parts), tmp_path / "merged")
    assert [contents(atlas) for atlas in parts] == before


def test_top_lists_are_those_of_the_parts_sorted_by_new_positions(parts, tmp_path):
    merged = nl.Atlas.merge(parts, tmp_path / "merged")
    at = {record.id: position for position, record in merged.samples.items()}
    assert sorted(at.values()) == list(range(12))
    for name in SITES:
        records: dict[int, list] = {}
        for atlas in parts:
            top = atlas.statistics(name).top
            for neuron, rank in (top.ids != ABSENT).nonzero().tolist():
                position = at[atlas.samples[top.ids[neuron, rank].item()].id]
                kept = top.visual[neuron, rank].tolist(), top.text[neuron, rank].tolist()
                records.setdefault(neuron, []).append(
                    (-top.value[neuron, rank].item(), position, *kept)
                )
        found = merged.statistics(name).top
        for neuron, some in records.items():
            best = sorted(some)[:5]
            assert found.ids[neuron].tolist() == [position for _, position, _, _ in best]
            assert found.visual[neuron].tolist() == [visual for _, _, visual, _ in best]
            assert found.text[neuron].tolist() == [text for _, _, _, text in best]


def test_of_equal_values_across_scans_the_earlier_position_stays(scan, scenes, tmp_path):
    # The same picture and text under other ids: every value ties with one of the other scan.
    twins = [replace(sample, id=f"twin of {sample.id}") for sample in scenes[:3]]
    one, other = scan("a", scenes[:3], n=4), scan("b", twins, n=4)
    merged = joined(other, one, out=tmp_path / "merged")
    ordered = scanned_in((one, other), [*scenes, *twins])
    assert (
        contents(merged)["sites/language.0.safetensors"]
        == (contents(scan("whole", ordered, n=4))["sites/language.0.safetensors"])
    )
    top = merged.statistics("language.0").top
    assert torch.equal(top.value[:, 0], top.value[:, 1])
    assert torch.equal(top.ids[:, 0] + 3, top.ids[:, 1])


def test_a_domain_that_only_one_scan_has_is_kept(scan, scenes, tmp_path):
    rainy = [replace(sample, domain="rain") for sample in scenes[:2]]
    dry = [replace(sample, domain=None) for sample in scenes[2:5]]
    one, other = scan("rainy", rainy), scan("dry", dry)
    merged = joined(one, other, out=tmp_path / "merged")
    assert merged.manifest.domains == ("", "rain")
    found = merged.statistics("language.0").firing
    for atlas, domain in ((one, "rain"), (other, "")):
        own = atlas.statistics("language.0").firing
        assert torch.equal(found.fired[domain], own.fired[domain])
        assert torch.equal(found.tokens[domain], own.tokens[domain])


def test_skipped_samples_keep_their_names_and_move_with_their_scan(scan, scenes, tmp_path):
    bare = [replace(scenes[i], id=f"bare {i}", images=()) for i in range(3)]
    given = {
        "a": [bare[0], *scenes[:2]],
        "b": [scenes[2], bare[1], scenes[3], bare[2]],
    }
    made = {}
    for name, samples in given.items():
        with pytest.warns(UserWarning, match="no image"):
            made[name] = scan(name, samples)
    merged = joined(*made.values(), out=tmp_path / "merged")
    first, second = (
        next(name for name in made if made[name] is atlas) for atlas in in_order(made.values())
    )
    ids = [sample.id for sample in (*given[first], *given[second])]
    assert {each.position: each.id for each in merged.manifest.skipped} == {
        position: id for position, id in enumerate(ids) if id.startswith("bare")
    }
    assert {p: r.id for p, r in merged.samples.items()} == {
        position: id for position, id in enumerate(ids) if not id.startswith("bare")
    }
    assert all(each.reason == "no image" for each in merged.manifest.skipped)
    positions = [each.position for each in merged.manifest.skipped]
    assert positions == sorted(positions)
    assert merged.manifest.samples == 4
    with pytest.warns(UserWarning, match="no image"):
        whole = scan("whole", [*given[first], *given[second]])
    assert merged.manifest.model_copy(update={"parts": whole.manifest.parts}) == whole.manifest


def test_scans_in_other_batches_merge_and_say_so(scan, scenes, parts, tmp_path):
    a, _, _ = parts
    other = scan("other", scenes[12:16], batch_size=2, window=16)
    assert (a.choices.window, other.choices.window) == (16, 16)
    merged = joined(a, other, out=tmp_path / "merged")
    assert (merged.choices.batch_size, merged.choices.window) == (None, 16)
    third = scan("third", scenes[16:17], batch_size=2, window=4)
    again = joined(merged, third, out=tmp_path / "again")
    assert (again.choices.batch_size, again.choices.window) == (None, None)
    grouped = joined(a, joined(third, other, out=tmp_path / "right"), out=tmp_path / "left")
    assert contents(grouped) == contents(again)


def test_library_versions_and_names_do_not_depend_on_order_or_grouping(parts, tmp_path):
    made = [
        altered(
            atlas,
            tmp_path / name,
            versions={"torch": torch_version, "numpy": "2.0"},
            model=json.loads(atlas.manifest.model.model_dump_json()) | {"name": called},
        )
        for atlas, name, torch_version, called in zip(
            parts, "abc", ("2.7", "2.7", "2.6"), ("/models/x", "hub/x", "hub/x"), strict=True
        )
    ]
    a, b, c = made
    flat = joined(a, b, c, out=tmp_path / "flat")
    assert flat.manifest.versions == {"torch": "2.6 and 2.7", "numpy": "2.0"}
    left = joined(joined(a, b, out=tmp_path / "ab"), c, out=tmp_path / "left")
    right = joined(joined(c, b, out=tmp_path / "bc"), a, out=tmp_path / "right")
    assert contents(left) == contents(flat) == contents(right)


def of_neuron_without_text(folder: Path, number: int) -> nl.Atlas:
    """An atlas of a site that only the prompt runs through, where nothing is eligible."""
    layout = Layout.of(token_map("ppp"), 1, (Role.RESPONSE,), torch.device("cpu"))
    one = SiteStatistics(1, 2, 1, 1, torch.float32)
    values = torch.tensor([[1.0], [2.0], [-1.0]]) * number
    one.update(
        reduce(values, layout, 1, 1), Incoming([0], [str(number)], [""], torch.tensor([True]))
    )
    model = atlases.ModelInfo(name="m", model_type="m", fingerprint="m", dtype="float32")
    reading = {"n": 2, "keep_visual": 1, "keep_text": 1, "text_roles": (Role.RESPONSE,)}
    choices = atlases.Choices(**reading, template=True, batch_size=1, window=1)
    record = atlases.SampleRecord.of(nl.Sample(str(number), (), "asked", "said"), 0)
    with new_folder(folder) as working:
        atlases.write(
            working,
            model=model,
            choices=choices,
            sites=[site("qformer.0", 1)],
            statistics={"qformer.0": one},
            samples=[record],
            skipped=[],
            versions={},
            plan=str(number),
            positions=1,
        )
    return nl.Atlas.open(folder)


def test_counts_of_a_site_without_eligible_tokens_are_added(tmp_path):
    made = [of_neuron_without_text(tmp_path / str(i), i) for i in (1, 2, 3)]
    merged = nl.Atlas.merge(made, tmp_path / "merged")
    neuron = merged.neuron(nl.NeuronId("qformer.0", 0))
    assert len(neuron.positions) == 0
    found, place = merged.statistics("qformer.0"), COUNTED.index(Role.PROMPT)
    assert found.firing.tokens[""].sum(0)[place] == 9
    assert found.firing.fired[""].sum((0, 2))[place] == 6
    assert (neuron.maximum[Role.PROMPT], neuron.mean[Role.PROMPT]) == (6.0, pytest.approx(12 / 9))


def test_merged_atlases_are_classified_and_shown_like_others(vlm, scan, tmp_path):
    folders = [testbed.write(tmp_path / str(seed), 4, seed=seed) for seed in (21, 22)]
    merged = nl.Atlas.merge(
        [scan(f"a{i}", nl.read_samples(each)) for i, each in enumerate(folders)],
        tmp_path / "merged",
    )
    assert merged.runs == []
    assert merged.manifest.shard is None
    assert "8 samples" in merged._repr_html_()
    kinds = nl.NeuronClassifier().classify(merged)
    assert sum(kinds.shares(None).values()) == pytest.approx(1)
    # A warning, and so an error, if re-recorded maxima were not those that were scanned.
    neuron = nl.NeuronId("language.0", 7)
    found = nl.exemplars(vlm, merged, [neuron], explain=(1, 2, 3), held_out=())
    best = merged.neuron(neuron)
    assert [each.position for each in found[neuron].explain] == best.positions[:3].tolist()
    for each in found[neuron].explain:
        assert each.sample.id == merged.samples[each.position].id
        eligible = [int(role) in (Role.VISUAL, Role.RESPONSE) for role in each.tokens.role]
        rank = best.positions.tolist().index(each.position)
        largest = max(
            value for value, counts in zip(each.activation, eligible, strict=True) if counts
        )
        assert largest == pytest.approx(best.value[rank].item(), abs=1e-4)


# What is refused.


@pytest.mark.parametrize("how", ["twice the same", "overlapping", "within a merged one"])
def test_a_sample_that_is_in_two_scans_is_refused_by_name(scan, parts, scenes, tmp_path, how):
    a, b, _ = parts
    if how == "twice the same":
        given, name = [a, a], scenes[0].id
    elif how == "overlapping":
        given, name = [a, scan("over", [scenes[20], scenes[3]])], scenes[3].id
    else:
        given, name = [joined(a, b, out=tmp_path / "ab"), b], scenes[5].id
    with pytest.raises(DataError, match=rf"Sample '{name}' is in .* and in .*count twice"):
        nl.Atlas.merge(given, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"n": 6}, "n 5 and 6"),
        ({"keep_visual": 6}, "keep_visual 5 and 6"),
        ({"keep_text": 2}, "keep_text 3 and 2"),
        ({"text_roles": ("prompt", "response")}, "text_roles response and prompt/response"),
        ({"template": False}, "template True and False"),
        ({"sites": ["vision.0"]}, "sites vision.0, language.0 and vision.0"),
        ({"sites": ["vision.0", "language.1"]}, "sites .*language.0 and vision.0, language.1"),
    ],
    ids=lambda each: str(each) if isinstance(each, dict) else "",
)
def test_scans_with_other_readings_are_refused_with_what_differs(
    scan, parts, scenes, tmp_path, choices, said
):
    other = scan("other", scenes[20:21], **choices)
    with pytest.raises(AtlasError, match=rf"cannot be merged, since they differ in {said}"):
        joined(parts[0], other, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_scans_of_other_models_are_refused(parts, bed, untrained_vlm, scenes, tmp_path):
    out = tmp_path / "merged"
    other = nl.scan(untrained_vlm, scenes[20:21], out=tmp_path / "untrained", **ALONE)
    fingerprint = parts[0].manifest.model.fingerprint
    with pytest.raises(AtlasError, match=rf"model {fingerprint} and "):
        joined(parts[0], other, out=out)
    half = nl.adapt(copy.deepcopy(bed.model).bfloat16(), bed.processor)
    halved = nl.scan(half, scenes[20:21], out=tmp_path / "half", **ALONE)
    with pytest.raises(AtlasError, match=r"dtype float32 and bfloat16"):
        joined(parts[0], halved, out=out)
    inputs = {"choices": json.loads(parts[1].choices.model_dump_json()) | {"neuron": "down_input"}}
    with pytest.raises(AtlasError, match=r"neuron act_fn and down_input"):
        joined(parts[0], altered(parts[1], tmp_path / "inputs", **inputs), out=out)


@pytest.mark.parametrize("count", [0, 1])
def test_merging_fewer_than_two_is_refused(parts, tmp_path, count):
    with pytest.raises(AtlasError, match=f"{count} atlases were given; merging takes two or more"):
        nl.Atlas.merge(parts[:count], tmp_path / "merged")


@pytest.mark.parametrize("given", ["nothing", "no image"])
def test_shards_without_any_sample_are_refused_like_their_scan(vlm, tmp_path, given):
    samples = [] if given == "nothing" else [nl.Sample(name, (), "p", "r") for name in "ab"]
    shards = []
    for index in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what was skipped
            out = tmp_path / str(index)
            shards.append(nl.scan(vlm, samples, out=out, shard=(index, 2), **ALONE))
    with pytest.raises(SkippedError, match="None of these atlases has a sample"):
        nl.Atlas.merge(shards, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_never_overwrites(parts, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="would be overwritten"):
        nl.Atlas.merge(parts, tmp_path / "merged")
    with pytest.raises(AtlasError, match="is no atlas"):
        joined(parts[0], tmp_path / "nothing", out=tmp_path / "out")


# Shards.

BATCHED = {"sites": SITES, "n": 5, "batch_size": 2, "window": 4}


def sharded(scan: Scan, samples: Sequence[nl.Sample], count: int, **choices) -> list[nl.Atlas]:
    return [
        scan(f"{i} of {count}", samples, **(BATCHED | choices), shard=(i, count))
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [2, 3])
def test_all_shards_of_a_scan_are_the_scan_bit_for_bit(scan, scenes, tmp_path, count):
    whole = contents(scan("whole", scenes[:9], **BATCHED))
    shards = sharded(scan, scenes[:9], count)
    assert [each.manifest.shard for each in shards] == [
        Shard(index=i, count=count) for i in range(count)
    ]
    assert contents(nl.Atlas.merge(shards, tmp_path / "merged")) == whole
    assert contents(nl.Atlas.merge(shards[::-1], tmp_path / "reversed")) == whole


def test_shards_without_a_batch_change_nothing(scan, scenes, tmp_path):
    whole = contents(scan("whole", scenes[:3], **BATCHED))
    shards = sharded(scan, scenes[:3], 4)
    assert [each.manifest.samples for each in shards] == [2, 1, 0, 0]
    assert contents(nl.Atlas.merge(shards, tmp_path / "merged")) == whole
    assert contents(nl.Atlas.merge(shards[::-1], tmp_path / "reversed")) == whole


def test_a_shard_whose_samples_were_all_skipped_keeps_their_names(scan, scenes, tmp_path):
    bare = replace(scenes[3], id="bare", images=())
    samples, one = [scenes[0], bare], {"batch_size": 1, "window": 2}
    whole_of = BATCHED | one
    with pytest.warns(UserWarning, match="1 of 2 samples"):
        whole = scan("whole", samples, **whole_of)
    with pytest.warns(UserWarning, match="1 of 1 samples"):
        shards = sharded(scan, samples, 2, **one)
    assert sorted(each.manifest.samples for each in shards) == [0, 1]
    for number, order in enumerate((shards, shards[::-1])):
        merged = nl.Atlas.merge(order, tmp_path / str(number))
        assert contents(merged) == contents(whole)
        assert [each.id for each in merged.manifest.skipped] == ["bare"]


def test_shards_that_were_merged_merge_with_other_scans(scan, scenes, parts, tmp_path):
    shards = sharded(scan, scenes[5:8], 2, batch_size=1, window=16)
    again = nl.Atlas.merge(shards, tmp_path / "again")
    assert contents(again) == contents(parts[1])
    assert contents(joined(parts[0], again, out=tmp_path / "one")) == (
        contents(joined(parts[0], parts[1], out=tmp_path / "other"))
    )


def test_shards_that_are_missing_or_given_twice_are_named(scan, scenes, tmp_path):
    shards, out = sharded(scan, scenes[:6], 3), tmp_path / "merged"
    with pytest.raises(AtlasError, match=r"scan of 3 shards.*shards \[1\] are missing"):
        joined(shards[0], shards[2], out=out)
    with pytest.raises(AtlasError, match=r"shards \[0, 1\] are missing"):
        joined(shards[2], shards[2], out=out)
    with pytest.raises(AtlasError, match=r"shards \[1\] were given twice"):
        joined(shards[1], *shards, out=out)
    with pytest.raises(AtlasError, match=r"1 atlases were given"):
        joined(shards[0], out=out)
    assert not out.exists()


@pytest.mark.parametrize("what", ["a whole scan", "another count", "other samples", "batches"])
def test_shards_of_different_scans_are_refused_with_what_each_is(scan, scenes, tmp_path, what):
    first = scan("first", scenes[:6], **BATCHED, shard=(0, 2))
    if what == "a whole scan":
        other, named = scan("other", scenes[:6], **BATCHED), "whole"
    elif what == "another count":
        other, named = scan("other", scenes[:6], **BATCHED, shard=(1, 3)), "shard 1 of 3"
    elif what == "other samples":
        other, named = scan("other", scenes[6:9], **BATCHED, shard=(1, 2)), "shard 1 of 2"
    else:
        dealt = BATCHED | {"batch_size": 3}
        other, named = scan("other", scenes[:6], **dealt, shard=(1, 2)), "shard 1 of 2"
    with pytest.raises(AtlasError, match=rf"first \(shard 0 of 2\), .*other \({named}\)"):
        joined(first, other, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_shard_says_that_it_is_one(scan, scenes):
    assert "1 of 2" in scan("a", scenes[:4], **BATCHED, shard=(1, 2))._repr_html_()


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_cannot_be_is_refused(scan, scenes, shard):
    with pytest.raises(ValueError, match=r"give \(i, n\) with i from 0 to n - 1"):
        scan("a", scenes[:2], shard=shard)

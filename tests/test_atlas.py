from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image

import handmade
import neuronlens as nl
from handmade import open_atlas, statistics, token_map
from neuronlens import atlas as atlases
from neuronlens import testbed
from neuronlens.activations import Routed
from neuronlens.atlas import FORMAT, Shard, new_folder
from neuronlens.errors import (
    AtlasError,
    MissingExtraError,
    NeuronLensError,
    OutputError,
    SampleError,
    UnknownNameError,
)
from neuronlens.neurons import NeuronId
from neuronlens.running import COUNTED, FIXED_POINT, Incoming, Layout, SiteStatistics, reduce
from neuronlens.tokens import Role


@pytest.fixture
def copied(atlas, tmp_path) -> nl.Atlas:
    """An atlas that may be broken."""
    return nl.Atlas.open(shutil.copytree(atlas.path, tmp_path / "copied"))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> list[nl.Sample]:
    """Scenes as files."""
    return nl.read_samples(testbed.write(tmp_path_factory.mktemp("scenes"), 4, seed=11))


@pytest.fixture
def movable(vlm, tmp_path) -> nl.Atlas:
    """An atlas of files that may be broken."""
    samples = nl.read_samples(testbed.write(tmp_path / "scenes", 3, seed=12))
    return nl.scan(vlm, samples, out=tmp_path / "atlas", sites="vision.0", n=3)


@pytest.fixture(scope="module")
def small(vlm, scenes, tmp_path_factory) -> nl.Atlas:
    """Three sites, and fewer samples than a list has room for."""
    out = tmp_path_factory.mktemp("small") / "atlas"
    return nl.scan(vlm, scenes[:3], out=out, sites=["vision.0", "language.0", "language.1"], n=4)


@pytest.fixture
def routed(tmp_path) -> nl.Atlas:
    """A block of three experts of two neurons each, the last of which never ran; a dense one."""
    tokens, nan = token_map("vvvvrrp"), math.nan
    experts = torch.tensor([0, 0, 0, 1, 1, -1, 0])[:, None]
    first = torch.tensor([1.0, -1.0, 2.0, 5.0, -3.0, nan, 4.0])
    values = torch.stack([first, first * 2], 1)[:, None]
    layout = Layout.of(tokens, 1, (Role.RESPONSE,), torch.device("cpu"))
    made = {}
    for name, activation, count in (
        ("language.0", Routed(values, experts, 3), 3),
        ("language.1", values[:, 0].nan_to_num(7.0), 0),
    ):
        one = SiteStatistics(2 * max(1, count), 2, 2, 1, torch.float32, count)
        one.update(
            reduce(activation, layout, 2, 1), Incoming([0], ["s0"], [""], torch.tensor([True]))
        )
        made[name] = one
    picture = Image.new("RGB", (1, 1))
    with new_folder(tmp_path / "routed") as working:
        atlases.write(
            working,
            model=atlases.ModelInfo(name="made", model_type="x", fingerprint="f", dtype="float32"),
            choices=atlases.Choices(
                n=2,
                keep_visual=2,
                keep_text=1,
                text_roles=(Role.RESPONSE,),
                template=True,
                batch_size=1,
                window=1,
            ),
            sites=[handmade.site("language.0", 2, experts=3), handmade.site("language.1", 2)],
            statistics=made,
            samples=[atlases.SampleRecord.of(nl.Sample("s0", (picture,), "asked", "said"), 0)],
            skipped=[],
            versions={},
            positions=1,
        )
    return nl.Atlas.open(tmp_path / "routed")


# Opening.


def test_an_atlas_opens_as_the_scan_left_it(atlas):
    opened = nl.Atlas.open(str(atlas.path))
    assert opened.manifest == atlas.manifest
    opened.verify()


@pytest.mark.parametrize("name", ["samples.jsonl", "sites/language.1.safetensors"])
@pytest.mark.parametrize("how", ["missing", "truncated", "longer"])
def test_a_file_that_is_missing_or_has_another_size_is_named(copied, name, how):
    path = copied.path / name
    if how == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if how == "truncated" else data + b" ")
    said = "is missing" if how == "missing" else r"is \d+ bytes long"
    with pytest.raises(AtlasError, match=rf"{name} {said}.* Copy it again, or scan again"):
        nl.Atlas.open(copied.path)


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "a file"])
def test_what_is_no_atlas_is_refused(tmp_path, kind):
    path = tmp_path / "atlas"
    if kind == "an empty folder":
        path.mkdir()
    elif kind == "a file":
        path.write_text("{}")
    with pytest.raises(AtlasError, match=r"is no atlas: it has no manifest.json.*scan again"):
        nl.Atlas.open(path)


def test_an_atlas_in_a_newer_format_is_refused(copied):
    path = copied.path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": FORMAT + 1, "new": "field"}))
    with pytest.raises(AtlasError, match=rf"has format {FORMAT + 1}; .* up to {FORMAT}. Update it"):
        nl.Atlas.open(copied.path)


def test_an_atlas_of_an_earlier_format_is_refused(copied):
    path = copied.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(AtlasError, match=rf"has format 1.* reads {FORMAT}. Scan again"):
        nl.Atlas.open(copied.path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"3", b"{}", b'{"format": 3}', b"\xff\xfe\x00"], ids=str
)
def test_a_broken_manifest_is_refused(copied, text):
    (copied.path / "manifest.json").write_bytes(text)
    with pytest.raises(AtlasError, match=r"manifest.json cannot be read"):
        nl.Atlas.open(copied.path)


@pytest.mark.parametrize("name", ["samples.jsonl", "sites/vision.0.safetensors"])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["first byte", "middle byte", "last byte"])
def test_one_flipped_bit_is_found_by_verify_and_not_by_open(copied, name, where):
    path = copied.path / name
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    opened = nl.Atlas.open(copied.path)
    with pytest.raises(AtlasError, match=rf"{name} is not what the scan wrote"):
        opened.verify()


def test_a_site_file_that_is_no_safetensors_is_an_atlas_error(copied):
    path = copied.path / "sites/vision.0.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    opened = nl.Atlas.open(copied.path)
    with pytest.raises(AtlasError, match=r"vision.0.safetensors cannot be read"):
        opened.statistics("vision.0")
    with pytest.raises(AtlasError, match=r"vision.0.safetensors cannot be read"):
        opened.neuron(NeuronId("vision.0", 0))


def test_a_sample_table_that_is_no_json_is_an_atlas_error(copied):
    path = copied.path / "samples.jsonl"
    path.write_bytes(b"?" * path.stat().st_size)
    opened = nl.Atlas.open(copied.path)
    with pytest.raises(AtlasError, match=r"samples.jsonl"):
        opened.sample(0)


def test_an_atlas_refuses_a_model_with_other_weights(atlas, vlm, untrained_vlm):
    atlas.check(vlm)
    with pytest.raises(AtlasError, match="other weights"):
        atlas.check(untrained_vlm)


# Reading.


def test_a_neuron_is_its_rows_of_the_site(atlas):
    for site in ("vision.0", "projector.0", "language.3"):
        whole = atlas.statistics(site)
        fired = sum(whole.firing.fired.values()).sum(0)
        tokens = sum(whole.firing.tokens.values()).sum(0)
        for index in (0, 17, atlas.site(site).width - 1):
            one = atlas.neuron(NeuronId(site, index))
            present = whole.top.ids[index] >= 0
            assert torch.equal(one.positions, whole.top.ids[index][present])
            assert torch.equal(one.visual, whole.top.visual[index][present])
            assert torch.equal(one.text, whole.top.text[index][present])
            assert torch.equal(one.value, whole.top.value[index][present])
            for place, role in enumerate(COUNTED):
                assert one.maximum[role] == whole.roles.maximum[place, index].item()
                if tokens[place] == 0:
                    assert math.isnan(one.mean[role])
                    assert math.isnan(one.firing_rate[role])
                else:
                    seen = tokens[place].item()
                    mean = whole.roles.total[place, index].item() / FIXED_POINT / seen
                    assert one.mean[role] == pytest.approx(mean, rel=1e-6)
                    rate = fired[place, index].item() / seen
                    assert one.firing_rate[role] == pytest.approx(rate, rel=1e-6)


def test_a_routed_neuron_has_both_denominators(routed):
    visual, text, prompt, special = Role.VISUAL, Role.RESPONSE, Role.PROMPT, Role.SPECIAL
    one = routed.neuron(NeuronId("language.0", 0, expert=0))  # ran on three of four patches
    assert (one.maximum[visual], one.firing_rate[visual]) == (2.0, 2 / 4)
    assert (one.routed_share[visual], one.mean[visual]) == (3 / 4, pytest.approx(2 / 3, abs=1e-15))
    assert (one.routed_share[text], one.firing_rate[text]) == (0.0, 0.0)
    assert math.isnan(one.mean[text])
    assert one.maximum[text] == -math.inf
    assert (one.routed_share[prompt], one.mean[prompt], one.maximum[prompt]) == (1.0, 4.0, 4.0)
    assert math.isnan(one.routed_share[special])
    assert one.visual.tolist() == [[2.0, 1.0]]
    assert one.text.tolist() == [[-math.inf]]

    other = routed.neuron(NeuronId("language.0", 1, expert=1))
    assert (other.maximum[visual], other.maximum[text]) == (10.0, -6.0)
    assert (other.routed_share[visual], other.routed_share[text]) == (1 / 4, 1 / 2)
    assert (other.firing_rate[visual], other.firing_rate[text]) == (1 / 4, 0.0)
    assert (other.mean[visual], other.mean[text]) == (10.0, -6.0)
    assert other.value.tolist() == [10.0]

    never = routed.neuron(NeuronId("language.0", 0, expert=2))
    assert (len(never.positions), len(never.value)) == (0, 0)
    assert (never.routed_share[visual], never.firing_rate[visual]) == (0.0, 0.0)
    assert math.isnan(never.mean[visual])
    assert "best none" in repr(never)

    dense = routed.neuron(NeuronId("language.1", 0))
    assert [dense.routed_share[role] for role in (prompt, text, visual)] == [1.0] * 3
    assert dense.mean[text] == 2.0


def test_means_are_over_the_tokens_of_the_roles_that_ran(atlas, routed):
    # Values 1 -1 2 5 | -3 unrouted | 4, on visual, response and prompt tokens, at experts 0 0 0 1.
    first, other, never = (NeuronId("language.0", 0, expert=e) for e in range(3))
    assert routed.means([first, other, never], [Role.VISUAL]) == {
        first: pytest.approx(2 / 3),
        other: 5.0,
        never: pytest.approx(math.nan, nan_ok=True),
    }
    assert routed.means(first)[first] == pytest.approx((1 - 1 + 2 + 4) / 4)
    assert routed.means(other, [Role.VISUAL, Role.RESPONSE])[other] == pytest.approx((5 - 3) / 2)
    dense = NeuronId("language.1", 0)
    assert routed.means("language.1", [Role.RESPONSE])[dense] == 2.0
    # Of a scan: the roles' means, weighted by their tokens.
    chosen = NeuronId("language.2", 11)
    one, tokens = atlas.neuron(chosen), sum(atlas.statistics("language.2").firing.tokens.values())
    seen = {role: int(tokens[:, place].sum()) for place, role in enumerate(COUNTED)}
    some = (Role.VISUAL, Role.PROMPT)
    expected = sum(one.mean[role] * seen[role] for role in some) / sum(seen[r] for r in some)
    assert atlas.means("language.2/11", some)[chosen] == pytest.approx(expected, rel=1e-9)
    assert len(atlas.means("vision")) == 3 * 256
    with pytest.raises(UnknownNameError, match=r"counted role .*VISUAL"):
        atlas.means(chosen, [Role.PAD])


def test_a_neuron_of_a_routed_block_needs_its_expert(routed):
    with pytest.raises(UnknownNameError, match=r"expert in language.0 .*0 to 2"):
        routed.neuron(NeuronId("language.0", 0))
    with pytest.raises(UnknownNameError, match=r"expert in language.1 '0'.*dense"):
        routed.neuron(NeuronId("language.1", 0, expert=0))


def test_an_atlas_knows_how_its_scan_went(atlas, copied):
    (run,) = atlas.runs
    assert (run.samples, run.device, run.workers) == (24, "cpu", 0)
    assert run.shard == Shard(index=0, count=1)
    assert run.seconds > 0
    assert 0 <= run.waited <= run.seconds
    # It is no part of the result: without it nothing is missing.
    assert not any("runs" in name for name in atlas.manifest.files)
    (copied.path / "runs.jsonl").unlink()
    left = nl.Atlas.open(copied.path)
    left.verify()
    assert left.runs == []
    assert "24 samples" in left._repr_html_()


def test_top_samples_are_in_falling_order_without_repetition(atlas):
    one = atlas.neuron(NeuronId("language.1", 5))
    assert len(one.positions) == 20
    assert len(set(one.positions.tolist())) == 20
    assert one.value.tolist() == sorted(one.value.tolist(), reverse=True)
    for kept in (one.visual, one.text):
        assert (kept[:, :-1] >= kept[:, 1:]).all()


def test_a_neurons_maximum_is_over_eligible_roles_only(tmp_path):
    made = statistics([{0: ([1.0], [2.0])}])
    made.roles.maximum[COUNTED.index(Role.PROMPT)] = 9.0
    made.roles.maximum[COUNTED.index(Role.SPECIAL)] = 8.0
    neuron = NeuronId("language.0", 0)
    assert open_atlas(tmp_path / "r", {"language.0": made}).maximum(neuron) == 2.0
    both = (Role.PROMPT, Role.RESPONSE)
    assert open_atlas(tmp_path / "pr", {"language.0": made}, text_roles=both).maximum(neuron) == 9.0


def test_what_was_not_scanned_is_refused_with_what_was(atlas):
    with pytest.raises(UnknownNameError, match=r"No site in this atlas 'language.7'.*language.0"):
        atlas.statistics("language.7")
    with pytest.raises(UnknownNameError, match=r"neuron in language.0 '384'"):
        atlas.neuron(NeuronId("language.0", 384))


def test_an_atlas_shows_itself_with_hostile_names_escaped(atlas, tmp_path):
    assert "24" in atlas._repr_html_()
    hostile = "<script>alert(1)</script>"
    one = {"language.0": statistics([{0: ([1.0], [])}])}
    made = open_atlas(tmp_path / "a", one, domain=hostile)
    assert "<script>" not in made._repr_html_()
    assert "&lt;script&gt;" in made._repr_html_()


# Tables.


def rows_of(table) -> list[dict]:
    return table.to_pylist() if hasattr(table, "to_pylist") else table.to_dict("records")


def named(atlas: nl.Atlas, neuron: NeuronId) -> dict:
    its = atlas.site(neuron.site)
    name = {"site": its.name, "module": its.module, "layer": its.layer}
    if any(each.experts for each in atlas.sites.values()):
        name["expert"] = -1 if neuron.expert is None else neuron.expert
    return name | {"index": neuron.index}


def present(values: Iterable[float]) -> list[float]:
    """As a table says it: NaN for -inf, which stands for nothing at all."""
    return [math.nan if value == -math.inf else value for value in values]


def of_neuron(atlas: nl.Atlas, neuron: NeuronId) -> dict:
    one = atlas.neuron(neuron)
    row = named(atlas, neuron) | {"samples": len(one.positions)}
    (row["maximum"],) = present([max(one.maximum[role] for role in atlas.eligible)])
    for role in COUNTED:
        (row[f"maximum_{role.name.lower()}"],) = present([one.maximum[role]])
        row[f"mean_{role.name.lower()}"] = one.mean[role]
        row[f"firing_rate_{role.name.lower()}"] = one.firing_rate[role]
        if "expert" in row:
            row[f"routed_share_{role.name.lower()}"] = one.routed_share[role]
    return row


def of_samples(atlas: nl.Atlas, neuron: NeuronId) -> list[dict]:
    one, rows = atlas.neuron(neuron), []
    for rank, position in enumerate(one.positions.tolist()):
        row = named(atlas, neuron) | {"rank": rank + 1, "position": position}
        row |= {"sample": atlas.samples[position].id, "value": one.value[rank].item()}
        for side, kept in (("visual", one.visual), ("text", one.text)):
            for place, value in enumerate(present(kept[rank].tolist()), 1):
                row[f"{side}_{place}"] = value
        rows.append(row)
    return rows


def assert_rows(table, expected: list[dict]) -> None:
    found = rows_of(table)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for name in one:
            assert one[name] == other[name] or (
                one[name] != one[name] and other[name] != other[name]
            )


def every(atlas: nl.Atlas, *names: str) -> list[NeuronId]:
    return [NeuronId(name, index) for name in names for index in range(atlas.site(name).width)]


MANY = [NeuronId("language.1", 5 * i % 384) for i in range(100)]

SELECTIONS = {
    "everything": lambda a: (None, every(a, *a.sites)),
    "a module": lambda a: ("language", every(a, "language.0", "language.1")),
    "the name of a site": lambda a: ("vision.0", every(a, "vision.0")),
    "a site": lambda a: (a.site("language.1"), every(a, "language.1")),
    "a neuron": lambda a: (NeuronId("vision.0", 3), [NeuronId("vision.0", 3)]),
    "how one is written": lambda a: ("language.1/383", [NeuronId("language.1", 383)]),
    "several": lambda a: (
        ["language.1/3", NeuronId("vision.0", 5), "language.1/0"],
        [NeuronId("vision.0", 5), NeuronId("language.1", 3), NeuronId("language.1", 0)],
    ),
    "one of them twice": lambda a: (["vision.0/1", "vision.0/1"], [NeuronId("vision.0", 1)]),
    "a neuron before and after its site": lambda a: (
        ["language.0/9", "language.0", NeuronId("language.0", 2), "vision.0/0"],
        [NeuronId("vision.0", 0), *every(a, "language.0")],
    ),
    "a generator": lambda a: (
        (f"vision.0/{i}" for i in (2, 1)),
        [NeuronId("vision.0", 2), NeuronId("vision.0", 1)],
    ),
    "many neurons": lambda a: (MANY, MANY),
    "few neurons": lambda a: (MANY[:64], MANY[:64]),
    "none": lambda a: ([], []),
}


@pytest.mark.parametrize("library", ["pandas", "pyarrow"])
@pytest.mark.parametrize("which", SELECTIONS)
def test_a_table_has_the_numbers_of_each_selected_neuron(small, which, library):
    selection, neurons = SELECTIONS[which](small)
    table = small.table(selection, library=library)
    assert type(table).__module__.partition(".")[0] == library
    assert_rows(table, [of_neuron(small, neuron) for neuron in neurons])


@pytest.mark.parametrize("library", ["pandas", "pyarrow"])
@pytest.mark.parametrize("which", [each for each in SELECTIONS if each != "everything"])
def test_a_table_of_samples_has_each_ones_kept_activations(small, which, library):
    selection, neurons = SELECTIONS[which](small)
    expected = [row for neuron in neurons for row in of_samples(small, neuron)]
    assert len(expected) == 3 * len(neurons)
    assert_rows(small.table(selection, per="sample", library=library), expected)


@pytest.mark.parametrize("per", ["neuron", "sample"])
def test_a_table_of_nothing_has_the_columns_of_one(small, per):
    for library in ("pandas", "pyarrow"):
        whole, none = (small.table(some, per=per, library=library) for some in ("vision.0", []))
        names = [
            list(table.columns if library == "pandas" else table.column_names)
            for table in (whole, none)
        ]
        assert names[0] == names[1]
        assert len(none) == 0


@pytest.mark.parametrize("library", ["pandas", "pyarrow"])
def test_a_table_of_routed_blocks_has_experts_and_what_was_sent_to_them(routed, library):
    neurons = [
        *[NeuronId("language.0", i, expert=e) for e in range(3) for i in range(2)],
        *[NeuronId("language.1", i) for i in range(2)],
    ]
    expected = [of_neuron(routed, neuron) for neuron in neurons]
    assert_rows(routed.table(library=library), expected)
    assert_rows(routed.table(["language.0/e1/1", neurons[7]], library=library), expected[3::4])
    samples = [row for neuron in neurons for row in of_samples(routed, neuron)]
    assert len(samples) == 6  # the last expert has none
    assert_rows(routed.table(per="sample", library=library), samples)


def test_a_table_of_the_dense_blocks_of_a_routed_atlas_has_no_experts(routed):
    columns = set(routed.table("language.1").columns)
    assert not {name for name in columns if name == "expert" or "routed" in name}
    assert columns | {"expert"} < set(routed.table().columns)


def test_a_table_says_nan_for_what_never_occurred_and_sums_in_double_precision(tmp_path):
    made = statistics([{0: ([1.0], [])}, {}], dtype=torch.bfloat16)
    place = COUNTED.index(Role.VISUAL)
    made.roles.total[place, 0] = 2**40 + 1
    made.firing.tokens[""][0, place] = 3
    made.firing.fired[""][0, place] = torch.tensor([2, 1])
    atlas = open_atlas(tmp_path / "a", {"language.0": made})
    one, other = rows_of(atlas.table())
    assert (one["mean_visual"], one["firing_rate_visual"]) == ((2**40 + 1) / FIXED_POINT / 3, 2 / 3)
    assert (one["maximum"], one["maximum_visual"], one["samples"]) == (1.0, 1.0, 1)
    assert (other["mean_visual"], other["samples"]) == (0.0, 0)
    assert all(math.isnan(row["maximum_response"]) for row in (one, other))
    assert math.isnan(other["maximum"])
    assert math.isnan(one["mean_response"])
    (row,) = rows_of(atlas.table(per="sample"))
    assert (row["visual_1"], row["value"]) == (1.0, 1.0)
    assert math.isnan(row["visual_2"])
    assert math.isnan(row["text_1"])


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ("qformer", r"site in this atlas 'qformer'.*language.0"),
        ("language.9", r"site in this atlas 'language.9'.*language.0"),
        (["vision.0", NeuronId("language.9", 0)], r"site in this atlas 'language.9'"),
        ("language.0/384", r"neuron in language.0 '384'.*0 to 383"),
        (["language.0", "language.0/384"], r"neuron in language.0 '384'"),
        ("language.0/e1/3", r"expert in language.0 '1'.*dense"),
    ],
    ids=str,
)
@pytest.mark.parametrize("per", ["neuron", "sample"])
def test_a_table_of_what_was_not_scanned_is_refused(small, selection, said, per):
    with pytest.raises(UnknownNameError, match=said):
        small.table(selection, per=per)


def test_a_text_that_names_no_neuron_is_refused(small):
    with pytest.raises(ValueError, match=r"'language.0/x' names no neuron. Write 'site/index'"):
        small.table("language.0/x")


def test_an_unknown_kind_of_table_is_refused_with_the_known_ones(small):
    with pytest.raises(UnknownNameError, match=r"library of tables 'polars'.*pandas.*pyarrow"):
        small.table(library="polars")
    with pytest.raises(ValueError, match=r"No table per 'layer'.*'neuron' or 'sample'"):
        small.table(per="layer")


@pytest.mark.parametrize("library", ["pandas", "pyarrow"])
@pytest.mark.parametrize("per", ["neuron", "sample"])
def test_a_table_without_its_library_says_which_extra_brings_it(small, monkeypatch, library, per):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"'{library}'.*pip install '\.\[table\]'"):
        small.table("vision.0", per=per, library=library)


# Finding samples again.


def test_a_sample_is_found_again_through_its_files(vlm, written, tmp_path):
    atlas = nl.scan(vlm, written, out=tmp_path / "a", sites="vision.0")
    for position, sample in enumerate(written):
        found = nl.Atlas.open(atlas.path).sample(position)
        for name in ("id", "images", "prompt", "response", "domain"):
            assert getattr(found, name) == getattr(sample, name)
        assert len(found.annotations) == len(sample.annotations)
        before = {each.number: each for each in sample.annotations}
        for each in found.annotations:
            assert each.names == before[each.number].names
            assert np.array_equal(each.mask(), before[each.number].mask())
            assert each.image == 0


def test_a_changed_image_is_refused(movable):
    path = movable.sample(1).images[0]
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(SampleError, match=r"changed image.*00001.png differs since the scan"):
        movable.sample(1)
    movable.sample(0)


def test_a_missing_image_is_refused(movable):
    movable.sample(2).images[0].unlink()
    with pytest.raises(SampleError, match=r"missing image.*00002.png is gone since the scan"):
        movable.sample(2)


def test_a_sample_from_memory_must_be_passed_again_and_then_works(vlm, atlas, scenes):
    with pytest.raises(AtlasError, match=r"from memory.*Pass the same samples: samples=\.\.\."):
        atlas.sample(0)
    neuron = NeuronId("language.0", 0)
    with pytest.raises(AtlasError, match=r"samples=\.\.\."):
        nl.exemplars(vlm, atlas, [neuron])
    found = nl.exemplars(vlm, atlas, [neuron], samples=scenes)
    assert found[neuron].explain[0].sample is scenes[found[neuron].explain[0].position]


def test_a_sample_with_masks_from_memory_must_be_passed_again(vlm, written, scenes, tmp_path):
    sample = nl.Sample("x", written[0].images, "p", "r", annotations=scenes[0].annotations)
    atlas = nl.scan(vlm, [sample], out=tmp_path / "a", sites="vision.0")
    with pytest.raises(AtlasError, match="from memory"):
        atlas.sample(0)


def test_a_sample_that_was_skipped_is_refused_by_name(vlm, scenes, tmp_path):
    with pytest.warns(UserWarning, match="1 no image"):
        atlas = nl.scan(
            vlm, [scenes[0], nl.Sample("bare", (), "p", "r")], out=tmp_path / "a", sites="vision.0"
        )
    with pytest.raises(NeuronLensError):
        atlas.sample(1)


def test_the_fingerprint_of_the_data_does_not_depend_on_where_it_lies(vlm, tmp_path):
    data = []
    for name, seed in (("one", 1), ("other", 1), ("third", 2)):
        samples = nl.read_samples(testbed.write(tmp_path / name, 2, seed=seed))
        atlas = nl.scan(vlm, samples, out=tmp_path / f"{name} atlas", sites="vision.0")
        data.append(atlas.manifest.data)
    assert data[0] == data[1] != data[2]


# Folders.


def test_a_new_folder_appears_only_when_the_block_ended_well(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert out.stat().st_mode & 0o755 == 0o755  # not for its owner alone
    assert [each.name for each in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_ended_badly_leaves_nothing(tmp_path, error):
    def work():
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        work()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_there_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def work():
        with new_folder(out) as folder:
            (folder / "file").write_text("late")
            out.mkdir()
            (out / "file").write_text("first")

    with pytest.raises(OSError, match="out"):
        work()
    assert (out / "file").read_text() == "first"


def test_a_folder_under_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OutputError, match="cannot be written"), new_folder(out):
            raise AssertionError("the block must not run")


def test_what_is_finished_is_kept_where_its_place_was_taken_meanwhile(tmp_path):
    def overtaken():
        with new_folder(tmp_path / "a") as work:
            (work / "done").write_text("x")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "other").write_text("y")

    with pytest.raises(OutputError, match="lies in") as raised:
        overtaken()
    (kept,) = tmp_path.glob(".a-*")
    assert str(kept) in str(raised.value)
    assert (kept / "done").read_text() == "x"
    assert (tmp_path / "a" / "other").read_text() == "y"

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import neuronlens as nl
from neuronlens.atlas import Choices
from neuronlens.errors import (
    AdapterError,
    DataError,
    OutputError,
    SkippedError,
    UnknownNameError,
)
from neuronlens.running import ABSENT, COUNTED, FIXED_POINT, block_of
from neuronlens.samples import encode
from neuronlens.scan import batch_plan
from neuronlens.scan.feed import Encoded, Encoder
from neuronlens.scan.plan import Planned
from neuronlens.scan.state import ScanState
from neuronlens.tokens import Role

LANGUAGE = ("language.0", "language.3")


# What the tests compare.


def records(atlas: nl.Atlas, site: str) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By sample, its largest visual and text activations on every neuron (n >= samples)."""
    top = atlas.statistics(site).top
    found = {}
    for position in atlas.samples:
        neuron, rank = (top.ids == position).nonzero(as_tuple=True)
        assert neuron.tolist() == list(range(len(top.ids)))
        found[position] = top.visual[neuron, rank], top.text[neuron, rank]
    return found


def files(atlas: nl.Atlas) -> dict[str, bytes]:
    names = [name for name in atlas.manifest.files if name.startswith("sites/")]
    assert names
    return {name: (atlas.path / name).read_bytes() for name in names}


def nothing_at(out) -> bool:
    """No atlas, and no working folder left beside where it should be."""
    return not out.exists() and not list(out.parent.iterdir())


def only_unfinished_work_at(out) -> bool:
    """No atlas, and beside where it should be nothing but what the scan can go on with."""
    return [each.name for each in out.parent.iterdir()] == [f".{out.name}.scan"]


@contextmanager
def changing(adapter: nl.ModelAdapter, site: str, call: int, change):
    """Replace one site's output in one of the coming forwards; before any recorder sees it."""
    forwards = count()

    def hook(_module, _args, out):
        return change(out.clone()) if next(forwards) == call else None

    handle = adapter.model.get_submodule(adapter.site(site).path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def hooks(adapter: nl.ModelAdapter) -> dict[str, list]:
    """What is attached to each module; transformers has hooks of its own."""
    return {
        name: [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for name, module in adapter.model.named_modules()
    }


def halt(_out):
    raise ArithmeticError("the power went off")


def place_of(samples, batch_size: int, window: int, id: str) -> tuple[int, int]:
    """Number of its batch, and of its row within it."""
    for number, batch in enumerate(batch_plan(samples, batch_size, window)):
        for row, (_, sample) in enumerate(batch):
            if sample.id == id:
                return number, row
    raise LookupError(id)


# The plan.


def texts(lengths) -> list[nl.Sample]:
    return [nl.Sample(str(i), (), "x" * length) for i, length in enumerate(lengths)]


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=40),
    batch_size=st.integers(1, 9),
    window=st.integers(1, 20),
)
def test_a_plan_deals_every_sample_once_and_never_crosses_a_window(lengths, batch_size, window):
    samples = texts(lengths)
    plan = list(batch_plan(samples, batch_size, window))
    dealt = [position for batch in plan for position, _ in batch]
    assert sorted(dealt) == list(range(len(samples)))
    for batch in plan:
        assert 1 <= len(batch) <= batch_size
        assert len({position // window for position, _ in batch}) == 1
        assert all(sample is samples[position] for position, sample in batch)
    for start in range(0, len(samples), window):
        inside = dealt[start : start + window]
        assert inside == sorted(inside, key=lambda position: (lengths[position], position))


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 6), max_size=40), window=st.integers(1, 20))
def test_a_plan_is_a_pure_function_of_its_arguments(lengths, window):
    samples = texts(lengths)
    once = list(batch_plan(samples, 4, window))
    assert list(batch_plan(samples, 4, window)) == once
    assert list(batch_plan(iter(samples), 4, window)) == once


# What is found.


@pytest.mark.parametrize("site", ["vision.1", "projector.0", "language.2"])
@pytest.mark.parametrize("text_roles", [("response",), ("prompt",), ("prompt", "response")])
def test_a_scan_is_what_brute_force_over_all_activations_finds(
    vlm, scenes, tmp_path, site, text_roles
):
    samples, n = scenes[:7], 4
    atlas = nl.scan(
        vlm,
        samples,
        out=tmp_path / "a",
        sites=site,
        n=n,
        batch_size=3,
        window=4,
        text_roles=text_roles,
    )
    roles = [Role[each.upper()] for each in text_roles]
    seen = {}
    for batch in batch_plan(samples, 3, 4):
        encoded = encode(vlm, [sample for _, sample in batch])
        kept = []
        handle = vlm.model.get_submodule(vlm.site(site).path).register_forward_hook(
            lambda _module, _args, out, kept=kept: kept.append(out.detach().clone())
        )
        with torch.inference_mode():
            vlm.model(**encoded.inputs, use_cache=False)
        handle.remove()
        tokens = encoded.tokens[vlm.site(site).stream]
        flat = kept[0].reshape(-1, kept[0].shape[-1])
        for row, (position, _) in enumerate(batch):
            at = tokens.where(row)
            seen[position] = flat[at], tokens.role.flatten()[at]

    found = atlas.statistics(site)
    low = -math.inf
    for neuron in range(0, vlm.site(site).width, 7):
        column = {p: values[:, neuron].tolist() for p, (values, _) in seen.items()}
        of = {
            (p, role): [v for v, r in zip(column[p], seen[p][1].tolist(), strict=True) if r == role]
            for p in seen
            for role in COUNTED
        }
        ranked = []
        for p in seen:
            visual = sorted(of[p, Role.VISUAL], reverse=True)
            text = sorted((v for role in roles for v in of[p, role]), reverse=True)
            if visual or text:
                ranked.append((-max([*visual, *text]), p, visual + [low] * 5, text + [low] * 3))
        ranked = sorted(ranked)[:n]
        assert found.top.ids[neuron].tolist() == [p for _, p, _, _ in ranked]
        assert found.top.visual[neuron].tolist() == [visual[:5] for _, _, visual, _ in ranked]
        assert found.top.text[neuron].tolist() == [text[:3] for _, _, _, text in ranked]
        for place, role in enumerate(COUNTED):
            values = [v for p in seen for v in of[p, role]]
            fired = sum(each[:, place, neuron].sum() for each in found.firing.fired.values())
            assert found.roles.maximum[place, neuron].item() == max(values, default=low)
            assert fired == sum(v > 0 for v in values)
            total = found.roles.total[place, neuron].item() / FIXED_POINT
            assert total == pytest.approx(math.fsum(values), abs=len(seen) / FIXED_POINT)
            for domain, counts in found.firing.tokens.items():
                for block in range(16):
                    expected = sum(
                        len(of[p, role])
                        for p in seen
                        if (samples[p].domain, block_of(samples[p].unit())) == (domain, block)
                    )
                    assert counts[block, place].item() == expected


def test_the_same_plan_twice_gives_the_same_atlas_bit_for_bit(vlm, scenes, tmp_path):
    one, other = (
        nl.scan(vlm, samples, out=tmp_path / name, n=5, batch_size=4)
        for name, samples in (("list", scenes[:9]), ("generator", iter(scenes[:9])))
    )
    assert files(one) == files(other)
    assert one.manifest == other.manifest


def test_another_batch_size_changes_no_more_than_rounding(vlm, scenes, tmp_path):
    # Equality across batch sizes is not promised, since other kernels round otherwise.
    one, other = (
        nl.scan(vlm, scenes[:6], out=tmp_path / str(size), sites=LANGUAGE, n=6, batch_size=size)
        for size in (1, 6)
    )
    for site in LANGUAGE:
        before, after = records(one, site), records(other, site)
        for position in before:
            torch.testing.assert_close(before[position], after[position], rtol=1e-4, atol=1e-5)
        assert_same_tokens(one, other, site)


def assert_same_tokens(one: nl.Atlas, other: nl.Atlas, site: str) -> None:
    left, right = one.statistics(site).firing.tokens, other.statistics(site).firing.tokens
    assert left.keys() == right.keys()
    for domain in left:
        assert torch.equal(left[domain], right[domain])


@pytest.fixture
def padding_side(vlm):
    tokenizer = vlm.processor.tokenizer
    before = tokenizer.padding_side
    yield lambda side: setattr(tokenizer, "padding_side", side)
    tokenizer.padding_side = before


def test_padding_is_in_no_statistic(vlm, scenes, tmp_path, padding_side):
    samples = [
        replace(scene, response=" ".join(scene.response.split()[: 3 + 7 * i]))
        for i, scene in enumerate(scenes[:5])
    ]
    atlases = []
    for side in ("right", "left"):
        padding_side(side)
        widths = encode(vlm, samples).inputs["attention_mask"].sum(1)
        assert len(set(widths.tolist())) > 1
        atlases.append(nl.scan(vlm, samples, out=tmp_path / side, n=5, batch_size=5))
    right, left = atlases
    for site in vlm.sites:
        assert_same_tokens(right, left, site)
        one, other = right.statistics(site), left.statistics(site)
        torch.testing.assert_close(one.roles.maximum, other.roles.maximum, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.top.value, other.top.value, rtol=0, atol=1e-5)
        clear = (one.top.value[:, :-1] - one.top.value[:, 1:] > 1e-4).all(1)
        assert clear.float().mean() > 0.5
        assert torch.equal(one.top.ids[clear], other.top.ids[clear])
        tokens = sum(counts.sum(0) for counts in one.firing.tokens.values())
        apart = (one.roles.total - other.roles.total).abs() / FIXED_POINT
        assert (apart <= 1e-5 * tokens[:, None]).all()


def test_padding_that_is_not_finite_skips_nobody(vlm, scenes, tmp_path):
    samples = [scenes[0], replace(scenes[1], response="the image")]
    clean = nl.scan(vlm, samples, out=tmp_path / "clean", sites="language.3", batch_size=2)
    length = int(encode(vlm, samples[1:]).inputs["attention_mask"].sum())
    _, row = place_of(samples, 2, 32, samples[1].id)

    def spoil(out):
        out[row, length:] = math.nan
        return out

    with changing(vlm, "language.3", 0, spoil):
        spoilt = nl.scan(vlm, samples, out=tmp_path / "spoilt", sites="language.3", batch_size=2)
    assert files(clean) == files(spoilt)


def test_the_manifest_says_what_was_scanned_and_how(vlm, scenes, tmp_path):
    atlas = nl.scan(
        vlm,
        scenes[:3],
        out=tmp_path / "a",
        sites=["language.1", "vision"],
        n=2,
        keep_visual=6,
        keep_text=4,
        text_roles=("response", "prompt"),
        batch_size=2,
    )
    assert list(atlas.sites) == ["vision.0", "vision.1", "vision.2", "language.1"]
    choices = atlas.choices
    assert (choices.n, choices.keep_visual, choices.keep_text) == (2, 6, 4)
    assert choices.text_roles == (Role.PROMPT, Role.RESPONSE)
    assert (choices.batch_size, choices.window, choices.template) == (2, 32, True)
    manifest = atlas.manifest
    assert (manifest.samples, manifest.skipped) == (3, ())
    assert manifest.domains == tuple(sorted({scene.domain for scene in scenes[:3]}))
    assert manifest.model.fingerprint == vlm.fingerprint()
    assert {"torch", "transformers", "neuronlens-vlm"} <= set(manifest.versions)
    assert atlas.statistics("vision.0").top.visual.shape == (256, 2, 6)


def test_fewer_samples_than_n_leave_the_last_ranks_empty(vlm, scenes, tmp_path):
    atlas = nl.scan(vlm, scenes[:2], out=tmp_path / "a", sites="language.0", n=3)
    top = atlas.statistics("language.0").top
    assert (top.ids[:, :2] >= 0).all()
    assert (top.ids[:, 2] == ABSENT).all()


# Samples that cannot be used.


def no_image(sample, folder):
    return replace(sample, images=())


def missing_image(sample, folder):
    return replace(sample, images=(folder / "gone.png",))


def corrupt_image(sample, folder):
    (folder / "text.png").write_text("not a picture")
    return replace(sample, images=(folder / "text.png",))


def truncated_image(sample, folder):
    whole = folder / "whole.png"
    sample.images[0].save(whole)
    (folder / "cut.png").write_bytes(whole.read_bytes()[:200])
    return replace(sample, images=(folder / "cut.png",))


def no_response(sample, folder):
    return replace(sample, response=None)


def blank_response(sample, folder):
    return replace(sample, response="  \n")


def image_token(sample, folder):
    return replace(sample, prompt="<image> describe")


def too_long(sample, folder):
    return replace(sample, response="red " * 300)


BROKEN = [
    (no_image, "no image"),
    (missing_image, "missing image"),
    (corrupt_image, "corrupt image"),
    (truncated_image, "corrupt image"),
    (no_response, "no response"),
    (blank_response, "no response"),
    (image_token, "image token in text"),
    (too_long, "too long"),
]


@pytest.mark.parametrize(("spoil", "reason"), BROKEN, ids=[spoil.__name__ for spoil, _ in BROKEN])
def test_a_sample_that_cannot_be_used_is_named_and_only_it_is_missing(
    vlm, scenes, tmp_path, spoil, reason
):
    rest = scenes[:8]
    everyone = [*rest, spoil(replace(scenes[8], id="broken"), tmp_path)]
    readings = {"sites": LANGUAGE, "n": 9, "batch_size": 4, "window": 5}
    with pytest.warns(UserWarning, match=rf"1 of 9 samples were skipped: 1 {reason}"):
        found = nl.scan(vlm, everyone, out=tmp_path / "all", **readings)

    (skipped,) = found.manifest.skipped
    assert (skipped.position, skipped.id, skipped.reason) == (8, "broken", reason)
    assert "broken" in skipped.detail
    assert found.manifest.samples == 8
    assert sorted(found.samples) == list(range(8))
    # Only its own batch is re-formed. Here the batches are then those of the rest, so that
    # everything is equal to the bit; where the company changes, rounding may.
    batches = [
        [[p for p, sample in batch if sample.id != "broken"] for batch in batch_plan(some, 4, 5)]
        for some in (everyone, rest)
    ]
    assert batches[0] == batches[1]
    number, _ = place_of(everyone, 4, 5, "broken")
    assert len(batches[0][number]) == 3
    expected = nl.scan(vlm, rest, out=tmp_path / "rest", **readings)
    assert files(found) == files(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("site", ["vision.0", "language.0", "language.3"])
def test_a_sample_whose_activations_are_not_finite_is_named_and_only_it_is_missing(
    vlm, scenes, tmp_path, bad, site
):
    samples, lost = scenes[:6], 3
    readings = {"n": 6, "batch_size": 3}
    clean = nl.scan(vlm, samples, out=tmp_path / "clean", **readings)
    call, row = place_of(samples, 3, 48, samples[lost].id)

    def spoil(out):
        out[row, 5, 11] = bad
        return out

    with (
        changing(vlm, site, call, spoil),
        pytest.warns(UserWarning, match="1 of 6 samples were skipped: 1 non-finite activations"),
    ):
        found = nl.scan(vlm, samples, out=tmp_path / "spoilt", **readings)

    (skipped,) = found.manifest.skipped
    assert (skipped.position, skipped.id) == (lost, samples[lost].id)
    assert f"first at site {site}." in skipped.detail
    assert sorted(found.samples) == [0, 1, 2, 4, 5]
    length = int(encode(vlm, [samples[lost]]).inputs["attention_mask"].sum())
    for name in vlm.sites:
        # The others ran in the same batches: equal to the bit, on every site.
        one, other = records(found, name), records(clean, name)
        for position in one:
            assert torch.equal(one[position][0], other[position][0])
            assert torch.equal(one[position][1], other[position][1])
        after, before = (each.statistics(name) for each in (found, clean))
        theirs = samples[lost].domain, block_of(samples[lost].unit())
        gone = 0
        for domain in after.firing.tokens:
            for block in range(16):
                if (domain, block) == theirs:
                    gone = before.firing.tokens[domain] - after.firing.tokens[domain]
                else:
                    pair = [each.firing.fired[domain][block] for each in (after, before)]
                    assert torch.equal(*pair)
        seen = {"vision": 65, "projector": 64, "language": length}[vlm.site(name).stream]
        if theirs[0] in after.firing.tokens:
            assert gone.sum() == seen


def test_a_scan_stops_at_the_first_skip_beyond_max_skips(vlm, scenes, tmp_path):
    samples = [scenes[0], *(replace(each, images=()) for each in scenes[1:4])]
    with pytest.warns(UserWarning, match="3 of 4 samples were skipped: 3 no image"):
        allowed = nl.scan(vlm, samples, out=tmp_path / "a" / "atlas", sites="vision.0", max_skips=3)
    assert allowed.manifest.samples == 1
    out = tmp_path / "b" / "atlas"
    with pytest.raises(SkippedError, match="3 samples had to be skipped; max_skips is 2") as error:
        nl.scan(vlm, samples, out=out, sites="vision.0", max_skips=2)
    assert all(sample.id in str(error.value) for sample in samples[1:])
    assert only_unfinished_work_at(out)  # one sample was taken in


@pytest.mark.parametrize("samples", [[], ["a", "b"]], ids=["none given", "all skipped"])
def test_a_scan_that_could_use_no_sample_is_an_error(vlm, tmp_path, samples):
    out = tmp_path / "here" / "atlas"
    with pytest.raises(SkippedError, match=f"None of {len(samples)} samples could be used"):
        nl.scan(vlm, [nl.Sample(each, (), "p", "r") for each in samples], out=out)
    assert nothing_at(out)


@pytest.mark.parametrize("batch_size", [1, 4], ids=["in two batches", "in one batch"])
def test_two_samples_with_one_id_are_refused(vlm, scenes, tmp_path, batch_size):
    samples = [*scenes[:3], replace(scenes[3], id=scenes[0].id)]
    out = tmp_path / "here" / "atlas"
    with pytest.raises(DataError, match=f"Two samples have the id '{scenes[0].id}'"):
        nl.scan(vlm, samples, out=out, sites="vision.0", batch_size=batch_size)
    assert nothing_at(out)


# What goes wrong.


@pytest.mark.parametrize(
    ("call", "leaves"),
    [(0, nothing_at), (1, only_unfinished_work_at)],
    ids=["in the first batch", "in the second"],
)
def test_a_forward_that_raises_leaves_no_atlas_and_no_hook_but_the_batches_before_it(
    vlm, scenes, tmp_path, call, leaves
):
    out = tmp_path / "here" / "atlas"
    before = hooks(vlm)
    with changing(vlm, "language.2", call, halt), pytest.raises(ArithmeticError):
        nl.scan(vlm, scenes[:6], out=out, batch_size=3)
    assert leaves(out)
    assert hooks(vlm) == before


def test_a_finished_scan_leaves_no_hook_and_the_same_weights(vlm, scenes, tmp_path):
    before, attached = copy.deepcopy(vlm.model.state_dict()), hooks(vlm)
    nl.scan(vlm, scenes[:2], out=tmp_path / "a")
    assert hooks(vlm) == attached
    assert all(torch.equal(before[name], weight) for name, weight in vlm.model.state_dict().items())


CHOICES = Choices(
    n=6,
    keep_visual=5,
    keep_text=3,
    text_roles=(Role.RESPONSE,),
    template=True,
    batch_size=3,
    window=6,
)


def encoded(vlm, *placed) -> Encoded:
    return Encoder(vlm, CHOICES)[Planned(0, 0, "", placed, is_first=True)]


def state_of(scan: ScanState) -> dict[str, object]:
    domains = ["checked", "dotted", "plain", "striped"]
    return {
        "statistics": {
            f"{name} {key}": tensor.tolist()
            for name, site in scan.statistics.items()
            for key, tensor in site.state_dict(domains).items()
        },
        "samples": [each.position for each in scan.records],
        "skipped": [each.id for each in scan.skipped],
    }


@pytest.fixture
def interrupted(vlm, scenes):
    """A scan whose second batch, of which one sample has no image, was halted half-way."""
    sites = vlm.select(LANGUAGE)
    batch = encoded(vlm, (3, scenes[3]), (4, replace(scenes[4], images=())), (5, scenes[5]))
    undisturbed, scan = (ScanState(vlm, sites, CHOICES) for _ in range(2))
    for each in (undisturbed, scan):
        each.run(encoded(vlm, *enumerate(scenes[:3])))
    before = state_of(scan)
    with changing(vlm, "language.2", 0, halt), pytest.raises(ArithmeticError):
        scan.run(batch)
    undisturbed.run(batch)
    return scan, batch, before, state_of(undisturbed)


@pytest.mark.parametrize("part", ["statistics", "samples", "skipped"])
def test_a_forward_that_raises_in_the_middle_changes_no_state(interrupted, part):
    scan, _, before, _ = interrupted
    assert state_of(scan)[part] == before[part]


def test_a_batch_can_be_run_again_after_a_forward_that_raised(interrupted):
    scan, batch, _, undisturbed = interrupted
    scan.run(batch)
    assert state_of(scan) == undisturbed


@pytest.mark.parametrize("what", ["a dropout module", "language attention", "vision attention"])
def test_a_model_in_training_mode_that_drops_out_is_refused(bed, scenes, tmp_path, what):
    model = copy.deepcopy(bed.model)
    if what == "a dropout module":
        model.model.multi_modal_projector.extra = nn.Dropout(0.1)
    elif what == "language attention":
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.5
    else:
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.dropout = 0.5
    adapter = nl.adapt(model.train(), bed.processor)
    with pytest.raises(AdapterError, match=r"training mode.*model\.eval\(\)"):
        nl.scan(adapter, scenes[:1], out=tmp_path / "a", sites="vision.0")
    model.eval()  # what the message says
    nl.scan(adapter, scenes[:1], out=tmp_path / "a", sites="vision.0")


def test_a_folder_that_cannot_be_written_is_refused_before_any_forward(vlm, scenes, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with changing(vlm, "vision.0", 0, halt), pytest.raises(OutputError, match="cannot be written"):
        nl.scan(vlm, scenes[:1], out=tmp_path / "file" / "atlas")


@pytest.mark.parametrize("kind", ["a folder with a file", "a file"])
def test_an_output_that_holds_something_is_never_overwritten(vlm, scenes, tmp_path, kind):
    out = tmp_path / "atlas"
    if kind == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with (
        changing(vlm, "vision.0", 0, halt),
        pytest.raises(OutputError, match=r"would be overwritten.*Choose another folder"),
    ):
        nl.scan(vlm, scenes[:1], out=out)
    assert (out if kind == "a file" else out / "mine").read_text() == "mine"


def test_an_empty_folder_is_filled(vlm, scenes, tmp_path):
    (tmp_path / "atlas").mkdir()
    nl.scan(vlm, scenes[:1], out=tmp_path / "atlas", sites="vision.0").verify()
    assert [each.name for each in tmp_path.iterdir()] == ["atlas"]


def test_an_unknown_text_role_is_refused_with_the_known_ones(vlm, scenes, tmp_path):
    with pytest.raises(ValueError, match=r"No text role 'answer'.*'prompt' and 'response'"):
        nl.scan(vlm, scenes[:1], out=tmp_path / "a", text_roles=("answer",))


def test_an_unknown_site_is_refused_with_near_ones(vlm, scenes, tmp_path):
    with pytest.raises(UnknownNameError, match=r"No site 'language.9'.*language.0"):
        nl.scan(vlm, scenes[:1], out=tmp_path / "a", sites="language.9")


@pytest.mark.parametrize("name", ["n", "keep_visual", "keep_text", "batch_size", "window"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(vlm, scenes, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        nl.scan(vlm, scenes[:1], out=tmp_path / "a", sites="vision.0", **{name: value})


def test_samples_without_a_response_can_be_scanned_for_their_prompt(vlm, scenes, tmp_path):
    asked = [replace(each, response=None) for each in scenes[:2]]
    atlas = nl.scan(
        vlm, asked, out=tmp_path / "a", sites="language.0", text_roles=("prompt", "response")
    )
    tokens = Counter()
    for counts in atlas.statistics("language.0").firing.tokens.values():
        tokens.update(dict(zip(COUNTED, counts.sum(0).tolist(), strict=True)))
    assert tokens[Role.RESPONSE] == 0
    assert tokens[Role.PROMPT] == 2 * len(asked[0].prompt.split())
    assert tokens[Role.VISUAL] == 2 * 64


def test_a_sample_with_two_images_counts_the_tokens_of_both(vlm, scenes, tmp_path):
    pair = (scenes[0].images[0], scenes[1].images[0])
    samples = [replace(scenes[0], images=pair), *scenes[2:4]]
    atlas = nl.scan(vlm, samples, out=tmp_path / "a", sites=["vision.0", "language.0"])
    for site, special in (("vision.0", 4), ("language.0", None)):
        tokens = sum(each.sum(0) for each in atlas.statistics(site).firing.tokens.values())
        assert tokens[COUNTED.index(Role.VISUAL)] == 4 * 64
        assert special in (None, tokens[COUNTED.index(Role.SPECIAL)])
    neuron = nl.NeuronId("vision.0", 3)
    found = nl.exemplars(vlm, atlas, [neuron], samples=samples, explain=(1, 2, 3), held_out=())
    lengths = {each.position: len(each.tokens) for each in found[neuron].explain}
    assert lengths == {0: 130, 1: 65, 2: 65}


def test_half_precision_is_scanned_as_it_is(bed, scenes, tmp_path):
    vlm = nl.adapt(copy.deepcopy(bed.model).bfloat16(), bed.processor)
    atlas = nl.scan(vlm, scenes[:5], out=tmp_path / "a", sites="language.0", n=5, batch_size=5)
    assert atlas.manifest.model.dtype == "bfloat16"
    found = atlas.statistics("language.0")
    assert found.top.visual.dtype == found.roles.maximum.dtype == torch.bfloat16
    assert (found.top.value[:, :-1] >= found.top.value[:, 1:]).all()
    # Other batches round otherwise; within the tolerance nobody is warned.
    neuron = nl.NeuronId("language.0", 3)
    nl.exemplars(vlm, atlas, [neuron], samples=scenes[:5], batch_size=2)


def test_a_model_without_its_processor_cannot_be_scanned(bed, scenes, tmp_path):
    out = tmp_path / "here" / "atlas"
    with pytest.raises(AdapterError, match=r"adapt\(model, processor\)"):
        nl.scan(nl.adapt(bed.model), scenes[:1], out=out)
    assert nothing_at(out)


def test_a_sample_that_its_processor_refuses_is_skipped_and_named(
    vlm, scenes, tmp_path, monkeypatch
):
    plain = type(vlm).process

    def process(self, texts, images, *, add_special_tokens):
        if any(image.size == (3, 64) for row in images for image in row):
            raise ZeroDivisionError("an image too thin")
        return plain(self, texts, images, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(type(vlm), "process", process)
    thin = replace(scenes[0], id="thin", images=(Image.new("RGB", (3, 64)),), annotations=())
    with pytest.warns(UserWarning, match="1 of 6 samples were skipped: 1 refused by the processor"):
        atlas = nl.scan(vlm, [*scenes[:3], thin, *scenes[3:5]], out=tmp_path / "a", batch_size=3)
    (skipped,) = atlas.manifest.skipped
    assert (skipped.id, skipped.position) == ("thin", 3)
    assert "ZeroDivisionError: an image too thin" in skipped.detail
    with pytest.raises(ZeroDivisionError):
        nl.scan(vlm, [thin], out=tmp_path / "b")


def blocks_in(atlas: nl.Atlas) -> set[int]:
    """Blocks in which there is a token."""
    counts = atlas.statistics("language.0").firing.tokens.values()
    return {int(at) for each in counts for at in each.sum(1).nonzero().flatten()}


def test_questions_about_one_image_are_in_one_block_and_so_is_a_group(vlm, scenes, tmp_path):
    (tmp_path / "images").mkdir()
    scenes[0].images[0].save(tmp_path / "images" / "scene.png")
    forms = (scenes[0].images[0], tmp_path / "images" / "scene.png")
    asked = [
        replace(scenes[0], id=f"q{number}", images=(forms[number % 2],), domain=str(number % 3))
        for number in range(12)
    ]
    atlas = nl.scan(vlm, asked, out=tmp_path / "one", sites="language.0")
    assert blocks_in(atlas) == {block_of(scenes[0].unit())}
    grouped = [replace(each, group="film 7") for each in scenes[:12]]
    atlas = nl.scan(vlm, grouped, out=tmp_path / "group", sites="language.0")
    assert blocks_in(atlas) == {block_of("group film 7")}
    alone = nl.scan(vlm, scenes[:12], out=tmp_path / "alone", sites="language.0")
    assert len(blocks_in(alone)) > 4

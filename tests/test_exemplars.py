from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import neuronlens as nl
from handmade import NEURON, exemplar, scene, site, token_map
from neuronlens.activations import Routed
from neuronlens.errors import AdapterError, AtlasError, OutputError, SampleError, UnknownNameError
from neuronlens.exemplars import (
    EXPLAIN_RANKS,
    HELD_OUT_RANKS,
    VALIDATE_RANKS,
    NeuronExemplars,
)
from neuronlens.exemplars.columns import Columns
from neuronlens.neurons import NeuronId
from neuronlens.running import COUNTED
from neuronlens.samples import encode
from neuronlens.tokens import Role

NEURONS = [
    NeuronId("language.0", 3),
    NeuronId("language.2", 17),
    NeuronId("language.2", 5),
    NeuronId("vision.1", 40),
    NeuronId("projector.0", 9),
]


@pytest.fixture(scope="module")
def found(vlm, atlas, scenes):
    return nl.exemplars(vlm, atlas, NEURONS, samples=scenes)


def positions(group) -> list[int]:
    return [each.position for each in group]


@contextmanager
def doubled(adapter, site):
    """The same weights, but twice the activations."""
    hook = adapter.model.get_submodule(adapter.site(site).path).register_forward_hook(
        lambda m, a, out: out * 2
    )
    try:
        yield
    finally:
        hook.remove()


# Which samples.


def test_exemplars_are_the_samples_at_their_ranks(found, atlas, scenes):
    assert list(found) == NEURONS
    for neuron in NEURONS:
        top = atlas.neuron(neuron).positions.tolist()
        for group, ranks in (
            (found[neuron].explain, EXPLAIN_RANKS),
            (found[neuron].held_out, HELD_OUT_RANKS),
        ):
            assert [each.rank for each in group] == list(ranks)
            assert positions(group) == [top[rank - 1] for rank in ranks]
            assert all(each.sample is scenes[each.position] for each in group)
            assert all(each.neuron == neuron for each in group)
        assert found[neuron].maximum == atlas.maximum(neuron)


def test_recorded_activations_have_the_maxima_of_the_scan(found, atlas):
    for neuron in NEURONS:
        known = atlas.neuron(neuron)
        for each in (*found[neuron].explain, *found[neuron].held_out):
            visual = np.sort(each.activation[each.visual])[::-1]
            np.testing.assert_allclose(visual[:5], known.visual[each.rank - 1], atol=1e-5)
            text = np.sort(each.activation[each.text])[::-1][:3]
            kept = known.text[each.rank - 1].numpy()
            np.testing.assert_allclose(text, kept[: len(text)], atol=1e-5)
            assert np.isneginf(kept[len(text) :]).all()


def test_recorded_activations_are_those_of_the_sample_alone(found, vlm):
    for neuron in NEURONS:
        site = vlm.site(neuron.site)
        for each in found[neuron].explain[:2]:
            batch = encode(vlm, [each.sample])
            with nl.ActivationRecorder(vlm, site) as recorder:
                vlm.model(**batch.inputs)
            alone = recorder.activations[site.name][0, :, neuron.index].detach().numpy()
            np.testing.assert_allclose(each.activation, alone, atol=1e-5)
            assert len(each.tokens) == len(alone)
            assert (each.tokens.pieces is not None) == (site.stream == "language")


@pytest.mark.parametrize("batch_size", [1, 3, 24])
def test_the_batch_size_changes_no_more_than_rounding(found, vlm, atlas, scenes, batch_size):
    again = nl.exemplars(vlm, atlas, NEURONS, samples=scenes, batch_size=batch_size)
    for neuron in NEURONS:
        for one, other in zip(found[neuron].explain, again[neuron].explain, strict=True):
            np.testing.assert_allclose(one.activation, other.activation, atol=1e-5)
            assert one.tokens.pieces == other.tokens.pieces
            assert np.array_equal(one.tokens.role, other.tokens.role)
            assert np.array_equal(one.tokens.box, other.tokens.box, equal_nan=True)


@pytest.mark.parametrize("sampling", ["top", "random"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_sample_is_both_explained_from_and_held_out(vlm, atlas, scenes, sampling, seed):
    found = nl.exemplars(vlm, atlas, NEURONS, samples=scenes, sampling=sampling, seed=seed)
    for neuron in NEURONS:
        explain, held_out = positions(found[neuron].explain), positions(found[neuron].held_out)
        assert len(explain) == len(set(explain)) == len(EXPLAIN_RANKS)
        assert not set(explain) & set(held_out)


def test_random_exemplars_follow_their_seed_and_leave_the_held_out_alone(vlm, atlas, scenes, found):
    def drawn(seed):
        return nl.exemplars(vlm, atlas, NEURONS, samples=scenes, sampling="random", seed=seed)

    one, same, other = drawn(1), drawn(1), drawn(2)
    everywhere = set()
    for neuron in NEURONS:
        assert positions(one[neuron].explain) == positions(same[neuron].explain)
        assert positions(one[neuron].held_out) == positions(found[neuron].held_out)
        assert all(each.rank is None for each in one[neuron].explain)
        everywhere |= {*positions(one[neuron].explain), *positions(other[neuron].explain)}
    assert any(positions(one[n].explain) != positions(other[n].explain) for n in NEURONS)
    assert max(everywhere) >= 20  # from the whole scan, not from one neuron's top


def test_ranks_a_neuron_does_not_have_are_left_out(vlm, scenes, tmp_path):
    atlas = nl.scan(vlm, scenes[:6], out=tmp_path / "a", sites="language.0", n=20)
    neuron = NeuronId("language.0", 3)
    one = nl.exemplars(vlm, atlas, [neuron], samples=scenes[:6])[neuron]
    assert [each.rank for each in one.explain] == [1, 5]
    assert [each.rank for each in one.held_out] == [3]


def test_a_neuron_asked_for_twice_is_recorded_once(vlm, atlas, scenes):
    found = nl.exemplars(vlm, atlas, [NEURONS[0], NEURONS[0]], samples=scenes)
    assert list(found) == [NEURONS[0]]


def test_validation_ranks_are_recorded_beside_the_others(vlm, atlas, scenes, found):
    assert not {*VALIDATE_RANKS} & {*EXPLAIN_RANKS, *HELD_OUT_RANKS}
    validated = nl.exemplars(vlm, atlas, NEURONS, samples=scenes, validate=VALIDATE_RANKS)
    for neuron in NEURONS:
        top = atlas.neuron(neuron).positions.tolist()
        one = validated[neuron]
        assert [each.rank for each in one.validate] == list(VALIDATE_RANKS)
        assert positions(one.validate) == [top[rank - 1] for rank in VALIDATE_RANKS]
        assert positions(one.explain) == positions(found[neuron].explain)
        assert positions(one.held_out) == positions(found[neuron].held_out)
        assert found[neuron].validate == found[neuron].contrast == ()


# Samples on which a neuron is quiet, and draws.


FEW = {"explain": (1, 5), "held_out": (3, 7), "validate": (2, 6)}


@pytest.fixture(scope="module")
def small(vlm, scenes, tmp_path_factory) -> nl.Atlas:
    """A scan that keeps 8 of its 24 samples for each neuron."""
    out = tmp_path_factory.mktemp("small") / "atlas"
    return nl.scan(vlm, scenes, out=out, n=8, batch_size=6)


@torch.no_grad()
def alone(adapter, neuron, sample) -> np.ndarray:
    """A neuron on one sample that is run alone, read by a hook of the test's own."""
    batch, kept = encode(adapter, [sample]), []
    module = adapter.model.get_submodule(adapter.site(neuron.site).path)
    hook = module.register_forward_hook(lambda _m, _a, out: kept.append(out[..., neuron.index]))
    try:
        adapter.model(**batch.inputs)
    finally:
        hook.remove()
    return kept[0].flatten().numpy()


def largest(each, activation: np.ndarray) -> float:
    return float(activation[each.tokens.is_role(Role.VISUAL, Role.RESPONSE).numpy()].max())


def test_contrast_exemplars_are_the_quietest_samples_outside_the_top(vlm, small, scenes):
    # Three times six is more than the sixteen samples that are no top sample: all are looked at.
    found = nl.exemplars(vlm, small, NEURONS, samples=scenes, contrast=6, **FEW)
    for neuron in NEURONS:
        group, top = found[neuron].contrast, small.neuron(neuron).positions.tolist()
        assert all(each.rank is None for each in group)
        of_all = {}
        for position in set(range(24)) - set(top):
            activation = alone(vlm, neuron, scenes[position])
            looked = nl.look(vlm, neuron, scenes[position])
            of_all[position] = largest(looked, activation)
        for each in group:
            np.testing.assert_allclose(
                each.activation, alone(vlm, neuron, scenes[each.position]), atol=1e-5
            )
        quiet = [of_all[each.position] for each in group]
        assert len(set(positions(group))) == 6
        np.testing.assert_allclose(quiet, sorted(of_all.values())[:6], atol=1e-5)


def test_contrast_exemplars_are_drawn_from_part_of_the_scan(vlm, small, scenes):
    drawn = [
        nl.exemplars(vlm, small, NEURONS, samples=scenes, contrast=2, seed=seed, **FEW)
        for seed in range(3)
    ]
    assert all(len(each[neuron].contrast) == 2 for each in drawn for neuron in NEURONS)
    for each in drawn:
        for neuron in NEURONS:
            assert not {*positions(each[neuron].contrast)} & {*small.neuron(neuron).positions}
    assert any(
        positions(drawn[0][neuron].contrast) != positions(drawn[1][neuron].contrast)
        for neuron in NEURONS
    )


def test_there_are_no_more_contrast_exemplars_than_samples_outside_the_top(vlm, atlas, scenes):
    found = nl.exemplars(vlm, atlas, NEURONS[:1], samples=scenes, contrast=9)
    assert len(found[NEURONS[0]].contrast) == 4  # 24 samples, of which 20 are top samples


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sample_drawn_at_random_has_one_use(vlm, small, scenes, seed):
    found = nl.exemplars(
        vlm,
        small,
        NEURONS,
        samples=scenes,
        sampling="random",
        contrast=4,
        seed=seed,
        explain=(1, 2, 3, 4, 5, 6, 7, 8),
        held_out=(9,),
        validate=(10,),
    )
    for neuron in NEURONS:
        one = found[neuron]
        assert (len(one.explain), len(one.held_out), len(one.contrast)) == (8, 0, 4)
    found = nl.exemplars(
        vlm,
        small,
        NEURONS,
        samples=scenes,
        sampling="random",
        contrast=4,
        seed=seed,
        explain=tuple(range(9, 19)),
        held_out=(1, 3, 5),
        validate=(2, 4, 6),
    )
    for neuron in NEURONS:
        one = found[neuron]
        groups = [positions(g) for g in (one.explain, one.held_out, one.validate, one.contrast)]
        assert [len(group) for group in groups] == [10, 3, 3, 4]
        assert len({p for group in groups for p in group}) == 20


DRAWN = {"sampling": "random", "contrast": 2} | FEW


def uses(one: NeuronExemplars) -> list[list[int]]:
    return [positions(g) for g in (one.explain, one.held_out, one.validate, one.contrast)]


def test_a_neuron_has_the_same_samples_whatever_other_neurons_there_are(vlm, small, scenes):
    together = nl.exemplars(vlm, small, NEURONS, samples=scenes, **DRAWN)
    other_way = nl.exemplars(vlm, small, NEURONS[::-1], samples=scenes, **DRAWN)
    for neuron in NEURONS:
        single = nl.exemplars(vlm, small, [neuron], samples=scenes, **DRAWN)
        assert uses(single[neuron]) == uses(together[neuron]) == uses(other_way[neuron])
    assert len({tuple(positions(together[neuron].explain)) for neuron in NEURONS}) > 1


PROGRAM = """
import sys, numpy as np, neuronlens as nl
from neuronlens.exemplars.choose import Choice, choose
atlas = nl.Atlas.open(sys.argv[1])
choice = Choice((1, 5), (3, 7), (2, 6), 2, "random", 0)
for name in sys.argv[2:]:
    chosen = choose(atlas, nl.NeuronId.parse(name), np.arange(24), choice)
    print([place.position for place in chosen.places if place.use == "explain"])
"""


def test_another_process_draws_the_same_samples(vlm, small, scenes):
    found = nl.exemplars(vlm, small, NEURONS, samples=scenes, **DRAWN)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small.path), *map(str, NEURONS)],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == [str(positions(found[n].explain)) for n in NEURONS]


# How they are recorded.


@contextmanager
def fed(adapter):
    """What each forward in the block is given, as lists of ids."""
    given: list[list[list[int]]] = []
    hook = adapter.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: given.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    try:
        yield given
    finally:
        hook.remove()


@pytest.mark.parametrize("how", [{"explain": (1,), "held_out": (2,)}, DRAWN], ids=["top", "drawn"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_what_is_still_needed_is_recorded_to_the_bit_as_in_the_whole_run(
    vlm, small, scenes, how, batch_size
):
    how = how | {"samples": scenes, "batch_size": batch_size}
    with fed(vlm) as of_all:
        whole = nl.exemplars(vlm, small, NEURONS, **how)
    for needed in ([NEURONS[3]], [NEURONS[2], NEURONS[0]], NEURONS, []):
        with fed(vlm) as given:
            part = nl.exemplars(vlm, small, NEURONS, only=needed, **how)
        assert list(part) == needed
        assert all(each in of_all for each in given)
        if len(needed) == 1 and "sampling" not in how:
            assert len(given) <= 2 < len(of_all)
        for neuron in needed:
            assert uses(part[neuron]) == uses(whole[neuron])
            for group in ("explain", "held_out", "validate", "contrast"):
                both = (getattr(each[neuron], group) for each in (part, whole))
                for one, other in zip(*both, strict=True):
                    assert one.activation.tobytes() == other.activation.tobytes()
                    assert one.tokens.pieces == other.tokens.pieces
                    assert (one.sample, one.rank) == (other.sample, other.rank)


def test_every_sample_is_run_once_for_all_neurons(vlm, atlas, scenes):
    with fed(vlm) as given:
        found = nl.exemplars(vlm, atlas, NEURONS, samples=scenes, batch_size=5)
    needed = {p for each in found.values() for group in uses(each) for p in group}
    assert sum(map(len, given)) == len(needed)


def test_nothing_behind_the_deepest_needed_site_is_run(bed, scenes, atlas):
    model = copy.deepcopy(bed.model)
    vlm, ran = nl.adapt(model, bed.processor), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: ran.add(name))
    layers = "model.language_model.layers"
    nl.exemplars(vlm, atlas, [NEURONS[3], NEURONS[0]], samples=scenes)
    nl.look(vlm, NEURONS[0], scenes[0])
    assert f"{layers}.0.mlp.gate_proj" in ran
    assert not {f"{layers}.0", "lm_head"} & ran
    ran.clear()
    nl.exemplars(vlm, atlas, [NEURONS[3]], samples=scenes)
    nl.look(vlm, NEURONS[3], scenes[0])
    assert "model.vision_tower.encoder.layers.1.mlp.fc1" in ran
    assert not any(name.startswith(layers) for name in ran)


def test_what_a_sample_is_is_kept_once_for_all_neurons(vlm, atlas, scenes):
    neurons = [nl.NeuronId(f"language.{n % 4}", n) for n in range(12)] + NEURONS
    found = nl.exemplars(vlm, atlas, neurons, samples=scenes)
    everything = [e for one in found.values() for e in (*one.explain, *one.held_out)]
    maps = {(e.position, vlm.site(e.neuron.site).stream): e.tokens for e in everything}
    assert len({id(each.tokens) for each in everything}) == len(maps) < len(everything)
    for each in everything:
        assert each.tokens is maps[each.position, vlm.site(each.neuron.site).stream]
        assert each.sample is scenes[each.position]
        assert each.activation.dtype == np.float32
        # Not a view, which would keep the whole batch's columns.
        assert each.activation.base is None


def test_columns_of_routed_experts_are_zero_where_a_token_was_sent_elsewhere():
    values = torch.arange(24.0).reshape(2, 2, 2, 3) + 1
    expert = torch.tensor([[[0, 2], [1, 0]], [[2, -1], [-1, -1]]])
    values[expert < 0] = float("nan")
    routed = Routed(values, expert, 3)
    rows = [8, 0, 4, 6]
    sink = Columns({"language.0": rows})
    sink.take(site("language.0", 3, experts=3), routed, token_map("vrvr"))
    # Row 8 is neuron 2 of expert 2, row 0 neuron 0 of expert 0, and so on.
    assert sink.fetched()["language.0"].tolist() == [
        [6, 1, 0, 4],
        [0, 10, 8, 0],
        [15, 0, 0, 13],
        [0, 0, 0, 0],
    ]


def test_columns_of_several_sites_are_fetched_apart():
    one, other = torch.randn(2, 3, 5), torch.randn(4, 7)
    sink = Columns({"vision.0": [4, 0], "language.1": [6]})
    sink.take(site("vision.0", 5), one, token_map("v" * 6))
    sink.take(site("language.1", 7), other.double(), token_map("r" * 4))
    kept = sink.fetched()
    assert np.array_equal(kept["vision.0"], one.reshape(6, 5)[:, [4, 0]])
    assert np.array_equal(kept["language.1"], other[:, [6]])
    assert {each.dtype for each in kept.values()} == {np.dtype(np.float32)}


def test_a_bar_is_shown_if_asked_for(vlm, atlas, scenes, capsys):
    nl.exemplars(vlm, atlas, NEURONS[:1], samples=scenes)
    assert capsys.readouterr().err == ""
    nl.exemplars(vlm, atlas, NEURONS[:1], samples=scenes, progress=True)
    assert "2/2" in capsys.readouterr().err


# Samples that cannot be used again.


ON_DISK = {"explain": (1, 3), "held_out": (2, 4), "batch_size": 3}


@pytest.fixture
def on_disk(vlm, scenes, tmp_path) -> tuple[nl.Atlas, list[Path]]:
    """A scan of image files."""
    files = [tmp_path / f"{number}.png" for number in range(10)]
    for file, each in zip(files, scenes, strict=False):
        each.open_images()[0].save(file)
    samples = [
        nl.Sample(f"s{n}", (file,), each.prompt, each.response)
        for n, (file, each) in enumerate(zip(files, scenes, strict=False))
    ]
    return nl.scan(vlm, samples, out=tmp_path / "atlas", n=4, batch_size=5), files


def test_samples_that_cannot_be_used_again_are_left_out_and_named(vlm, on_disk):
    atlas, files = on_disk
    whole = nl.exemplars(vlm, atlas, NEURONS, **ON_DISK)
    assert whole.skipped == {}
    gone, changed = atlas.neuron(NEURONS[0]).positions[:2].tolist()
    files[gone].unlink()
    Image.new("RGB", (64, 64), "red").save(files[changed])
    said = rf"2 samples .*(missing image: 1 \(s{gone}\)|changed image: 1 \(s{changed}\)); "
    with pytest.warns(UserWarning, match=said) as warned:
        found = nl.exemplars(vlm, atlas, NEURONS, **ON_DISK)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert found.skipped == {f"s{gone}": "missing image", f"s{changed}": "changed image"}
    assert [e.rank for e in found[NEURONS[0]].explain] == [3]
    assert [e.rank for e in found[NEURONS[0]].held_out] == [4]
    for neuron in NEURONS:
        for group in ("explain", "held_out"):
            left = [e for e in getattr(whole[neuron], group) if e.position not in (gone, changed)]
            for one, other in zip(left, getattr(found[neuron], group), strict=True):
                assert (one.position, one.rank) == (other.position, other.rank)
                np.testing.assert_allclose(one.activation, other.activation, atol=1e-5)


def test_only_samples_that_are_needed_are_reported(vlm, on_disk):
    atlas, files = on_disk
    used = [set(atlas.neuron(neuron).positions[:4].tolist()) for neuron in NEURONS]
    needed, lost = next(
        (neuron, mine)
        for neuron, mine in zip(NEURONS, used, strict=True)
        if set.union(*used) - mine
    )
    other = min(set.union(*used) - lost)
    files[other].unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nl.exemplars(vlm, atlas, NEURONS, only=[needed], **ON_DISK)
    assert found.skipped == {}
    assert len(found[needed].explain) == len(found[needed].held_out) == 2


def test_if_no_sample_can_be_used_again_there_is_nothing_to_go_on_with(vlm, on_disk):
    atlas, files = on_disk
    for file in files:
        file.unlink()
    with pytest.raises(SampleError, match="missing image"):
        nl.exemplars(vlm, atlas, NEURONS, **ON_DISK)
    with pytest.warns(UserWarning, match="could not be used again"):
        found = nl.exemplars(vlm, atlas, NEURONS, only=NEURONS[:1], **ON_DISK)
    assert found[NEURONS[0]].explain == found[NEURONS[0]].held_out == ()


class Choosy:
    """A processor that takes no red picture."""

    def __init__(self, processor) -> None:
        self._processor = processor

    def __getattr__(self, name):
        return getattr(self._processor, name)

    def __call__(self, *args, images, **more):
        if any(
            np.asarray(picture).min(axis=(0, 1)).tolist() == [255, 0, 0] for (picture,) in images
        ):
            raise ArithmeticError("red")
        if len(images) == 5:
            raise TypeError("five")
        return self._processor(*args, images=images, **more)


def test_one_sample_that_the_processor_refuses_does_not_stop_the_others(vlm, atlas, scenes, found):
    picky = nl.adapt(vlm.model, Choosy(vlm.processor))
    first, second = positions(found[NEURONS[0]].explain)[:2]
    red = (Image.new("RGB", (64, 64), "red"),)
    given = [replace(s, images=red) if n == first else s for n, s in enumerate(scenes)]
    given[second] = replace(given[second], images=())
    with pytest.warns(UserWarning, match="2 samples could not be used again"):
        some = nl.exemplars(picky, atlas, NEURONS, samples=given, batch_size=4)
    assert some.skipped == {
        str(scenes[first].id): "refused by the processor",
        str(scenes[second].id): "no image",
    }
    left = [p for p in positions(found[NEURONS[0]].explain) if p not in (first, second)]
    assert positions(some[NEURONS[0]].explain) == left
    with pytest.raises(TypeError, match="five"):  # it is no single sample's fault
        nl.exemplars(picky, atlas, NEURONS, samples=scenes, batch_size=5)


# What is refused.


@pytest.mark.parametrize("ranks", [((1, 3), (3, 5)), ((1, 2, 3), (1, 2, 3))])
def test_a_rank_that_would_leak_is_refused(vlm, atlas, scenes, ranks):
    explain, held_out = ranks
    with pytest.raises(ValueError, match=r"Ranks \[.*3\] are in both explain and held_out"):
        nl.exemplars(vlm, atlas, NEURONS, samples=scenes, explain=explain, held_out=held_out)


@pytest.mark.parametrize(
    "ranks",
    [
        {"validate": (2, 5)},
        {"validate": (7, 8)},
        {"validate": (4,), "held_out": (4,)},
        {"validate": (5,), "sampling": "random"},
    ],
    ids=str,
)
def test_a_rank_has_one_use(vlm, atlas, scenes, ranks):
    with pytest.raises(ValueError, match=r"Ranks \[(5|7|4)\] are in both .* and validate"):
        nl.exemplars(vlm, atlas, NEURONS, samples=scenes, **ranks)


def test_a_negative_number_of_contrast_exemplars_is_refused(vlm, atlas, scenes):
    with pytest.raises(ValueError, match=r"contrast=-1 .*from 0"):
        nl.exemplars(vlm, atlas, NEURONS, samples=scenes, contrast=-1)


def test_what_is_still_needed_must_have_been_asked_for(vlm, atlas, scenes):
    with pytest.raises(UnknownNameError, match=r"among `neurons` 'language\.2/5'"):
        nl.exemplars(vlm, atlas, NEURONS[:2], samples=scenes, only=[NEURONS[2]])


@pytest.mark.parametrize(
    ("explain", "held_out"), [((0,), (20,)), ((1,), (-3,)), ((1, 0), (2,))], ids=str
)
def test_ranks_count_from_one(vlm, atlas, scenes, explain, held_out):
    with pytest.raises(ValueError, match="rank"):
        nl.exemplars(vlm, atlas, NEURONS, samples=scenes, explain=explain, held_out=held_out)


def test_an_unknown_way_of_sampling_is_refused(vlm, atlas, scenes):
    with pytest.raises(ValueError, match=r"Random.*random"):
        nl.exemplars(vlm, atlas, NEURONS, samples=scenes, sampling="Random")


def test_a_model_with_other_weights_is_refused(untrained_vlm, atlas, scenes):
    with pytest.raises(AtlasError, match="other weights"):
        nl.exemplars(untrained_vlm, atlas, NEURONS, samples=scenes)


def test_a_model_in_training_mode_is_refused(bed, atlas, scenes):
    model = copy.deepcopy(bed.model)
    model.model.multi_modal_projector.extra = nn.Dropout(0.1)
    adapter = nl.adapt(model.train(), bed.processor)
    with pytest.raises(AdapterError, match="training mode"):
        nl.exemplars(adapter, atlas, NEURONS, samples=scenes)


def test_activations_that_differ_from_the_scan_are_warned_of(vlm, atlas, scenes):
    with doubled(vlm, "language.2"), pytest.warns(UserWarning, match="differ from the scan's"):
        nl.exemplars(vlm, atlas, NEURONS[1:2], samples=scenes)


@pytest.mark.parametrize("change", ["reversed", "cut short"])
def test_samples_that_are_not_those_of_the_scan_are_refused(vlm, atlas, scenes, change):
    given = scenes[::-1] if change == "reversed" else scenes[:2]
    with pytest.raises(UnknownNameError, match="Pass the scanned samples in the scanned order"):
        nl.exemplars(vlm, atlas, NEURONS, samples=given)


def test_a_neuron_that_was_not_asked_for_is_refused_with_those_that_were(found):
    with pytest.raises(UnknownNameError, match=r"in these exemplars 'vision.1/41'.*vision.1/40"):
        found[NeuronId("vision.1", 41)]


# One exemplar, by hand.


def test_levels_and_maxima_by_hand():
    one = exemplar("svvpr", [9.0, 2.0, -1.0, 8.0, 1.0], maximum=4.0)
    assert one.visual.tolist() == [False, True, True, False, False]
    assert one.text.tolist() == [False, False, False, False, True]
    assert one.level.tolist() == [10, 5, 0, 10, 2.5]
    assert one.maximum_by_modality == (5, 2.5)
    assert math.isnan(exemplar("r", [1.0]).maximum_by_modality[0])


def test_only_text_is_shown_and_only_what_counts_is_shaded():
    one = exemplar(
        "svvprs",
        [9.0, 2.0, -1.0, 8.0, 1.0, 3.0],
        maximum=4.0,
        pieces=("<bos>", "", "", " asked", " said", "<eos>"),
    )
    shown = one.shaded_text()
    assert "asked" in shown
    assert "said" in shown
    assert "bos" not in shown
    assert 'title="2.50"' in shown
    assert shown.count("title=") == 1


def test_an_exemplar_paints_each_image_with_its_own_tokens():
    tokens = token_map("vvvv")
    tokens = replace(tokens, image=tokens.image.clone(), box=tokens.box.clone())
    tokens.image[2:] = 1
    tokens.box[2:] = tokens.box[:2]
    white = Image.new("RGB", (16, 8), "white")
    two = nl.Sample("two", (white, white), "p", "r")
    one = replace(exemplar("vvvv", [10.0, 0.0, 0.0, 10.0]), sample=two, tokens=tokens)
    first, second = (np.asarray(each.modulated) for each in one.pictures())
    half = first.shape[1] // 2
    assert (first[:, :half] == 255).all()
    assert (first[:, half:] == 0).all()
    assert (second[:, :half] == 0).all()
    assert (second[:, half:] == 255).all()


def test_pictures_can_be_painted_with_other_values():
    one = exemplar("vv", [10.0, 0.0])
    own, other = (np.asarray(one.pictures(v)[0].modulated) for v in (None, np.array([0.0, 10.0])))
    half = own.shape[1] // 2
    assert not own[:, half:].any()
    assert not other[:, :half].any()
    assert other[:, half:].all()


HOSTILE = "<script>alert(1)</script>"


def test_hostile_captions_and_ids_are_escaped_in_html():
    sample = scene(1, id=HOSTILE, response=HOSTILE)
    one = exemplar("vr", [1.0, 2.0], pieces=("", HOSTILE), sample=sample, rank=1)
    for shown in (one, NeuronExemplars(NEURON, 2.0, (one,), (one,))):
        assert "<script>" not in shown._repr_html_()
        assert "&lt;script&gt;" in shown._repr_html_()


# One neuron on one sample.


def test_looking_gives_the_activations_of_the_sample(vlm, scenes, found):
    for neuron in NEURONS:
        one = found[neuron].explain[0]
        looked = nl.look(vlm, neuron, one.sample, maximum=found[neuron].maximum)
        np.testing.assert_allclose(looked.activation, one.activation, atol=1e-5)
        np.testing.assert_allclose(looked.level, one.level, atol=1e-4)
        assert (looked.rank, looked.position) == (None, None)


def test_looking_takes_the_largest_eligible_activation_as_ten(vlm, scenes):
    one = nl.look(vlm, NEURONS[0], scenes[0])
    eligible = one.tokens.is_role(Role.VISUAL, Role.RESPONSE).numpy()
    assert one.maximum == one.activation[eligible].max()
    assert max(one.maximum_by_modality) == 10
    double = nl.look(vlm, NEURONS[0], scenes[0], maximum=2 * one.maximum)
    np.testing.assert_allclose(double.level[eligible], one.level[eligible] / 2, atol=1e-6)


@pytest.mark.parametrize("role", [Role.PROMPT, Role.SPECIAL], ids=["prompt", "special"])
def test_tokens_that_do_not_count_do_not_set_the_scale(vlm, atlas, scenes, role):
    maximum = dict(zip(COUNTED, atlas.statistics("language.0").roles.maximum, strict=True))
    eligible = maximum[Role.VISUAL].maximum(maximum[Role.RESPONSE])
    more = (maximum[role] > 1.2 * eligible) & (eligible > 0.01)
    neuron = NeuronId("language.0", int(more.nonzero()[0]))
    one = nl.exemplars(vlm, atlas, [neuron], samples=scenes)[neuron]
    best = one.explain[0]
    assert one.maximum == best.maximum == atlas.maximum(neuron)
    assert max(best.maximum_by_modality) == pytest.approx(10, abs=1e-3)
    looked = nl.look(vlm, neuron, best.sample)
    assert looked.maximum == pytest.approx(one.maximum, abs=1e-5)
    assert max(looked.maximum_by_modality) == 10


def test_looking_needs_no_response(vlm, scenes):
    one = nl.look(vlm, NEURONS[0], replace(scenes[0], response=None))
    assert one.text.sum() == len(scenes[0].prompt.split())
    assert "describe" in one.shaded_text()


def test_looking_at_a_vision_neuron_shows_pictures_only(vlm, scenes):
    one = nl.look(vlm, NeuronId("vision.0", 1), scenes[0])
    assert one.visual.sum() == 64
    assert not one.text.any()
    assert "data:image" in one._repr_html_()


def test_looking_leaves_no_hook(vlm, scenes):
    module = vlm.model.get_submodule(vlm.site("language.0").path)
    before = list(module._forward_hooks)
    nl.look(vlm, NEURONS[0], scenes[0])
    assert list(module._forward_hooks) == before


def test_a_look_is_saved_as_a_picture(vlm, scenes, tmp_path):
    path = tmp_path / "look.png"
    one = nl.look(vlm, NEURONS[0], scenes[0])
    one.save(path)
    with Image.open(path) as saved:
        assert saved.format == "PNG"
        # The image, its modulated copy and its heat map side by side, enlarged.
        assert saved.width >= 3 * 256
        assert len(np.unique(np.asarray(saved.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_a_look_that_cannot_be_saved_says_where(tmp_path):
    with pytest.raises(OutputError, match=r"gone.look.png cannot be written"):
        exemplar("vr", [1.0, 2.0], pieces=("", "a")).save(tmp_path / "gone" / "look.png")


def test_what_cannot_be_looked_at_is_refused(vlm, scenes):
    with pytest.raises(UnknownNameError, match=r"neuron in language.0 '9999'"):
        nl.look(vlm, NeuronId("language.0", 9999), scenes[0])
    with pytest.raises(SampleError, match="no image"):
        nl.look(vlm, NEURONS[0], replace(scenes[0], images=()))


def test_tokens_that_see_no_region_paint_no_picture():
    seen = exemplar("ssvvpr", [0, 0, 5, 3, 0, 1])
    blind = replace(seen, tokens=replace(seen.tokens, box=seen.tokens.box * float("nan")))
    assert blind._repr_html_().count("<img") == 1 < seen._repr_html_().count("<img")
    assert "they see no single region" in blind._repr_html_()
    assert "see no single region" not in seen._repr_html_()
    assert blind.figure().width < seen.figure().width or blind.figure().size != seen.figure().size
    assert "on visual tokens -" in exemplar("ssppr", [0, 0, 0, 0, 1])._repr_html_()

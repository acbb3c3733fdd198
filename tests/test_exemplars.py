from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from torch import nn

import neuronlens as nl
from handmade import NEURON, exemplar, scene, token_map
from neuronlens.errors import AdapterError, AtlasError, OutputError, SampleError, UnknownNameError
from neuronlens.exemplars import EXPLAIN_RANKS, HELD_OUT_RANKS, NeuronExemplars
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


# What is refused.


@pytest.mark.parametrize("ranks", [((1, 3), (3, 5)), ((1, 2, 3), (1, 2, 3))])
def test_a_rank_that_would_leak_is_refused(vlm, atlas, scenes, ranks):
    explain, held_out = ranks
    with pytest.raises(ValueError, match=r"Ranks \[.*3\] are in both explain and held_out"):
        nl.exemplars(vlm, atlas, NEURONS, samples=scenes, explain=explain, held_out=held_out)


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

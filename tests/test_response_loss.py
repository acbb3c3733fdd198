"""Losses of given responses: against the model's own logits, alone and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import neuronlens as nl
from neuronlens.errors import (
    DataError,
    InterventionError,
    SkippedError,
    UnknownNameError,
)
from real import reals

REAL = reals()
# A decoder with its image in the text, with the image before it, one with an encoder.
SOME = [name for name in ("llava", "blip-2", "git", "florence2", "qwen2_5_vl") if name in REAL]


@pytest.fixture(scope="module")
def strong(vlm: nl.ModelAdapter) -> list[nl.NeuronId]:
    return [vlm.neuron(layer=3, index=index) for index in range(0, 384, 6)]


@pytest.fixture(scope="module")
def loss(vlm: Any, scenes: Sequence[nl.Sample], strong: list[nl.NeuronId]) -> Any:
    interventions = {
        "some": nl.deactivate(vlm, strong),
        "random": [
            nl.deactivate(vlm, nl.random_control(vlm, strong, seed=seed)) for seed in range(2)
        ],
    }
    return nl.response_loss(vlm, scenes, interventions, batch_size=5, resamples=200)


def by_hand(vlm: Any, sample: nl.Sample, template: bool = True) -> tuple[list[float], list[bool]]:
    """From one plain forward of the model: of each response token, its loss and whether it won."""
    batch = nl.encode(vlm, [sample], template=template, response=True)
    with torch.no_grad():
        logits = vlm.model(**batch.inputs).logits[0].double()
    name = "decoder_input_ids" if vlm.answer_stream != "language" else vlm.text_input
    ids = batch.inputs[name][0].tolist()
    said = (batch.tokens[vlm.answer_stream].role[0] == nl.Role.RESPONSE).nonzero()[:, 0].tolist()
    in_map = batch.tokens[vlm.answer_stream].role.shape[1]
    losses, right = [], []
    for at in said:
        word = ids[at - (in_map - len(ids))]
        row = logits[at - 1 - (in_map - len(logits))]
        losses.append(float(torch.logsumexp(row, 0) - row[word]))
        right.append(int(row.argmax()) == word)
    return losses, right


def test_losses_are_those_of_the_models_own_logits(vlm, scenes, loss):
    place = 0
    for sample in scenes:
        losses, right = by_hand(vlm, sample)
        here = slice(place, place + len(losses))
        assert {token.sample for token in loss.tokens[here]} == {sample.id}
        np.testing.assert_allclose(loss.values("none")[0, here], losses, atol=1e-5)
        assert loss.values("none", "right")[0, here].tolist() == [float(each) for each in right]
        place += len(losses)
    assert place == len(loss.tokens)


def test_tokens_spell_the_responses(scenes, loss):
    for number, sample in enumerate(scenes):
        mine = [token for token in loss.tokens if token.sample == sample.id]
        assert " ".join(token.text for token in mine) == sample.response
        assert [token.place for token in mine] == list(range(len(mine)))
        assert {token.domain for token in mine} == {sample.domain}
        assert {u for u, t in zip(loss.units, loss.tokens, strict=True) if t in mine} >= {number}


def test_under_an_intervention_they_are_those_of_the_changed_model(vlm, bed, scenes, strong, loss):
    down = bed.model.model.language_model.layers[3].mlp.down_proj
    before = down.weight.detach().clone()
    try:
        with torch.no_grad():
            down.weight[:, [neuron.index for neuron in strong]] = 0
        losses = [value for sample in scenes for value in by_hand(vlm, sample)[0]]
    finally:
        with torch.no_grad():
            down.weight.copy_(before)
    np.testing.assert_allclose(loss.values("some")[0], losses, atol=1e-5)
    assert abs(loss.values("some") - loss.values("none")).max() > 0.1


@pytest.mark.parametrize("size", [1, 7, 24])
def test_batching_changes_nothing(vlm, scenes, loss, size):
    again = nl.response_loss(vlm, scenes, batch_size=size, resamples=0)
    np.testing.assert_allclose(again.values("none"), loss.values("none"), atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_other_families_lose_what_their_own_logits_say(name):
    real = REAL[name]
    vlm = nl.adapt(*real.build())
    samples = [
        nl.Sample(
            id=str(number),
            images=(Image.fromarray(np.full((32 + 8 * number, 40, 3), 60 * number, np.uint8)),),
            prompt=real.prompt,
            response=" ".join([real.response] * (number + 1)),
        )
        for number in range(2)
    ]
    found = nl.response_loss(vlm, samples, template=real.template, batch_size=2, resamples=0)
    expected = [value for sample in samples for value in by_hand(vlm, sample, real.template)[0]]
    np.testing.assert_allclose(found.values("none")[0], expected, rtol=1e-3, atol=1e-4)


def test_means_and_differences_are_those_of_own_loops(loss):
    red = [token.text == "red" for token in loss.tokens]
    none, some = loss.values("none")[0], loss.values("some")[0]
    random = loss.values("random")
    inside = [b - a for a, b, it in zip(none, some, red, strict=True) if it]
    outside = [b - a for a, b, it in zip(none, some, red, strict=True) if not it]
    assert any(red)
    assert loss.mean("none", group="red").value == pytest.approx(
        np.mean([a for a, it in zip(none, red, strict=True) if it])
    )
    assert loss.compare("some", group="red").value == pytest.approx(np.mean(inside))
    gap = loss.compare("some", group="red", versus="others")
    assert gap.value == pytest.approx(np.mean(inside) - np.mean(outside))
    assert gap.interval[0] <= gap.value <= gap.interval[1]
    beside = loss.compare("some", "random")
    assert beside.value == pytest.approx(np.mean(some) - np.mean(random))
    assert beside.units == 24


def test_a_group_may_be_what_a_function_says(loss):
    early = loss.mean("none", group=lambda token: token.place < 5)
    mine = [v for v, t in zip(loss.values("none")[0], loss.tokens, strict=True) if t.place < 5]
    assert early.value == pytest.approx(np.mean(mine))
    assert early.rows == 24 * 5


def test_the_table_says_what_compare_says(loss):
    table = loss.table().set_index("condition")
    change = loss.compare("some", number="right")
    assert table.loc["some", "right_change"] == change.value
    assert table.loc["some", "right_change_low"] == change.interval[0]
    assert table.loc["none", "loss"] == loss.mean("none").value
    assert str(loss.compare("some")) in loss._repr_html_()


def test_samples_without_a_response_are_skipped_by_name(vlm, scenes):
    given = [scenes[0], replace(scenes[1], response=None), scenes[2]]
    found = nl.response_loss(vlm, given, resamples=0)
    assert [(each.id, each.reason) for each in found.skipped] == [(scenes[1].id, "no response")]
    assert set(found.units) == {0, 1}  # without a gap
    with pytest.raises(SkippedError, match=r"None of the 1 samples.*no response"):
        nl.response_loss(vlm, given[1:2])


@pytest.mark.parametrize("how", [{"roles": ("response",)}, {"roles": ("prompt",)}])
def test_interventions_at_some_tokens_are_those_of_each_samples_own_tokens(vlm, scenes, how):
    some, early = scenes[:3], [vlm.neuron(layer=1, index=index) for index in range(0, 384, 2)]
    conditions = {"some": nl.deactivate(vlm, early, **how), "all": nl.deactivate(vlm, early)}
    found = nl.response_loss(vlm, some, conditions, resamples=0)
    losses: list[float] = []
    for sample in some:
        tokens = nl.encode(vlm, [sample], response=True).tokens
        with nl.deactivate(vlm, early, tokens=tokens, **how):
            losses += by_hand(vlm, sample)[0]
    np.testing.assert_allclose(found.values("some")[0], losses, atol=1e-5)
    for other in ("none", "all"):
        assert abs(found.values(other)[0] - losses).max() > 0.01


def test_responses_about_one_image_are_one_unit(vlm, scenes):
    again = [replace(each, id=f"{each.id} again") for each in scenes[:2]]
    found = nl.response_loss(vlm, [*scenes[:3], *again], resamples=20)
    units = dict(zip((token.sample for token in found.tokens), found.units, strict=True))
    assert list(units.values()) == [0, 1, 2, 0, 1]
    assert found.mean("none").units == 3
    assert "of 5 responses on 3 sets of images" in found._repr_html_()
    assert "of 5 responses, " in repr(found)


def test_losses_that_are_no_numbers_are_counted_and_warned_of_once(vlm, scenes):
    huge = nl.set_to(vlm, [vlm.neuron(0, index) for index in range(384)], 3e38)
    with pytest.warns(UserWarning, match=r"losses are not finite.* of 2 samples") as heard:
        found = nl.response_loss(vlm, scenes[:2], {"huge": huge}, batch_size=1, resamples=0)
    assert len(heard) == 1
    assert repr(scenes[1].id) in str(heard[0].message)
    for number in ("loss", "right"):
        assert np.isnan(found.values("huge", number)).all()
        assert np.isnan(found.mean("huge", number=number).value)
        assert not np.isnan(found.values("none", number)).any()
    assert f"{len(found.tokens)} losses not finite" in repr(found)
    assert f"{len(found.tokens)} numbers are not finite" in found._repr_html_()


def test_bad_input_is_refused(vlm, untrained_vlm, scenes, loss, strong):
    with pytest.raises(InterventionError, match="of another model"):
        nl.response_loss(untrained_vlm, scenes, {"some": nl.deactivate(vlm, strong)})
    with pytest.raises(DataError, match="1 ids occur more than once"):
        nl.response_loss(vlm, [scenes[0], scenes[0]])
    with (
        pytest.raises(InterventionError, match=r"64 neurons .* leave the block first"),
        nl.deactivate(vlm, strong),
    ):
        nl.response_loss(vlm, scenes)
    with pytest.raises(DataError, match="batch_size=0"):
        nl.response_loss(vlm, scenes, batch_size=0)
    with pytest.raises(UnknownNameError, match="'rigth'"):
        loss.mean("none", number="rigth")
    with pytest.raises(UnknownNameError, match="'nothing'"):
        loss.compare("nothing")
    with pytest.raises(UnknownNameError, match="pink"):
        loss.mean("none", group="pink")
    with pytest.raises(DataError, match="give group="):
        loss.compare("some", versus="others")


def test_samples_of_one_group_are_drawn_together(vlm, scenes):
    film = [replace(each, group=f"film {number % 3}") for number, each in enumerate(scenes[:9])]
    assert set(nl.response_loss(vlm, film, resamples=0).units) == {0, 1, 2}
    moved = {"some": nl.deactivate(vlm, "language.2/18")}
    deviation = nl.hidden_state_deviation(vlm, film, moved, resamples=0)
    assert deviation.units == (0, 1, 2) * 3

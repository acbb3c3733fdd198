"""How far interventions move the last hidden states, against own hooks and edited weights."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neuronlens as nl
from neuronlens import testbed
from neuronlens.errors import (
    AdapterError,
    DataError,
    InterventionError,
    SkippedError,
    UnknownNameError,
)
from neuronlens.evaluate import Deviation, hidden_state_deviation
from neuronlens.intervene import deactivate, random_control
from real import reals


@pytest.fixture(scope="module")
def asked() -> list[nl.Sample]:
    questions = testbed.questions(7, seed=4)
    return [each.sample("chat") for each in questions]


@pytest.fixture(scope="module")
def chosen(vlm: nl.ModelAdapter) -> list[nl.NeuronId]:
    return [vlm.neuron(layer, i) for layer in (0, 2) for i in range(0, 384, 5)]


@pytest.fixture(scope="module")
def conditions(vlm: nl.ModelAdapter, chosen: list[nl.NeuronId]) -> dict[str, Any]:
    controls = [random_control(vlm, chosen, seed=seed) for seed in range(3)]
    return {
        "chosen": deactivate(vlm, chosen),
        "random": [deactivate(vlm, each) for each in controls],
    }


@pytest.fixture(scope="module")
def deviation(vlm: Any, asked: list[nl.Sample], conditions: dict[str, Any]) -> Deviation:
    return hidden_state_deviation(vlm, asked, conditions, batch_size=3)


def last_states(model: Any, path: str, inputs: dict[str, Any]) -> Tensor:
    """What the last decoder layer gives, by an own hook."""
    kept: list[Any] = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    (out,) = kept
    state: Tensor = out[0] if isinstance(out, tuple) else out
    return state[0].double()


def without(model: Any, neurons: list[nl.NeuronId]) -> Any:
    """A copy of the testbed whose down projections have these neurons' columns zeroed."""
    edited = copy.deepcopy(model)
    for neuron in neurons:
        layer = int(neuron.site.rpartition(".")[2])
        with torch.no_grad():
            edited.model.language_model.layers[layer].mlp.down_proj.weight[:, neuron.index] = 0
    return edited


def own_share(one: Tensor, other: Tensor) -> float:
    upper = sum(float(x) ** 2 for x in (one - other).flatten())
    lower = sum(float(x) ** 2 for x in one.flatten())
    return float((upper / lower) ** 0.5)


LAST = "model.language_model.layers.3"


def test_shares_are_those_of_edited_weights_sample_by_sample(vlm, asked, chosen, deviation):
    edited = without(vlm.model, chosen)
    for column, sample in enumerate(asked):
        inputs = nl.encode(vlm, [sample]).inputs
        normal, moved = (last_states(m, LAST, inputs) for m in (vlm.model, edited))
        expected = own_share(normal, moved)
        assert expected > 0.01
        assert deviation.shares["chosen"][0, column] == pytest.approx(expected, rel=1e-4)


def test_the_states_are_those_before_the_final_norm(vlm, asked, chosen):
    inputs = nl.encode(vlm, asked[:1]).inputs
    with torch.no_grad():
        normed = vlm.model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        state = last_states(vlm.model, LAST, inputs)
        again = vlm.model.model.language_model.norm(state.float())
    torch.testing.assert_close(again, normed)
    assert not torch.allclose(state.float(), normed, atol=0.1)


def test_the_last_token_alone_can_be_looked_at(vlm, asked, chosen, conditions):
    found = hidden_state_deviation(vlm, asked, conditions, tokens="last", batch_size=4)
    edited = without(vlm.model, chosen)
    for column, sample in enumerate(asked):
        inputs = nl.encode(vlm, [sample]).inputs
        normal, moved = (last_states(m, LAST, inputs)[-1] for m in (vlm.model, edited))
        expected = own_share(normal, moved)
        assert found.shares["chosen"][0, column] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_shares_do_not_depend_on_the_batch_nor_on_the_tokenizers_side(
    vlm, asked, conditions, deviation, side
):
    tokenizer = vlm.processor.tokenizer
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        alone = hidden_state_deviation(vlm, asked, conditions, batch_size=1)
        together = hidden_state_deviation(vlm, asked, conditions, batch_size=7)
        assert tokenizer.padding_side == side
    finally:
        tokenizer.padding_side = before
    lengths = {nl.encode(vlm, [each]).inputs["input_ids"].shape[1] for each in asked}
    assert len(lengths) > 1
    for name in ("chosen", "random"):
        np.testing.assert_allclose(together.shares[name], alone.shares[name], rtol=1e-4)
        np.testing.assert_allclose(deviation.shares[name], alone.shares[name], rtol=1e-4)


def test_responses_are_left_out(vlm, asked, conditions, deviation):
    said = [
        nl.Sample(each.id, each.images, each.prompt, "the image shows a small yellow diamond .")
        for each in asked
    ]
    found = hidden_state_deviation(vlm, said, {"chosen": conditions["chosen"]})
    np.testing.assert_allclose(found.shares["chosen"], deviation.shares["chosen"], rtol=1e-4)


def test_controls_of_several_seeds_are_each_their_own(vlm, asked, conditions, deviation):
    for number, control in enumerate(conditions["random"]):
        alone = hidden_state_deviation(vlm, asked[:2], {"one": control})
        np.testing.assert_allclose(
            alone.shares["one"][0], deviation.shares["random"][number, :2], rtol=1e-4
        )
    assert deviation.shares["random"].shape == (3, 7)
    assert deviation.mean("random").value == pytest.approx(deviation.shares["random"].mean())
    off = deviation.compare("chosen", "random")
    expected = deviation.shares["chosen"].mean() - deviation.shares["random"].mean()
    assert off.value == pytest.approx(expected)
    assert off.interval is not None
    assert off.interval[0] < off.value < off.interval[1]


def test_domains_are_apart(deviation, asked):
    table = deviation.table("domain").set_index(["condition", "group"])
    shares = deviation.shares["chosen"][0]
    for domain in {each.domain for each in asked}:
        mine = [s for s, each in zip(shares, asked, strict=True) if each.domain == domain]
        assert table.loc[("chosen", domain), "deviation"] == pytest.approx(np.mean(mine))
        assert deviation.mean("chosen", group=domain).value == pytest.approx(np.mean(mine))
    domain = str(asked[0].domain)
    inside = np.array([each.domain == domain for each in asked])
    off = shares - deviation.shares["random"].mean(0)
    found = deviation.compare("chosen", "random", group=domain, versus="others")
    assert found.value == pytest.approx(off[inside].mean() - off[~inside].mean())


def test_inert_neurons_move_nothing():
    # LLaVA reads its vision tower at layer -2: what the last layer does is lost.
    real = reals()["llava"]
    model, processor = real.build()
    vlm = nl.adapt(model, processor)
    (inert,) = [site for site in vlm.sites.values() if site.inert]
    before = [site for site in vlm.select("vision") if not site.inert][-1]
    samples = [
        nl.Sample(str(i), each.images, real.prompt)
        for i, each in enumerate(testbed.scenes(2, seed=1))
    ]
    with pytest.warns(UserWarning, match="without any effect"):
        nothing = deactivate(vlm, [inert.neuron(i) for i in range(inert.width)])
    something = deactivate(vlm, [before.neuron(i) for i in range(before.width)])
    found = hidden_state_deviation(
        vlm, samples, {"inert": nothing, "before": something}, template=False
    )
    assert found.shares["inert"].tolist() == [[0.0, 0.0]]
    assert (found.shares["before"] > 0).all()
    assert found.mean("inert").interval == (0, 0)


@pytest.mark.parametrize("name", ["blip-2+t5", "git", "minimax_m3_vl", "qwen2_5_vl"])
def test_other_families_are_measured_in_batches_as_alone(name):
    real = reals()[name]
    vlm = nl.adapt(*real.build())
    site = vlm.select("language")[0]
    few = [site.neuron(i, 0 if site.experts else None) for i in range(site.width)]
    pictures = [each.images for each in testbed.scenes(2, seed=1)]
    samples = [
        nl.Sample("one", pictures[0], real.prompt),
        nl.Sample("two", pictures[1], f"{real.prompt} {real.prompt}"),
    ]
    both = hidden_state_deviation(
        vlm, samples, {"few": deactivate(vlm, few)}, template=real.template
    )
    (path,) = vlm.decoding.layers[-1:]
    assert (both.shares["few"] > 0).all()
    for column, sample in enumerate(samples):
        inputs = nl.encode(vlm, [sample], template=real.template).inputs
        normal = last_states(vlm.model, path, inputs)
        with deactivate(vlm, few):
            moved = last_states(vlm.model, path, inputs)
        expected = own_share(normal, moved)
        assert both.shares["few"][0, column] == pytest.approx(expected, rel=1e-3)


def test_the_untouched_model_runs_once_for_each_batch(vlm, asked, conditions):
    count = [0]
    hook = vlm.model.register_forward_pre_hook(lambda *args: count.__setitem__(0, count[0] + 1))
    hidden_state_deviation(vlm, asked, conditions, batch_size=4)
    hook.remove()
    # And three times to see whether padding changes anything: a batch, and two of its rows alone.
    assert count[0] == 2 * (1 + 1 + 3) + 3


@pytest.mark.parametrize("how", [{"roles": ("prompt",)}, {"positions": [-1]}])
def test_interventions_at_some_tokens_are_those_of_each_samples_own_tokens(vlm, asked, chosen, how):
    found = hidden_state_deviation(vlm, asked, {"some": deactivate(vlm, chosen, **how)})
    for column, sample in enumerate(asked):
        batch = nl.encode(vlm, [sample])
        normal = last_states(vlm.model, LAST, batch.inputs)
        with deactivate(vlm, chosen, tokens=batch.tokens, **how):
            moved = last_states(vlm.model, LAST, batch.inputs)
        expected = own_share(normal, moved)
        assert expected > 0.001
        assert found.shares["some"][0, column] == pytest.approx(expected, rel=1e-4)


def test_the_last_row_of_a_padded_batch_is_compared_with_the_row_alone_too(vlm, asked):
    by_length = sorted(asked, key=lambda each: len(each.prompt))[:: len(asked) - 1]
    few = {"few": deactivate(vlm, "language.0/0")}
    expected = hidden_state_deviation(vlm, by_length, few, batch_size=1)

    def mix_up(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if len(kwargs["input_ids"]) > 1:
            pixels = kwargs["pixel_values"].clone()
            pixels[-1] = pixels[-1].flip(-1) * 2
            kwargs = kwargs | {"pixel_values": pixels}
        return args, kwargs

    hook = vlm.model.register_forward_pre_hook(mix_up, with_kwargs=True)
    try:
        found = hidden_state_deviation(vlm, by_length, few, batch_size=2)
    finally:
        hook.remove()
    np.testing.assert_allclose(found.shares["few"], expected.shares["few"], rtol=1e-4)


def test_shares_that_are_no_numbers_are_counted_and_warned_of_once(vlm, asked, conditions):
    huge = nl.set_to(vlm, [vlm.neuron(0, index) for index in range(384)], 3e38)
    with pytest.warns(UserWarning, match=r"2 deviations are not finite.* under huge") as heard:
        found = hidden_state_deviation(
            vlm, asked[:2], {"huge": huge, "chosen": conditions["chosen"]}, batch_size=1
        )
    assert len(heard) == 1
    assert heard[0].filename == __file__
    assert repr(asked[1].id) in str(heard[0].message)
    assert np.isnan(found.shares["huge"]).all()
    assert found.mean("huge").rows == 0
    assert repr(found) == "Deviation(2 samples, conditions huge, chosen, 2 numbers not finite)"
    assert "2 numbers are not finite, and in no mean." in found._repr_html_()


def test_inside_a_block_it_is_refused(vlm, asked, conditions):
    with (
        pytest.raises(InterventionError, match=r"1 neurons .* leave the block first"),
        deactivate(vlm, "language.0/0"),
    ):
        hidden_state_deviation(vlm, asked, conditions)


def test_what_cannot_be_encoded_is_skipped_by_name(vlm, asked, conditions, tmp_path):
    lost = nl.Sample("lost", (tmp_path / "none.png",), "what is it ?")
    found = hidden_state_deviation(vlm, [asked[0], lost, asked[1]], conditions)
    assert [(each.id, each.position) for each in found.skipped] == [("lost", 1)]
    assert [each.id for each in found.samples] == [asked[0].id, asked[1].id]
    assert found.shares["random"].shape == (3, 2)
    assert not np.isnan(found.shares["random"]).any()
    assert "1 samples were skipped: missing image (1)." in found._repr_html_()
    with pytest.raises(SkippedError, match="None of the 1 samples"):
        hidden_state_deviation(vlm, [lost], conditions)


def test_shares_are_written_as_they_are(deviation, tmp_path):
    deviation.save(tmp_path / "found.json")
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["shares"]["random"] == deviation.shares["random"].tolist()
    assert [each["id"] for each in told["samples"]] == [each.id for each in deviation.samples]
    assert told["tokens"] == "all"


def test_it_shows_itself_with_names_escaped(vlm, asked, conditions):
    found = hidden_state_deviation(vlm, asked[:2], {"<i>": conditions["random"]})
    html = found._repr_html_()
    assert "&lt;i&gt; (mean of 3)" in html
    assert "<i>" not in html
    assert repr(found) == "Deviation(2 samples, conditions <i>)"


def test_bad_input_is_refused_at_the_door(vlm, untrained_vlm, asked, chosen, conditions):
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "No samples were given"),
        (testbed.questions(1), {}, "question.identification"),
        ([asked[0], asked[0]], {}, "1 ids occur more than once"),
        (asked, {"batch_size": 0}, "batch_size=0"),
    ]
    for samples, how, text in cases:
        with pytest.raises(DataError, match=text):
            hidden_state_deviation(vlm, samples, conditions, **how)
    with pytest.raises(UnknownNameError, match="No choice of tokens 'first'"):
        hidden_state_deviation(vlm, asked, conditions, tokens="first")  # type: ignore[arg-type]
    with pytest.raises(InterventionError, match="nothing to run"):
        hidden_state_deviation(vlm, asked, {})
    with pytest.raises(InterventionError, match="of another model"):
        hidden_state_deviation(vlm, asked, {"a": deactivate(untrained_vlm, chosen)})
    found = hidden_state_deviation(vlm, asked[:2], conditions)
    with pytest.raises(UnknownNameError, match="No condition 'none'"):
        found.mean("none")
    with pytest.raises(DataError, match="give group= too"):
        found.compare("chosen", "random", versus="others")


def test_a_model_that_drops_out_is_refused(vlm, asked):
    model = copy.deepcopy(vlm.model)
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    model.train()
    noisy = nl.adapt(model, vlm.processor)
    with pytest.raises(AdapterError, match="training mode"):
        hidden_state_deviation(noisy, asked, {"a": deactivate(noisy, "language.0/0")})

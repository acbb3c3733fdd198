"""The logit lens: the model's own logits at the last layer, the paper's formula at the others.

References are written here from the definitions: own hooks, norms by hand, weights as they are.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

import neuronlens as nl
from neuronlens.errors import (
    AdapterError,
    CaptureError,
    DataError,
    SampleError,
    UnknownNameError,
)
from neuronlens.lens import LensReading, LogitLens
from neuronlens.lens.curves import Totals
from neuronlens.lens.decode import Decoder, divergences, entropies, top
from neuronlens.lens.norm import LinearPart
from neuronlens.lens.places import placed
from neuronlens.lens.states import show_states
from neuronlens.lens.words import Words, visible
from neuronlens.tokens import Role, TokenMap
from zoo import entries

ZOO = entries()
LAYERS = 5
"""Of the testbed: embeddings and four decoder layers."""


@pytest.fixture(scope="module")
def lens(vlm) -> LogitLens:
    return LogitLens(vlm)


@pytest.fixture(scope="module")
def batch(vlm, scenes):
    chosen = nl.encode(vlm, scenes[:5])
    assert (chosen.tokens["language"].role == Role.PAD).any()  # of different lengths
    return chosen


@cache
def zoo(name: str) -> tuple[nl.ModelAdapter, dict[str, Any]]:
    entry = ZOO[name]
    model = entry.model()
    assert sum(p.numel() for p in model.parameters()) < 2e6
    return nl.adapt(model), entry.inputs(model, entry.images())


def states_by_hand(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """What enters the first layer of a LLaVA, and what leaves each: [batch, token, hidden]."""
    kept: dict[int, Tensor] = {}
    layers = model.model.language_model.layers
    handles = [
        layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: kept.update({0: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    ]
    for number, layer in enumerate(layers, 1):

        def keep(m: Any, args: Any, out: Any, number: int = number) -> None:
            kept[number] = out if isinstance(out, Tensor) else out[0]

        handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return [kept[i] for i in range(len(layers) + 1)]


def distribution_by_hand(model: Any, state: Tensor) -> Tensor:
    """Eq. (10) in float64: RMS norm with its scale, unembedding, softmax."""
    norm, head = model.model.language_model.norm, model.lm_head
    x = state.detach().double()
    x = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    logits = (x * norm.weight.detach().double()) @ head.weight.detach().double().T
    return logits.softmax(-1)


def entropy_by_hand(p: np.ndarray) -> float:
    return -sum(float(x) * math.log(float(x)) for x in p if x > 0)


def filled(reading: LensReading) -> np.ndarray:
    """Probabilities [layer, token, word] of a reading of all words."""
    out = np.zeros((*reading.ids.shape[:2], reading.words), np.float32)
    np.put_along_axis(out, reading.ids, reading.probabilities, -1)
    return out


# States.


def test_the_last_layer_is_the_models_own_distribution_and_the_others_are_equation_10(
    vlm, lens, batch
):
    reading = lens.read(batch, k=lens.words)
    tokens = batch.tokens["language"]
    with torch.no_grad():
        logits = vlm.model(**batch.inputs).logits
    states = states_by_hand(vlm.model, batch.inputs)
    got = filled(reading)
    assert got.shape == (LAYERS, int((tokens.role != Role.PAD).sum()), 54)
    place = 0
    for row in range(5):
        for column in range(tokens.role.shape[1]):
            if tokens.role[row, column] == Role.PAD:
                continue
            own = logits[row, column].double().softmax(-1).numpy()
            np.testing.assert_allclose(got[-1, place], own, atol=1e-6)
            if place % 29 == 0:
                for layer, state in enumerate(states):
                    want = distribution_by_hand(vlm.model, state[row, column]).numpy()
                    np.testing.assert_allclose(got[layer, place], want, atol=2e-6)
                    assert reading.entropy[layer, place] == pytest.approx(
                        entropy_by_hand(want), abs=2e-5
                    )
            place += 1
    assert (np.diff(reading.probabilities, axis=-1) <= 0).all()


def test_no_state_is_normed_twice(vlm, lens, batch):
    # hidden_states[-1] of transformers is normed already; what the naive lens makes of it is other.
    with torch.no_grad():
        out = vlm.model(**batch.inputs, output_hidden_states=True)
        naive = vlm.decoding.logits(vlm.model, out.hidden_states[-1]).softmax(-1)[0, 0]
    got = filled(lens.read(batch, k=lens.words, layers=[4], positions=[0]))[0, 0]
    assert np.abs(got - naive.numpy()).max() > 1e-2
    np.testing.assert_allclose(got, out.logits[0, 0].softmax(-1).numpy(), atol=1e-6)


SOME = (
    "blip-2+t5",
    "chameleon",
    "deepseek_ocr2",
    "gemma3n",
    "git",
    "glm5_next",
    "paligemma",
    "qwen4_exp",
    "udop",
)
"""Encoder-decoders, masked words, streams, images before the text, labels. All: test_decoding."""


@pytest.mark.parametrize("name", [name for name in SOME if name in ZOO])
def test_layers_0_and_last_of_models_unlike_the_rest(name):
    vlm, inputs = zoo(name)
    lens = LogitLens(vlm)
    decoding, kept = vlm.decoding, {}
    first = vlm.model.get_submodule(decoding.layers[0])
    handles = [
        first.register_forward_pre_hook(
            lambda m, a, k: kept.update(first=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
        vlm.model.register_forward_hook(lambda m, a, out: kept.update(logits=out.logits)),
    ]
    with torch.no_grad():
        vlm.model(**inputs)
    for handle in handles:
        handle.remove()
    reading = lens.read(inputs, k=lens.words, layers=[0, -1])
    tokens = vlm.tokens(inputs)[vlm.answer_stream]
    at = (tokens.role != Role.PAD).flatten()
    with torch.no_grad():
        embedded = decoding.logits(vlm.model, decoding.residual(kept["first"]))
    for row, logits in enumerate((embedded, kept["logits"])):
        assert logits.shape[:2] == tokens.role.shape
        want = logits.flatten(0, 1)[at].double().softmax(-1)
        np.testing.assert_allclose(filled(reading)[row], want.numpy(), rtol=1e-4, atol=2e-6)
        entropy = [entropy_by_hand(p) for p in want.numpy()]
        np.testing.assert_allclose(reading.entropy[row], entropy, atol=1e-4)
    assert reading.layers == (0, len(decoding.layers))
    assert reading.texts[7] == "<7>"  # there is no tokenizer
    if vlm.answer_stream != "language":
        with pytest.raises(UnknownNameError, match=r"visual position.*Known: \(none\)"):
            lens.read(inputs, positions=[("visual", 0)])


@pytest.mark.parametrize("name", sorted({"pi0", "inkling2"} & set(ZOO)))
def test_a_model_whose_states_have_no_logits_is_refused_with_the_reason(name):
    with pytest.raises(AdapterError, match=r"no unembedding|no function of its last"):
        LogitLens(nl.adapt(ZOO[name].model("meta")))


def test_a_model_without_weights_is_refused():
    with pytest.raises(AdapterError, match="meta device"):
        LogitLens(nl.adapt(ZOO["llava"].model("meta")))


def test_a_model_that_drops_out_is_refused_also_later(bed):
    model = copy.deepcopy(bed.model)
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    lens = LogitLens(nl.adapt(model, bed.processor))
    model.train()
    with pytest.raises(AdapterError, match="training mode"):
        LogitLens(nl.adapt(model, bed.processor))
    with pytest.raises(AdapterError, match="training mode"):
        lens.read(dict(input_ids=torch.tensor([[5, 6]])))


def test_token_maps_of_other_inputs_are_noticed(vlm, batch):
    with pytest.raises(CaptureError, match=r"Layer 0 ran on \(5, \d+\) tokens"):
        show_states(
            vlm, batch.inputs, torch.Size((5, 7)), torch.tensor([0]), [0], lambda layer, s: None
        )


def test_no_hook_is_left_also_when_a_reducer_raises(vlm, batch):
    def halt(layer: int, states: Tensor) -> None:
        raise ArithmeticError

    def hooks() -> int:  # transformers leaves some of its own
        every = vlm.model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in every)

    tokens, before = batch.tokens["language"], hooks()
    with pytest.raises(ArithmeticError):
        show_states(vlm, batch.inputs, tokens.role.shape, torch.tensor([0]), [2], halt)
    assert hooks() == before


def test_a_reading_inside_a_deactivation_is_of_the_changed_model(vlm, lens, scenes):
    def read() -> LensReading:
        return lens.show(scenes[0], k=lens.words, position=("response", 4))

    at = int(read().positions[0])
    neurons = [f"language.1/{i}" for i in range(300)]
    before = filled(read())
    with nl.deactivate(vlm, neurons):
        inside = filled(read())
        with torch.no_grad():
            own = vlm.model(**nl.encode(vlm, [scenes[0]]).inputs).logits[0, at].softmax(-1)
    np.testing.assert_array_equal(inside[:2], before[:2])  # before layer 1 of the sites
    assert np.abs(inside[2] - before[2]).max() > 1e-4
    np.testing.assert_allclose(inside[-1, 0], own.numpy(), atol=1e-6)
    np.testing.assert_array_equal(filled(read()), before)


# From logits to numbers.


def test_entropy_and_candidates_of_three_distributions_by_hand():
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor(
        [[0.0, 0, 0, 0], [math.log(2), 0, 0, lowest], [5.0, -math.inf, lowest, -math.inf]]
    )
    log = logits.log_softmax(-1).clamp(min=-1e30)
    want = [math.log(4), 1.5 * math.log(2), 0]
    torch.testing.assert_close(entropies(log.clone()), torch.tensor(want))
    ids, p = top(log[1:2], 2)
    assert ids[0, 0] == 0
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.25]]))


def test_divergence_by_hand_is_zero_for_equals_and_finite_for_impossible_words():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    low = -1e30
    log_p, log_q = p.log().clamp(min=low), q.log().clamp(min=low)
    assert divergences(log_p, log_p).tolist() == [0.0]
    assert divergences(log_p, log_q).item() == pytest.approx(0.5 * math.log(2))
    assert math.isfinite(divergences(log_q, log_p).item())


@given(
    st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=30),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_entropy_lies_between_zero_and_the_logarithm_of_the_number_of_words(values, masked):
    logits = torch.tensor([values + [torch.finfo(torch.float32).min] * masked])
    entropy = entropies(logits.log_softmax(-1).clamp(min=-1e30)).item()
    p = torch.tensor(values, dtype=torch.float64).softmax(0).numpy()
    assert entropy == pytest.approx(entropy_by_hand(p), abs=1e-4)
    assert -1e-6 <= entropy <= math.log(len(values)) + 1e-5


def test_masked_words_give_no_nan_and_no_probability():
    vlm, inputs = zoo("chameleon")
    reading = LogitLens(vlm).read(inputs, k=160)
    assert np.isfinite(reading.entropy).all()
    masked = list(vlm.decoding.masked)
    assert masked
    assert (filled(reading)[..., masked] == 0).all()


# Memory.


class Largest(TorchDispatchMode):
    """Notes the shapes of all tensors whose last axis are words, but for the weights."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.rows = words, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            is_words = isinstance(each, Tensor) and each.ndim and each.shape[-1] == self.words
            if is_words and tuple(each.shape) != (128, self.words):  # the weights, transposed
                self.rows = max(self.rows, each.numel() // self.words)
        return out


@pytest.mark.parametrize("compare", [False, True], ids=["alone", "compared"])
def test_no_tensor_of_more_than_a_chunk_times_the_vocabulary_is_made(vlm, scenes, compare):
    small = LogitLens(vlm, memory=7 * 24 * 54)
    with Largest(54) as spy:
        curves = small.entropy(scenes[:6], batch_size=4, compare=compare, resamples=0)
    assert spy.rows == 7
    whole = LogitLens(vlm).entropy(scenes[:6], batch_size=4, compare=compare, resamples=0)
    np.testing.assert_allclose(curves.mean, whole.mean, atol=1e-6)


def test_the_budget_holds_the_tensors_of_a_chunk(vlm):
    # The most at once: logits, in float32, their softmax, exponents, and two of the last layer's.
    assert Decoder(vlm, 24 * 54 * 10).size == 10
    assert Decoder(vlm, 1).size == 1
    with pytest.raises(ValueError, match="memory is 0"):
        LogitLens(vlm, memory=0)


@pytest.mark.parametrize("memory", [1, 24 * 54 * 11])
def test_the_chunk_changes_nothing(vlm, lens, batch, memory):
    few = LogitLens(vlm, memory=memory).read(batch, positions=[0, 70, -1])
    whole = lens.read(batch, positions=[0, 70, -1])
    np.testing.assert_array_equal(few.ids, whole.ids)
    np.testing.assert_allclose(few.entropy, whole.entropy, atol=1e-6)


# Curves.


def curves_by_hand(vlm, samples, roles) -> dict[tuple[str, str], tuple[np.ndarray, int, int]]:
    """Sample by sample, token by token: by domain and kind, mean entropy by layer, and counts."""
    sums: dict[tuple[str, str], list[list[float]]] = {}
    owners: dict[tuple[str, str], set[str]] = {}
    for sample in samples:
        one = nl.encode(vlm, [sample])
        states = states_by_hand(vlm.model, one.inputs)
        for column, role in enumerate(one.tokens["language"].role[0].tolist()):
            kind = "visual" if role == Role.VISUAL else "text" if role in roles else None
            if kind is None:
                continue
            values = [
                entropy_by_hand(distribution_by_hand(vlm.model, state[0, column]).numpy())
                for state in states
            ]
            sums.setdefault((sample.domain, kind), []).append(values)
            owners.setdefault((sample.domain, kind), set()).add(sample.id)
    return {
        key: (np.mean(values, 0), len(values), len(owners[key])) for key, values in sums.items()
    }


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("prompt", "response"), (Role.PROMPT, Role.RESPONSE)),
        ((Role.RESPONSE,), (Role.RESPONSE,)),
    ],
)
def test_curves_are_the_mean_over_all_tokens_of_a_domain(vlm, lens, scenes, names, roles):
    some = scenes[:7]
    curves = lens.entropy(some, batch_size=3, text_roles=names, resamples=0)
    want = curves_by_hand(vlm, some, roles)
    assert set(curves.groups) == {sample.domain for sample in some}
    assert len(curves.groups) > 1
    for g, group in enumerate(curves.groups):
        for k, kind in enumerate(("visual", "text")):
            mean, tokens, samples = want[group, kind]
            np.testing.assert_allclose(curves.curve(kind, group), mean, atol=2e-5)
            assert (curves.tokens[g, k], curves.samples[g, k]) == (tokens, samples)
    assert np.isnan(curves.interval).all()


@pytest.mark.parametrize("size", [1, 5, 24])
def test_curves_do_not_depend_on_the_batching(lens, scenes, size):
    whole = lens.entropy(scenes[:8], by=None)
    other = lens.entropy(scenes[:8], by=None, batch_size=size)
    assert whole.groups == ("all",)
    np.testing.assert_allclose(other.mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(other.interval, whole.interval, atol=1e-5)


def test_groups_are_whatever_a_function_says_and_samples_without_a_domain_are_a_group(lens, scenes):
    by = lens.entropy(scenes[:4], by=lambda s: s.id[-1], resamples=0)
    assert by.groups == tuple(dict.fromkeys(s.id[-1] for s in scenes[:4]))
    bare = nl.Sample("bare", scenes[0].images, "describe the image .")
    assert lens.entropy([bare, scenes[1]], resamples=0).groups == ("(none)", scenes[1].domain)
    with pytest.raises(UnknownNameError, match="grouping 'label'"):
        lens.entropy(scenes[:1], by="label")


def test_a_mean_weights_tokens_and_its_interval_draws_samples():
    totals = Totals(layers=1, measures=1)
    totals.add("a", "1", np.array([1]), np.array([[[0.0]]]))
    totals.add("a", "2", np.array([1, 1, 1]), np.array([[[3.0], [4.0], [5.0]]]))
    totals.add("b", "3", np.array([0]), np.array([[[2.0]]]))
    args: dict[str, Any] = dict(words=9, text_roles=(Role.PROMPT,), skipped={}, seed=0)
    curves = totals.curves([0], resamples=2000, **args)
    assert curves.curve("text", "a").tolist() == [3.0]  # 12 over 4 tokens; not 2, of two samples
    # Two of two: 0, 12/4 or 4, of which the outer two come in a quarter of the draws each.
    assert curves.interval[0, 1, 0].tolist() == [0.0, 4.0]
    assert np.isnan(curves.curve("visual", "a")).all()
    assert np.isnan(curves.interval[1]).all()
    assert curves.tokens.tolist() == [[0, 4], [1, 0]]
    assert curves.samples.tolist() == [[0, 2], [1, 0]]
    again = totals.curves([0], resamples=2000, **args)
    np.testing.assert_array_equal(again.interval, curves.interval)


def test_the_interval_is_as_wide_as_samples_differ_and_not_as_tokens_do():
    rng = np.random.default_rng(0)
    totals = Totals(layers=1, measures=1)
    levels = rng.normal(size=40)
    for level in levels:
        totals.add("a", str(level), np.zeros(500, int), np.full((1, 500, 1), level))
    curves = totals.curves([0], words=9, text_roles=(), skipped={}, resamples=1000, seed=1)
    width = np.ptp(curves.interval[0, 0, 0])
    assert width == pytest.approx(2 * 1.96 * levels.std() / math.sqrt(40), rel=0.15)


def test_samples_of_the_same_images_are_drawn_together():
    rng = np.random.default_rng(0)
    images = rng.normal(size=20)
    one, several = Totals(layers=1, measures=1), Totals(layers=1, measures=1)
    for image, level in enumerate(images):
        for totals, questions in ((one, 1), (several, 8)):
            for _ in range(questions):
                totals.add("a", str(image), np.zeros(5, int), np.full((1, 5, 1), level))
    how = dict(words=9, text_roles=(), skipped={}, resamples=500, seed=0)
    intervals = [totals.curves([0], **how).interval for totals in (one, several)]
    np.testing.assert_allclose(intervals[0], intervals[1])


def test_the_interval_weights_tokens_as_the_mean_does():
    totals = Totals(layers=1, measures=1)
    for number in range(12):  # short samples at 0, long ones at 1
        tokens = 99 if number % 2 else 1
        totals.add(
            "a", str(number), np.ones(tokens, int), np.full((1, tokens, 1), float(number % 2))
        )
    curves = totals.curves([0], words=9, text_roles=(), skipped={}, resamples=500, seed=0)
    low, high = curves.interval[0, 1, 0]
    assert 0.9 < low < curves.mean[0, 1, 0] == 594 / 600 < high <= 1


def test_compared_with_the_last_layer_it_is_itself_and_the_others_are_kl(vlm, lens, scenes):
    curves = lens.entropy(scenes[:3], by=None, compare=True, resamples=0)
    assert curves.divergence is not None
    assert curves.agreement is not None
    np.testing.assert_allclose(curves.divergence[..., -1], 0, atol=1e-7)
    assert (curves.agreement[..., -1] == 1).all()
    kl, agree = [], []
    for sample in scenes[:3]:
        one = nl.encode(vlm, [sample])
        states = states_by_hand(vlm.model, one.inputs)
        last, at_2 = (distribution_by_hand(vlm.model, states[i][0]) for i in (-1, 2))
        visual = one.tokens["language"].role[0] == Role.VISUAL
        kl += (last * (last / at_2).log()).sum(-1)[visual].tolist()
        agree += (last.argmax(-1) == at_2.argmax(-1))[visual].tolist()
    assert curves.divergence[0, 0, 2] == pytest.approx(np.mean(kl), abs=1e-5)
    assert curves.agreement[0, 0, 2] == pytest.approx(np.mean(agree), abs=1e-9)
    assert lens.entropy(scenes[:1], resamples=0).divergence is None


def test_chosen_layers_are_those_of_the_whole_and_others_are_an_error(lens, scenes):
    whole = lens.entropy(scenes[:2], by=None, resamples=20)
    some = lens.entropy(scenes[:2], by=None, resamples=20, layers=[-1, 0, 0])
    assert some.layers == (0, 4)
    np.testing.assert_allclose(some.mean, whole.at((0, 4)).mean, atol=1e-6)
    assert whole.at((4, 0)).layers == (4, 0)
    np.testing.assert_array_equal(whole.at((4, 0)).interval[..., 0, :], whole.interval[..., 4, :])
    frame = whole.at((0, 4)).table()
    assert list(frame.columns[:4]) == ["group", "kind", "layer", "entropy"]
    assert len(frame) == 4
    assert frame.entropy[3] == whole.mean[0, 1, 4]
    for wrong in (
        lambda: whole.at([9]),
        lambda: whole.curve("audio"),
        lambda: whole.curve("text", "x"),
    ):
        with pytest.raises(UnknownNameError, match="Known: "):
            wrong()
    assert "layer 4" in whole._repr_html_()
    assert "2 samples" in whole._repr_html_()


def test_a_sample_that_cannot_be_used_is_left_out_by_name(lens, scenes, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    torn = nl.Sample("torn", (tmp_path / "torn.png",), "describe the image .")
    curves = lens.entropy([scenes[0], torn, scenes[1]], by=None, batch_size=3)
    assert list(curves.skipped) == ["torn"]
    assert curves.skipped["torn"].reason == "corrupt image"
    assert curves.samples.tolist() == [[2, 2]]
    assert "1 samples skipped" in curves._repr_html_()
    with pytest.raises(SampleError, match="torn"):
        lens.entropy([torn])
    with pytest.raises(ValueError, match="No samples"):
        lens.entropy([])


def test_a_sample_whose_states_are_not_finite_is_left_out_by_name(bed, scenes):
    model = copy.deepcopy(bed.model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # no longer tied
    word = bed.processor.tokenizer.convert_tokens_to_ids("purple")
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = math.nan
    lens = LogitLens(nl.adapt(model, bed.processor))
    bad = [s.id for s in scenes[:8] if "purple" in s.prompt + s.response]
    curves = lens.entropy(scenes[:8], by=None, batch_size=4)
    assert 0 < len(bad) < 8
    assert list(curves.skipped) == bad
    assert {e.reason for e in curves.skipped.values()} == {"non-finite states"}
    assert np.isfinite(curves.mean).all()
    assert curves.samples[0, 0] == 8 - len(bad)


def test_text_is_less_spread_than_image_in_the_trained_model_and_not_in_the_untrained(
    lens, untrained_vlm, scenes
):
    # P2, section 4.2.3, on the testbed; the control has no such curve.
    trained = lens.entropy(scenes[:12], by=None)
    control = LogitLens(untrained_vlm).entropy(scenes[:12], by=None)
    gap = trained.curve("visual") - trained.curve("text")
    assert (gap[1:] > 0.5).all()
    assert np.abs(control.curve("visual") - control.curve("text"))[1:].max() < 0.5
    assert trained.curve("text")[-1] < 0.5 < control.curve("text")[-1]


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (dict(batch_size=0), ValueError, "batch_size is 0"),
        (dict(resamples=-1), ValueError, "resamples -1"),
        (dict(layers=[5]), UnknownNameError, r"layer '5'. Known: 0 \(embeddings\) to 4"),
        (dict(layers=[-6]), UnknownNameError, "layer '-6'"),
        (dict(layers=["norm"]), UnknownNameError, "layer 'norm'.*Layers are numbers"),
        (dict(layers=[]), ValueError, "No layers given"),
        (dict(text_roles=["caption"]), UnknownNameError, "kind of token 'caption'"),
        (dict(text_roles=["visual"]), ValueError, "only text"),
    ],
)
def test_what_cannot_be_averaged_is_refused_at_once(lens, wrong, error, says):
    with pytest.raises(error, match=says):
        lens.entropy([], **wrong)


# Readings.


def test_one_token_is_shown_as_the_paper_names_it(vlm, lens, scenes):
    tokens = nl.encode(vlm, [scenes[0]]).map_of(0)
    visual = (tokens.role == Role.VISUAL).nonzero().flatten()
    second = lens.show(scenes[0], position=("visual", 1), k=3)
    assert second.positions.tolist() == [int(visual[1])]
    assert second.ids.shape == (LAYERS, 1, 3)
    assert f"of {scenes[0].id}</div>" in second._repr_html_()
    assert f">{second.probabilities[0, 0, 2]:.2f}</span>" in second._repr_html_()
    assert len(second) == 1
    whole = lens.read(scenes[0], k=3)
    np.testing.assert_array_equal(second.ids[:, 0], whole.ids[:, int(visual[1])])
    last = lens.show(scenes[0])
    text = tokens.is_role(Role.PROMPT, Role.RESPONSE).nonzero().flatten()
    assert last.positions.tolist() == [int(text[-1])]
    word, probability = last.candidates(4, 0)[0]
    assert word == "<eos>"
    assert probability > 0.5


def test_positions_leave_padding_out_on_either_side():
    role = torch.tensor([[0, 0, 1, 4, 4, 2, 3], [1, 4, 2, 2, 3, 0, 0]])
    tokens = TokenMap(
        role, torch.arange(2)[:, None].expand(2, 7), torch.zeros_like(role), torch.zeros(2, 7, 4)
    )
    assert placed(tokens, 0, None).tolist() == [0, 1, 2, 3, 4]
    assert placed(tokens, 0, [("visual", 1), ("text", -1), -1, 0]).tolist() == [2, 4, 4, 0]
    assert placed(tokens, 1, [("text", 0), ("response", 0), ("special", 0)]).tolist() == [2, 4, 0]
    for wrong, says in [
        (5, r"token position in sample 0.*Known: -5 to 4"),
        (("visual", 2), "Known: -2 to 1"),
        (("sound", 0), "kind of token 'sound'"),
    ]:
        with pytest.raises(UnknownNameError, match=says):
            placed(tokens, 0, [wrong])


def test_a_batch_is_read_sample_by_sample(lens, batch, scenes):
    whole = lens.read(batch, layers=-1)
    assert whole.layers == (4,)
    assert whole.samples == batch.samples
    for row in (0, 3):
        mine, alone = whole.of(row), lens.read(scenes[row], layers=[4])
        np.testing.assert_array_equal(mine.positions, alone.positions)
        np.testing.assert_allclose(mine.entropy, alone.entropy, atol=1e-4)
        assert mine.tokens.pieces == alone.tokens.pieces == batch.pieces(row)
        assert mine.samples == (scenes[row],)
        torch.testing.assert_close(mine.tokens.role, alone.tokens.role)
    with pytest.raises(UnknownNameError, match="sample in this reading '9'"):
        whole.of(9)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (dict(k=0), ValueError, "k is 0. Give 1 to 54"),
        (dict(k=55), ValueError, "k is 55"),
        (dict(layers=[7]), UnknownNameError, "layer '7'"),
        (dict(positions=[]), ValueError, "No positions"),
        (dict(positions=[10**6]), UnknownNameError, "token position"),
        (dict(positions=[("response", 999)]), UnknownNameError, "response position"),
    ],
)
def test_what_cannot_be_read_is_refused(lens, scenes, wrong, error, says):
    with pytest.raises(error, match=says):
        lens.read(scenes[0], **wrong)


def test_a_batch_of_another_model_and_samples_without_a_processor_are_refused(
    vlm, lens, untrained_vlm, scenes
):
    with pytest.raises(AdapterError, match="another model"):
        lens.read(nl.encode(untrained_vlm, [scenes[0]]))
    bare = LogitLens(nl.adapt(vlm.model))
    for ask in (bare.read, lambda s: bare.entropy([s])):
        with pytest.raises(AdapterError, match=r"need a processor.*adapt\(model, processor\)"):
            ask(scenes[0])


def test_bare_inputs_are_read_like_the_samples_they_come_from(lens, batch):
    bare = lens.read(batch.inputs, layers=[2])
    np.testing.assert_array_equal(bare.ids, lens.read(batch, layers=[2]).ids)
    assert bare.samples == ()
    assert bare.tokens.pieces is not None


def handmade(texts: list[str], tokens: int = 1) -> LensReading:
    ids = np.tile(np.arange(len(texts)), (2, tokens, 1))
    p = np.tile(np.linspace(0.9, 0.1, len(texts)), (2, tokens, 1))
    one = torch.full((tokens,), 2)
    map_ = TokenMap(one, one * 0, one * 0 - 1, torch.zeros(tokens, 4), ("<b>",) * tokens)
    entropy = np.zeros((2, tokens))
    names = dict(enumerate(texts))
    return LensReading((0, 1), ids, p, entropy, map_, np.arange(tokens), names, len(texts))


def test_tokens_are_text_in_html_whatever_they_look_like():
    page = handmade(["<script>alert(1)</script>", "</s>", " no", "a\nb", ""])._repr_html_()
    assert "<script>" not in page
    assert "</s>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;/s&gt;" in page
    assert "&lt;b&gt;" in page
    assert "\u2423no" in page
    assert "a\u23ceb" in page
    assert "\u2205" in page
    assert page.index("embeddings") > page.index(">1</th><td")  # the last layer is on top
    several = handmade(["x", "y"], tokens=50)._repr_html_()
    assert "at 40 of 50 tokens" in several
    assert several.count("<td") == 2 * 40


def test_candidates_of_what_was_not_read_are_an_error():
    reading = handmade(["x", "y"])
    assert reading.candidates(1, -1) == [("x", 0.9), ("y", pytest.approx(0.1))]
    with pytest.raises(UnknownNameError, match=r"layer in this reading '2'\. Known: 0, 1"):
        reading.candidates(2, 0)
    with pytest.raises(UnknownNameError, match="token in this reading '1'"):
        reading.candidates(0, 1)


# Words.


def sentencepiece_like() -> PreTrainedTokenizerFast:
    vocab = {
        "<unk>": 0,
        "</s>": 1,
        "\u2581": 2,
        "\u2581no": 3,
        "no": 4,
        "<0xE2>": 5,
        "\u2581red": 6,
    }
    tokenizer = Tokenizer(models.Unigram([(w, -float(i)) for w, i in vocab.items()], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def bytes_like() -> PreTrainedTokenizerFast:
    words = [
        "<|end|>",
        "r",
        "e",
        "d",
        "re",
        "red",
        "\u0120",
        "\u0120red",
        "\u010a",
        "\u00e2",
        "\u00e2\u013a",
    ]
    merges = [("r", "e"), ("re", "d"), ("\u0120", "red")]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def test_words_of_sentencepiece_and_of_bytes_read_as_text():
    words = Words(SimpleNamespace(tokenizer=sentencepiece_like()))
    assert [words.text(i) for i in (1, 3, 4, 6)] == ["</s>", " no", "no", " red"]
    assert words.text(5) == "<0xE2>"
    assert words.text(7) == "<7>"
    assert (words.number("red"), words.number("no")) == (6, 3)
    words = Words(SimpleNamespace(tokenizer=bytes_like()))
    assert [words.text(i) for i in (0, 5, 7, 8)] == ["<|end|>", "red", " red", "\n"]
    assert words.text(9) == "\u00e2"  # a byte of a character, as the tokenizer writes it
    assert (words.number("red"), words.number(" red")) == (7, 7)
    with pytest.raises(UnknownNameError, match=r"single token for the word 'deer'.*'d', 'e'"):
        words.number("deer")
    assert visible(" a\n\tb") == "\u2423a\u23ce\u21e5b"


def test_a_word_is_one_known_token_or_refused(lens, vlm):
    assert lens.contributions(["language.0/0"], ["red"]).shape == (1, 1)
    for word in ("crimson", "red circle", ""):
        with pytest.raises(UnknownNameError, match="single token for the word"):
            lens.writers(word)
    with pytest.raises(UnknownNameError, match=r"word '54'\. Known: 0 to 53"):
        lens.writers(54)
    with pytest.raises(AdapterError, match="need a tokenizer"):
        LogitLens(nl.adapt(vlm.model)).writers("red")


# What neurons write.


def column_by_hand(vlm: nl.ModelAdapter, neuron: nl.NeuronId) -> Tensor:
    """The down projection's column, from the weights as the source lays them out."""
    tap: Any = vlm.tap(vlm.site(neuron.site))
    if neuron.expert is not None:
        weight = vlm.model.get_submodule(tap.path).down_proj[neuron.expert]
        by_input = type(vlm.model.get_submodule(tap.path)).__name__ in TRANSPOSED
        return weight[neuron.index] if by_input else weight[:, neuron.index]
    down = vlm.model.get_submodule(tap.down)
    return down.weight[neuron.index] if hasattr(down, "nf") else down.weight[:, neuron.index]


TRANSPOSED = ("GptOssExperts", "Llama4TextExperts")

WRITING = (
    "blip-2",  # OPT: biases, LayerNorm
    "blip-2+t5",  # the decoder of two stacks, whose states are scaled
    "chameleon",  # masked words
    "cohere2_vision",  # scaled logits, LayerNorm without a bias
    "internvl+gpt_oss",  # experts, transposed, with biases
    "llama4",  # experts, transposed
    "llava",
    "qwen3_vl_moe",  # experts
    "vision-encoder-decoder",  # GPT-2: transposed weights, LayerNorm
)


@pytest.mark.parametrize("norm", ["scale", "none"])
@pytest.mark.parametrize("name", [name for name in WRITING if name in ZOO])
def test_what_a_neuron_writes_is_its_column_times_the_unembedding(name, norm):
    vlm, _ = zoo(name)
    lens, decoding = LogitLens(vlm), vlm.decoding
    unembedding = vlm.model.get_submodule(decoding.unembedding).weight
    final = vlm.model.get_submodule(decoding.norm)
    sites = [s for s in vlm.select("language") if s.stream == vlm.answer_stream]
    for site in (sites[0], sites[-1]):
        neuron = site.neuron(5, 1 if site.experts else None)
        column = column_by_hand(vlm, neuron)
        if norm == "scale":
            if "LayerNorm" in type(final).__name__ and not name.endswith("t5"):
                column = column - column.mean()
            column = column * final.weight
        want = (unembedding @ column)[: lens.words] * decoding.scale * decoding.state_scale
        want[list(decoding.masked)] = 0
        got = lens.contributions([neuron], norm=norm)[0]
        torch.testing.assert_close(torch.tensor(got), want.detach(), rtol=1e-4, atol=1e-5)
        written = lens.writes(neuron, k=4, norm=norm)
        can_come = [i for i in range(lens.words) if i not in decoding.masked]
        order = sorted(can_come, key=lambda i: -got[i])
        assert written.raised.tolist() == order[:4]
        assert written.lowered.tolist() == order[::-1][:4]
        np.testing.assert_array_equal(written.raised_by, got[order[:4]])
        assert written.mean == pytest.approx(got[can_come].mean(), abs=1e-6)


def test_the_heads_factors_count_and_its_cap_does_not(vlm, lens):
    scaled = copy.copy(vlm)
    scaled.decoding = replace(vlm.decoding, scale=0.25, state_scale=3.0, cap=2.0)
    got = LogitLens(scaled).contributions(["language.2/9"])
    np.testing.assert_allclose(got, 0.75 * lens.contributions(["language.2/9"]), atol=1e-6)
    (neuron, value), *_ = LogitLens(scaled).writers(33, n=1)
    assert (neuron, pytest.approx(value / 0.75, abs=1e-5)) == lens.writers(33, n=1)[0]


def test_norms_behind_a_block_pass_its_columns_on():
    # Gemma 4 with experts: each block's own norm, then that of their sum; by hand.
    vlm, _ = zoo("gemma4+moe")
    lens = LogitLens(vlm)
    layer = vlm.model.get_submodule(vlm.decoding.layers[1])
    final = vlm.model.get_submodule(vlm.decoding.norm)
    unembedding = vlm.model.get_submodule(vlm.decoding.unembedding).weight
    for site in [s for s in vlm.select("language") if s.layer == 1]:
        neuron = site.neuron(3, 2 if site.experts else None)
        own = (
            layer.post_feedforward_layernorm_2
            if site.experts
            else layer.post_feedforward_layernorm_1
        )
        scale = own.weight * layer.post_feedforward_layernorm.weight * final.weight
        want = (unembedding @ (column_by_hand(vlm, neuron) * scale)).detach()
        got = torch.tensor(lens.contributions([neuron])[0])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    brute = lens.contributions(
        [site.neuron(i, e) for e in range(site.experts) for i in range(4)], [9]
    )
    assert np.abs(brute).max() > 0
    found = dict(lens.writers(9, n=10**6, sites=[site], relative=False))
    assert len(found) == site.neurons
    for (index, expert), value in zip(
        ((i, e) for e in range(site.experts) for i in range(4)), brute[:, 0], strict=True
    ):
        assert found[site.neuron(index, expert)] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("hidden", [6, 7])
@pytest.mark.parametrize("kind", ["layer", "rms", "one plus"])
def test_the_linear_part_of_a_norm_is_its_scale_and_centring(kind, hidden):
    torch.manual_seed(1)
    norm: Any = nn.LayerNorm(hidden) if kind == "layer" else nn.RMSNorm(hidden)
    nn.init.normal_(norm.weight)
    weight = norm.weight.detach().clone()
    if kind == "layer":
        nn.init.normal_(norm.bias)
    if kind == "one plus":  # Gemma's: the scale is 1 + weight

        class Plus(nn.RMSNorm):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.rms_norm(x, (hidden,), 1 + self.weight, 1e-6)

        norm = Plus(hidden)
        norm.weight.data = weight - 1
    part, x = LinearPart(norm, hidden), torch.randn(3, hidden)
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    torch.testing.assert_close(part(x), centred * weight, rtol=1e-4, atol=1e-5)
    d = torch.randn(hidden, 2)
    torch.testing.assert_close(x @ part.back(d), part(x) @ d, rtol=1e-4, atol=1e-5)
    # Of a large state of length 1, a small addition is passed on like that, its length held.
    state = torch.randn(hidden, dtype=torch.float64)
    state = state - state.mean() if kind == "layer" else state
    state = state / state.square().mean().sqrt()
    small = 1e-4 * x[0].double()
    small = small - (small @ state) / (state @ state) * state  # the length is held to first order
    if kind == "layer":
        small = small - small.mean()
    moved = norm.double()(torch.stack([state + small, state]))
    torch.testing.assert_close(
        (moved[0] - moved[1]).detach(), part(small), rtol=1e-3, atol=1e-7, check_dtype=False
    )


def test_in_the_running_model_a_neuron_adds_its_contribution_over_the_states_length(bed, scenes):
    # The last layer's neuron, one unit more at the last token: what the logits do is predicted.
    model = copy.deepcopy(bed.model).double()
    vlm = nl.adapt(model, bed.processor)
    inputs = nl.encode(vlm, [scenes[0]]).inputs
    lens, index, eps = LogitLens(vlm), 11, 0.03
    down = model.model.language_model.layers[3].mlp.down_proj

    def logits(more: float) -> Tensor:
        def add(m: Any, args: Any) -> tuple[Tensor]:
            changed = args[0].clone()
            changed[..., index] += more
            return (changed,)

        handle = down.register_forward_pre_hook(add)
        with torch.no_grad():
            out = model(**inputs).logits[0, -4]
        handle.remove()
        return out

    state = states_by_hand(model, inputs)[-1][0, -4]
    length = state.square().mean().sqrt()
    # The state grows or shrinks as well, which scales all its logits.
    grows = (state @ down.weight[:, index]).item() / (len(state) * length**2)
    want = (logits(eps) - logits(-eps)) / (2 * eps) + grows * logits(0)
    got = torch.tensor(lens.contributions([f"language.3/{index}"])[0])
    assert want.abs().max() > 0.05
    torch.testing.assert_close(got.double() / length, want, rtol=2e-3, atol=2e-4)


def test_writers_are_the_neurons_of_the_largest_contributions(vlm, lens):
    word = 33
    every = [site.neuron(i) for site in vlm.select("language") for i in range(site.width)]
    logits = lens.contributions(every).astype(float)
    for relative in (True, False):
        value = logits[:, word] - (logits.mean(1) if relative else 0)
        order = np.argsort(-np.abs(value), kind="stable")[:30]
        found = lens.writers(word, n=30, relative=relative)
        assert [neuron for neuron, _ in found] == [every[i] for i in order]
        np.testing.assert_allclose([v for _, v in found], value[order], atol=1e-5)
    assert {v > 0 for _, v in found} == {True, False}
    name = vlm.processor.tokenizer.convert_ids_to_tokens(word)
    assert lens.writers(name, n=30, relative=False) == found
    only = lens.writers(word, n=3, sites="language.2")
    assert {neuron.site for neuron, _ in only} == {"language.2"}
    assert len(lens.writers(word, n=10**6)) == len(every)


def test_measured_writers_are_the_mean_of_what_they_add_before_the_word(vlm, lens, scenes):
    some, word = scenes[:6], 33
    taken: list[Tensor] = []
    down = vlm.model.model.language_model.layers[2].mlp.down_proj
    for sample in some:
        one = nl.encode(vlm, [sample])
        kept: list[Tensor] = []
        handle = down.register_forward_pre_hook(lambda m, a, kept=kept: kept.append(a[0][0]))
        with torch.no_grad():
            vlm.model(**one.inputs)
        handle.remove()
        ids = one.inputs["input_ids"][0].tolist()
        taken += [kept[0][i] for i in range(len(ids) - 1) if ids[i + 1] == word]
    assert len(taken) > 3
    mean = torch.stack(taken).double().mean(0).numpy()
    unit = lens.contributions([f"language.2/{i}" for i in range(384)]).astype(float)
    value = mean * (unit[:, word] - unit.mean(1))
    found = lens.writers(word, n=20, sites="language.2", samples=some, batch_size=4)
    order = np.argsort(-value)[:20]
    assert [neuron.index for neuron, _ in found] == order.tolist()
    np.testing.assert_allclose([v for _, v in found], value[order], rtol=1e-4)
    assert vlm.neuron_kind == "act_fn"  # it was read elsewhere, and nothing is left of that
    visual = lens.writers(word, n=5, sites="language.2", samples=some, at="visual")
    assert visual != found[:5]
    assert visual == lens.writers(word, n=5, sites="language.2", samples=some, at=["visual"])


def test_measured_writers_say_which_samples_were_left_out_and_what_is_missing(
    lens, scenes, tmp_path
):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    torn = nl.Sample("torn", (tmp_path / "torn.png",), "describe the image .")
    with pytest.warns(UserWarning, match="1 samples were left out: torn"):
        lens.writers("red", n=2, samples=[*scenes[:6], torn], at="all")
    with pytest.raises(SampleError, match="torn"):
        lens.writers("red", samples=[torn])
    with pytest.raises(DataError, match=r"followed by '<pad>'.*at='all'"):
        lens.writers(0, samples=scenes[:2])
    with pytest.raises(UnknownNameError, match="kind of token 'sound'"):
        lens.writers("red", samples=scenes[:2], at="sound")


def test_routed_inputs_count_zero_where_a_token_goes_elsewhere():
    vlm, inputs = zoo("qwen3_vl_moe")
    from neuronlens.lens.inputs import MeanInputs
    from neuronlens.samples import Batch

    site = next(s for s in vlm.select("language") if s.experts)
    batch = Batch(inputs, vlm.tokens(inputs), (), vlm)
    mean = MeanInputs(vlm, [site])
    mean.run([batch], lambda b: b.tokens["language"].role != Role.PAD)
    by = nl.adapt(vlm.model, neuron="down_input")
    with torch.no_grad(), nl.ActivationRecorder(by, site) as recorder:
        vlm.model(**inputs)
    dense = recorder.activations[site.name].dense()
    at = batch.tokens["language"].role != Role.PAD
    want = dense[at].nan_to_num().double().mean(0).flatten()
    assert dense[at].isnan().any()
    assert mean.tokens == int(at.sum())
    torch.testing.assert_close(mean.mean(site), want)


class NoBackward(nn.Module):
    """A projection in whole numbers, such as quantised models have."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("whole", (linear.weight.detach() * 100).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ (self.whole.float().T / 100) + 0.5


def test_projections_that_cannot_be_run_backward_are_run_forward(bed):
    model = copy.deepcopy(bed.model)
    mlp = model.model.language_model.layers[2].mlp
    mlp.down_proj = NoBackward(mlp.down_proj)
    lens = LogitLens(nl.adapt(model, bed.processor))
    weight = mlp.down_proj.whole.float() / 100
    scale = model.model.language_model.norm.weight
    want = ((model.lm_head.weight * scale) @ weight).detach()
    got = lens.contributions(["language.2/7"])[0]
    torch.testing.assert_close(torch.tensor(got), want[:, 7], rtol=1e-4, atol=1e-5)
    found = lens.writers(33, n=384, sites="language.2", relative=False)
    assert found[0][1] == pytest.approx(
        float(want[33].abs().max()) * np.sign(found[0][1]), abs=1e-4
    )
    assert all(v == pytest.approx(float(want[33, n.index]), abs=1e-4) for n, v in found)


def test_columns_are_the_models_own_also_where_hooks_change_what_runs(vlm, lens, batch):
    free = lens.writes("language.1/5"), lens.writers(33, n=5)
    off = ["language.1/5", *[neuron for neuron, _ in free[1]]]
    downs = [layer.mlp.down_proj for layer in vlm.model.model.language_model.layers]
    zeroing = [d.register_forward_pre_hook(lambda m, a: (a[0] * 0,)) for d in downs]
    with nl.deactivate(vlm, off), torch.inference_mode():
        inside = lens.writes("language.1/5"), lens.writers(33, n=5)
        vlm.model(**batch.inputs)
    for handle in zeroing:
        handle.remove()
    np.testing.assert_array_equal(free[0].raised_by, inside[0].raised_by)
    assert free[1] == inside[1]


def test_what_a_neuron_writes_shows_itself_with_its_words(lens):
    written = lens.writes("language.3/5", k=3)
    assert written.words() == [written.texts[int(i)] for i in written.raised]
    page = written._repr_html_()
    assert "language.3/5" in page
    assert "per unit" in page
    assert f"{written.raised_by[0]:+.3f}" in page
    assert f"{written.lowered_by[2]:+.3f}" in page
    assert "&lt;" in page  # <image> or <unk> is among them, as text
    assert "<image>" not in page
    assert "<unk>" not in page


@pytest.mark.parametrize(
    ("neuron", "error", "says"),
    [
        ("vision.1/5", AdapterError, "vision.1 write no words: they are the vision's"),
        ("projector.0/5", AdapterError, "write no words"),
        ("language.9/5", UnknownNameError, "site 'language.9'"),
        ("language.1/384", UnknownNameError, "neuron in language.1 '384'"),
        ("language.1/e0/3", UnknownNameError, "expert in language.1"),
    ],
)
def test_neurons_that_write_no_words_are_refused(lens, neuron, error, says):
    with pytest.raises(error, match=says):
        lens.writes(neuron)


def test_what_has_no_logits_of_its_own_is_refused_with_the_reason():
    vlm, _ = zoo("blip-2+t5")  # the encoder's neurons
    lens = LogitLens(vlm)
    with pytest.raises(AdapterError, match=r"they run on 'language', not on 'language\.decoder'"):
        lens.writes("language.0/3")
    assert {n.site for n, _ in lens.writers(5, n=500)} == {
        "language.decoder.0",
        "language.decoder.1",
    }
    with pytest.raises(AdapterError, match="write no words"):
        lens.writers(5, sites="vision")
    for name, says in [
        ("gemma3n", "several residual streams"),
        ("vision-encoder-decoder+bert", "is not linear"),
    ]:
        vlm, _ = zoo(name)
        with pytest.raises(AdapterError, match=says):
            LogitLens(vlm).writes(f"{vlm.select('language')[-1].name}/3")


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda lens: lens.writes("language.1/1", k=55), ValueError, "k is 55"),
        (lambda lens: lens.writes("language.1/1", norm="rms"), UnknownNameError, "Known: scale"),
        (lambda lens: lens.writers("red", n=0), ValueError, "n is 0"),
        (lambda lens: lens.writers("red", at="all"), ValueError, "no samples were given"),
        (lambda lens: LogitLens(lens.adapter.model), AdapterError, r"A Llava.*nl\.adapt"),
        (lambda lens: lens.writers("red", sites="audio"), UnknownNameError, "site 'audio'"),
        (lambda lens: lens.writers("red", batch_size=0), ValueError, "batch_size 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(lens, wrong, error, says):
    with pytest.raises(error, match=says):
        wrong(lens)


def test_a_lens_says_what_it_reads(lens):
    assert repr(lens) == "LogitLens('neuronlens-testbed', 5 layers, 54 words)"
    assert list(lens.layers) == [0, 1, 2, 3, 4]


def test_results_of_the_lens_are_told_in_a_line(lens, scenes):
    assert repr(lens.show(scenes[0], k=3)) == "LensReading(1 tokens, 5 layers, 3 of 54 words)"
    curves = lens.entropy(scenes[:4], by=None, layers=[0, 4], resamples=0)
    text = curves.tokens[0, 1]
    assert repr(curves) == f"EntropyCurves(2 layers, 1 group, 256 visual, {text} text tokens)"
    written = lens.writes("language.3/5", k=4)
    first = f"{written.words()[0]} {written.raised_by[0]:+.2f}, "
    assert repr(written).startswith(f"NeuronWrites(language.3/5: raises {first}")
    assert repr(written).count(", ") == 4


def test_one_neuron_and_one_word_need_no_list(lens):
    one = lens.contributions("language.3/5", "red")
    np.testing.assert_array_equal(one, lens.contributions(["language.3/5"], ["red"]))
    assert one.shape == (1, 1)

"""Answers under interventions: batched as alone, resumed as uninterrupted, intervals as drawn."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import neuronlens as nl
from neuronlens import testbed
from neuronlens.errors import (
    AdapterError,
    DataError,
    InterventionError,
    OutputError,
    SkippedError,
    UnknownNameError,
)
from neuronlens.evaluate import (
    BEAMS,
    GREEDY,
    Answered,
    Evaluation,
    Generation,
    batches,
    evaluate,
)
from neuronlens.evaluate.answers import Writer
from neuronlens.evaluate.resampling import Measured
from neuronlens.evaluate.settings import settings_of
from neuronlens.explanation import Failure
from neuronlens.intervene import amplify, by_sample, deactivate
from neuronlens.metrics import ExactMatch, OptionLetter, VQAAccuracy
from neuronlens.questions import Prompt, Question
from real import Real, reals

PLAIN = Prompt("bare", "{question}", "{question}", template=False)
SHORT = {"max_new_tokens": 4}


class Length:
    """How long an answer is; what cannot be told is a failure."""

    name = "length"
    settings: Mapping[str, object] = {"metric": "length"}

    def __init__(self, fails: Sequence[str] = ()) -> None:
        self.fails = set(fails)
        self.asked: list[tuple[str, str]] = []

    def score(
        self, answers: Sequence[str | None], questions: Sequence[Question]
    ) -> list[Mapping[str, float] | Failure]:
        self.asked += [(each.id, said or "") for each, said in zip(questions, answers, strict=True)]
        return [
            Failure("too hard")
            if each.id in self.fails
            else {"length": float(len(said or "")), "words": float(len((said or "").split()))}
            for each, said in zip(questions, answers, strict=True)
        ]


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return testbed.questions(8, seed=3, domain="colour")


@pytest.fixture(scope="module")
def strong(vlm: nl.ModelAdapter) -> list[nl.NeuronId]:
    """So many neurons that answers change."""
    return [vlm.neuron(layer, i) for layer in (1, 2, 3) for i in range(384) if i % 4]


@pytest.fixture(scope="module")
def conditions(vlm: nl.ModelAdapter, strong: list[nl.NeuronId]) -> dict[str, Any]:
    return {
        "strong": amplify(vlm, strong, -1.0),
        "random": [deactivate(vlm, strong), amplify(vlm, strong, -0.6)],
    }


@pytest.fixture(scope="module")
def evaluation(vlm: Any, asked: list[Question], conditions: dict[str, Any]) -> Evaluation:
    return evaluate(
        vlm, asked, Length(), interventions=conditions, prompt="chat", generation=SHORT, seed=1
    )


def texts(found: Evaluation, condition: str = "none", member: int = 0) -> list[str]:
    return [each.text for each in found.answers[condition][member]]


def generated(vlm: Any, question: Question, **how: Any) -> str:
    """The answer by the model's own generate(), one question alone, with the chat template."""
    processor, model = vlm.processor, vlm.model
    chat = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": question.text}],
        }
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=question.images[0], text=text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, **how)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


# Answers.


@pytest.mark.parametrize("size", [1, 5, 8])
def test_answers_are_those_of_a_plain_generate_whatever_the_batch(vlm, asked, size):
    found = evaluate(vlm, asked, Length(), prompt="chat", generation=SHORT, batch_size=size)
    assert texts(found) == [generated(vlm, each, max_new_tokens=4) for each in asked]
    lengths = {len(vlm.processor.tokenizer(each.text)["input_ids"]) for each in asked}
    assert len(lengths) > 2  # so batches are padded


def test_answers_under_an_intervention_are_those_of_a_plain_generate_within_it(
    vlm, asked, conditions, evaluation
):
    with conditions["strong"]:
        expected = [generated(vlm, each, max_new_tokens=4) for each in asked]
    assert texts(evaluation, "strong") == expected
    assert expected != texts(evaluation)
    with conditions["random"][1]:
        assert texts(evaluation, "random", 1) == [
            generated(vlm, each, max_new_tokens=4) for each in asked
        ]


def test_beams_are_those_of_a_plain_generate(vlm, untrained_vlm, asked):
    # Without training, no hypothesis is much better than another: beams differ from greedy.
    how = Generation(4, num_beams=5, length_penalty=-1.0)
    plain = {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 4, "early_stopping": False}
    for model in (vlm, untrained_vlm):
        found = evaluate(model, asked[:4], Length(), prompt="chat", generation=how, batch_size=4)
        assert texts(found) == [generated(model, each, **plain) for each in asked[:4]]
    greedy = evaluate(untrained_vlm, asked[:4], Length(), prompt="chat", generation=SHORT)
    assert texts(found) != texts(greedy)


def test_the_presets_say_what_they_are():
    assert GREEDY.settings["num_beams"] == 1
    assert GREEDY.settings["do_sample"] is BEAMS.settings["do_sample"] is False
    assert (BEAMS.num_beams, BEAMS.length_penalty, BEAMS.max_new_tokens) == (5, -1.0, 512)
    assert BEAMS.max_length is None
    assert BEAMS.arguments(7) == {
        "do_sample": False,
        "num_beams": 5,
        "max_new_tokens": 7,
        "length_penalty": -1.0,
        "early_stopping": False,
    }
    assert GREEDY.arguments(7) == {"do_sample": False, "num_beams": 1, "max_new_tokens": 7}


REAL = reals()
SOME = (
    "blip",  # counts text from the left
    "blip-2",  # hands its language model embeddings
    "blip-2+t5",  # an encoder-decoder
    "florence2",  # an encoder whose positions are absolute
    "git",  # its tokenizer ends every text
    "instructblip",  # has a second text
    "internvl",
    "janus",  # drops logits processors
    "kosmos-2.5",  # a processor that cannot pad on the left
    "llava",
    "minimax_m3_vl",  # attends to blocks that are counted from the left
    "mllama",
    "pix2struct",  # the prompt is the decoder's
    "qwen2_5_vl",
)
TRIMMED = {"git": 1, "pix2struct": 1}
"""How many tokens behind the prompt end the text, in front of the answer."""


def photo(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize([(150, 100), (90, 160), (120, 120)][number % 3])


def by_steps(real: Real, vlm: Any, question: Question, tokens: int) -> str:
    """The answer by the model's own generate(), whose steps tell how many tokens are new."""
    sample = nl.Sample("alone", question.images, question.text)
    batch = nl.encode(vlm, [sample], template=real.template)
    inputs = dict(batch.inputs)
    if vlm.answer_stream != "language":
        inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    cut = TRIMMED.get(real.name, 0)
    for name in (vlm.text_input, vlm.text_mask):
        inputs[name] = inputs[name][:, : inputs[name].shape[1] - cut]
    told = {"return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        out = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, **told)
    new = out.sequences[0, -len(out.scores) :]
    return str(vlm.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("name", [each for each in SOME if each in REAL])
def test_real_processors_answer_in_batches_as_alone(name, caplog):
    real = REAL[name]
    vlm = nl.adapt(*real.build())
    words = [real.prompt, f"{real.prompt} {real.prompt}", f"this {real.prompt}"]
    several = [Question(str(i), (photo(i),), text) for i, text in enumerate(words)]
    prompt = Prompt("bare", "{question}", "{question}", template=real.template)
    side = vlm.processor.tokenizer.padding_side
    how: dict[str, Any] = {"prompt": prompt, "generation": {"max_new_tokens": 5}}
    together = evaluate(vlm, several, Length(), **how, batch_size=3)
    one_by_one = evaluate(vlm, several, Length(), **how, batch_size=1)
    assert texts(together) == texts(one_by_one)
    assert texts(together) == [by_steps(real, vlm, each, 5) for each in several]
    assert vlm.processor.tokenizer.padding_side == side
    alone = {"blip", "janus", "minimax_m3_vl", "pix2struct"}
    assert ("one by one" in caplog.text) == (name in alone)


def test_a_generate_that_returns_no_prompt_is_read_as_well(vlm, asked, monkeypatch):
    expected = [generated(vlm, each, max_new_tokens=4) for each in asked[:3]]
    plain = vlm.model.generate

    def only_new(**inputs: Any) -> Tensor:
        out: Tensor = plain(**inputs)
        return out[:, inputs["input_ids"].shape[1] :]

    monkeypatch.setitem(vars(vlm.model), "generate", only_new)
    found = evaluate(vlm, asked[:3], Length(), prompt="chat", generation=SHORT)
    assert texts(found) == expected


def test_beams_that_see_something_else_are_refused(vlm, asked, monkeypatch):
    plain = vlm.model.generate

    def mixed_up(**inputs: Any) -> Tensor:
        if inputs["num_beams"] > 1:
            inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
        out: Tensor = plain(**inputs)
        return out

    def broken(**inputs: Any) -> Tensor:
        if inputs["num_beams"] > 1:
            raise ValueError("image features and tokens do not match")
        out: Tensor = plain(**inputs)
        return out

    how = {**SHORT, "num_beams": 2}
    for generate, text in ((mixed_up, "something else than the prompt"), (broken, "cannot follow")):
        monkeypatch.setitem(vars(vlm.model), "generate", generate)
        with pytest.raises(AdapterError, match=f"{text}.*Use one beam"):
            evaluate(vlm, asked[:2], Length(), prompt="chat", generation=how)
        found = evaluate(vlm, asked[:2], Length(), prompt="chat", generation=SHORT)
        assert not found.skipped  # which is what the message advises


def test_nothing_is_left_of_how_it_generated(vlm, asked):
    model, tokenizer = vlm.model, vlm.processor.tokenizer
    before = model.generation_config.to_dict(), tokenizer.padding_side
    model.generation_config.max_length = 77

    class Broken(Length):
        pass

    def halt(*args: Any) -> Any:
        assert tokenizer.padding_side == before[1]
        raise ArithmeticError("halt")

    try:
        hook = model.get_submodule("model.language_model").register_forward_hook(halt)
        with pytest.raises(ArithmeticError):
            evaluate(vlm, asked[:1], Broken(), prompt="chat", generation=SHORT)
        hook.remove()
        assert model.generation_config.max_length == 77
    finally:
        model.generation_config.max_length = before[0]["max_length"]
    evaluate(vlm, asked[:3], Length(), prompt="chat", generation=SHORT)
    assert (model.generation_config.to_dict(), tokenizer.padding_side) == before


def test_transformers_has_nothing_to_warn_of(vlm, asked):
    model = vlm.model
    before = model.generation_config
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        model.generation_config = type(before).from_dict(
            before.to_dict() | {"temperature": 0.6, "top_p": 0.9, "max_length": 4096}
        )
        heard.clear()
        for how in (SHORT, {**SHORT, "num_beams": 2, "length_penalty": -1.0}):
            evaluate(vlm, asked[:2], Length(), prompt="chat", generation=how)
    finally:
        model.generation_config = before
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert heard == []


@pytest.mark.parametrize(("more", "cut"), [(0, {True}), (1, {True, False})])
def test_a_length_with_the_prompt_counts_no_padding(vlm, asked, more, cut):
    words = [len(generated_prompt(vlm, each)) for each in asked]
    limit = max(words) + more
    found = evaluate(vlm, asked, Length(), prompt="chat", generation={"max_length": limit})
    assert {each.id for each in found.skipped} == {
        q.id for q, count in zip(asked, words, strict=True) if count >= limit
    }
    assert {each.reason for each in found.skipped} == (set() if more else {"too long"})
    for each, said in zip(found.questions, found.answers["none"][0], strict=True):
        room = limit - len(generated_prompt(vlm, each))
        assert said.text == generated(vlm, each, max_new_tokens=room)
        # The end is a token, too: an answer is cut if there was no room for it.
        assert said.cut == (len(said.text.split()) == room)
    assert {said.cut for said in found.answers["none"][0]} == cut


def generated_prompt(vlm: Any, question: Question) -> list[int]:
    sample = nl.Sample("alone", question.images, question.text)
    ids: list[int] = nl.encode(vlm, [sample]).inputs["input_ids"][0].tolist()
    return ids


def test_drawn_answers_are_drawn_by_the_seed(untrained_vlm, asked):
    def drawn(seed: int) -> list[str]:
        how = {"max_new_tokens": 6, "do_sample": True}
        return texts(
            evaluate(untrained_vlm, asked[:4], Length(), prompt="chat", generation=how, seed=seed)
        )

    state = torch.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_answers_that_are_drawn_one_by_one_are_drawn_each_by_itself(
    untrained_vlm, asked, monkeypatch
):
    several = [Question(str(i), asked[0].images, asked[0].text) for i in range(4)]
    how = {"max_new_tokens": 6, "do_sample": True}
    monkeypatch.setattr(Writer, "_may_batch", lambda self, encoded: False)
    found = evaluate(untrained_vlm, several, Length(), prompt="chat", generation=how, batch_size=2)
    assert len(set(texts(found))) == 4


def test_the_last_row_of_a_batch_is_compared_with_the_row_alone_too(
    untrained_vlm, asked, monkeypatch, caplog
):
    vlm = untrained_vlm
    several = [
        Question(str(i), (photo(i),), text)
        for i, text in enumerate(["what is it ?", "what is it ?", "what is it ? what is it ?"])
    ]
    expected = [generated(vlm, each, max_new_tokens=4) for each in several]
    plain = vlm.model.generate

    def mix_up(**inputs: Any) -> Tensor:
        if len(inputs["input_ids"]) > 1:
            pixels = inputs["pixel_values"].clone()
            pixels[-1] = pixels[-1].flip(-1) * 3
            inputs["pixel_values"] = pixels
        out: Tensor = plain(**inputs)
        return out

    monkeypatch.setitem(vars(vlm.model), "generate", mix_up)
    for some in (several[:2], several[1:]):  # without padding, and with it in the first row
        caplog.clear()
        found = evaluate(vlm, some, Length(), prompt="chat", generation=SHORT)
        assert texts(found) == [expected[int(each.id)] for each in some]
        assert "one by one" in caplog.text


# Numbers.


def test_what_cannot_be_measured_is_named_and_in_no_mean(vlm, asked, conditions):
    lost = asked[1].id
    found = evaluate(
        vlm,
        asked[:4],
        Length(fails=[lost]),
        interventions={"strong": conditions["strong"]},
        prompt="chat",
        generation=SHORT,
    )
    assert [(each.id, each.failure) for each in found.failures] == [(lost, "too hard")] * 2
    said = [len(text) for q, text in zip(asked, texts(found), strict=False) if q.id != lost]
    assert found.mean("none").value == pytest.approx(np.mean(said))
    assert found.mean("none").rows == 3
    assert np.isnan(found.values("none")[0, 1])
    assert found.table()["failures"].tolist() == [1, 1]
    assert "2 answers could not be measured" in found._repr_html_()


def test_means_and_differences_are_those_of_own_loops(evaluation, asked):
    of = {
        name: [[len(text) for text in texts(evaluation, name, m)] for m in range(count)]
        for name, count in (("none", 1), ("strong", 1), ("random", 2))
    }
    red = [each.domain == "orange" for each in asked]
    assert 0 < sum(red) < len(red)

    def mean(name: str, inside: Sequence[bool]) -> float:
        rows = [[v for v, i in zip(row, inside, strict=True) if i] for row in of[name]]
        return sum(map(sum, rows)) / (len(rows) * len(rows[0]))

    every, others = [True] * len(red), [not each for each in red]
    assert evaluation.mean("random").value == pytest.approx(mean("random", every))
    assert evaluation.mean("strong", group="orange").value == pytest.approx(mean("strong", red))
    assert evaluation.compare("strong").value == pytest.approx(
        mean("strong", every) - mean("none", every)
    )
    drop = mean("strong", red) - mean("random", red)
    elsewhere = mean("strong", others) - mean("random", others)
    assert drop != elsewhere
    for versus in ("others", lambda each: each.domain != "orange"):
        found = evaluation.compare("strong", "random", group="orange", versus=versus)
        assert found.value == pytest.approx(drop - elsewhere)
    kind = evaluation.compare("strong", group="colour", by="kind")
    inside = [each.kind == "colour" for each in asked]
    assert kind.value == pytest.approx(mean("strong", inside) - mean("none", inside))
    named = evaluation.mean(
        "none", group="short", by=lambda q: "short" if len(q.text) < 25 else None
    )
    assert named.value == pytest.approx(mean("none", [len(q.text) < 25 for q in asked]))


def test_other_numbers_of_the_metric_can_be_compared(evaluation):
    assert evaluation.numbers == ("length", "words")
    words = [len(text.split()) for text in texts(evaluation)]
    assert evaluation.mean("none", number="words").value == pytest.approx(np.mean(words))
    with pytest.raises(UnknownNameError, match=r"No number 'letters'\. Known: length, words"):
        evaluation.mean("none", number="letters")


def test_an_answer_given_twice_is_measured_once(vlm, asked, conditions):
    metric = Length()
    same = {"a": deactivate(vlm, "language.0/0"), "b": deactivate(vlm, "language.0/1")}
    found = evaluate(vlm, asked[:4], metric, interventions=same, prompt="chat", generation=SHORT)
    assert texts(found) == texts(found, "a") == texts(found, "b")
    assert len(metric.asked) == len(set(metric.asked)) == 4


def test_another_metric_needs_no_generation(evaluation, asked, monkeypatch):
    monkeypatch.delattr(torch.nn.Module, "__call__")
    scored = evaluation.scored(ExactMatch())
    assert scored.metric == "exact_match"
    assert scored.metric_settings == ExactMatch().settings
    expected = [float(a == q.references[0]) for a, q in zip(texts(scored), asked, strict=True)]
    assert scored.values("none")[0].tolist() == expected
    assert scored.mean("none").value > 0.5
    assert evaluation.metric == "length"


# Intervals.


def measured(values: Mapping[str, Any], units: Sequence[int], **how: Any) -> Measured:
    arrays = {name: np.array(rows, float) for name, rows in values.items()}
    return Measured(arrays, units, **{"resamples": 2000, "seed": 0, **how})


def every(rows: int) -> np.ndarray:
    return np.ones(rows, dtype=bool)


def percentiles(values: list[float]) -> np.ndarray:
    return np.percentile(values, [2.5, 97.5], method="inverted_cdf")


def test_intervals_are_those_of_all_equally_likely_draws():
    # Three units of one, two and one rows; two members. All 27 x 4 draws are listed.
    a, b = [[1, 5, 2, 9], [3, 4, 8, 0]], [[0, 2, 2, 1]]
    units = [0, 1, 1, 2]
    means, differences = [], []
    for draw in itertools.product(range(3), repeat=3):
        rows = [row for unit in draw for row in range(4) if units[row] == unit]
        for members in itertools.product(range(2), repeat=2):
            means.append(float(np.mean([a[m][r] for m in members for r in rows])))
            off = [a[m][r] - b[0][r] for m in members for r in rows]
            differences.append(float(np.mean(off)))
    found = measured({"a": a, "b": b}, units, resamples=20_000)
    assert found.mean("a").interval == pytest.approx(percentiles(means), abs=0.15)
    assert found.difference("a", "b", every(4)).interval == pytest.approx(
        percentiles(differences), abs=0.15
    )
    assert found.mean("a").units == 3


def test_intervals_of_differences_of_differences_are_those_of_all_draws():
    a, b = [1, 5, 2, 9, 0], [3, 4, 8, 0, 1]
    units = [0, 0, 1, 1, 2]
    inside = np.array([True, False, True, False, True])
    drawn = []
    for draw in itertools.product(range(3), repeat=3):
        rows = [row for unit in draw for row in range(5) if units[row] == unit]
        off = [[a[r] - b[r] for r in rows if inside[r] == which] for which in (True, False)]
        if all(off):  # the last unit has no row outside
            drawn.append(float(np.mean(off[0]) - np.mean(off[1])))
    found = measured({"a": [a], "b": [b]}, units, resamples=20_000)
    versus = found.difference("a", "b", inside, ~inside)
    assert versus.interval == pytest.approx(percentiles(drawn), abs=0.15)
    assert versus.value == pytest.approx(np.mean([-2, -6, -1]) - np.mean([1, 9]))
    assert (versus.rows, versus.units) == (5, 3)
    assert versus.resamples == pytest.approx(20_000 * len(drawn) / 27, rel=0.02)


def test_a_condition_differs_from_itself_by_nothing():
    found = measured({"a": [[1, 5, 2, 9]]}, range(4)).difference("a", "a", every(4))
    assert (found.value, found.interval) == (0, (0, 0))


def test_pairs_take_out_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 50)
    found = measured({"a": [hard], "b": [hard + 1 + rng.normal(0, 0.1, 50)]}, range(50))
    low, high = found.difference("b", "a", every(50)).interval or (0, 9)
    assert 0.9 < low < 1 < high < 1.1
    alone = found.mean("a").interval or (0, 0)
    assert alone[1] - alone[0] > 3


def test_questions_on_one_image_count_as_one():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 20))
    one = measured({"a": values[:1], "b": values[1:]}, range(20))
    four = measured(
        {"a": values[:1].repeat(4, 1), "b": values[1:].repeat(4, 1)}, np.arange(20).repeat(4)
    )
    same = one.difference("a", "b", every(20)), four.difference("a", "b", every(80))
    assert same[0].interval == pytest.approx(same[1].interval)
    assert (same[1].rows, same[1].units) == (80, 20)


def test_members_widen_an_interval_by_how_much_they_differ():
    rng = np.random.default_rng(2)
    rows = rng.normal(0, 0.1, 200)
    alike = measured({"a": [rows, rows, rows, rows]}, range(200)).mean("a").interval
    apart = measured({"a": [rows - 1, rows, rows, rows + 1]}, range(200)).mean("a").interval
    assert alike is not None
    assert apart is not None
    assert alike[1] - alike[0] < 0.04
    # The standard error of four members with variance 0.5 is 0.35.
    assert 0.8 < apart[1] - apart[0] < 1.6


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = {"images": 0, "questions": 0}
    for trial in range(150):
        rng = np.random.default_rng(trial)
        image, own = rng.normal(size=40).repeat(4), rng.normal(0, 0.3, 160)
        for name, units in (("images", np.arange(40).repeat(4)), ("questions", np.arange(160))):
            found = measured({"a": [image + own]}, units, resamples=150, seed=trial).mean("a")
            low, high = found.interval or (1, 1)
            held[name] += low <= 0 <= high
    assert 0.88 <= held["images"] / 150 <= 0.99
    assert held["questions"] / 150 < 0.8  # what is measured four times is not four things


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_values_are_those_of_own_loops_with_numbers_missing(data):
    rows = data.draw(st.integers(1, 6))
    number = st.one_of(st.just(np.nan), st.integers(-3, 3).map(float))

    def some(members: int) -> list[list[float]]:
        row = st.lists(number, min_size=rows, max_size=rows)
        return data.draw(st.lists(row, min_size=members, max_size=members))

    a, b = some(data.draw(st.integers(1, 3))), some(data.draw(st.integers(1, 3)))
    inside = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    found = measured({"a": a, "b": b}, range(rows), resamples=20)
    own = [v for row in a for v, i in zip(row, inside, strict=True) if i and v == v]
    mean = found.mean("a", np.array(inside))
    assert mean.value == pytest.approx(np.mean(own)) if own else np.isnan(mean.value)
    off = [
        one[r] - other[r]
        for one in a
        for other in b
        for r in range(rows)
        if inside[r] and one[r] == one[r] and other[r] == other[r]
    ]
    difference = found.difference("a", "b", np.array(inside))
    if not off:
        assert np.isnan(difference.value)
        return
    assert difference.value == pytest.approx(np.mean(off))
    if difference.interval is not None:
        low, high = difference.interval
        assert min(off) - 1e-9 <= low <= high <= max(off) + 1e-9


def test_one_image_has_no_interval(vlm):
    question = testbed.questions(1, seed=3)[0]
    two = [question, Question("other", question.images, "how many objects are there ?")]
    found = evaluate(vlm, two, Length(), prompt="chat", generation=SHORT)
    assert found.units == (0, 0)
    assert found.mean("none").interval is None
    assert "2 questions on 1 sets of images" in found._repr_html_()


def test_the_same_pictures_are_found_in_files_bytes_and_memory(vlm, tmp_path):
    picture = testbed.questions(1, seed=3)[0].images[0]
    for name in ("a", "b"):
        picture.save(tmp_path / f"{name}.png")
    data = (tmp_path / "a.png").read_bytes()
    several = [(tmp_path / "a.png",), (tmp_path / "b.png",), (data,), (picture,), (picture.copy(),)]
    asked = [Question(str(i), images, "what is it ?") for i, images in enumerate(several)]
    found = evaluate(vlm, asked, Length(), prompt="chat", generation=SHORT)
    assert found.units == (0, 0, 0, 1, 1)  # the bytes of a file, the pixels of a picture


# Skipped.


def test_what_cannot_be_put_is_skipped_under_every_condition(vlm, asked, conditions, tmp_path):
    lost = Question("lost", (tmp_path / "none.png",), "what is it ?")
    long = Question("long", asked[0].images, "what " * 300)
    found = evaluate(
        vlm,
        [asked[0], lost, asked[1], long, asked[2]],
        Length(),
        interventions=conditions,
        prompt="chat",
        generation=SHORT,
        batch_size=3,
    )
    assert [(each.id, each.position, each.reason) for each in found.skipped] == [
        ("lost", 1, "missing image"),
        ("long", 3, "too long"),
    ]
    assert [each.id for each in found.questions] == [each.id for each in asked[:3]]
    counts = {len(row) for members in found.answers.values() for row in members}
    assert counts == {3}
    assert "2 questions were skipped: missing image (1), too long (1)." in found._repr_html_()
    with pytest.raises(SkippedError, match=r"None of the 2 questions .* there is no file"):
        evaluate(vlm, [lost, long], Length(), prompt="chat", generation=SHORT)


def test_a_row_that_can_only_be_encoded_in_a_batch_moves_no_other(vlm, asked, monkeypatch):
    plain = batches.collate

    def refusing(adapter: Any, prepared: Any) -> Any:
        if [each.sample.id for each in prepared] == [asked[0].id]:
            raise ValueError("not alone")
        return plain(adapter, prepared)

    monkeypatch.setattr(batches, "collate", refusing)
    found = evaluate(vlm, asked[:3], Length(), prompt="chat", generation=SHORT)
    # Whether it is in a batch what it is alone cannot be told, so it is left out.
    assert [(each.id, each.reason) for each in found.skipped] == [
        (asked[0].id, "refused by the processor")
    ]
    assert texts(found) == [generated(vlm, each, max_new_tokens=4) for each in asked[1:3]]


@pytest.mark.parametrize("size", [1, 2])
def test_an_adapter_that_does_not_fit_is_no_samples_fault(vlm, asked, monkeypatch, size):
    plain = batches.collate

    def misfit(adapter: Any, prepared: Any) -> Any:
        if asked[3].id in {each.sample.id for each in prepared}:
            raise AdapterError("the processor's text tokens are not those of its text")
        return plain(adapter, prepared)

    monkeypatch.setattr(batches, "collate", misfit)
    with pytest.raises(AdapterError, match="text tokens"):
        evaluate(vlm, asked[:4], Length(), prompt="chat", generation=SHORT, batch_size=size)


def test_a_sample_that_is_too_long_is_found_among_others_of_its_id(vlm, asked):
    encoder = batches.Encoder(vlm, template=True, side="left")
    words = ("what is it ?", "what " * 300)
    same = [nl.Sample("same", asked[0].images, text) for text in words]
    (found,) = encoder([(7, same[0]), (8, same[1])])
    assert found.positions == (7,)
    assert [(each.position, each.reason) for each in encoder.skipped] == [(8, "too long")]


# Folders.


class Stopped(KeyboardInterrupt):
    pass


@contextmanager
def stopping_after(
    vlm: Any, forwards: int, error: type[BaseException] = AssertionError
) -> Iterator[list[int]]:
    """An error if more forwards are run; counts them."""
    count = [0]

    def stop(*args: Any) -> None:
        count[0] += 1
        if count[0] > forwards:
            raise error("one forward too many")

    hook = vlm.model.register_forward_pre_hook(lambda *args: stop())
    try:
        yield count
    finally:
        hook.remove()


def run(vlm: Any, asked: list[Question], out: Path | None, **how: Any) -> Evaluation:
    usual: dict[str, Any] = {"prompt": "chat", "generation": SHORT, "batch_size": 4, "out": out}
    return evaluate(vlm, asked, **{"metric": Length(), **usual, **how})


@pytest.mark.parametrize("forwards", [0, 9, 22])
def test_a_stopped_run_goes_on_as_if_it_had_not(vlm, asked, conditions, tmp_path, forwards):
    asked = asked[:6]
    some = {"strong": conditions["strong"]}
    whole = run(vlm, asked, tmp_path / "whole", interventions=some)
    with stopping_after(vlm, forwards, Stopped), pytest.raises(Stopped):
        run(vlm, asked, tmp_path / "part", interventions=some)
    with (tmp_path / "part" / "answers.jsonl").open("ab") as file:
        file.write(b'{"condition":"none","member":0,"id":"scene-3')  # killed while it wrote
    again = run(vlm, asked, tmp_path / "part", interventions=some)
    assert again.to_json() == whole.to_json()
    for name in ("answers.jsonl", "interventions.jsonl", "evaluation.json"):
        own = (tmp_path / "part" / name).read_bytes()
        assert own == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_opened_without_a_forward(vlm, asked, tmp_path):
    first = run(vlm, asked, tmp_path / "out")
    metric = Length()
    with stopping_after(vlm, 0) as count:
        again = run(vlm, asked, tmp_path / "out", metric=metric)
        other = run(vlm, asked, tmp_path / "out", metric=ExactMatch())
    assert count == [0]
    assert metric.asked == []  # known, too
    assert again.to_json() == first.to_json()
    assert other.mean("none").value == first.scored(ExactMatch()).mean("none").value


def test_conditions_can_be_added_and_left_out(vlm, asked, conditions, tmp_path):
    run(vlm, asked, tmp_path / "out")
    with stopping_after(vlm, 10**6) as count:
        both = run(vlm, asked, tmp_path / "out", interventions=conditions)
    with stopping_after(vlm, 10**6) as fresh:
        run(vlm, asked, None, interventions=conditions, baseline=False)
    assert count[0] == fresh[0]  # the untouched model did not run again
    assert both.conditions == ("none", "strong", "random")
    with stopping_after(vlm, 0):
        one = run(vlm, asked, tmp_path / "out", interventions={"random": conditions["random"]})
    assert one.conditions == ("none", "random")
    assert texts(one, "random", 1) == texts(both, "random", 1)
    told = (tmp_path / "out" / "interventions.jsonl").read_text().splitlines()
    settings = {json.loads(line)["digest"]: json.loads(line)["settings"] for line in told}
    assert conditions["strong"].settings in settings.values()


def test_a_metric_that_stops_leaves_the_answers(vlm, asked, tmp_path):
    class Broke(Length):
        def score(self, answers: Any, questions: Any) -> Any:
            raise RuntimeError("no money left")

    with pytest.raises(RuntimeError, match="no money"):
        run(vlm, asked, tmp_path / "out", metric=Broke())
    with stopping_after(vlm, 0):
        run(vlm, asked, tmp_path / "out")


def test_failures_are_tried_again(vlm, asked, tmp_path):
    lost = asked[0].id
    first = run(vlm, asked, tmp_path / "out", metric=Length(fails=[lost]))
    assert [each.id for each in first.failures] == [lost]
    metric = Length()
    again = run(vlm, asked, tmp_path / "out", metric=metric)
    assert not again.failures
    assert [id for id, _ in metric.asked] == [lost]


def test_references_can_be_corrected_afterwards(vlm, asked, tmp_path):
    before = run(vlm, asked[:4], tmp_path / "out", metric=ExactMatch())
    wrong = [replace(each, references=("no such thing",)) for each in asked[:4]]
    with stopping_after(vlm, 0):
        after = run(vlm, wrong, tmp_path / "out", metric=ExactMatch())
    assert before.mean("none").value > after.mean("none").value == 0


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"prompt": "short"}, "another prompt.name: 'chat', not 'short'"),
        ({"generation": {"max_new_tokens": 5}}, "another generation.max_new_tokens: 4, not 5"),
        ({"asked": 3}, "another number of questions: 4, not 3"),
        ({"asked": "other"}, "another set of questions"),
        ({"model": "untrained"}, "another model"),
        ({"interventions": "other"}, "'strong' with other interventions"),
    ],
)
def test_other_settings_are_refused(
    vlm, untrained_vlm, asked, strong, conditions, tmp_path, how, text
):
    given = dict(how)
    run(vlm, asked[:4], tmp_path / "out", interventions={"strong": conditions["strong"]})
    before = {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()}
    model = untrained_vlm if given.pop("model", None) else vlm
    some = asked[:4]
    if given.get("asked") == "other":
        some = [*asked[:3], Question(asked[3].id, asked[0].images, asked[3].text)]
    elif "asked" in given:
        some = asked[:3]
    given.pop("asked", None)
    if given.get("interventions") == "other":
        given["interventions"] = {"strong": amplify(vlm, strong[:-1], -1.0)}
    with pytest.raises(OutputError, match=text):
        run(model, some, tmp_path / "out", **given)
    assert {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "part", ["image_processor", "chat_template", "generation_config", "dtype", "tokenizer"]
)
def test_another_processor_or_setting_of_the_model_is_refused(
    vlm, asked, tmp_path, monkeypatch, part
):
    run(vlm, asked[:1], tmp_path / "out")
    processor, config = vlm.processor, vlm.model.generation_config
    if part == "image_processor":
        monkeypatch.setattr(processor.image_processor, "do_normalize", False)
    elif part == "chat_template":
        monkeypatch.setattr(processor, "chat_template", processor.chat_template + "\n")
    elif part == "generation_config":
        monkeypatch.setattr(config, "repetition_penalty", 1.7)
    elif part == "dtype":
        monkeypatch.setattr(type(vlm), "dtype", torch.bfloat16)
    else:
        monkeypatch.setattr(type(processor.tokenizer), "special_tokens_map", {"eos_token": "</s>"})
    with pytest.raises(OutputError, match=f"another setting.{part}: '.*', not '"):
        run(vlm, asked[:1], tmp_path / "out")


@pytest.mark.parametrize("name", ["blip-2+t5", "git", "llava", "qwen2_5_vl"])
def test_settings_are_those_of_an_equal_processor(name):
    one, other = (nl.adapt(*REAL[name].build()) for _ in range(2))
    before = settings_of(one)
    other.processor.tokenizer.padding_side = "left"
    one.processor.tokenizer.padding_side = "right"
    assert settings_of(other) == settings_of(one) == before
    question = Question("0", (photo(0),), REAL[name].prompt)
    prompt = Prompt("bare", "{question}", "{question}", template=REAL[name].template)
    evaluate(one, [question], Length(), prompt=prompt, generation={"max_new_tokens": 2})
    assert settings_of(one) == before  # generating leaves none behind


def test_other_versions_of_libraries_are_warned_of(vlm, asked, tmp_path):
    run(vlm, asked[:1], tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    told = json.loads(path.read_text())
    assert told["versions"]["torch"] == metadata.version("torch")
    told["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(told))
    with pytest.warns(UserWarning, match=r"begun with torch 1\.0 and .* goes on with") as heard:
        run(vlm, asked[:1], tmp_path / "out")
    assert heard[0].filename == __file__


def test_another_seed_and_batch_size_go_on_where_nothing_is_drawn(vlm, asked, conditions, tmp_path):
    some = {"strong": conditions["strong"]}
    first = run(vlm, asked, tmp_path / "out", interventions=some)
    with stopping_after(vlm, 0):
        again = run(vlm, asked, tmp_path / "out", interventions=some, seed=4, batch_size=3)
    whole = run(vlm, asked, None, interventions=some, seed=4)
    assert again.manifest.seed == 4
    assert again.compare("strong") == whole.compare("strong") != first.compare("strong")


def test_another_seed_and_batch_size_are_refused_where_answers_are_drawn(vlm, asked, tmp_path):
    usual: dict[str, Any] = {"generation": SHORT | {"do_sample": True}}
    run(vlm, asked[:2], tmp_path / "out", **usual)
    for how, text in (
        ({"seed": 4}, "another seed: 0, not 4"),
        ({"batch_size": 1}, "another batch size, .*: 4, not 1"),
    ):
        with pytest.raises(OutputError, match=text):
            run(vlm, asked[:2], tmp_path / "out", **usual, **how)


def test_a_folder_of_something_else_is_refused(vlm, asked, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(vlm, asked[:1], tmp_path)
    run(vlm, asked[:1], tmp_path / "out")
    (tmp_path / "out" / "answers.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="no whole evaluation"):
        run(vlm, asked[:1], tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="no whole evaluation"):
        run(vlm, asked[:1], tmp_path / "out")
    with pytest.raises(DataError, match="There is no finished evaluation"):
        Evaluation.open(tmp_path / "nowhere")
    (tmp_path / "odd.json").write_text('{"manifest": 3}')
    with pytest.raises(DataError, match="no whole evaluation"):
        Evaluation.open(tmp_path / "odd.json")


def test_an_evaluation_survives_its_file(evaluation, tmp_path):
    evaluation.save(tmp_path / "deep" / "found.json")
    again = Evaluation.open(tmp_path / "deep" / "found.json")
    assert again.to_json() == evaluation.to_json()
    assert again.compare("strong", "random", group="orange", versus="others") == evaluation.compare(
        "strong", "random", group="orange", versus="others"
    )
    assert again.table("kind").equals(evaluation.table("kind"))
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["found.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        evaluation.save(tmp_path / "deep" / "found.json" / "in.json")


# Tables and texts.


def test_tables_say_what_compare_says(evaluation, asked):
    table = evaluation.table("kind").set_index(["condition", "group"])
    row = table.loc[("random", "colour")]
    mean = evaluation.mean("random", group="colour", by="kind")
    off = evaluation.compare("random", group="colour", by="kind")
    assert (row["mean"], row["mean_low"], row["mean_high"]) == (mean.value, *mean.interval)
    assert (row["difference"], row["difference_low"]) == (off.value, off.interval[0])
    assert row["questions"] == sum(each.kind == "colour" for each in asked)
    assert row["members"] == 2
    answers = evaluation.answer_table()
    assert len(answers) == 4 * len(asked)
    first = answers[(answers["condition"] == "strong") & (answers["id"] == asked[2].id)]
    assert first["answer"].tolist() == [texts(evaluation, "strong")[2]]


def test_html_is_escaped(vlm, asked):
    name = "<b>bold</b>"
    found = evaluate(
        vlm,
        asked[:2],
        Length(),
        interventions={name: deactivate(vlm, "language.0/0")},
        prompt="chat",
        generation=SHORT,
    )
    html = found._repr_html_()
    assert name not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert repr(found) == f"Evaluation(2 questions, length, conditions none, {name})"


# The door.


def test_bad_questions_are_refused_before_anything_runs(vlm, asked):
    bare = Question("bare", asked[0].images, "what is it ?")
    cases: list[tuple[Any, Any, str]] = [
        ([], Length(), "No questions were given"),
        ([asked[0], asked[0]], Length(), "1 questions have an id that another has"),
        ([asked[0], "what is it ?"], Length(), "A str was given among the questions"),
        ([asked[0], bare], VQAAccuracy(), "'bare'"),
        ([asked[0]], OptionLetter(), "option"),
        ([asked[0]], VQAAccuracy, "is no metric"),
        ([asked[0]], "accuracy", "is no metric"),
    ]
    with stopping_after(vlm, 0) as count:
        for questions, metric, text in cases:
            with pytest.raises(DataError, match=text):
                evaluate(vlm, questions, metric, prompt="chat")
        for how, text in (
            ({"batch_size": 0}, "batch_size=0"),
            ({"resamples": -1}, "resamples=-1"),
            ({"generation": {"max_new_tokens": 0}}, "max_new_tokens=0"),
            ({"generation": {"num_beams": 1.5}}, "num_beams=1.5"),
            ({"generation": {"num_return_sequences": 2}}, "num_return_sequences cannot be"),
            ({"generation": {"bad_words_ids": {1}}}, "as JSON"),
            ({"generation": "beams"}, "give nl.GREEDY, nl.BEAMS"),
        ):
            with pytest.raises(DataError, match=text):
                evaluate(vlm, asked[:1], Length(), **{"prompt": "chat", **how})
    assert count == [0]
    with pytest.raises(DataError, match="no limit"):
        Generation(None)


def test_a_metric_of_another_form_is_refused(vlm, asked):
    class Odd(Length):
        def score(self, answers: Any, questions: Any) -> Any:
            return self.give(len(answers))

    for give, text in (
        (lambda n: [{"length": 1.0}] * (n + 1), "gave 3 results for 2 answers"),
        (lambda n: [{"size": 1.0}] * n, "under the metric's own name"),
    ):
        metric = Odd()
        metric.give = give  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=text):
            evaluate(vlm, asked[:2], metric, prompt="chat", generation=SHORT)
    metric = Odd()
    metric.give = lambda n: [{"length": float("nan")}] * n  # type: ignore[attr-defined]
    found = evaluate(vlm, asked[:2], metric, prompt="chat", generation=SHORT)
    assert {each.failure for each in found.failures} == {"length is not a number"}


def test_bad_interventions_are_refused(vlm, untrained_vlm, asked, strong):
    one = deactivate(vlm, strong)
    cases: list[tuple[Any, str]] = [
        ({"other": deactivate(untrained_vlm, strong)}, "is of another model"),
        ({"none": one}, "cannot be the name"),
        ({"": one}, "cannot be the name"),
        ({"few": []}, "has no intervention"),
        ({"same": [one, deactivate(vlm, strong)]}, "the same intervention twice"),
        ({"rows": by_sample(vlm, [one, None])}, "rows of one batch"),
        ({"rows": deactivate(vlm, strong, positions=[[0], [1]])}, "positions of each sample"),
        ({"text": "language.0/0"}, "is a str"),
        ({"text": ["language.0/0"]}, "has a str among"),
        ([one], "give a mapping"),
    ]
    for given_, text in cases:
        with pytest.raises(InterventionError, match=text):
            evaluate(vlm, asked[:1], Length(), interventions=given_, prompt="chat")
    with pytest.raises(InterventionError, match=r"864 neurons .* leave the block first"), one:
        evaluate(vlm, asked[:1], Length(), prompt="chat")
    with pytest.raises(InterventionError, match="nothing to run"):
        evaluate(vlm, asked[:1], Length(), baseline=False, prompt="chat")
    assert amplify(vlm, strong[:2], 1.5).settings != deactivate(vlm, strong[:2]).settings


def test_a_model_that_cannot_answer_is_refused(vlm, asked, bed):
    with pytest.raises(AdapterError, match="need a processor"):
        evaluate(nl.adapt(bed.model), asked[:1], Length(), prompt="chat")


def test_unknown_names_are_refused(evaluation):
    with pytest.raises(
        UnknownNameError, match=r"No condition 'weak'\. Known: none, strong, random"
    ):
        evaluation.compare("weak")
    with pytest.raises(UnknownNameError, match="No group 'pink'"):
        evaluation.compare("strong", group="pink")
    with pytest.raises(UnknownNameError, match="No way to group 'colour'"):
        evaluation.table("colour")
    with pytest.raises(DataError, match="give group= too"):
        evaluation.compare("strong", versus="others")
    with pytest.raises(DataError, match="are in both groups"):
        evaluation.compare("strong", group="orange", versus=lambda each: True)
    with pytest.raises(DataError, match="says so of nothing"):
        evaluation.compare("strong", group=lambda each: False)
    with pytest.raises(DataError, match="no others"):
        evaluation.compare("strong", group=lambda each: True, versus="others")


def test_without_the_untouched_model_conditions_are_still_compared(vlm, asked, conditions):
    found = run(vlm, asked, None, interventions=conditions, baseline=False)
    assert found.conditions == ("strong", "random")
    assert "difference" not in found.table().columns
    expected = np.mean([len(text) for text in texts(found, "strong")])
    assert found.mean("strong").value == pytest.approx(expected)
    assert "difference" not in found._repr_html_()
    assert isinstance(found.answers["strong"][0][0], Answered)

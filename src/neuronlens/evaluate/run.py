"""Put questions to a model as it is and under interventions, and measure the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import AdapterError, DataError, SkippedError
from neuronlens.evaluate.answers import Writer, Written
from neuronlens.evaluate.batches import Encoder, Side, parts, units_of
from neuronlens.evaluate.conditions import (
    Condition,
    Interventions,
    applied,
    conditions_of,
)
from neuronlens.evaluate.evaluation import Answered, Evaluation, measured
from neuronlens.evaluate.folder import AnswerRecord, Journal, Manifest, journal
from neuronlens.evaluate.generation import GREEDY, Generation, as_generation
from neuronlens.evaluate.numbers import require_measurable
from neuronlens.evaluate.resampling import RESAMPLES
from neuronlens.evaluate.settings import settings_of, versions
from neuronlens.metrics import Metric
from neuronlens.questions import Prompt, Question, as_prompt


def evaluate(
    adapter: ModelAdapter,
    questions: Iterable[Question],
    metric: Metric,
    *,
    interventions: Interventions | None = None,
    prompt: Prompt | str = "short",
    generation: Generation | Mapping[str, object] = GREEDY,
    out: str | Path | None = None,
    batch_size: int = 8,
    baseline: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """What interventions do to a model's answers, and how sure that is.

    Every question is put to the model as it is, the condition `"none"`, and under each
    intervention. An intervention may be a list, such as random controls of several seeds; its
    result is their mean, and its interval covers questions and seeds::

        evaluation = nl.evaluate(
            vlm,
            questions,
            nl.metrics.VQAAccuracy(),
            interventions={
                "red": nl.deactivate(vlm, neurons),
                "random": [
                    nl.deactivate(vlm, nl.random_control(vlm, neurons, seed=seed))
                    for seed in range(5)
                ],
            },
            out="evaluation",
        )
        evaluation.compare("red", "random", group="red", versus="others")

    Answers are generated in batches; each is what it would be alone, up to rounding. A question
    that cannot be put to the model (an image is missing, the prompt is too long) is skipped under
    every condition, and named. With `out`, answers are written as soon as they are known: a run
    that was stopped or killed goes on when it is called again with the same arguments, a finished
    one is opened, conditions may be added, and another metric needs no generation.

    Args:
        adapter: Of the model, with its processor.
        questions: With references, if the metric compares with some.
        metric: Measures each answer, such as `nl.metrics.VQAAccuracy()`.
        interventions: By name, what `nl.deactivate`, `nl.amplify` or `nl.set_to` return, or
            several of these that stand for one another.
        prompt: How questions are put: a `Prompt`, or the name of one.
        generation: How answers are generated: `nl.GREEDY`, `nl.BEAMS` (P2's), a `Generation`, or
            a mapping of `generate()`'s arguments.
        out: Folder of the evaluation; None keeps it in memory.
        batch_size: Questions per batch.
        baseline: Whether to run the untouched model, which differences are to.
        resamples: How often intervals draw; 0 for none.
        seed: Of intervals, and of sampling if `generation` samples.
        progress: Whether to show a bar.

    Source: P2, sections 4.1 and 4.3, Table 2; P1, sections 4.7 and B.1. Paired intervals,
    controls of several seeds and differences of differences are ours.

    Raises:
        DataError: If there is no question, ids repeat, or a question lacks what the metric
            compares with; before anything is generated.
        InterventionError: If an intervention is none, or of another model.
        AdapterError: If the model cannot generate, is in training mode, or has no processor.
        OutputError: If `out` holds something else, or an evaluation with other settings, or
            cannot be written; what is done is written.
        SkippedError: If no question could be put to the model.
    """
    asked = _checked(questions, metric)
    if batch_size < 1 or resamples < 0:
        raise DataError(
            f"batch_size={batch_size}, resamples={resamples} were given; they must be at least 1 "
            "and 0."
        )
    how, put_as = as_generation(generation), as_prompt(prompt)
    conditions = conditions_of(adapter, interventions, baseline=baseline)
    if adapter.processor is None:
        raise AdapterError("Questions need a processor to become inputs: adapt(model, processor).")
    adapter.require_eval()
    images, _ = units_of([each.images for each in asked])
    manifest = Manifest(
        model=adapter.fingerprint(),
        model_name=adapter.name,
        prompt=asdict(put_as),
        generation=how.settings,
        settings=settings_of(adapter),
        versions=versions(),
        questions=_digest(asked, images, put_as),
        count=len(asked),
        seed=seed,
        batch_size=batch_size,
        conditions={each.name: each.digests for each in conditions},
    )
    settings = {
        digest: told
        for each in conditions
        for digest, told in zip(each.digests, each.settings, strict=True)
    }
    with journal(None if out is None else Path(out), manifest, settings) as kept:
        run = _Run(adapter, asked, put_as, how, conditions, kept, seed)
        run.generate(batch_size, progress=progress)
        evaluation = measured(run.collected(images, resamples), metric, kept.scores, kept.score)
        kept.result(evaluation.to_json())
    return evaluation


def _checked(questions: Iterable[Question], metric: Metric) -> list[Question]:
    asked = list(questions)
    if not asked:
        raise DataError("No questions were given: evaluate needs at least one.")
    for each in asked:
        if not isinstance(each, Question):
            raise DataError(
                f"A {type(each).__name__} was given among the questions. Make each a Question, or "
                "read them with nl.read_questions."
            )
    seen: set[str] = set()
    twice = [each.id for each in asked if each.id in seen or seen.add(each.id)]  # type: ignore[func-returns-value]
    if twice:
        raise DataError(
            f"{len(twice)} questions have an id that another has, such as {twice[0]!r}. Answers "
            "are found by it: give each question its own."
        )
    require_measurable(metric, asked)
    return asked


def _digest(questions: Sequence[Question], images: Sequence[str], prompt: Prompt) -> str:
    """Of the questions as they are put: references and domains may still change."""
    told = [
        [each.id, name, each.sample(prompt).prompt]
        for each, name in zip(questions, images, strict=True)
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


class _Run:
    """One call: what is asked, under which conditions, and what is known so far."""

    def __init__(
        self,
        adapter: ModelAdapter,
        questions: Sequence[Question],
        prompt: Prompt,
        generation: Generation,
        conditions: Sequence[Condition],
        kept: Journal,
        seed: int,
    ) -> None:
        self.questions = questions
        self.conditions = conditions
        self.kept = kept
        self.samples = [each.sample(prompt) for each in questions]
        # A decoder goes on behind its prompt; an encoder counts positions from the left.
        side: Side = "left" if adapter.answer_stream == "language" else "right"
        self.encoder = Encoder(adapter, template=prompt.template, side=side)
        self.writer = Writer(adapter, self.encoder, generation, seed)

    def generate(self, batch_size: int, *, progress: bool) -> None:
        """Whatever answers are not there yet, batch by batch, under all conditions."""
        members = sum(len(each.members) for each in self.conditions)
        total = len(self.questions) * members
        with tqdm(total=total, desc="evaluate", unit="answer", disable=not progress) as bar:
            for number, part in enumerate(parts(len(self.questions), batch_size)):
                if any(self._lacks(name, member, part) for name, member, _ in self._members()):
                    self._answer(number, part)
                bar.update(len(part) * members)

    def _answer(self, number: int, part: range) -> None:
        # Whole batches, whatever of them is known: what a resumed run writes is what an
        # uninterrupted one would have.
        encoded = self.encoder([(position, self.samples[position]) for position in part])
        groups = self.writer.groups(encoded)
        self.kept.skip(self.encoder.skipped)
        for name, member, intervention in self._members():
            if not self._lacks(name, member, part):
                continue
            found: list[AnswerRecord] = []
            with applied(intervention) if groups else applied(None):
                for place, group in enumerate(groups):
                    written = self.writer.answers(group, draw=(number, place))
                    ids = [self.questions[at].id for at in group.encoded.positions]
                    found += [
                        _record(name, member, id, each)
                        for id, each in zip(ids, written, strict=True)
                    ]
            self.kept.answer(found)

    def _members(self) -> list[tuple[str, int, Any]]:
        return [
            (each.name, number, member)
            for each in self.conditions
            for number, member in enumerate(each.members)
        ]

    def _lacks(self, name: str, member: int, part: range) -> bool:
        ids = (self.questions[position].id for position in part)
        return any(
            (name, member, id) not in self.kept.answers and id not in self.kept.skipped
            for id in ids
        )

    def collected(self, images: Sequence[str], resamples: int) -> Evaluation:
        """The answers, before they are measured.

        Raises:
            SkippedError: If there are none.
        """
        kept = self.kept
        places = [at for at, each in enumerate(self.questions) if each.id not in kept.skipped]
        skipped = [kept.skipped[each.id] for each in self.questions if each.id in kept.skipped]
        if not places:
            raise SkippedError(
                f"None of the {len(self.questions)} questions could be put to the model. "
                f"{skipped[0].detail}"
            )
        questions = tuple(self.questions[at] for at in places)
        numbers: dict[str, int] = {}
        return Evaluation(
            manifest=kept.manifest,
            metric="",
            metric_settings={},
            questions=questions,
            units=tuple(numbers.setdefault(images[at], len(numbers)) for at in places),
            skipped=tuple(skipped),
            answers={
                each.name: tuple(
                    tuple(_unmeasured(kept.answers[each.name, n, q.id]) for q in questions)
                    for n in range(len(each.members))
                )
                for each in self.conditions
            },
            resamples=resamples,
        )


def _unmeasured(record: AnswerRecord) -> Answered:
    return Answered(**record.model_dump())


def _record(name: str, member: int, id: str, written: Written) -> AnswerRecord:
    return AnswerRecord(
        condition=name,
        member=member,
        id=id,
        text=written.text,
        tokens=written.tokens,
        cut=written.cut,
    )

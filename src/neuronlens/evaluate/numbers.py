"""From answers to a metric's numbers, each answer to a question measured once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from neuronlens.errors import DataError
from neuronlens.evaluate.folder import ScoreRecord
from neuronlens.explanation import Failure
from neuronlens.metrics import ANLS, ExactMatch, Mentions, Metric, OptionLetter, VQAAccuracy
from neuronlens.questions import Question

_BY_RULE = (ANLS, ExactMatch, Mentions, OptionLetter, VQAAccuracy)
"""Metrics that cost nothing."""

_AT_ONCE = 256
"""Answers that are measured together, and then kept: a judge that is stopped goes on."""


def require_measurable(metric: Metric, questions: Sequence[Question]) -> None:
    """Refuse questions that a metric cannot compare with, before anything is generated.

    Raises:
        DataError: From the metric, naming the questions; or if it is none.
    """
    for name in ("name", "settings", "score"):
        if isinstance(metric, type) or not hasattr(metric, name):
            raise DataError(
                f"{metric!r:.80} is no metric: it needs a name, settings and score(answers, "
                "questions). Give one of nl.metrics, such as nl.metrics.VQAAccuracy()."
            )
    if isinstance(metric, _BY_RULE):
        metric.score([""] * len(questions), questions)
        return
    # A judge costs money: it is tried on one question that has nothing to compare with.
    without = [each for each in questions if not each.references]
    if not without:
        return
    try:
        metric.score([""], without[:1])
    except DataError:
        metric.score([""] * len(without), without)  # the same error, naming all of them
        raise


def measure(
    metric: Metric,
    pairs: Iterable[tuple[Question, str]],
    kept: Mapping[str, ScoreRecord],
    keep: Callable[[list[ScoreRecord]], None],
) -> dict[str, ScoreRecord]:
    """What the metric says of each answer to a question, by `score_key`.

    Answers that are alike are measured once, under whatever condition they were given: a judge
    is not asked twice, and does not answer twice. A failure is tried again.

    Args:
        metric: The metric.
        pairs: Questions with an answer; they may repeat.
        kept: What is known already.
        keep: Takes what is new, part by part.

    Raises:
        DataError: If the metric does not give one thing for each answer, or not a number under
            its own name.
    """
    wanted = {score_key(metric, question, text): (question, text) for question, text in pairs}
    known = {key: kept[key] for key in wanted if key in kept and kept[key].numbers is not None}
    left = [(key, pair) for key, pair in wanted.items() if key not in known]
    for start in range(0, len(left), _AT_ONCE):
        part = left[start : start + _AT_ONCE]
        found = metric.score([text for _, (_, text) in part], [asked for _, (asked, _) in part])
        if len(found) != len(part):
            raise DataError(
                f"{metric.name} gave {len(found)} results for {len(part)} answers; it must give "
                "one for each, a Failure for what it could not measure."
            )
        new = [_record(metric, key, said) for (key, _), said in zip(part, found, strict=True)]
        keep(new)
        known |= {each.key: each for each in new}
    return known


def _record(metric: Metric, key: str, said: Mapping[str, float] | Failure) -> ScoreRecord:
    if isinstance(said, Failure):
        return ScoreRecord(key=key, failure=said.reason, asked=said.asked)
    if metric.name not in said:
        raise DataError(
            f"{metric.name} gave the numbers {', '.join(said) or '(none)'}; one must be under the "
            "metric's own name."
        )
    numbers = {name: float(value) for name, value in said.items()}
    if any(value != value for value in numbers.values()):
        return ScoreRecord(key=key, failure=f"{metric.name} is not a number")
    return ScoreRecord(key=key, numbers=numbers)


def score_key(metric: Metric, question: Question, answer: str) -> str:
    """A digest of all that a metric's numbers depend on."""
    told = [
        metric.name,
        metric.settings,
        [question.id, question.text, question.domain, question.role],
        list(question.references),
        None if question.options is None else dict(question.options),
        question.kind,
        answer,
    ]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]

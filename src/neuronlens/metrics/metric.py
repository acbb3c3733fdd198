"""What a metric is: answers and their questions go in, named numbers come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from neuronlens.errors import DataError
from neuronlens.explanation import Failure
from neuronlens.questions import Question

Measures = Mapping[str, float]
"""The numbers of one answer, by name. The one under the metric's `name` is what is compared."""

_SHOWN = 5


@runtime_checkable
class Metric(Protocol):
    """Tells how good answers are.

    Attributes:
        name: Of the metric, and of the number of each answer that is compared; from 0 (wrong)
            to 1 (right).
        settings: What its numbers depend on, JSON-able and complete, for manifests.
    """

    @property
    def name(self) -> str:
        """Of the metric, and of its main number."""
        ...

    @property
    def settings(self) -> dict[str, object]:
        """What its numbers depend on."""
        ...

    def score(
        self, answers: Sequence[str], questions: Sequence[Question]
    ) -> list[Measures | Failure]:
        """Measure each answer against its question's references.

        Returns:
            For each answer, in their order, its numbers by name: always one under the
            metric's own `name`, and the same names for every answer. What cannot be told is
            a `Failure`, never a 0.

        Raises:
            DataError: Before anything is measured, if there are not as many answers as
                questions, or a question lacks what the metric compares with.
        """
        ...


def paired(
    metric: str, answers: Sequence[str | None], questions: Sequence[Question]
) -> list[tuple[str, Question]]:
    """Answers beside their questions; None, no answer at all, counts as an empty one.

    Raises:
        DataError: If there are not as many of one as of the other, or questions have no
            references.
    """
    if isinstance(answers, str):
        raise DataError(f"One text was given as the answers of {metric}: give a list of texts.")
    if len(answers) != len(questions):
        raise DataError(
            f"{len(answers)} answers were given to {metric} for {len(questions)} questions: give "
            "one answer for each question, in the same order."
        )
    odd = [q.id for a, q in zip(answers, questions, strict=True) if not isinstance(a, str | None)]
    if odd:
        raise DataError(
            f"{metric} measures texts; {len(odd)} of {len(answers)} answers are none: those to "
            f"{listed(odd)}."
        )
    without = [question.id for question in questions if not question.references]
    if without:
        raise DataError(
            f"{metric} compares an answer with references, and {len(without)} of "
            f"{len(questions)} questions have none: {listed(without)}. Give each question its "
            "references, or leave it out."
        )
    return [(answer or "", question) for answer, question in zip(answers, questions, strict=True)]


def listed(ids: Sequence[str]) -> str:
    """The first few ids, and how many more there are."""
    more = len(ids) - _SHOWN
    shown = ", ".join(map(repr, ids[:_SHOWN]))
    return f"{shown} and {more} more" if more > 0 else shown

"""Exact match, and words that have to be in an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from neuronlens.errors import DataError
from neuronlens.explanation import Failure
from neuronlens.metrics.metric import Measures, listed, paired
from neuronlens.metrics.normalise import comparable
from neuronlens.questions import Question


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, else 0, both `normalised` as in VQAv2.

    Of what consists of articles alone, such as the answer "A", nothing would be left to
    compare; it is compared as it is, in lower case.

    >>> exact_match("The Two.", ["2"])
    1.0
    """
    said = comparable(answer)
    return float(any(comparable(each) == said for each in references))


def mentions(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer as whole words, from 0 to 1.

    Upper and lower case, and how much white space there is, make no difference. A reference
    that is given twice counts once.

    >>> mentions("There is a red circle.", ["red", "blue", "circle"])
    0.6666666666666666
    """
    said = _on_one_line(answer)
    wanted = dict.fromkeys(map(_on_one_line, references))
    found = [re.search(rf"(?<!\w){re.escape(each)}(?!\w)", said) is not None for each in wanted]
    return sum(found) / len(found)


def _on_one_line(text: str) -> str:
    return " ".join(text.casefold().split())


class ExactMatch:
    """Whether an answer is one of the references: `exact_match` of every answer.

    The top-1 accuracy of data sets with one right answer, such as RS-VQA.
    """

    name = "exact_match"

    def __repr__(self) -> str:
        return "ExactMatch()"

    @property
    def settings(self) -> dict[str, object]:
        """What its numbers depend on, for manifests."""
        return {"metric": self.name, "normalised": "vqav2"}

    def score(
        self, answers: Sequence[str | None], questions: Sequence[Question]
    ) -> list[Measures | Failure]:
        """Measure each answer: `exact_match`, 0 or 1.

        Raises:
            DataError: If a question has no references.
        """
        return [
            {self.name: exact_match(answer, question.references)}
            for answer, question in paired(self.name, answers, questions)
        ]


class Mentions:
    """How many of the references an answer names: `mentions` of every answer.

    For captions: references are then the words that a right one has, all of them, and not
    alternatives.
    """

    name = "mentions"

    def __repr__(self) -> str:
        return "Mentions()"

    @property
    def settings(self) -> dict[str, object]:
        """What its numbers depend on, for manifests."""
        return {"metric": self.name}

    def score(
        self, answers: Sequence[str | None], questions: Sequence[Question]
    ) -> list[Measures | Failure]:
        """Measure each answer: `mentions`, from 0 to 1.

        Raises:
            DataError: If a question has no references, or an empty one.
        """
        pairs = paired(self.name, answers, questions)
        empty = [q.id for q in questions if any(not each.strip() for each in q.references)]
        if empty:
            raise DataError(
                f"{self.name} looks for words, and references of {len(empty)} of "
                f"{len(questions)} questions are empty: {listed(empty)}. Leave those out."
            )
        return [{self.name: mentions(answer, q.references)} for answer, q in pairs]

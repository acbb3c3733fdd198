"""VQA accuracy: how many of ten people gave the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neuronlens.errors import DataError
from neuronlens.explanation import Failure
from neuronlens.metrics.metric import Measures, listed, paired
from neuronlens.metrics.normalise import comparable, normalised, spaced
from neuronlens.questions import Question

ENOUGH = 3
"""An answer that this many other people gave is right."""

PEOPLE = 10
"""How many people answered each question of VQAv2."""


def vqa_accuracy(answer: str, references: Sequence[str], *, literal: bool = False) -> float:
    """Accuracy of an answer to a question that several people have answered, from 0 to 1.

    With ten answers or more: for each of them, matches among the *others* / 3, at most 1; the
    mean of these. With fewer: matches / 3, at most 1. (With ten, leaving one out makes an
    answer that three people gave right to 0.9, not 1.)

    >>> vqa_accuracy("2", ["two"] * 4 + ["three"] * 6)
    1.0
    >>> vqa_accuracy("two", ["2"] * 2 + ["3"] * 8)
    0.6

    Args:
        answer: What a model said.
        references: What people said, three answers at least.
        literal: The official code to the letter. It differs from the default in two cases.
            Where all people said the same, texts are compared as they are, so that "Yes." is
            wrong where all said "yes": it expects answers that were cleaned before, as those
            behind published results are; by default, `normalised` answers are compared
            everywhere. And an answer of articles alone, such as the letter "a", is equal to an
            empty one; by default it is compared as it is.

    Source: the evaluation code of VQAv2 (Agrawal et al., vqaEval.py); min(n/3, 1) for fewer
    than ten answers is the formula of Antol et al., VQA, 2015.

    Raises:
        DataError: If there are fewer than three references.
    """
    if isinstance(references, str) or len(references) < ENOUGH:
        raise DataError(
            f"VQA accuracy asks whether {ENOUGH} people gave the answer; {references!r:.80} are "
            f"too few to tell. Give the people's answers, or compare with ExactMatch."
        )
    clean: Callable[[str], str] = normalised if literal else comparable
    if literal and len({spaced(each) for each in references}) == 1:
        clean = spaced
    said = clean(answer)
    matches = [clean(each) == said for each in references]
    found = sum(matches)
    if len(references) < PEOPLE:
        return min(found / ENOUGH, 1.0)
    return sum(min(found - match, ENOUGH) for match in matches) / (ENOUGH * len(matches))


class VQAAccuracy:
    """VQA accuracy with the official normalisation: `vqa_accuracy` of every answer.

    Attributes:
        literal: Whether the official code is followed to the letter; see `vqa_accuracy`.
    """

    name = "vqa_accuracy"

    def __init__(self, *, literal: bool = False) -> None:
        self.literal = literal

    def __repr__(self) -> str:
        return f"VQAAccuracy(literal={self.literal})"

    @property
    def settings(self) -> dict[str, object]:
        """What its numbers depend on, for manifests."""
        return {"metric": self.name, "literal": self.literal}

    def score(
        self, answers: Sequence[str | None], questions: Sequence[Question]
    ) -> list[Measures | Failure]:
        """Measure each answer: `vqa_accuracy`, from 0 to 1.

        Raises:
            DataError: If a question has fewer than three references.
        """
        pairs = paired(self.name, answers, questions)
        few = [question.id for question in questions if len(question.references) < ENOUGH]
        if few:
            raise DataError(
                f"{self.name} asks whether {ENOUGH} people gave the answer, and {len(few)} of "
                f"{len(questions)} questions have fewer references: {listed(few)}. No answer to "
                "them could count as right. Take nl.metrics.ExactMatch() for one right answer."
            )
        return [
            {self.name: vqa_accuracy(answer, question.references, literal=self.literal)}
            for answer, question in pairs
        ]

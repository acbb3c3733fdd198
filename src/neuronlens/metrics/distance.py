"""ANLS: how few letters have to change to make an answer a right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from neuronlens.errors import DataError
from neuronlens.explanation import Failure
from neuronlens.metrics.metric import Measures, paired
from neuronlens.questions import Question

AtThreshold = Literal["zero", "keep"]


def levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of letters that make one text the other.

    A letter is a Unicode code point. Takes about len(one) * len(other) / 64 steps, at most
    milliseconds for texts of some thousand letters.

    >>> levenshtein("kitten", "sitting")
    3

    Source: Myers, A fast bit-vector algorithm for approximate string matching, 1999, in the
    form of Hyyro, 2003, for the distance of whole texts. One column of the usual table is held
    as two numbers, whose bits say where it grows and where it falls from one row to the next.
    """
    short, long = sorted((one, other), key=len)
    if not short:
        return len(long)
    where: dict[str, int] = {}
    for row, letter in enumerate(short):
        where[letter] = where.get(letter, 0) | 1 << row
    rows = (1 << len(short)) - 1
    last = 1 << (len(short) - 1)
    grows, falls, distance = rows, 0, len(short)
    for letter in long:
        equal = where.get(letter, 0)
        diagonal = (((equal & grows) + grows) ^ grows) | equal | falls
        right_grows = falls | (rows & ~(diagonal | grows))
        right_falls = grows & diagonal
        if right_grows & last:
            distance += 1
        elif right_falls & last:
            distance -= 1
        right_grows = right_grows << 1 | 1  # the first row is 0, 1, 2, ...: it always grows
        right_falls <<= 1
        grows = rows & (right_falls | ~(diagonal | right_grows))
        falls = rows & right_grows & diagonal
    return distance


def anls(
    answer: str,
    references: Sequence[str],
    threshold: float = 0.5,
    *,
    at_threshold: AtThreshold = "zero",
) -> float:
    """Similarity of an answer to the nearest reference, from 0 to 1.

    With NL = Levenshtein distance / length of the longer text: 1 - NL if NL is below the
    threshold, else 0; the largest over the references. Upper and lower case are the same, and
    so is any white space; that around a text does not count. Two empty texts are alike (1); an
    empty one and another are not (0).

    >>> anls("pay to the order", ["Pay to the  order of"])
    0.8421052631578947
    >>> anls("no", ["ny"])
    0.0

    Args:
        answer: What a model said.
        references: Right answers.
        threshold: Distance from which on an answer is wrong, above 0, at most 1.
        at_threshold: What an answer at exactly that distance gets: `"zero"`, as in the formula,
            or `"keep"`, its similarity, as in the organisers' script.

    Source: Biten et al., Scene text visual question answering, 2019, eq. (1); Mathew et al.,
    DocVQA, 2021. The organisers' script divides by the lengths before white space
    is dealt with, so blanks behind a wrong answer would make it less wrong; here they do not.

    Raises:
        DataError: If there is no reference.
        ValueError: If the threshold is not above 0 and at most 1.
    """
    require_threshold(threshold, at_threshold)
    if isinstance(references, str) or not references:
        raise DataError(f"ANLS needs a list of right answers; {references!r:.80} was given.")
    said = _folded(answer)
    best = 0.0
    for reference in map(_folded, dict.fromkeys(references)):
        longest = max(len(said), len(reference))
        distance = levenshtein(said, reference) / longest if longest else 0.0
        if distance < threshold or (at_threshold == "keep" and distance == threshold):
            best = max(best, 1.0 - distance)
    return best


def require_threshold(threshold: float, at_threshold: str) -> None:
    """Refuse what makes no threshold.

    Raises:
        ValueError: If the threshold is not above 0 and at most 1, or the other word unknown.
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"threshold={threshold} was given. It is a share of letters that may be wrong: above "
            "0 and at most 1, and 0.5 for DocVQA."
        )
    if at_threshold not in ("zero", "keep"):
        raise ValueError(f"at_threshold={at_threshold!r} was given; it is 'zero' or 'keep'.")


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


class ANLS:
    """Average normalised Levenshtein similarity: `anls` of every answer.

    Attributes:
        threshold: Distance from which on an answer is wrong.
        at_threshold: What an answer at exactly that distance gets; see `anls`.
    """

    name = "anls"

    def __init__(self, threshold: float = 0.5, *, at_threshold: AtThreshold = "zero") -> None:
        require_threshold(threshold, at_threshold)
        self.threshold = threshold
        self.at_threshold: AtThreshold = at_threshold

    def __repr__(self) -> str:
        return f"ANLS(threshold={self.threshold}, at_threshold={self.at_threshold!r})"

    @property
    def settings(self) -> dict[str, object]:
        """What its numbers depend on, for manifests."""
        return {
            "metric": self.name,
            "threshold": self.threshold,
            "at_threshold": self.at_threshold,
        }

    def score(
        self, answers: Sequence[str | None], questions: Sequence[Question]
    ) -> list[Measures | Failure]:
        """Measure each answer: `anls`, from 0 to 1.

        Raises:
            DataError: If a question has no references.
        """
        return [
            {
                self.name: anls(
                    answer, question.references, self.threshold, at_threshold=self.at_threshold
                )
            }
            for answer, question in paired(self.name, answers, questions)
        ]

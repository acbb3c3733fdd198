"""Answers as VQAv2's evaluation compares them: marks, numbers, articles, contractions."""

from __future__ import annotations

import re
from typing import Final

MARKS: Final = ';/[]"{}()=+\\_-><@`,?!'
"""Removed beside a blank, and otherwise replaced by one. Apostrophe and colon stay."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

DIGITS: Final = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}

ARTICLES: Final = frozenset({"a", "an", "the"})

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Every contraction with one of its apostrophes left out, and what it stands for."""
    table = {
        whole[:at] + whole[at + 1 :]: whole
        for whole in _CONTRACTED.split()
        for at, letter in enumerate(whole)
        if letter == "'"
    }
    # The official table has this one the wrong way round.
    return {**table, "somebody'd": "somebodyd"}


CONTRACTIONS: Final = _contractions()
"""Words that lack an apostrophe, and the words they stand for."""

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32


def normalised(answer: str) -> str:
    """An answer in the form in which VQAv2's evaluation compares answers.

    In this order: line breaks and tabs become blanks, blanks around the text go; a mark of
    `MARKS` is removed wherever it occurs if somewhere it stands beside a blank, or if the text
    has a comma between two digits, and otherwise becomes a blank; full stops go unless a digit
    follows; the rest is lower-cased and split into words; number words up to ten and "none"
    become digits; articles go; words that lack one apostrophe get it back.

    >>> normalised("The two-seat cars, dont they?")
    "2 seat cars don't they"

    Source: the evaluation code of VQAv2 (Agrawal et al., GT-Vision-Lab/VQA, vqaEval.py), with
    its quirks; as there, at most 32 full stops are removed. Of its table, four entries with a
    capital I, which no lower-cased word is, and two that change nothing are left out.
    """
    text = spaced(answer)
    marked = text
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if beside_blank or in_number else " ")
    plain = _FULL_STOP.sub("", marked, count=_MOST_FULL_STOPS)
    words = [DIGITS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def comparable(answer: str) -> str:
    """The `normalised` answer; of articles alone, which would leave nothing, the answer itself."""
    return normalised(answer) or spaced(answer).lower()


def spaced(answer: str) -> str:
    """An answer on one line, without blanks around it: what is done to every answer first."""
    return answer.replace("\n", " ").replace("\t", " ").strip()

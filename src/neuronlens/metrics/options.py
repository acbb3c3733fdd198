"""Which of a question's options an answer names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from neuronlens.errors import DataError
from neuronlens.explanation import Failure
from neuronlens.metrics.metric import Measures, listed, paired
from neuronlens.questions import Question

_WORDS = frozenset({"A", "I"})
"""Capital letters that begin sentences as words of their own."""

_JOINS = frozenset({"and", "as", "because", "but", "is", "or", "since"})
"""Words before which an A is no article."""

_LEADS = "answer|be|choose|choosing|either|is|pick|say|select|with"
"""Words after which a bare letter is meant: "vitamin C" and "hepatitis B" name no option."""

_HIDDEN = "__"
"""Stands for an option's text, as a word: the A before it may be an article."""


def option_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names; None if it names none, or several.

    Read in this order, and the first that says anything decides:

    1. The whole answer is a letter, with or without marks ("b", "(B)", "B.").
    2. The whole answer is an option's text, which may follow the option's letter.
    3. The answer says which it is ("the answer is B", "Answer: (b)").
    4. Letters as one writes options: in brackets anywhere ("(b)", "b)"), with a mark at the
       start of a line ("B.", "B:"), in capitals at the start of a line, after words such as
       "option" or "choose", or together ("A or B"). An A or I that may be a word does not count.
    5. An option's text occurs in the answer as whole words; a text within a longer option's
       text does not count.

    Letters within an option's text, such as in "hepatitis B", are no letters of options.
    Upper and lower case of texts do not differ; marks for bold and quotes are passed over.
    What is said of an option is not understood: "not (A)" names A.

    >>> option_letter("I think the answer is (b), the liver.", {"A": "Kidney", "B": "Liver"})
    'B'
    >>> option_letter("A or B", {"A": "Kidney", "B": "Liver"}) is None
    True

    Args:
        answer: What a model said.
        options: Letter (or digit) to text.

    Raises:
        DataError: If there are no options, or a key is not a single letter or digit.
    """
    require_letters(options)
    letters = {letter.upper(): letter for letter in options}
    texts = {letter: _plain(text) for letter, text in options.items()}
    said = _unmarked(answer)
    some = "".join(map(re.escape, letters))
    whole = re.fullmatch(rf"[(\[]?\s*([{some}])\s*[)\]]?\s*[.:,;)]*", said, re.IGNORECASE)
    if whole and whole[1].upper() in letters:
        return letters[whole[1].upper()]
    found = _whole_text(said, letters, texts)
    if not found:
        hidden = _without(said, texts)
        found = _declared(hidden, some) or _written(hidden, some)
        found = {letters[each] for each in found & letters.keys()} or _occurring(said, texts)
    return found.pop() if len(found) == 1 else None


def require_letters(options: Mapping[str, str] | None) -> None:
    """Refuse options that cannot be named by a letter.

    Raises:
        DataError: If there are none, or a key is not a single letter or digit.
    """
    if not options:
        raise DataError("There are no options to choose from: give a letter and a text for each.")
    odd = [each for each in options if len(each) != 1 or not each.isalnum()]
    if odd or len({each.upper() for each in options}) < len(options):
        raise DataError(
            f"Options are named by different single letters or digits, not by {list(options)}."
        )


def _unmarked(text: str) -> str:
    """A text without marks for bold and quotes; wide letters become ordinary ones."""
    return re.sub(r"[*_`\"'“”‘’]+", "", unicodedata.normalize("NFKC", text)).strip()


def _plain(text: str) -> str:
    """A text for comparison: case, white space and marks around it do not count."""
    return " ".join(_unmarked(text).casefold().split()).strip(" .,;:!?")


def _whole_text(said: str, letters: Mapping[str, str], texts: Mapping[str, str]) -> set[str]:
    """Options of which the answer is the text, alone or behind a letter; both if they differ."""
    named = {letter for letter, text in texts.items() if text and text == _plain(said)}
    if named:
        return named
    some = "".join(map(re.escape, letters))
    led = re.match(rf"[(\[]?([{some}])(?:[)\]]?\s*[.:,)\]-]+\s*|\s+)(.+)", said, re.I | re.S)
    if led is None or led[1].upper() not in letters:
        return set()
    named = {letter for letter, text in texts.items() if text and text == _plain(led[2])}
    if named and re.match(r"[aA]\s", said):  # an article, unless it names the option itself
        return named & {letters["A"]} or named
    return named | {letters[led[1].upper()]} if named else set()


def _without(said: str, texts: Mapping[str, str]) -> str:
    """The answer with the options' texts hidden: letters within them are none."""
    for text in sorted(filter(None, texts.values()), key=len, reverse=True):
        if len(text) > 1:
            said = re.sub(_whole_words(text), _HIDDEN, said, flags=re.IGNORECASE)
    return said


def _declared(said: str, some: str) -> set[str]:
    """Letters that are said to be the answer, and those they are given together with."""
    found = re.finditer(
        rf"\banswer\b(?:\s+(?:is|was|would be|should be|must be))?\s*[:=]?\s*"
        rf"(?:(?:option|choice)\s*)?(?P<bracket>[(\[]\s*)?(?P<letter>[{some}])(?!\w)"
        r"(?:\s*[)\]])?(?P<next>\s+\w+)?",
        said,
        re.IGNORECASE,
    )
    named = {
        each["letter"].upper()
        for each in found
        if each["bracket"] or _meant(each["letter"], each["next"])
    }
    joined = _joined(said, some)
    return named | joined if named & joined else named


def _written(said: str, some: str) -> set[str]:
    """Letters written as options are."""
    bracketed = re.findall(rf"(?<!\w)[(\[]?([{some}])[)\]]", said, re.IGNORECASE)
    called = re.findall(rf"\b(?:option|choice|letter)\s+([{some}])(?!\w)", said, re.IGNORECASE)
    marked = re.findall(rf"^\s*([{some}])\s*[.:,;](?!\w)", said, re.IGNORECASE | re.MULTILINE)
    bare = re.finditer(
        rf"(?:^|\b(?i:{_LEADS}))\s*(?P<letter>(?<!\w)[{some}])(?!\w)(?P<next>\s+\w+)?",
        said,
        re.MULTILINE,
    )
    meant = [each["letter"] for each in bare if _meant(each["letter"], each["next"])]
    alone = {each.upper() for each in (*bracketed, *called, *marked, *meant)}
    return alone | _joined(said, some)


def _joined(said: str, some: str) -> set[str]:
    """Letters given together, such as "A or B"."""
    pair = rf"(?<!\w)([{some}])(?=\s*(?:[,/&]|\bor\b|\band\b)\s*([{some}])(?!\w))"
    return {letter for found in re.findall(pair, said) for letter in found}


def _meant(letter: str, following: str | None) -> bool:
    """Whether a bare letter is no word, such as those of "a dog" and "I see", and no number."""
    if following is None:
        return True
    word = letter.islower() or letter.isdigit() or letter in _WORDS
    return not word or (letter.isupper() and following.strip().lower() in _JOINS)


def _occurring(said: str, texts: Mapping[str, str]) -> set[str]:
    """Options whose text occurs in the answer, other than within a longer option's text."""
    plain, found = _plain(said), set()
    for letter, text in sorted(texts.items(), key=lambda each: -len(each[1])):
        if text and re.search(_whole_words(text), plain):
            found.add(letter)
            if sum(text == other for other in texts.values()) == 1:
                plain = re.sub(_whole_words(text), _HIDDEN, plain)
    return found


def _whole_words(text: str) -> str:
    spaced = r"\s+".join(map(re.escape, text.split()))
    return rf"(?<!\w){spaced}(?!\w)"


class OptionLetter:
    """Whether an answer names the right option: `option_letter` of every answer.

    Gives two numbers: `option_letter`, 1 if it names a reference and only that, else 0; and
    `option_named`, 1 if it names an option at all. An answer that names none, or several, is
    wrong; the second number tells how often that is so.
    """

    name = "option_letter"

    def __repr__(self) -> str:
        return "OptionLetter()"

    @property
    def settings(self) -> dict[str, object]:
        """What its numbers depend on, for manifests."""
        return {"metric": self.name, "none named": "wrong"}

    def score(
        self, answers: Sequence[str | None], questions: Sequence[Question]
    ) -> list[Measures | Failure]:
        """Measure each answer: `option_letter` and `option_named`, each 0 or 1.

        Raises:
            DataError: If a question has no references or no options, or options that cannot
                be named by a letter.
        """
        pairs = paired(self.name, answers, questions)
        without = [question.id for question in questions if not question.options]
        if without:
            raise DataError(
                f"{self.name} looks for the letter of an option, and {len(without)} of "
                f"{len(questions)} questions have no options: {listed(without)}. Take another "
                "metric for open questions."
            )
        for question in questions:
            try:
                require_letters(question.options)
            except DataError as error:
                raise DataError(f"Question {question.id!r}: {error}") from None
        measured: list[Measures | Failure] = []
        for answer, question in pairs:
            named = option_letter(answer, question.options or {})
            right = float(named in question.references)
            measured.append({self.name: right, "option_named": float(named is not None)})
        return measured

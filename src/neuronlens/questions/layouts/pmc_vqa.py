"""PMC-VQA: questions with four options about figures of medical papers."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from neuronlens.errors import DataError
from neuronlens.questions.layouts.source import Source
from neuronlens.questions.question import Question

_LETTERS = ("A", "B", "C", "D")


def read(source: Source) -> Iterator[Question]:
    """Questions of PMC-VQA, either release (Hugging Face, xmcmic/PMC-VQA).

    Both have the columns `Figure_path`, `Question`, `Choice A` to `Choice D` and `Answer`.
    Version 1 (`train.csv`, `test.csv`, `test_clean.csv`; figures in `images`) has the answer's
    text in `Answer` and its letter in `Answer_label`. Version 2 (`train_2.csv`, `test_2.csv`;
    figures without sub-figures, in `figures`) has the letter in `Answer`, and `index`,
    `Caption` and `split` besides.

    Choices are written as ` A:text`; letter and colon are taken off. The reference is the
    letter. A row without a question, or whose letter is none of its options, is left out, and
    a warning says how many were.
    """
    left_out: list[int] = []
    for number, row in _rows(source):
        options = {
            letter: text
            for letter in _LETTERS
            if (text := _cleaned(letter, row.get(f"Choice {letter}") or ""))
        }
        version_1 = "Answer_label" in row
        label = (row.get("Answer_label" if version_1 else "Answer") or "").strip()
        text = (row["Question"] or "").strip()
        if label not in options or not text:
            left_out.append(number)
            continue
        folder = source.images or source.path.parent / ("images" if version_1 else "figures")
        yield Question(
            id=f"pmc-vqa-{source.path.stem}-{number}",
            images=(folder / row["Figure_path"].strip(),),
            text=text,
            references=(label,),
            options=options,
            domain=source.domain,
            role=source.role,
        )
    if left_out:
        warnings.warn(
            f"{len(left_out)} rows of {source.path} were left out: they have no question, or "
            f"their letter is none of their options. The first are {left_out[:5]}, from 0.",
            stacklevel=3,
        )


def _rows(source: Source) -> Iterator[tuple[int, Mapping[str, str]]]:
    path: Path = source.path
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            needed = ("Figure_path", "Question", "Answer", *(f"Choice {e}" for e in _LETTERS))
            if "Answer_label" in (rows.fieldnames or ()):
                needed = tuple(each for each in needed if each != "Answer")
            source.need(dict.fromkeys(rows.fieldnames or ()), needed, str(path))
            for number, row in enumerate(rows):
                if row["Figure_path"] is None or not row["Figure_path"].strip():
                    raise DataError(f"{path}: row {number}, from 0, names no figure.")
                yield number, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not CSV in UTF-8: {error}.") from error


def _cleaned(letter: str, choice: str) -> str:
    """The choice without its own letter; a letter that is not its own belongs to the text."""
    return re.sub(rf"^\s*{letter}\s*:", "", choice).strip()

"""Questions from the files in which data sets publish them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from neuronlens.errors import DataError, UnknownNameError
from neuronlens.questions.layouts import Source, docvqa, lingoqa, ours, pmc_vqa, rsvqa, vqav2
from neuronlens.questions.prompt import DRIVING_ROLE
from neuronlens.questions.question import Question

LayoutName = Literal["vqav2", "pmc-vqa", "docvqa", "lingoqa", "rsvqa", "jsonl"]

_READERS: Mapping[str, tuple[Callable[[Source], Iterator[Question]], str | None, str]] = {
    "vqav2": (vqav2.read, "common", ""),
    "pmc-vqa": (pmc_vqa.read, "medical", ""),
    "docvqa": (docvqa.read, "document", ""),
    "lingoqa": (lingoqa.read, "driving", DRIVING_ROLE),
    "rsvqa": (rsvqa.read, "remote sensing", ""),
    "jsonl": (ours.read, None, ""),
}


def read_questions(
    path: str | Path,
    layout: LayoutName,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    domain: str | None = None,
    role: str | None = None,
) -> list[Question]:
    """Questions of one of P2's five data sets in its official layout, or of a JSONL of ours.

    Ids begin with the layout's name, so that several data sets go into one scan; those of a
    JSONL are as they stand. What each layout is, file by file, says docs/questions.md.

    Args:
        path: The file with the questions.
        layout: `"vqav2"`, `"pmc-vqa"`, `"docvqa"`, `"lingoqa"`, `"rsvqa"` or `"jsonl"`.
        images: Folder of the images, if not where the layout has it.
        annotations: The file with the answers, where the layout keeps them apart and it does
            not lie beside the questions.
        domain: Of every question; by default what P2 uses the data set for: `"common"`,
            `"medical"`, `"document"`, `"driving"`, `"remote sensing"`.
        role: Role description of every question; by default P2's, for driving only.

    Returns:
        The questions in the order of the file. Images are not opened; one that is missing or
        broken is told when it is needed.

    Raises:
        UnknownNameError: If there is no such layout.
        FileNotFoundError: If a file is missing.
        DataError: If a file has another form, an id occurs twice, or questions and answers do
            not belong together.
        MissingExtraError: If LingoQA is read without pyarrow.
    """
    if layout not in _READERS:
        raise UnknownNameError("layout", layout, _READERS)
    read, usual_domain, usual_role = _READERS[layout]
    if annotations is not None and layout not in ("vqav2", "rsvqa"):
        raise DataError(
            f"The layout {layout!r} has questions and answers in one file; leave `annotations` out."
        )
    source = Source(
        layout,
        Path(path),
        None if images is None else Path(images),
        None if annotations is None else Path(annotations),
        usual_domain if domain is None else domain,
        usual_role if role is None else role,
    )
    questions: list[Question] = []
    seen: set[str] = set()
    for each in read(source):
        if each.id in seen:
            raise DataError(
                f"{source.path} has two questions with the id {each.id!r}; ids must differ."
            )
        seen.add(each.id)
        questions.append(each)
    if not questions:
        raise DataError(f"{source.path} holds no question.")
    return questions

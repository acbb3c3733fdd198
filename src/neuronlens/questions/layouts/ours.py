"""A layout of our own: one question per line of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from neuronlens.errors import DataError
from neuronlens.questions.layouts.source import Source
from neuronlens.questions.question import Question
from neuronlens.samples.read import first_fault


class QuestionRow(BaseModel, defer_build=True):
    """A question as a line of JSON; paths are relative to the file's folder.

    Other fields are ignored.

    Attributes:
        id: Unique within the file; the line's number, from 0, if there is none.
        image: File of the image.
        images: Files, where there are several.
        question: What is asked.
        references: Answers that are right; letters, for a question with options.
        options: Letter to text.
        domain: Name of the domain.
        role: A role description.
        kind: Type of question.
    """

    id: str | int | None = None
    image: str | list[str] | None = None
    images: list[str] = Field(default_factory=list)
    question: str
    references: list[str] = Field(default_factory=list)
    options: dict[str, str] | None = None
    domain: str | None = None
    role: str = ""
    kind: str = ""


def read(source: Source) -> Iterator[Question]:
    """Questions of a JSONL file, one `QuestionRow` a line.

    A row's own domain and role go before those given for the file.
    """
    folder = source.images or source.path.parent
    with source.path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines):
                if line.strip():
                    yield _question(source, line, number, folder)
        except UnicodeDecodeError as error:
            raise DataError(f"{source.path} is not UTF-8 text: {error}.") from error


def _question(source: Source, line: str, number: int, folder: Path) -> Question:
    try:
        row = QuestionRow.model_validate_json(line)
        one = [row.image] if isinstance(row.image, str) else (row.image or [])
        return Question(
            id=str(number if row.id is None else row.id),
            images=tuple(folder / name for name in (*one, *row.images)),
            text=row.question,
            references=tuple(row.references),
            options=row.options,
            domain=source.domain if row.domain is None else row.domain,
            role=row.role or source.role,
            kind=row.kind,
        )
    except ValidationError as error:
        raise DataError(f"{source.path}, line {number + 1}: {first_fault(error)}") from error
    except DataError as error:
        raise DataError(f"{source.path}, line {number + 1}: {error}") from error

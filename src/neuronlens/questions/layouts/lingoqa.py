"""LingoQA: questions about driving, each with several frames of a video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neuronlens.errors import DataError, MissingExtraError
from neuronlens.questions.layouts.source import Source
from neuronlens.questions.question import Question

_COLUMNS = ("question_id", "segment_id", "images", "question", "answer")


def read(source: Source) -> Iterator[Question]:
    """Questions of LingoQA as released in 2024 (github.com/wayveai/LingoQA).

    `train.parquet` (of `scenery` and of `action`) or `val.parquet` (of `evaluation`, 500
    questions) has the columns `question_id`, `segment_id`, `images`, `question` and `answer`.
    `images` is a list of paths such as `images/val/{segment}/0.jpg`, relative to the file's
    folder. The rows of one question have one answer each: the evaluation set has two.

    A question has all its frames, in their order, and the answers of all its rows.

    Deviation: P2's code puts the frames side by side into one picture; here they stay several
    images, as P2's text says. A model that takes one image refuses them.
    """
    folder = source.images or source.path.parent
    first: dict[str, tuple[object, object, tuple[str, ...]]] = {}
    answers: dict[str, list[str]] = {}
    for row in _rows(source):
        name = str(row["question_id"])
        frames = tuple(map(str, row["images"] if row["images"] is not None else ()))
        if not frames:
            raise DataError(f"{source.path}: question {name!r} has no images.")
        said = (row["segment_id"], row["question"], frames)
        if first.setdefault(name, said) != said:
            raise DataError(
                f"{source.path} has two questions with the id {name!r}: rows with one id must "
                "have the same segment, images and question."
            )
        if row["answer"] is not None:
            answers.setdefault(name, []).append(str(row["answer"]))
    for name, (_, text, frames) in first.items():
        yield Question(
            id=f"lingoqa-{name}",
            images=tuple(folder / frame for frame in frames),
            text=str(text),
            references=tuple(answers.get(name, ())),
            domain=source.domain,
            role=source.role,
        )


def _rows(source: Source) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "table", "Reading LingoQA") from None
    with source.path.open("rb"):
        pass  # a missing file is told from one that is no parquet
    try:
        file = parquet.ParquetFile(source.path)
        source.need(dict.fromkeys(file.schema_arrow.names), _COLUMNS, str(source.path))
        for batch in file.iter_batches(columns=list(_COLUMNS)):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{source.path} is not parquet: {error}.") from error

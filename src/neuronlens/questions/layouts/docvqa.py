"""DocVQA: questions about scanned pages, answered by words that stand there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from neuronlens.errors import DataError
from neuronlens.questions.layouts.source import Source
from neuronlens.questions.question import Question


def read(source: Source) -> Iterator[Question]:
    """Questions of DocVQA, task 1 (single page), release 1.0 (rrc.cvc.uab.es, challenge 17).

    `{split}_v1.0.json`, or `{split}_v1.0_withQT.json` with types of questions, has `data`, each
    with `questionId`, `question`, `image` such as `documents/xnbl0037_1.png`, `docId` and,
    except in the test split, `answers`. Images lie in `documents` beside the file; the later
    download has them in one folder without it, which `images` can be.

    References are all answers; the kind is the types of the question, joined by commas.
    """
    records = source.json(source.path, "data")["data"]
    folder = source.images or source.path.parent
    # Once, not for every question: a folder with sub-folder is the earlier download.
    is_nested = source.images is None or (folder / "documents").is_dir()
    for number, record in enumerate(records):
        where = f"{source.path}, question {number},"
        each = source.need(record, ("questionId", "question", "image"), where)
        answers = each.get("answers") or []
        if not isinstance(answers, list):
            raise DataError(f"{where} has answers that are no list.")
        name = Path(str(each["image"]))
        yield Question(
            id=f"docvqa-{each['questionId']}",
            images=(folder / (name if is_nested else name.name),),
            text=str(each["question"]),
            references=tuple(map(str, answers)),
            domain=source.domain,
            role=source.role,
            kind=", ".join(map(str, each.get("question_types") or ())),
        )

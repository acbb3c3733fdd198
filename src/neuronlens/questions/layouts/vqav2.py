"""VQAv2: open questions about everyday photographs, ten answers each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from neuronlens.errors import DataError
from neuronlens.questions.layouts.source import Source
from neuronlens.questions.question import Question


def read(source: Source) -> Iterator[Question]:
    """Questions of VQAv2, release 2.0 of 2017 (visualqa.org), as its files are named there.

    `v2_OpenEnded_mscoco_{split}_questions.json` has `data_subtype` and `questions`, each with
    `image_id`, `question` and `question_id`; `v2_mscoco_{split}_annotations.json` beside it has
    `annotations`, each with `question_id`, ten `answers`, `question_type` and `answer_type`.
    Images are `{split}/COCO_{split}_{image_id}.jpg`, twelve digits. Test splits have no
    annotations, and `test-dev2015` asks about images of `test2015`.

    References are the ten answers in their order, repeated as they are; the kind is the type of
    the answer: `yes/no`, `number` or `other`.
    """
    file = source.need(
        source.json(source.path, "questions"), ("data_subtype", "questions"), str(source.path)
    )
    split = str(file["data_subtype"])
    pictures = "test2015" if split.startswith("test") else split
    folder = source.images or source.path.parent / pictures
    answered = None if _is_hidden(source, split) else _answers(source, split)
    asked: set[str] = set()
    for number, record in enumerate(file["questions"]):
        each = source.need(
            record, ("question_id", "image_id", "question"), f"{source.path}, question {number},"
        )
        name = str(each["question_id"])
        asked.add(name)
        if answered is not None and name not in answered:
            raise DataError(
                f"{source.path}: question {name} has no annotation; is it this split's?"
            )
        references, kind = answered[name] if answered is not None else ((), "")
        yield Question(
            id=f"vqav2-{name}",
            images=(folder / f"COCO_{pictures}_{int(each['image_id']):012}.jpg",),
            text=str(each["question"]),
            references=references,
            domain=source.domain,
            role=source.role,
            kind=kind,
        )
    unasked = sorted(set(answered or ()) - asked)
    if unasked:
        raise DataError(
            f"{len(unasked)} annotations have no question in {source.path}, the first is "
            f"{unasked[0]}. Questions and annotations must be of one split."
        )


def _is_hidden(source: Source, split: str) -> bool:
    return split.startswith("test") and source.annotations is None


def _answers(source: Source, split: str) -> dict[str, tuple[tuple[str, ...], str]]:
    path: Path = source.annotations or source.sibling(
        f"v2_mscoco_{split}_annotations.json", "its annotations"
    )
    found: dict[str, tuple[tuple[str, ...], str]] = {}
    for number, record in enumerate(source.json(path, "annotations")["annotations"]):
        where = f"{path}, annotation {number},"
        each = source.need(record, ("question_id", "answers", "answer_type"), where)
        answers = [
            source.need(one, ("answer",), f"{where} one of its answers") for one in each["answers"]
        ]
        name = str(each["question_id"])
        if name in found:
            raise DataError(f"{path} has two annotations of question {name}.")
        found[name] = tuple(str(one["answer"]) for one in answers), str(each["answer_type"])
    return found

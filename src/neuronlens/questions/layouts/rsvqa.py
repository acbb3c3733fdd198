"""RS-VQA: questions about satellite and aerial images, made from maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from neuronlens.errors import DataError
from neuronlens.questions.layouts.source import Source
from neuronlens.questions.question import Question

_ENDING = "_questions.json"


def read(source: Source) -> Iterator[Question]:
    """Questions of RSVQA, low or high resolution (Lobry et al. 2020; Zenodo 6344334, 6344367).

    `LR_split_{split}_questions.json`, or `USGS_split_{split}_questions.json` at high resolution
    (with a second test split, `test_phili`), has `questions`, each with `id`, `active` and, if
    active, `img_id`, `question`, `type` and `answers_ids`; `..._answers.json` beside it has
    `answers`, each with `id`, `active` and `answer`. A file lists every id of the data set;
    only its own are active. Images are `Images_LR/{img_id}.tif` or `Data/{img_id}.tif`; png is
    taken if the first image has no tif but a png.

    The kind is the type of the question: `presence`, `comp`, `count` and `rural_urban` or
    `area`. Answers are as they are in the file: counts are not put into the classes that RSVQA
    trains on. The third file of a split, `..._images.json`, is not needed.
    """
    records = source.json(source.path, "questions")["questions"]
    answers = _answers(source)
    folder = source.images or source.path.parent / (
        "Images_LR" if source.path.name.startswith("LR_") else "Data"
    )
    release = source.path.name.split("_")[0].lower()
    suffix = ""
    for number, record in enumerate(records):
        where = f"{source.path}, question {number},"
        if not source.need(record, ("id", "active"), where)["active"]:
            continue
        each = source.need(record, ("img_id", "question", "type", "answers_ids"), where)
        suffix = suffix or _suffix(folder, each["img_id"])
        lost = [one for one in each["answers_ids"] if one not in answers]
        if lost:
            raise DataError(f"{where} has the answer {lost[0]}, which the answers do not hold.")
        yield Question(
            id=f"rsvqa-{release}-{each['id']}",
            images=(folder / f"{each['img_id']}{suffix}",),
            text=str(each["question"]),
            references=tuple(answers[one] for one in each["answers_ids"]),
            domain=source.domain,
            role=source.role,
            kind=str(each["type"]),
        )


def _answers(source: Source) -> dict[object, str]:
    name = source.path.name
    if source.annotations is None and not name.endswith(_ENDING):
        raise DataError(
            f"{source.path} is not in the layout 'rsvqa': its name should end in {_ENDING}, as "
            "that of the answers beside it ends in _answers.json. Or give `annotations`."
        )
    path: Path = source.annotations or source.sibling(
        f"{name.removesuffix(_ENDING)}_answers.json", "its answers"
    )
    found: dict[object, str] = {}
    for number, record in enumerate(source.json(path, "answers")["answers"]):
        where = f"{path}, answer {number},"
        if source.need(record, ("id", "active"), where)["active"]:
            found[record["id"]] = str(source.need(record, ("answer",), where)["answer"])
    return found


def _suffix(folder: Path, image: object) -> str:
    has_png = (folder / f"{image}.png").is_file() and not (folder / f"{image}.tif").is_file()
    return ".png" if has_png else ".tif"

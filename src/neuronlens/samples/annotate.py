"""Named regions for samples, from the annotation files that COCO and others publish."""

from __future__ import annotations

import json
import warnings
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from pydantic import BaseModel, Field, ValidationError

from neuronlens.errors import DataError
from neuronlens.samples.outline import Outline
from neuronlens.samples.read import first_fault
from neuronlens.samples.sample import Annotation, Sample

_ENDINGS: Final = ("-merged", "-other", "-stuff")
"""How COCO marks a category of stuff that gathers several, or is not the thing of that name."""


class _Image(BaseModel, defer_build=True):
    id: int | str
    file_name: str
    height: int
    width: int


class _Category(BaseModel, defer_build=True):
    id: int
    name: str
    supercategory: str | None = None
    isthing: bool = True

    def concepts(self) -> tuple[str, ...]:
        """Its name and that of its kind, as words."""
        kind = self.supercategory if self.supercategory != "none" else None
        names = (_words(each or "", self.isthing) for each in (self.name, kind))
        return tuple(dict.fromkeys(each for each in names if each))


class _Segment(BaseModel, defer_build=True):
    id: int = Field(gt=0, lt=256**3)
    category_id: int


class _Head(BaseModel, defer_build=True):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[dict[str, Any]]


class _Instance(BaseModel, defer_build=True):
    category_id: int
    segmentation: Any = None


class _Panoptic(BaseModel, defer_build=True):
    file_name: str
    segments_info: list[_Segment]


def annotate(
    samples: Sequence[Sample], path: str | Path, *, masks: str | Path | None = None
) -> list[Sample]:
    """The samples with the regions that a file in COCO's form has of their images.

    Instance files are read (`instances_train2017.json`: polygons and run lengths, of crowds too)
    and panoptic ones (`panoptic_train2017.json` with its folder of PNG maps). An image is found by
    its file name: `file_name` in the file, with its folders if it has any, has to be how the
    image's path ends. Images are not opened and masks not filled here, but when one is needed.

    A region is named by its category and that one's supercategory: ("cat", "animal"). In names,
    underscores become spaces, and the endings -merged, -other and -stuff are dropped, so that
    "wall-other-merged" is a "wall" and "furniture-stuff" is "furniture"; in names of stuff
    (`isthing` is 0) other hyphens become spaces: "floor-wood" is "floor wood". The concept "wall"
    is then all walls, since it is also what the kinds of wall are instances of.

    Regions are of an image as its file stores it. If EXIF data turn the image by a quarter, looking
    for a concept in it is an error; if they turn it by half or mirror it, masks are wrong.

    For annotations of any other form, write a JSONL with label maps or outlines of the regions
    (see `SampleRow`) and read it with `read_samples`, or make each an `Annotation`.

    Args:
        samples: Samples whose images are files.
        path: The JSON.
        masks: Of a panoptic file, the folder of its PNG maps; by default the one beside it with
            its name.

    Returns:
        The samples in their order, each with the file's regions after those it had. A sample
        without an entry in the file comes back as it was; a warning counts these.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If the file is not of this form, a region of these samples is not, a PNG is
            missing, or no image of the samples is in the file.
    """
    path = Path(path)
    samples = list(samples)
    head = _read(path)
    is_panoptic = any("segments_info" in each for each in head.annotations)
    if masks is not None and not is_panoptic:
        raise DataError(f"{path} is no panoptic file: it has no use for masks={str(masks)!r}.")
    known = _by_name(path, head.images)
    depths = sorted({len(name) for name in known}, reverse=True)
    found = [
        [_entry(image, known, depths) if isinstance(image, Path) else None for image in each.images]
        for each in samples
    ]
    wanted = {entry.id: entry for each in found for entry in each if entry is not None}
    _check_found(path, samples, head.images, found)
    concepts = {each.id: _concepts(path, each) for each in head.categories}
    folder = Path(masks) if masks is not None else path.with_suffix("")
    regions: dict[int | str, list[Annotation]] = defaultdict(list)
    for number, item in enumerate(head.annotations):
        if not isinstance(item.get("image_id"), int | str):
            named = item.get("id", f"number {number}")
            raise DataError(f"{path}, annotation {named}: it has no image_id.")
        image = wanted.get(item["image_id"])
        if image is None:
            continue
        try:
            regions[image.id] += (
                _segments(item, concepts, folder)
                if is_panoptic
                else _instance(item, image, concepts)
            )
        except (DataError, ValidationError) as error:
            fault = first_fault(error) if isinstance(error, ValidationError) else error
            named = item.get("id", f"of image {item['image_id']}")
            raise DataError(f"{path}, annotation {named}: {fault}") from error
    return [
        replace(
            sample,
            annotations=sample.annotations
            + tuple(
                replace(region, image=number)
                for number, entry in enumerate(entries)
                if entry is not None
                for region in regions[entry.id]
            ),
        )
        for sample, entries in zip(samples, found, strict=True)
    ]


def _read(path: Path) -> _Head:
    try:
        read = json.loads(path.read_text(encoding="utf-8"), object_hook=_packed)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    try:
        return _Head.model_validate(read)
    except ValidationError as error:
        raise DataError(
            f"{path} is not in COCO's form, which has images, categories and annotations with "
            f"masks. {first_fault(error)}"
        ) from error


def _packed(item: dict[str, Any]) -> dict[str, Any]:
    """An annotation without what is not needed, its polygons as bytes: a file has millions."""
    if "segmentation" not in item:
        return item
    polygons = item["segmentation"]
    if isinstance(polygons, list):
        with suppress(TypeError, OverflowError):  # complained about if it is one that is needed
            item["segmentation"] = [array("d", each) for each in polygons]
    return {name: item[name] for name in _NEEDED if name in item}


_NEEDED: Final = ("id", "image_id", "category_id", "segmentation")


def _by_name(path: Path, images: Sequence[_Image]) -> dict[tuple[str, ...], _Image]:
    """The images by the parts of their file names."""
    known: dict[tuple[str, ...], _Image] = {}
    ids = set()
    for image in images:
        name = PurePosixPath(image.file_name).parts
        if name in known or image.id in ids:
            which = f"named {image.file_name!r}" if name in known else f"with the id {image.id!r}"
            raise DataError(f"{path} has two images {which}, so regions cannot be told apart.")
        ids.add(image.id)
        known[name] = image
    return known


def _entry(
    image: Path, known: Mapping[tuple[str, ...], _Image], depths: Sequence[int]
) -> _Image | None:
    named = (known.get(image.parts[-depth:]) for depth in depths if depth)
    return next((entry for entry in named if entry is not None), None)


def _check_found(
    path: Path,
    samples: Sequence[Sample],
    images: Sequence[_Image],
    found: Sequence[Sequence[_Image | None]],
) -> None:
    """Warn of samples whose images are not in the file; refuse if all are."""
    without = [
        sample
        for sample, entries in zip(samples, found, strict=True)
        if not entries or None in entries
    ]
    given = [str(each) for sample in without for each in sample.images if isinstance(each, Path)]
    if samples and not any(entry for entries in found for entry in entries):
        theirs = repr(images[0].file_name) if images else "none at all"
        ours = f"such as {given[0]!r}" if given else "whose images are in memory, not files"
        raise DataError(
            f"{path} has none of the images of the {len(samples)} samples, {ours}. It has "
            f"images such as {theirs}. Give the file of the same images; names must be equal."
        )
    if without:
        warnings.warn(
            f"{len(without)} of {len(samples)} samples have an image without an entry in {path}, "
            f"such as {without[0].id!r}"
            + (f" with {given[0]}" if given else "")
            + "; it has no regions from there.",
            stacklevel=3,
        )


def _concepts(path: Path, category: _Category) -> tuple[str, ...]:
    concepts = category.concepts()
    if not _words(category.name, category.isthing):
        raise DataError(f"{path}, category {category.id}: it has no name.")
    return concepts


def _words(name: str, is_thing: bool) -> str:
    name = name.strip()
    while name.endswith(_ENDINGS):
        name = name[: name.rindex("-")]
    name = name.replace("_", " ")
    return " ".join((name if is_thing else name.replace("-", " ")).split())


def _named(concepts: Mapping[int, tuple[str, ...]], category: int) -> tuple[str, ...]:
    if category not in concepts:
        known = ", ".join(map(str, list(concepts)[:12])) or "none"
        raise DataError(f"there is no category {category}; the file has {known}.")
    return concepts[category]


def _instance(
    item: Mapping[str, Any], image: _Image, concepts: Mapping[int, tuple[str, ...]]
) -> Iterator[Annotation]:
    read = _Instance.model_validate(item)
    names = _named(concepts, read.category_id)
    size = (image.height, image.width)
    match read.segmentation:
        case [_, *_] as polygons:
            outline = Outline(size, polygons)
        case {"size": [height, width], "counts": str() | list() as counts}:
            if (height, width) != size:
                raise DataError(
                    f"its mask is of {height} x {width}, but its image {image.file_name} of "
                    f"{image.height} x {image.width}."
                )
            outline = Outline(size, counts=counts)
        case other:
            raise DataError(
                "its segmentation is neither a list of polygons nor run lengths with size and "
                f"counts, but {str(other)[:60]}."
            )
    yield Annotation(names, outline)


def _segments(
    item: Mapping[str, Any], concepts: Mapping[int, tuple[str, ...]], folder: Path
) -> Iterator[Annotation]:
    read = _Panoptic.model_validate(item)
    name = PurePosixPath(read.file_name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"its map {read.file_name!r} is not within the folder of masks.")
    labels = (folder / name).resolve()
    if not labels.is_file():
        raise DataError(f"there is no map {labels}. Give the folder of the PNG maps: masks=...")
    for segment in read.segments_info:
        yield Annotation(_named(concepts, segment.category_id), labels, segment.id)

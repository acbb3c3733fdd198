"""Reading samples from files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neuronlens.errors import DataError
from neuronlens.samples.outline import Outline
from neuronlens.samples.sample import Annotation, Sample


class LabelMap(BaseModel):
    """Annotations in a file: a PNG whose values are named."""

    model_config = ConfigDict(defer_build=True, extra="forbid")
    labels: str
    names: dict[int, list[str]]
    image: int = 0


class Region(BaseModel):
    """One named region as a file has it: an outline, as COCO writes it.

    Attributes:
        names: Every concept it is an instance of.
        size: Height and width of the image in pixels.
        polygons: As in `Outline`; empty if there are counts.
        counts: As in `Outline`: a list or COCO's text.
        image: Number of the image within its sample.
    """

    model_config = ConfigDict(defer_build=True, extra="forbid")
    names: list[str]
    size: tuple[int, int]
    polygons: list[list[float]] = Field(default_factory=list)
    counts: str | list[int] | None = None
    image: int = 0

    def outline(self) -> Outline:
        """Its outline, checked here only: an atlas holds many that are never looked at.

        Raises:
            DataError: If it is none.
        """
        return Outline(self.size, self.polygons, self.counts)


class SampleRow(BaseModel, defer_build=True):
    """A sample as a line of JSON; paths are relative to the file's folder.

    Other fields are ignored.

    Attributes:
        id: Unique within the file.
        image: File, or files, of the image.
        prompt: What is asked.
        response: What is said.
        domain: Name of the domain.
        annotations: Named regions as label maps: `{"labels": "masks/1.png", "names": {"1":
            ["cat", "animal"]}}`.
        regions: Named regions as outlines: `{"names": ["cat", "animal"], "size": [480, 640],
            "polygons": [[10, 10, 20, 10, 20, 20]]}`, or with `counts` in place of `polygons`.
        group: Of samples that are not independent of each other, as in `Sample`.
    """

    id: str | int | None = None
    image: str | list[str] | None = None
    prompt: str
    response: str | None = None
    domain: str | None = None
    annotations: list[LabelMap] = Field(default_factory=list)
    regions: list[Region] = Field(default_factory=list)
    group: str | None = None

    def sample(self, folder: Path, fallback_id: str) -> Sample:
        """The sample, with its paths made absolute.

        Raises:
            DataError: If one of `regions` has no outline that can be.
        """
        names = [self.image] if isinstance(self.image, str) else (self.image or [])
        mapped = [
            Annotation(tuple(called), (folder / each.labels).resolve(), number, each.image)
            for each in self.annotations
            for number, called in each.names.items()
        ]
        outlined = [
            Annotation(tuple(each.names), each.outline(), image=each.image) for each in self.regions
        ]
        return Sample(
            id=fallback_id if self.id is None else str(self.id),
            images=tuple((folder / name).resolve() for name in names),
            prompt=self.prompt,
            response=self.response,
            domain=self.domain,
            annotations=(*mapped, *outlined),
            group=self.group,
        )


class Turn(BaseModel, defer_build=True):
    """Who says what in a conversation, as LLaVA's data have it."""

    speaker: str = Field(alias="from")
    value: str


def first_exchange(turns: Sequence[Turn]) -> tuple[str, str] | None:
    """Prompt and response that a conversation begins with; None if it begins otherwise."""
    if [turn.speaker for turn in turns[:2]] != ["human", "gpt"]:
        return None
    return turns[0].value.replace("<image>", "").strip(), turns[1].value.strip()


class _Conversation(BaseModel, defer_build=True):
    id: str | int | None = None
    image: str | list[str] | None = None
    conversations: list[Turn]


def read_samples(path: str | Path, images: str | Path | None = None) -> list[Sample]:
    """Samples from a JSONL file of ours, or from LLaVA's conversation JSON.

    Args:
        path: A `.jsonl` with `image`, `prompt` and optionally `id`, `response`, `domain`,
            `annotations` and `regions` per line (see `SampleRow`); or a `.json` list of records
            with `image` and `conversations`, of which the first exchange is read.
        images: Folder of the images, if not that of the file.

    Returns:
        The samples in the order of the file. Images are not opened; one that is missing
        or broken is skipped, by name, when it is needed.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If the file is not of either form, or an id occurs twice.
    """
    path = Path(path)
    folder = Path(images) if images is not None else path.parent
    readers = {".jsonl": _read_jsonl, ".json": _read_conversations}
    if path.suffix not in readers:
        raise DataError(
            f"{path} is neither .jsonl (one sample per line) nor .json (LLaVA's conversations)."
        )
    try:
        samples = list(readers[path.suffix](path, folder))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"{path} has two samples with the id {sample.id!r}; ids must differ.")
        seen.add(sample.id)
    if not samples:
        raise DataError(f"{path} holds no sample.")
    return samples


def _read_jsonl(path: Path, folder: Path) -> Iterator[Sample]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = SampleRow.model_validate_json(line)
                    sample = row.sample(folder, str(number - 1))
                except ValidationError as error:
                    raise DataError(f"{path}, line {number}: {first_fault(error)}") from error
                except DataError as error:
                    raise DataError(f"{path}, line {number}: {error}") from error
                yield sample


def _read_conversations(path: Path, folder: Path) -> Iterator[Sample]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(records, list):
        raise DataError(f"{path} should hold a list of records, not {type(records).__name__}.")
    longer = 0
    for number, record in enumerate(records):
        try:
            read = _Conversation.model_validate(record)
        except ValidationError as error:
            raise DataError(f"{path}, record {number}: {first_fault(error)}") from error
        turns = read.conversations
        exchange = first_exchange(turns)
        if exchange is None:
            said = [turn.speaker for turn in turns[:2]]
            raise DataError(f"{path}, record {number} begins with {said}, not ['human', 'gpt'].")
        longer += len(turns) > 2
        row = SampleRow(
            id=read.id,
            image=read.image,
            prompt=exchange[0],
            response=exchange[1],
        )
        yield row.sample(folder, str(number))
    if longer:
        warnings.warn(
            f"{longer} of {len(records)} conversations in {path} have more than one exchange; "
            "only the first of each was read.",
            stacklevel=3,
        )


def first_fault(error: ValidationError) -> str:
    """The first field that is wrong, and how."""
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"]) or "the line"
    return f"{where}: {first['msg']}."

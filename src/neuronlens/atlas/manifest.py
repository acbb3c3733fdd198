"""What an atlas says of itself: models of its manifest and its sample table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL.Image import Image
from pydantic import BaseModel

from neuronlens.errors import AtlasError, SampleError
from neuronlens.neurons import NeuronSite
from neuronlens.samples import (
    LabelMap,
    Outline,
    Region,
    Sample,
    SampleRow,
    image_digest,
)
from neuronlens.tokens import Role

FORMAT: Final = 3
"""Version of the folder's layout; a reader refuses any other."""


class Choices(BaseModel, defer_build=True):
    """The readings a scan was made with; another value of any needs another scan.

    `batch_size` and `window` are None where merged scans had several: they change how sums are
    rounded, and nothing else.
    """

    n: int
    keep_visual: int
    keep_text: int
    text_roles: tuple[Role, ...]
    rank: str = "largest activation over eligible tokens"
    text: str = "given"
    neuron: str = "act_fn"
    template: bool
    batch_size: int | None
    window: int | None

    def spelled(self) -> dict[str, object]:
        """The choices by name, roles by theirs, for people."""
        return self.model_dump(mode="json") | {
            "text_roles": "/".join(role.name.lower() for role in self.text_roles)
        }


class ModelInfo(BaseModel, defer_build=True):
    """Which model was scanned: where it came from, and a fingerprint of its weights."""

    name: str
    model_type: str
    fingerprint: str
    dtype: str
    revision: str | None = None


class Skipped(BaseModel, defer_build=True):
    """A sample that could not be used, and why."""

    position: int
    id: str
    reason: str
    detail: str


class FileInfo(BaseModel, defer_build=True):
    """Size and SHA-256 of a file of the atlas."""

    bytes: int
    sha256: str


class Part(BaseModel, defer_build=True):
    """The samples of one scan, of which an atlas may hold several.

    Attributes:
        data: Fingerprint of the samples that were taken in, with their images.
        plan: Fingerprint of the ids and texts of all samples that were given.
        positions: How many were given.
    """

    data: str
    plan: str
    positions: int


class Shard(BaseModel, defer_build=True):
    """Which share of the batches an atlas is of: every `count`-th one from `index` on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index} of {self.count}"


class Session(BaseModel, defer_build=True):
    """One run of a scan, from its start or a checkpoint; what it says is no part of the result.

    Attributes:
        started: When, in UTC.
        samples: How many it took in.
        seconds: How long it ran.
        waited: Seconds in which the model waited for data.
        saving: Seconds spent on checkpoints.
        workers: Worker processes.
        device: Of the model's inputs.
        threads: Of the main process.
        shard: Which share it had.
    """

    started: str
    samples: int = 0
    seconds: float = 0
    waited: float = 0
    saving: float = 0
    workers: int
    device: str
    threads: int
    shard: Shard


class Manifest(BaseModel, defer_build=True):
    """What the folder holds and how it came to be.

    `data` is the fingerprint of all samples that were taken in; `shard` is None unless the atlas
    is a shard that has not been merged yet.
    """

    format: int = FORMAT
    model: ModelInfo
    choices: Choices
    sites: tuple[NeuronSite, ...]
    domains: tuple[str, ...]
    samples: int
    skipped: tuple[Skipped, ...]
    data: str
    parts: tuple[Part, ...]
    shard: Shard | None
    versions: dict[str, str]
    files: dict[str, FileInfo]

    def reasons(self) -> str:
        """How many samples were skipped for what; empty if none was."""
        counts = Counter(each.reason for each in self.skipped)
        return ", ".join(f"{count} {reason}" for reason, count in counts.items())


class SampleRecord(SampleRow):
    """A row of the sample table; paths are absolute.

    Attributes:
        position: In the sequence that was scanned; what `top.ids` hold.
        digests: SHA-256 of each image.
        unit: What its block follows from: its group, or what its images show, in whatever form
            they were given.
        in_memory: Whether an image or a label map was no file, so that the sample must be
            passed again to be looked at.
    """

    position: int
    digests: list[str]
    unit: str
    in_memory: bool = False

    @classmethod
    def of(
        cls, sample: Sample, position: int, pictures: Sequence[Image] | None = None
    ) -> SampleRecord:
        """The record of a sample; `pictures` are its images, opened, if they are at hand."""
        paths = [str(source.absolute()) for source in sample.images if isinstance(source, Path)]
        labels: dict[tuple[str, int], dict[int, list[str]]] = {}
        regions: list[Region] = []
        in_memory = len(paths) < len(sample.images)
        for each in sample.annotations:
            if isinstance(each.labels, Path):
                named = labels.setdefault((str(each.labels.absolute()), each.image), {})
                named.setdefault(each.number, []).extend(each.names)
            elif isinstance(each.labels, Outline):
                size, text = each.labels.size, each.labels.text()
                regions.append(
                    Region(names=list(each.names), size=size, counts=text, image=each.image)
                )
            else:
                in_memory = True
        return cls(
            id=sample.id,
            image=paths,
            prompt=sample.prompt,
            response=sample.response,
            domain=sample.domain,
            annotations=[
                LabelMap(labels=path, names=names, image=image)
                for (path, image), names in labels.items()
            ],
            regions=regions,
            group=sample.group,
            position=position,
            digests=[image_digest(source) for source in sample.images],
            unit=sample.unit(pictures),
            in_memory=in_memory,
        )

    def sample_from_files(self) -> Sample:
        """The sample, if its images are still what was scanned.

        Raises:
            AtlasError: If it was not a file to begin with.
            SampleError: If an image is gone or has changed.
        """
        if self.in_memory:
            raise AtlasError(
                f"Sample {self.id!r} was scanned from memory, so its image or masks cannot be "
                "found again. Pass the same samples: samples=..."
            )
        sample = self.sample(Path("/"), str(self.position))
        paths = [source for source in sample.images if isinstance(source, Path)]
        for path, digest in zip(paths, self.digests, strict=True):
            if not path.exists():
                raise SampleError(sample.id, "missing image", f"{path} is gone since the scan.")
            if image_digest(path) != digest:
                raise SampleError(sample.id, "changed image", f"{path} differs since the scan.")
        return sample

    def fingerprint(self) -> bytes:
        """What makes the sample this one, wherever its files lie."""
        told = [self.id, self.digests, self.prompt, self.response, self.domain, self.group]
        return json.dumps(told).encode()

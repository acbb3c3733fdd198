"""What a sample is: images, what is asked of them, what is said."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from neuronlens.errors import DataError, SampleError
from neuronlens.samples.outline import Outline

Picture = Path | Image.Image | bytes
"""A file, a picture in memory, or the bytes of a file."""


@dataclass(frozen=True, eq=False)
class Annotation:
    """A region of an image, and everything it is called.

    Attributes:
        names: Every concept the region is an instance of, such as `("red", "circle")`.
        labels: A map of the image's size in which the region has the value `number`: an
            array, or a path to a PNG. The value of a colour is red + 256 green + 65536 blue, as
            COCO's panoptic maps have it. Or the region's outline alone.
        number: Value of the region in `labels`; an outline has none.
        image: Number of the image within its sample.
    """

    names: tuple[str, ...]
    labels: Path | NDArray[np.integer[Any]] | Outline
    number: int = 1
    image: int = 0

    def mask(self) -> NDArray[np.bool_]:
        """True inside the region, `[height, width]`; that of an outline is read-only.

        Raises:
            DataError: If the label map cannot be read.
        """
        if isinstance(self.labels, Outline):
            return self.labels.mask()
        labels = _read_labels(self.labels) if isinstance(self.labels, Path) else self.labels
        return np.asarray(labels == self.number)


@lru_cache(maxsize=64)
def _read_labels(path: Path) -> NDArray[np.integer[Any]]:
    try:
        with Image.open(path) as image:
            labels = np.array(image)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"The label map {path} cannot be read: {error}.") from error
    if labels.ndim == 3 and labels.shape[-1] == 3:
        return labels.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    if labels.ndim != 2:
        raise DataError(
            f"The label map {path} has {labels.shape[-1]} values per pixel. Save it with one, or "
            "as a picture in red, green and blue."
        )
    return labels


@dataclass(frozen=True, eq=False)
class Sample:
    """One image (or several), what is asked of it, and what is said about it.

    Attributes:
        id: Unique within a data set.
        images: Paths, pictures in memory, or the bytes of image files.
        prompt: The user's text, without image tokens and chat markers.
        response: The text whose tokens the papers look at; None where there is none.
        domain: Name of the domain, for domain-specific neurons.
        annotations: Named regions, where the data set has them.
        group: Samples of one group are not independent of each other, such as crops of a
            photograph or frames of a video; statistics keep them together. By default,
            samples of the same images are a group.
    """

    id: str
    images: tuple[Picture, ...]
    prompt: str
    response: str | None = None
    domain: str | None = None
    annotations: tuple[Annotation, ...] = ()
    group: str | None = None

    def __post_init__(self) -> None:
        """Take paths as text, and a single image without a tuple, for what they mean."""
        given: Any = self.images
        several = given if isinstance(given, (tuple, list)) else (given,)
        images = tuple(Path(each) if isinstance(each, str) else each for each in several)
        object.__setattr__(self, "images", images)

    def open_images(self) -> list[Image.Image]:
        """The images as RGB, turned upright as their EXIF data say.

        Raises:
            SampleError: If there is none, or one is missing or not readable.
        """
        if not self.images:
            raise SampleError(self.id, "no image", "give at least one, as `image` or `images`.")
        opened = []
        file: Path | io.BytesIO
        for source in self.images:
            if isinstance(source, Image.Image):
                opened.append(ImageOps.exif_transpose(source).convert("RGB"))
                continue
            if isinstance(source, bytes):
                file, named = io.BytesIO(source), f"{len(source)} bytes"
            else:
                file, named = source, str(source)
            try:
                with Image.open(file) as image:
                    opened.append(ImageOps.exif_transpose(image).convert("RGB"))
            except FileNotFoundError:
                raise SampleError(self.id, "missing image", f"there is no file {named}.") from None
            except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as e:
                said = str(e).replace(repr(file), named)  # not where in memory the bytes lie
                raise SampleError(self.id, "corrupt image", f"{named}: {said}.") from e
        return opened

    def unit(self, pictures: Sequence[Image.Image] | None = None) -> str:
        """What is drawn or dealt as a whole by intervals and tests: its group, or its images.

        Args:
            pictures: Its images, opened: then what they show counts, in whatever form they were
                given. Without, files count by their bytes; one that cannot be read by its path.
        """
        if self.group is not None:
            return f"group {self.group}"
        known = [_known_as(each) for each in (self.images if pictures is None else pictures)]
        return "+".join(known) or f"sample {self.id}"

    def concepts(self) -> frozenset[str]:
        """Every name its annotations carry."""
        return frozenset(name for each in self.annotations for name in each.names)


def image_digest(source: Picture) -> str:
    """SHA-256 of a file's bytes, or of a picture's pixels."""
    if isinstance(source, Image.Image):
        return hashlib.sha256(
            repr(source.size).encode() + source.convert("RGB").tobytes()
        ).hexdigest()
    data = source if isinstance(source, bytes) else source.read_bytes()
    return hashlib.sha256(data).hexdigest()


def _known_as(source: Picture) -> str:
    try:
        return image_digest(source)
    except OSError:
        return f"unreadable: {source!s}" if isinstance(source, Path) else "unreadable"

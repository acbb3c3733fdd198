"""A region written down as polygons or run lengths, and the mask it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from neuronlens.errors import DataError

_LARGEST: Final = 2**28
"""No image of more pixels is opened, and no file may make us fill such a mask."""

_FARTHEST: Final = 2**24
"""No corner lies farther out than so many pixels: 64 bits are then enough to be exact."""


@dataclass(frozen=True, eq=False)
class Outline:
    """A region of an image as COCO's files write it: polygons or run lengths.

    A pixel belongs to a polygon if its centre does, with corners rounded to fifths of a pixel as
    COCO's own code does; what a polygon that crosses itself encloses twice is outside. COCO's code
    rounds places along slanted edges once more: it may tell a pixel otherwise whose centre lies
    within a tenth of a pixel of such an edge.

    Attributes:
        size: Height and width of the image in pixels.
        polygons: Each is x, y, x, y, ... in pixels from the top left corner of the image; the
            region is all of them together. Two points or one enclose nothing.
        counts: Without polygons, how many pixels are outside, then inside, then outside and so
            on, counted down each column from the left one on; a list, or COCO's text of it. Kept
            as text.

    Raises:
        DataError: If the size, a polygon or the counts cannot be, or both or neither are given.
    """

    size: tuple[int, int]
    polygons: Sequence[Sequence[float] | NDArray[np.float64]] = ()
    counts: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check what is given, and keep it in few bytes."""
        size = _whole(self.size, "size")
        if len(size) != 2:
            raise DataError(f"The size of an outline is a height and a width, not {size}.")
        height, width = size
        if min(size) < 1 or height * width > _LARGEST:
            raise DataError(f"No image is {height} pixels high and {width} wide.")
        if (self.counts is None) == (len(self.polygons) == 0):
            raise DataError("An outline needs either polygons or counts.")
        kept = tuple(_corners(each) for each in self.polygons)
        counts = self.counts
        if counts is not None:
            runs = _read(counts) if isinstance(counts, str) else _whole(counts, "counts")
            if min(runs, default=0) < 0 or sum(runs) != height * width:
                raise DataError(
                    f"The counts cover {sum(runs)} pixels"
                    + (", some of them negative," if min(runs, default=0) < 0 else "")
                    + f" of an image of {height} x {width}, which has {height * width}."
                )
            counts = counts if isinstance(counts, str) else _written(runs)
        object.__setattr__(self, "size", (height, width))
        object.__setattr__(self, "polygons", kept)
        object.__setattr__(self, "counts", counts)

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> Self:
        """The outline, in run lengths, of exactly this mask `[height, width]`."""
        height, width = mask.shape
        down = np.asarray(mask, np.bool_).T.ravel()
        starts = np.flatnonzero(down[1:] != down[:-1]) + 1
        runs = np.diff([0, *starts.tolist(), down.size]).tolist()
        return cls((height, width), counts=[0, *runs] if down[0] else runs)

    def mask(self) -> NDArray[np.bool_]:
        """True inside the region, `[height, width]`; read-only, for it is kept a while."""
        return _mask(self)

    def text(self) -> str:
        """The run lengths of the mask as COCO's text."""
        if isinstance(self.counts, str):
            return self.counts
        return Outline.of(self.mask()).text()


@lru_cache(maxsize=128)
def _mask(outline: Outline) -> NDArray[np.bool_]:
    height, width = outline.size
    if isinstance(outline.counts, str):
        runs = _read(outline.counts)
        inside = np.arange(len(runs)) % 2 == 1
        mask = np.ascontiguousarray(np.repeat(inside, runs).reshape(width, height).T)
    else:
        mask = np.zeros((height, width), np.bool_)
        for polygon in outline.polygons:
            _fill(mask, np.asarray(polygon).reshape(-1, 2))
    mask.flags.writeable = False
    return mask


def _fill(mask: NDArray[np.bool_], corners: NDArray[np.float64]) -> None:
    """Set the pixels whose centre an odd number of edges lies above.

    In whole tenths of a pixel all of it is exact: corners are even, centres are odd.
    """
    height, width = mask.shape
    points = 2 * np.floor(corners * 5 + 0.5).astype(np.int64)
    ends = np.stack([points, np.roll(points, -1, 0)])
    by_x = np.argsort(ends[..., 0], 0)[..., None]
    (from_x, from_y), (to_x, to_y) = np.take_along_axis(ends, by_x, 0).transpose(0, 2, 1)
    first, end = (np.clip(_up(each - 5, 10), 0, width) for each in (from_x, to_x))
    edge = np.repeat(np.arange(len(points)), end - first)  # once for each column it passes
    if not len(edge):
        return
    column = np.arange(len(edge)) - np.repeat(np.cumsum(end - first) - end, end - first)
    from_x, from_y, to_x, to_y = (each[edge] for each in (from_x, from_y, to_x, to_y))
    across, down = to_x - from_x, to_y - from_y
    reached = (from_y - 5) * across + (10 * column + 5 - from_x) * down
    row = np.clip(_up(reached, 10 * across), 0, height)
    top, left = row.min(), column.min()
    high, wide = row.max() - top, column.max() - left + 1
    crossed = np.bincount((row - top) * wide + column - left, minlength=(high + 1) * wide)
    above = crossed.reshape(high + 1, wide)[:high].cumsum(0)
    mask[top : top + high, left : left + wide] |= above % 2 == 1


def _up(dividend: NDArray[np.int64], divisor: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Quotients of whole numbers, rounded up."""
    return -(-dividend // divisor)


def _corners(given: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    try:
        numbers = np.array(given, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"A polygon is a list of numbers, x and y in turn: {error}.") from error
    if numbers.ndim != 1 or len(numbers) % 2:
        raise DataError(
            f"A polygon is a list of x and y in turn; one here has the shape {numbers.shape}, "
            "which is no even number of coordinates."
        )
    if not (np.abs(numbers) < _FARTHEST).all():
        raise DataError("A polygon has a coordinate that is no place in an image.")
    numbers.flags.writeable = False
    return numbers


def _whole(numbers: Sequence[int], named: str) -> list[int]:
    try:
        whole = [int(each) for each in numbers]
        if whole == list(numbers):
            return whole
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(f"The {named} of an outline are whole numbers, not {str(numbers)[:60]}.")


def _written(runs: Sequence[int]) -> str:
    """Run lengths as COCO's text.

    Each number is the difference to the one before the last from the fourth on, in groups of five
    bits, lowest first; a sixth bit says that more follow, and the highest bit of the last group is
    the sign. A group is the character with its code plus 48.
    """
    characters = []
    for place, run in enumerate(runs):
        left = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            group, left = left & 0x1F, left >> 5
            more = left != (-1 if group & 0x10 else 0)
            characters.append(chr(48 + group + 0x20 * more))
    return "".join(characters)


def _read(text: str) -> list[int]:
    """The run lengths of COCO's text; the reverse of `_written`."""
    runs: list[int] = []
    number = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise DataError(f"{text[:40]!r} is no COCO text of run lengths (at {character!r}).")
        number |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    if shift:
        raise DataError(f"The COCO text of run lengths {text[:40]!r} breaks off within a number.")
    return runs

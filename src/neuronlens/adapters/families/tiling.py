"""How an image was cut into tiles, and what the text and the original's size tell of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.grids import ImageSize, Piece, cells, queries, raster

Area = tuple[float, float, float, float]
"""Left, top, right and bottom of what a tile shows of the image."""

Areas = list[Area | None]
"""None for what is not known."""

Originals = Sequence[Sequence[ImageSize]] | None
"""Per sample, the sizes of its images before processing."""


def original(originals: Originals, sample: int, number: int) -> ImageSize | None:
    """The size before processing of a sample's image, if it was given."""
    rows = originals or ()
    inside = sample < len(rows) and number < len(rows[sample])
    return rows[sample][number] if inside else None


def whole(size: ImageSize) -> Area:
    """The area of an image."""
    return 0.0, 0.0, float(size[0]), float(size[1])


@dataclass(frozen=True)
class Cut:
    """How one image was cut.

    Attributes:
        tiles: Number of tiles, which come row by row.
        columns: Of tiles; None if nothing tells.
        view: Whether the whole image follows as one more tile.
    """

    tiles: int
    columns: int | None
    view: bool = False

    @classmethod
    def of(cls, count: int, columns: int | None) -> Cut:
        """`count` tiles, of which the last is a view of the whole unless it is the only one."""
        return cls(1, 1) if count == 1 else cls(count - 1, columns, view=True)

    def areas(self, tile: ImageSize) -> tuple[ImageSize, Areas]:
        """Size of the canvas that was cut, and what each tile shows of it; then the view."""
        if self.columns is None:
            return tile, [*[None] * self.tiles, *[whole(tile)] * self.view]
        width, height = tile
        size = (self.columns * width, self.tiles // self.columns * height)
        parts: Areas = [
            (x * width, y * height, (x + 1) * width, (y + 1) * height)
            for y, x in (divmod(n, self.columns) for n in range(self.tiles))
        ]
        return size, [*parts, *[whole(size)] * self.view]


@dataclass(frozen=True)
class Text:
    """One row of the text: its token ids, and where its runs of placeholders start and end."""

    ids: list[int]
    runs: list[tuple[int, int]]

    def at(self, position: int) -> int:
        """The id at a position; -1 where there is none."""
        return self.ids[position] if 0 <= position < len(self.ids) else -1

    def image_ends(self, skip: int = 0) -> list[bool]:
        """Which runs end an image: the row's last, and those with the same token behind.

        Args:
            skip: Tokens between a run and that token.
        """
        if not self.runs:
            return []
        end = self.at(self.runs[-1][1] + skip)
        return [self.at(last + skip) == end for _, last in self.runs]

    def until(self, is_last: Sequence[bool]) -> list[list[tuple[int, int]]]:
        """The runs, in groups that end where `is_last` says."""
        groups: list[list[tuple[int, int]]] = [[]]
        for run, last in zip(self.runs, is_last, strict=True):
            groups[-1].append(run)
            if last:
                groups.append([])
        return [group for group in groups if group]


def texts(ids: Int[Tensor, "batch token"], here: Bool[Tensor, "batch token"]) -> list[Text]:
    """The rows of a text with their runs of placeholders, which are `here`."""
    steps = torch.diff(F.pad(here.long(), (1, 1)), dim=1)
    found = []
    for row, step in zip(ids, steps, strict=True):
        starts = (step == 1).nonzero().flatten().tolist()
        ends = (step == -1).nonzero().flatten().tolist()
        found.append(Text(row.tolist(), list(zip(starts, ends, strict=True))))
    return found


def over(area: Area | None, side: int) -> Piece:
    """`side` x `side` tokens over an area, in reading order."""
    if area is None:
        return queries(side * side)
    left, top, right, bottom = area
    unit = raster(side, side, (side, side)).double() / side
    scale = torch.tensor([right - left, bottom - top] * 2).double()
    return cells(unit * scale + torch.tensor([left, top] * 2).double())


def nearest_grid(tiles: int, before: ImageSize, tile: int) -> int:
    """Columns of the grid of so many tiles that GOT-OCR 2's processor, and others, choose.

    It takes the grid whose aspect ratio is the nearest, the last of equally near ones if the
    image fills half of it; so that among those of its number of tiles, too.

    Args:
        tiles: Their number.
        before: Size of the original.
        tile: Pixels of a tile's side.
    """
    width, height = before
    best, nearest = 1, math.inf
    for columns in (n for n in range(1, tiles + 1) if tiles % n == 0):
        off = abs(width / height - columns / (tiles // columns))
        fills = width * height > 0.5 * tile * tile * tiles
        if off < nearest or (off == nearest and fills):
            best, nearest = columns, off
    return best


def least_enlarged_grid(tiles: int, before: ImageSize, tile: int) -> int:
    """As `nearest_grid`, by Cohere's rule: enlarge the least, else shrink the least."""
    width, height = before
    scales = {
        columns: min(columns * tile / width, tiles // columns * tile / height)
        for columns in range(1, tiles + 1)
        if tiles % columns == 0
    }
    enlarged = {columns: scale for columns, scale in scales.items() if scale >= 1}
    if enlarged:
        return min(enlarged, key=lambda columns: enlarged[columns])
    return max(scales, key=lambda columns: scales[columns])

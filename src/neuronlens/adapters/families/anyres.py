"""LLaVA-NeXT and its like: the whole image as one tile, then the tiles of a padded canvas."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.families.llava import SelectingAdapter
from neuronlens.adapters.families.patches import interleaved
from neuronlens.adapters.geometry import Placement, stretched
from neuronlens.adapters.grids import (
    Boxes,
    Grid,
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    in_blocks,
    nothing,
    raster,
    rows,
    special,
)
from neuronlens.errors import AdapterError


@dataclass(frozen=True)
class Canvas:
    """How an image lies on its canvas of tiles: resized to `area`, padded on both sides alike.

    Boxes are told in the pixels of `area`. Where they reach into the padding they are cut
    off, and NaN where nothing is left.
    """

    tiles: tuple[int, int]
    side: int
    area: ImageSize

    @staticmethod
    def of(original: ImageSize, pinpoints: Sequence[Sequence[int]], side: int) -> Canvas:
        """The canvas on which the image loses least, among `pinpoints` (height, width)."""
        from transformers.image_processing_utils import select_best_resolution

        width, height = original
        down, across = select_best_resolution((height, width), [tuple(p) for p in pinpoints])
        if across / width < down / height:
            area = (across, min(math.ceil(height * across / width), down))
        else:
            area = (min(math.ceil(width * down / height), across), down)
        return Canvas((down // side, across // side), side, area)

    @property
    def size(self) -> ImageSize:
        """Of the whole canvas."""
        return self.tiles[1] * self.side, self.tiles[0] * self.side

    def inside(self, box: Boxes) -> Boxes:
        """From pixels of the canvas to those of the resized image."""
        start = [(whole - mine) // 2 for whole, mine in zip(self.size, self.area, strict=True)]
        moved = (box - torch.tensor(start * 2)).clamp(min=0)
        moved = torch.minimum(moved, torch.tensor(self.area * 2).to(moved))
        moved[((moved[..., 2:] - moved[..., :2]) < 1e-4).any(-1)] = float("nan")
        return moved

    def tile(self, number: int, per_side: int) -> Boxes:
        """The cells of one tile."""
        row, column = divmod(number, self.tiles[1])
        corner = (column * self.side, row * self.side)
        return self.inside(raster(per_side, per_side, (self.side, self.side), corner))

    def kept(self, original: ImageSize, per_side: int) -> Float[Tensor, "row column 4"]:
        """The cells of all tiles as one grid, without the rows or columns of the padding."""
        height, width = self.tiles[0] * per_side, self.tiles[1] * per_side
        grid = self.inside(raster(height, width, self.size)).reshape(height, width, 4)
        # As in transformers' unpad_image, rounding included.
        if original[0] / original[1] > width / height:
            cut = (height - int(round(original[1] * (width / original[0]), 7))) // 2
            return grid[cut : height - cut]
        cut = (width - int(round(original[0] * (height / original[1]), 7))) // 2
        return grid[:, cut : width - cut]


def lines(grid: Float[Tensor, "row column 4"]) -> Piece:
    """The tokens of a grid, a newline after each row."""
    piece = nothing()
    for row in grid:
        piece = piece + cells(row) + special()
    return piece


@dataclass(frozen=True, eq=False)
class Laid:
    """An image or frame: the size its boxes are told in, and its tokens.

    Attributes:
        area: In pixels.
        tower: Per tile, what the tower sees.
        passed: Per tile, what the projector is given.
        language: What the language model is given.
    """

    area: ImageSize
    tower: list[Piece]
    passed: list[Piece]
    language: Piece


@register("llava_next")
class AnyresAdapter(SelectingAdapter):
    """Streams: `vision` [tile, CLS (CLIP's) + patch], `projector` [tile, patch], `language`.

    Boxes are told in the pixels of the image as it was resized for the canvas, without its
    padding. Newlines, on the placeholder's id, are SPECIAL.
    """

    def check_model(self) -> None:
        """Refuse what the model itself cannot lay out."""
        super().check_model()
        if (self._strategy == "default") != bool(self.first_tokens):
            raise AdapterError(
                f"vision_feature_select_strategy={self._strategy!r} with a "
                f"{self._vision.model_type!r} leaves no square of patches per tile. Use 'default' "
                "with CLIP and 'full' with SigLIP."
            )
        self.side = int(self._vision.image_size)
        self.patches_per_side = self.side // int(self._vision.patch_size)

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """Also the canvases."""
        mine = [list(each) for each in self._config.image_grid_pinpoints]
        theirs = getattr(self.image_processor, "image_grid_pinpoints", None)
        canvases = None if theirs is None else [list(each) for each in theirs]
        return super().agreements() | {"image grid pinpoints": (canvases, mine)}

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized: the padding is not counted."""
        return stretched(original, size)

    @property
    def per_side(self) -> int:
        """Tokens along each side of a tile."""
        return self.patches_per_side

    def lines(self, canvas: Canvas, original: ImageSize) -> Piece:
        """The tokens behind those of the whole image: rows of the canvas, each with a newline."""
        return lines(canvas.kept(original, self.per_side))

    def laid(self, original: ImageSize) -> Laid:
        """An image with its canvas."""
        canvas = Canvas.of(original, self._config.image_grid_pinpoints, self.side)

        def tiles(per_side: int) -> list[Piece]:
            cut = [canvas.tile(number, per_side) for number in range(math.prod(canvas.tiles))]
            return [cells(box) for box in (raster(per_side, per_side, canvas.area), *cut)]

        first, passed = special(self.first_tokens), tiles(self.per_side)
        return Laid(
            area=canvas.area,
            tower=[first + piece for piece in tiles(self.patches_per_side)],
            passed=passed,
            language=passed[0] + self.lines(canvas, original),
        )

    def whole(self, tokens: Piece, passed: Piece | None = None) -> Laid:
        """An image or frame that is one tile."""
        area = (self.side, self.side)
        patches = cells(raster(self.patches_per_side, self.patches_per_side, area))
        tower = [special(self.first_tokens) + patches]
        return Laid(area, tower, [patches if passed is None else passed], tokens)

    def images(self, inputs: Mapping[str, Any]) -> list[Laid]:
        """The images of the batch."""
        given = inputs.get("image_sizes")
        sizes = [] if given is None else torch.as_tensor(given).tolist()
        return [self.laid((int(width), int(height))) for height, width in sizes]

    def frames(self, inputs: Mapping[str, Any]) -> list[Laid]:
        """The frames of the batch's videos."""
        return []

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Images in order, then the frames of videos."""
        if inputs.get("pixel_values") is not None and inputs.get("image_sizes") is None:
            raise AdapterError(
                "There are pixel_values and no image_sizes, which say how images lie on their "
                "tiles. Pass the processor's whole output to the model."
            )
        images, frames = self.images(inputs), self.frames(inputs)
        laid = [*images, *frames]
        language = flat((i, each.language) for i, each in enumerate(laid))
        if frames:
            ids = self.text(inputs)
            is_video = ids[self.placeholders(inputs, ids)] == self._config.video_token_id
            language = interleaved(is_video, language, sum(len(each.language) for each in images))
        return Seen(
            sizes=[each.area for each in laid],
            language=language,
            streams=self.streams(laid),
        )

    def streams(self, laid: Sequence[Laid]) -> dict[str, Grid]:
        """The tower's and the projector's tokens."""
        tower = [(i, piece) for i, each in enumerate(laid) for piece in each.tower]
        passed = [(i, piece) for i, each in enumerate(laid) for piece in each.passed]
        is_even = len({len(piece) for _, piece in passed}) == 1
        return {"vision": rows(tower), "projector": (rows if is_even else flat)(passed)}


@register("llava_next_video")
class LlavaNextVideoAdapter(AnyresAdapter):
    """As `AnyresAdapter`; each frame of a video counts as an image, its patches averaged."""

    def frames(self, inputs: Mapping[str, Any]) -> list[Laid]:
        """Frames, their patches averaged (or the like) before the projector."""
        videos = inputs.get("pixel_values_videos")
        if videos is None:
            return []
        stride = int(self._config.spatial_pool_stride)
        count = self.patches_per_side // stride
        seen = self.side * count * stride // self.patches_per_side
        tokens = cells(raster(count, count, (seen, seen)))
        return [self.whole(tokens, tokens)] * (videos.shape[0] * videos.shape[1])


def shrunk(before: int, after: int) -> tuple[list[int], list[int]]:
    """First and last of the cells that each cell of a bilinearly shrunk axis is made of."""
    first, last = [], []
    for cell in range(after):
        at = max((cell + 0.5) * before / after - 0.5, 0.0)
        first.append(min(math.floor(at), before - 1))
        last.append(min(math.floor(at) + (at % 1 > 1e-6), before - 1))
    return first, last


def shrunk_grid(
    grid: Float[Tensor, "row column 4"], down: int, across: int
) -> Float[Tensor, "down across 4"]:
    """What the cells of a bilinearly shrunk grid see."""
    top, bottom = shrunk(grid.shape[0], down)
    left, right = shrunk(grid.shape[1], across)
    corner, opposite = grid[top][:, left], grid[bottom][:, right]
    return torch.cat([corner[..., :2], opposite[..., 2:]], -1)


@register("llava_onevision")
class LlavaOnevisionAdapter(AnyresAdapter):
    """As `AnyresAdapter`; large canvases are shrunk, and several images of a sample uncut.

    Each frame of a video counts as an image.
    """

    def lines(self, canvas: Canvas, original: ImageSize) -> Piece:
        """The rows of the canvas, shrunk if there are too many tokens."""
        grid = canvas.kept(original, self.per_side)
        most = int(str(self._config.vision_aspect_ratio).removeprefix("anyres_max_"))
        down, across = grid.shape[:2]
        ratio = math.sqrt(down * across / (most * self.per_side**2))
        if ratio > 1.1:
            grid = shrunk_grid(grid, int(down // ratio), int(across // ratio))
        return lines(grid)

    def images(self, inputs: Mapping[str, Any]) -> list[Laid]:
        """An image with its canvas if it is its sample's only one, else as one padded square."""
        counts = inputs.get("batch_num_images")
        laid = super().images(inputs)
        alone = [True] * len(laid)
        if counts is not None:
            alone = [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)]
        square = cells(raster(self.per_side, self.per_side, (self.side, self.side))) + special()
        return [
            each if is_alone else self.whole(square)
            for each, is_alone in zip(laid, alone, strict=True)
        ]

    def frames(self, inputs: Mapping[str, Any]) -> list[Laid]:
        """Frames, shrunk to half their side behind the projector; a newline after each video."""
        videos = inputs.get("pixel_values_videos")
        if videos is None:
            return []
        grid = raster(self.per_side, self.per_side, (self.side, self.side))
        half = math.ceil(self.per_side / 2)
        grid = shrunk_grid(grid.reshape(self.per_side, self.per_side, 4), half, half)
        tokens = cells(grid.flatten(0, 1))
        video = [self.whole(tokens)] * (int(videos.shape[1]) - 1)
        return [*video, self.whole(tokens + special())] * int(videos.shape[0])

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized; one of several images is padded to a square first."""
        width, height = original
        if size != (self.side, self.side) or width == height:
            return stretched(original, size)
        longest = max(original)
        scale = self.side / longest
        cut = [-((longest - each) // 2) * scale for each in original]
        return Placement(original, (scale, scale), (cut[0], cut[1]))


@register("granite4_vision")
class Granite4VisionAdapter(AnyresAdapter):
    """As `AnyresAdapter`, with a Q-Former for each of the language layers that features enter.

    Streams: `vision` [tile, patch], `qformer` [window, query], `language`. A query's box is
    the cell whose mean it starts from; its attention sees its whole window. The Q-Formers
    of later layers start from one corner of the cell.
    """

    def check_model(self) -> None:
        """Read which Q-Formers there are."""
        super().check_model()
        config = self._config
        self._entered = [layer for _, layer in config.deepstack_layer_map or ()]
        self._spatial = list(config.spatial_target_layers)
        self._window = [int(each) for each in config.downsample_rate.split("/")]

    @property
    def per_side(self) -> int:
        """Tokens along each side of a tile."""
        return int(self.patches_per_side * Fraction(*self._window))

    def stack_of(self, path: str) -> str | None:
        """As told by the path; the Q-Formers of corners that enter nowhere do not run."""
        found = re.search(r"spatial_projectors\.(\d+)", path)
        if found and int(found.group(1)) >= len(self._spatial):
            return None
        return super().stack_of(path)

    def read_layers(self) -> list[int]:
        """The tower's hidden states that are read."""
        deep = [layer for layer, _ in self._config.deepstack_layer_map or ()]
        return [*deep, *([self._config.spatial_vision_layer] if self._spatial else [])]

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers that are not read, and Q-Formers whose features enter no layer."""
        if stack != "qformer":
            return super().is_inert(stack, layer, last)
        targets = [*self._entered, *self._spatial]
        exists = targets[layer] < self._config.text_config.num_hidden_layers
        # Of several for one layer, the last one is used.
        return not exists or targets[layer] in targets[layer + 1 :]

    def streams(self, laid: Sequence[Laid]) -> dict[str, Grid]:
        """The tower's tokens, and the queries window by window."""
        streams = super().streams(laid)
        order = in_blocks(self.per_side, self.per_side, self._window[0])
        passed = [(i, piece[order]) for i, each in enumerate(laid) for piece in each.passed]
        windows = flat(passed).reshape(-1, self._window[0] ** 2)
        return {"vision": streams["vision"], "qformer": windows}

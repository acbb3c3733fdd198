"""Ovis2 and Perception LM: a thumbnail, then the tiles of a stretched canvas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.families.llava import GridAdapter
from neuronlens.adapters.families.patches import interleaved
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement, stretched
from neuronlens.adapters.grids import (
    Grid,
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    raster,
    rows,
    special,
)
from neuronlens.errors import AdapterError


def tile_boxes(down: int, across: int, side: int, per_side: int) -> list[Piece]:
    """A canvas of tiles: the whole image as one tile, then the tiles; one tile is alone."""
    size = (across * side, down * side)
    corners = [(column * side, row * side) for row in range(down) for column in range(across)]
    cut = [cells(raster(per_side, per_side, (side, side), corner)) for corner in corners]
    return cut if len(cut) == 1 else [cells(raster(per_side, per_side, size)), *cut]


@register("ovis2")
class Ovis2Adapter(GridAdapter):
    """Streams: `vision` [tile, patch], `language`. There is no projector.

    A token is a mean of visual words, weighted by what its square of patches looks like. The
    grid of tiles is told by the markers among the image's tokens.
    """

    towers: ClassVar[Mapping[str, int]] = {"ovis2_vision": 0}

    @property
    def placeholder_of_processor(self) -> int | None:
        """The part of an image; what the processor calls its image token stands for all of it."""
        return int(self.processor.tokenizer.convert_tokens_to_ids("<IMG_ATOM>"))

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Thumbnail and tiles."""
        side, patch = int(self._vision.image_size), int(self._vision.patch_size)
        stride = int(self._vision.hidden_stride)
        if side // patch % stride:
            raise AdapterError(
                f"{side // patch} patches a side do not fall into squares of {stride}; the padding "
                "this needs is not described."
            )
        ids = self.text(inputs)
        start, _, _, row, end = self._config.visual_indicator_token_ids
        per_side = side // patch // stride
        sizes: list[ImageSize] = []
        tower: list[tuple[int, Piece]] = []
        language: list[tuple[int, Piece]] = []
        for line in ids.tolist():
            at = 0
            while start in line[at:]:
                first = line.index(start, at)
                at = line.index(end, first)
                image = line[first:at]
                tiles = image.count(int(self._config.image_token_id)) // per_side**2
                down = image.count(row) + 1
                across = max(tiles - 1, 1) // down
                number = len(sizes)
                sizes.append((across * side, down * side))
                for kept, each in ((tower, side // patch), (language, per_side)):
                    kept += [(number, piece) for piece in tile_boxes(down, across, side, each)]
        if len(tower) != len(self.pixels(inputs)):
            raise AdapterError(
                f"The texts tell of {len(tower)} tiles, but there are "
                f"{len(inputs['pixel_values'])} in pixel_values. Was the text expanded by the "
                "model's own processor?"
            )
        return Seen(sizes, flat(language), {"vision": rows(tower)})

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized to the canvas."""
        return stretched(original, size)


@register("perception_lm")
class PerceptionLMAdapter(FamilyAdapter):
    """Streams: `vision` [tile, CLS + patch], `projector` [patch, tile], `language`.

    The inputs do not tell how tiles are arranged: it is seen from the thumbnail, of which
    they are the parts. Each frame of a video counts as an image.
    """

    def check_model(self) -> None:
        """Refuse towers that are no timm vision transformer."""
        super().check_model()
        tower: Any = self.model.get_submodule(_path_of(self.model, "timm_model"))
        if not hasattr(tower, "patch_embed") or not hasattr(tower, "num_prefix_tokens"):
            raise AdapterError(
                f"The vision tower is a {type(tower).__name__}; PerceptionLMAdapter knows the "
                "tokens of timm's vision transformers."
            )
        self._patch = int(tower.patch_embed.patch_size[0])
        self._first = int(tower.num_prefix_tokens)
        if self._first != int(self._config.vision_use_cls_token):
            raise AdapterError(
                f"The tower has {self._first} tokens before its patches, and the model leaves out "
                f"{int(self._config.vision_use_cls_token)} (vision_use_cls_token)."
            )

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Thumbnail and tiles of every image, then frames."""
        return self.look_with(inputs, None)

    def look_with(
        self, inputs: Mapping[str, Any], originals: Sequence[Sequence[ImageSize]] | None
    ) -> Seen:
        """The processor's own rule says how the tiles of an image of known size are arranged."""
        known = [size for row in originals or () for size in row]
        sizes: list[ImageSize] = []
        tower: list[tuple[int, Piece]] = []
        passed: list[tuple[int, Piece]] = []
        shown: dict[str, list[tuple[int, Piece]]] = {"image": [], "video": []}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            given = inputs.get(name)
            for tiles in () if given is None else given:
                side = int(tiles.shape[-1])
                if kind == "video":
                    grids = [(1, 1)] * len(tiles)
                else:
                    original = known[len(sizes)] if known else None
                    grids = [self._grid(tiles, original)]
                for down, across in grids:
                    number = len(sizes)
                    sizes.append((across * side, down * side))
                    patches = side // self._patch
                    pooled = patches // int(self._config.projector_pooling_ratio)
                    for kept, each in ((tower, patches), (passed, patches), (shown[kind], pooled)):
                        pieces = tile_boxes(down, across, side, each)
                        if len(tiles) == 2 and kind == "image":
                            pieces = pieces * 2  # thumbnail and tile are the same
                        kept += [(number, piece) for piece in pieces]
        ids = self.text(inputs)
        ids = ids[self.placeholders(inputs, ids)]
        is_video = ids == self._config.video_token_id
        first = special(self._first)
        stills = sum(len(piece) for _, piece in shown["image"])
        by_tile = rows(passed)
        return Seen(
            sizes=sizes,
            language=interleaved(is_video, flat([*shown["image"], *shown["video"]]), stills),
            streams={
                "vision": rows((i, first + piece) for i, piece in tower),
                "projector": Grid(
                    by_tile.role.T.contiguous(),
                    by_tile.image.T.contiguous(),
                    by_tile.box.transpose(0, 1).contiguous(),
                    by_tile.sample.T.contiguous(),
                ),
            },
        )

    def _grid(
        self, tiles: Float[Tensor, "tile channel side side"], original: ImageSize | None
    ) -> tuple[int, int]:
        """Rows and columns of an image's tiles: by its size, else by what its thumbnail shows."""
        if len(tiles) == 1:
            return 1, 1
        ours, side = self.image_processor, int(tiles.shape[-1])
        if original is not None and hasattr(ours, "_fit_image_to_canvas"):
            rule = ours._fit_image_to_canvas(*original, side)
            across, down = rule or ours._find_closest_aspect_ratio(*original, side)
            if down * across == len(tiles) - 1:
                return int(down), int(across)
        return arrangement(tiles)

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized to the canvas."""
        return stretched(original, size)


def arrangement(tiles: Float[Tensor, "tile channel side side"]) -> tuple[int, int]:
    """Rows and columns of the canvas that, made small, looks most like the first tile."""
    thumbnail, parts = tiles[0].float(), tiles[1:].float()
    count, side = len(parts), tiles.shape[-1]

    def difference(down: int) -> float:
        canvas = parts.unflatten(0, (down, count // down)).permute(2, 0, 3, 1, 4)
        whole = canvas.reshape(1, 3, down * side, count // down * side)
        small = F.interpolate(whole, (side, side), mode="area")[0]
        return float((small - thumbnail).square().mean())

    down = min((n for n in range(1, count + 1) if count % n == 0), key=difference)
    return down, count // down


def _path_of(model: torch.nn.Module, name: str) -> str:
    return cast(str, next(path for path, _ in model.named_modules() if path.endswith(name)))

"""Molmo 2: overlapping crops, pooled by indices that are inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.families.patches import read_until
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    raster,
    rows,
)
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role


@register("molmo2")
class Molmo2Adapter(FamilyAdapter):
    """The whole image, made smaller, and overlapping crops of it; tokens pool 2 x 2 patches.

    Streams: `vision` [crop, patch], `projector` and `language` [token]. Frames of a video
    count as images of their own.
    """

    def placeholder_ids(self) -> list[int]:
        """Of a patch and, before the processor has replaced it, of a whole image."""
        whole = getattr(self.processor, "image_token_id", None)
        return sorted({*super().placeholder_ids(), *([] if whole is None else [int(whole)])})

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """The token of a patch and its size."""
        patch = self.processor.tokenizer.convert_tokens_to_ids("<im_patch>")
        size = self._config.vision_config.patch_size
        return {
            "id of <im_patch>": (patch, self._config.image_patch_id),
            "patch_size": (self.image_processor.patch_size, size),
        }

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers behind the last one whose output is read."""
        chosen = self._config.adapter_config.vision_feature_layer
        # From 0 on these count layers, whose outputs are the hidden states one further.
        states = [k + 1 if k >= 0 else k for k in chosen]
        return stack == "vision" and layer >= read_until(states, last)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Where a crop lies is told by which of its patches are pooled into which token."""
        if inputs.get("pixel_values") is not None:
            pooling, grids = inputs["image_token_pooling"], inputs["image_grids"].tolist()
            pixels = inputs["pixel_values"]
            views = [[(a, b), (c, d)] for a, b, c, d in grids]
        else:
            pooling, grids = inputs["video_token_pooling"], inputs["video_grids"].tolist()
            pixels = inputs["pixel_values_videos"]
            views = [[(a, b)] for frames, a, b in grids for _ in range(frames)]
        per_crop = pixels.shape[-2]
        side, edge = math.isqrt(per_crop), math.isqrt(pooling.shape[1])
        if side**2 != per_crop or edge**2 != pooling.shape[1]:
            raise AdapterError(
                f"{type(self).__name__} knows square crops and square pooling windows, not crops "
                f"of {per_crop} patches and windows of {pooling.shape[1]}."
            )
        counts = [a * b for image in views for a, b in image]
        windows = iter(pooling.cpu().split(counts))
        sizes: list[ImageSize] = []
        tokens: list[tuple[int, Piece]] = []
        patches: list[tuple[int, Piece]] = []
        for number, image in enumerate(views):
            pooled = [_pooled(next(windows), *grid, edge) for grid in image]
            patch = int(self._config.vision_config.patch_size)
            lines, columns = pooled[-1].patches.shape
            size = (columns * patch, lines * patch)
            sizes.append(size)
            for view in pooled:
                high, wide = view.patches.shape
                stretch = torch.tensor([columns / wide, lines / high] * 2) * patch
                tokens.append((number, view.tokens(stretch)))
                patches += [(number, crop) for crop in view.crops(side, stretch)]
        everything = flat(tokens)
        language = flat((number, piece[piece.role != Role.PAD]) for number, piece in tokens)
        return Seen(sizes, language, {"vision": rows(patches), "projector": everything})


@dataclass(frozen=True)
class _View:
    """A view of an image, as pooling sees it.

    Attributes:
        patches: Number of the patch at every place of the view.
        box: Of every token, in patches of the view; empty where it pools none.
    """

    patches: Int[Tensor, "row column"]
    box: Tensor

    def tokens(self, stretch: Tensor) -> Piece:
        """The tokens, in reading order."""
        piece = cells(self.box * stretch)
        piece.role[(self.box[:, :2] >= self.box[:, 2:]).any(1)] = int(Role.PAD)
        return piece

    def crops(self, side: int, stretch: Tensor) -> Iterator[Piece]:
        """The patches of every crop that the view is put together from."""
        own = raster(side, side, (side, side))
        for number in (self.patches // side**2).unique().tolist():
            at = (self.patches // side**2 == number).nonzero()[0]
            inside = int(self.patches[at[0], at[1]]) % side**2
            corner = at.flip(0) - torch.tensor([inside % side, inside // side])
            yield cells((own + corner.repeat(2)) * stretch)


def _pooled(windows: Int[Tensor, "token patch"], lines: int, columns: int, edge: int) -> _View:
    """The view of which `windows` of `edge` x `edge` patches (-1: none) make tokens."""
    places = rearrange(windows, "(r c) (a b) -> (r a) (c b)", r=lines, c=columns, a=edge, b=edge)
    there = places >= 0
    row, column = (there.any(axis).nonzero().flatten() for axis in (1, 0))
    kept = places[row[0] : row[-1] + 1, column[0] : column[-1] + 1]
    start = torch.stack([column[0], row[0]]).repeat(2)
    end = torch.tensor([*kept.T.shape, *kept.T.shape])
    box = raster(lines, columns, (columns * edge, lines * edge)) - start
    return _View(kept, torch.minimum(box.clamp(min=0), end))

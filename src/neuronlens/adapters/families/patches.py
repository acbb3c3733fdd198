"""Where the patches of pixel tensors lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from neuronlens.adapters.grids import Boxes, ImageSize, raster
from neuronlens.errors import AdapterError


def pair(size: Any) -> tuple[int, int]:
    """Height and width of what a config gives as one number or as both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def size_of(pixels: Tensor) -> ImageSize:
    """Width and height of the images of a batch."""
    return int(pixels.shape[-1]), int(pixels.shape[-2])


def patch_boxes(pixels: Tensor, patch: Any) -> Boxes:
    """Boxes of the whole patches of an image."""
    (width, height), (high, wide) = size_of(pixels), pair(patch)
    down, across = height // high, width // wide
    return raster(down, across, (across * wide, down * high))


def one_each(images: Sequence[Sequence[Any]], model: object) -> list[Any]:
    """The images of a batch, for models that take one image with every text."""
    if any(len(each) != 1 for each in images):
        raise AdapterError(
            f"{type(model).__name__} takes one image with each text, but the texts have "
            f"{[len(each) for each in images]}."
        )
    return [each[0] for each in images]

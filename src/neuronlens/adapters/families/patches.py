"""What several families share: places of patches, layers that are read, orders of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from neuronlens.adapters.grids import Boxes, Grid, ImageSize, raster
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


def read_until(chosen: int | Sequence[int], last: int) -> int:
    """The first layer of a tower that is behind everything that is read of it.

    Args:
        chosen: The hidden states that are read: k is the output of layer k - 1, 0 the first
            layer's input; negative numbers count from the last.
        last: The tower's last layer.
    """
    read = [chosen] if isinstance(chosen, int) else chosen
    return max(k if k >= 0 else last + 2 + k for k in read)


def interleaved(is_video: Bool[Tensor, " token"], tokens: Grid, first: int) -> Grid:
    """Tokens of images and of videos, in the order of their placeholders.

    Args:
        is_video: Which placeholders are those of videos.
        tokens: Of all images, then of all videos.
        first: How many of them are the images'.
    """
    counts = (int((~is_video).sum()), int(is_video.sum()))
    given = (first, tokens.role.numel() - first)
    if counts != given:
        raise AdapterError(
            f"The text has {counts[0]} image tokens and {counts[1]} video tokens, but the images "
            f"make {given[0]} and the videos {given[1]}. Was it expanded by the model's own "
            "processor?"
        )
    order = is_video.long().argsort(stable=True).argsort()
    return Grid(tokens.role[order], tokens.image[order], tokens.box[order], tokens.sample[order])


def one_each(images: Sequence[Sequence[Any]], model: object) -> list[Any]:
    """The images of a batch, for models that take one image with every text."""
    if any(len(each) != 1 for each in images):
        raise AdapterError(
            f"{type(model).__name__} takes one image with each text, but the texts have "
            f"{[len(each) for each in images]}."
        )
    return [each[0] for each in images]

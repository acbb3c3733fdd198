"""From processed pixels back to the original image's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuronlens.adapters.grids import ImageSize
from neuronlens.errors import AdapterError


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the processed one: processed = original * scale - cut."""

    original: ImageSize
    scale: tuple[float, float]
    cut: tuple[float, float]

    def to_original(self, box: Float[Tensor, "*axes 4"]) -> Float[Tensor, "*axes 4"]:
        """Boxes in original pixels, clipped to the image; NaN where nothing of it is left."""
        cut = torch.tensor(self.cut * 2, dtype=torch.float64)
        scale = torch.tensor(self.scale * 2, dtype=torch.float64)
        width, height = self.original
        moved = ((box.double() + cut) / scale).clamp(min=0)
        moved = torch.minimum(moved, torch.tensor([width, height, width, height]).double())
        empty = ((moved[..., 2:] - moved[..., :2]) < 1e-3).any(-1)
        moved[empty] = float("nan")
        return moved.float()


def resized_and_cropped(
    image_processor: Any, original: ImageSize, processed: ImageSize
) -> Placement:
    """Undo an image processor that resizes, then crops or pads around the centre.

    Args:
        image_processor: The Hugging Face image processor (CLIP's and its like).
        original: Size before processing.
        processed: Size after, as the model got it.

    Raises:
        AdapterError: If its settings do not explain the processed size.
    """
    width, height = original
    resized = original
    if image_processor.do_resize:
        size = image_processor.size
        short = getattr(size, "shortest_edge", None)
        if short:
            long = int(short * max(original) / min(original))
            resized = (short, long) if width <= height else (long, short)
            if width == height:
                resized = (short, short)
        elif getattr(size, "height", None) and getattr(size, "width", None):
            resized = (size.width, size.height)
    cropped = resized
    if getattr(image_processor, "do_center_crop", False):
        cropped = (image_processor.crop_size.width, image_processor.crop_size.height)
    if cropped != processed:
        raise AdapterError(
            f"{type(image_processor).__name__} should turn an image of {original} into one of "
            f"{cropped} (width, height), but the model was given {processed}. Boxes cannot be "
            "placed; was the image processed with other settings?"
        )
    scale = (resized[0] / width, resized[1] / height)
    # Where an odd number of rows is padded, the two kinds of processors differ by one pixel.
    by_torchvision = any(c.__name__ == "TorchvisionBackend" for c in type(image_processor).__mro__)
    cut = [
        -((after - before) // 2) if by_torchvision and before < after else (before - after) // 2
        for before, after in zip(resized, cropped, strict=True)
    ]
    return Placement(original, scale, (float(cut[0]), float(cut[1])))


def stretched(original: ImageSize, processed: ImageSize) -> Placement:
    """An image that was resized to the processed size and nothing else."""
    scale = (processed[0] / original[0], processed[1] / original[1])
    return Placement(original, scale, (0.0, 0.0))


def processed_by(image_processor: Any, original: ImageSize, processed: ImageSize) -> Placement:
    """Where an image lies in what its processor made of it: cropped if it crops, else resized."""
    if getattr(image_processor, "do_center_crop", False):
        return resized_and_cropped(image_processor, original, processed)
    return stretched(original, processed)

"""What every segmenter does, and how it is told apart from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from neuronlens.errors import SampleError
from neuronlens.samples import Sample


class Segmenter(Protocol):
    """Finds what a phrase names in an image."""

    @property
    def name(self) -> str:
        """What makes the masks, in words; other words wherever the masks could be others.

        Caches keep masks by it, and manifests carry it.
        """
        ...

    def segment(
        self, sample: Sample, image: int, phrases: Sequence[str]
    ) -> Bool[np.ndarray, "phrase height width"]:
        """Masks in the pixels of `sample.open_images()[image]`.

        A phrase that names nothing in the image has an empty mask.
        """
        ...


def clean(phrase: str) -> str:
    """The phrase as detectors are asked for it, and as caches keep it.

    Lower case, single spaces, nothing around it. Full stops and question marks become spaces:
    Grounding DINO reads them as the end of one phrase and the start of the next.
    """
    return " ".join(phrase.lower().replace(".", " ").replace("?", " ").split())


def open_image(sample: Sample, image: int) -> Image.Image:
    """One image of a sample, RGB and upright.

    Raises:
        SampleError: If it is missing or not readable, or the sample has no such image.
    """
    images = sample.open_images()
    if not 0 <= image < len(images):
        raise SampleError(
            sample.id, "no image", f"image {image} was asked for; it has {len(images)}."
        )
    return images[image]


def unite(
    boxes: Sequence[Float[np.ndarray, "box 4"]],
    image: Image.Image,
    fill: Callable[[Float[np.ndarray, "some 4"]], Bool[np.ndarray, "some height width"]],
    batch_size: int,
) -> Bool[np.ndarray, "phrase height width"]:
    """The union of each phrase's masks, made a batch of boxes at a time.

    A batch may hold boxes of several phrases. Never more than one batch of masks is kept.

    Args:
        boxes: By phrase.
        image: Gives the size of the masks.
        fill: Makes the masks of a batch of boxes.
        batch_size: Boxes at a time.
    """
    united = np.zeros((len(boxes), image.height, image.width), np.bool_)
    flat = np.concatenate([np.zeros((0, 4), np.float32), *boxes])
    owners = np.repeat(np.arange(len(boxes)), [len(each) for each in boxes])
    for start in range(0, len(flat), batch_size):
        some = slice(start, start + batch_size)
        for owner, mask in zip(owners[some], fill(flat[some]), strict=True):
            united[owner] |= mask
    return united

"""The segmenter protocol, and the one that knows: a data set's own annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from neuronlens.samples import Annotation, Sample


class Segmenter(Protocol):
    """Finds what a phrase names in an image."""

    def segment(self, sample: Sample, image: int, phrases: Sequence[str]) -> NDArray[np.bool_]:
        """Masks `[phrase, height, width]` in the original image's pixels.

        A phrase that names nothing in the image has an empty mask.
        """
        ...


class AnnotationSegmenter:
    """Masks from the samples' own annotations.

    A phrase names the regions that carry it as a name, or that carry every one of its words
    as a name: "red circle" is what is both red and a circle.
    """

    def segment(self, sample: Sample, image: int, phrases: Sequence[str]) -> NDArray[np.bool_]:
        """Masks `[phrase, height, width]`; empty where no annotation fits the phrase."""
        here = [each for each in sample.annotations if each.image == image]
        if here:
            height, width = here[0].mask().shape
        else:
            width, height = sample.open_images()[image].size
        masks = np.zeros((len(phrases), height, width), np.bool_)
        for mask, phrase in zip(masks, phrases, strict=True):
            for annotation in here:
                if _names(annotation, phrase):
                    mask |= annotation.mask()
        return masks


def _names(annotation: Annotation, phrase: str) -> bool:
    names = {name.lower() for name in annotation.names}
    phrase = phrase.lower().strip(" .")
    return phrase in names or (bool(phrase) and set(phrase.split()) <= names)

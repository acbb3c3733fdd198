"""The segmenter that knows: a data set's own annotations."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from neuronlens.errors import DataError
from neuronlens.samples import Annotation, Sample


class AnnotationSegmenter:
    """Masks from the samples' own annotations.

    A phrase names the regions that carry it as a name, or that carry every one of its words
    as a name: "red circle" is what is both red and a circle.
    """

    def __init__(self) -> None:
        self._checked: WeakSet[Sample] = WeakSet()

    @property
    def name(self) -> str:
        """The class; everything else is in the samples."""
        return "AnnotationSegmenter"

    def segment(self, sample: Sample, image: int, phrases: Sequence[str]) -> NDArray[np.bool_]:
        """Masks `[phrase, height, width]`; empty where no annotation fits the phrase.

        Raises:
            DataError: If a label map is not of its image's size.
        """
        if sample not in self._checked:
            _check_sizes(sample)
            self._checked.add(sample)
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


def _check_sizes(sample: Sample) -> None:
    images = sample.open_images()
    for annotation in sample.annotations:
        height, width = annotation.mask().shape
        if annotation.image >= len(images) or images[annotation.image].size != (width, height):
            sizes = [image.size for image in images]
            raise DataError(
                f"Sample {sample.id!r}: a label map of {width} x {height} annotates image "
                f"{annotation.image} of those of sizes {sizes}. Give each image labels of its size."
            )


def _names(annotation: Annotation, phrase: str) -> bool:
    names = {name.lower() for name in annotation.names}
    phrase = phrase.lower().strip(" .")
    return phrase in names or (bool(phrase) and set(phrase.split()) <= names)

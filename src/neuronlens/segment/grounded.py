"""Phrases to masks in two steps: a detector draws boxes, a masker fills them."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from neuronlens.samples import Sample
from neuronlens.segment.segmenter import clean, open_image


class Detector(Protocol):
    """Draws boxes around what phrases name."""

    @property
    def name(self) -> str:
        """Another one wherever the boxes could be others."""
        ...

    def boxes(self, image: Image.Image, phrases: Sequence[str]) -> list[Float[np.ndarray, "box 4"]]:
        """Left, top, right, bottom of the boxes of each phrase, in pixels of the image.

        A phrase that names nothing has an array without rows.
        """
        ...


class Masker(Protocol):
    """Finds the object in a box."""

    @property
    def name(self) -> str:
        """Another one wherever the masks could be others."""
        ...

    def masks(
        self, image: Image.Image, boxes: Sequence[Float[np.ndarray, "box 4"]]
    ) -> Bool[np.ndarray, "phrase height width"]:
        """The united masks of each array of boxes, in pixels of the image.

        The image is encoded once for all boxes; not at all if there is none.
        """
        ...


class GroundedSegmenter:
    """Masks of what a detector finds: Grounding DINO and SAM 2, or others of their kind.

    A phrase's mask is the union of the masks of its boxes. A phrase without a box has an empty
    mask, and an image without any box never reaches the masker. Several threads may share one;
    they take turns.

    Source: P1, section 3.3 (Grounded SAM 2 with the explanation as its prompt). P1 gives no
    thresholds. Deviation: each phrase is a detector query of its own (docs/methods.md, row 16).
    """

    def __init__(self, detector: Detector, masker: Masker) -> None:
        """Put a detector and a masker together.

        Args:
            detector: Such as `GroundingDino`.
            masker: Such as `Sam2` or `Sam2Package`.
        """
        self.detector = detector
        self.masker = masker
        self._turn = Lock()  # tokenizers and the images of one device are not for two at a time

    @classmethod
    def load(
        cls,
        detector: str = "IDEA-Research/grounding-dino-base",
        masker: str = "facebook/sam2.1-hiera-large",
        *,
        threshold: float = 0.3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GroundedSegmenter:
        """Grounding DINO and SAM 2 through transformers, from the hub or from folders.

        Args:
            detector: Name or folder of a Grounding DINO checkpoint.
            masker: Name or folder of a SAM 2 checkpoint.
            threshold: See `GroundingDino`.
            device: Where both run; by default the first GPU if there is one.
            dtype: Of the weights; by default as they are stored.

        Raises:
            MissingExtraError: If torchvision is not installed: extra `segment`.
        """
        from neuronlens.segment.grounding_dino import GroundingDino
        from neuronlens.segment.sam2 import Sam2

        # First, because it needs torchvision.
        filling = Sam2.load(masker, device=device, dtype=dtype)
        drawing = GroundingDino.load(detector, threshold=threshold, device=device, dtype=dtype)
        return cls(drawing, filling)

    @property
    def name(self) -> str:
        """Both parts' names."""
        return f"GroundedSegmenter({self.detector.name}; {self.masker.name})"

    def segment(
        self, sample: Sample, image: int, phrases: Sequence[str]
    ) -> Bool[np.ndarray, "phrase height width"]:
        """Masks of the phrases; empty where the detector finds nothing.

        Raises:
            SampleError: If the image is missing or not readable.
            SegmenterError: If a model answers with numbers that are not finite.
        """
        picture = open_image(sample, image)
        asked = [clean(phrase) for phrase in phrases]
        queries = [phrase for phrase in dict.fromkeys(asked) if phrase]
        masks = np.zeros((len(phrases), picture.height, picture.width), np.bool_)
        if not queries:
            return masks
        with self._turn:
            boxes = dict(zip(queries, self.detector.boxes(picture, queries), strict=True))
            found = [phrase for phrase in queries if len(boxes[phrase])]
            if found:
                united = self.masker.masks(picture, [boxes[phrase] for phrase in found])
                for row, phrase in enumerate(asked):
                    if phrase in found:
                        masks[row] = united[found.index(phrase)]
        return masks

    def __repr__(self) -> str:
        return self.name

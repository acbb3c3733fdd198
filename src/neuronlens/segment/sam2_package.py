"""Masks for boxes: SAM 2 as its authors publish it, the package `sam2`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import nn

from neuronlens.errors import MissingSegmenterError
from neuronlens.segment.checkpoint import at_least_one, describe, require_eval, settle
from neuronlens.segment.segmenter import unite

_SOURCE = "https://github.com/facebookresearch/sam2"


class Predictor(Protocol):
    """What is used of `sam2.sam2_image_predictor.SAM2ImagePredictor`."""

    model: nn.Module
    mask_threshold: float

    def set_image(self, image: np.ndarray) -> None:
        """Encode an image, `[height, width, 3]`."""
        ...

    def predict(
        self, *, box: np.ndarray, multimask_output: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks, their quality and their logits."""
        ...

    def reset_predictor(self) -> None:
        """Forget the image."""
        ...


class Sam2Package:
    """Finds the object in each box, like `Sam2`, with the predictor of the package `sam2`.

    The package of that name on the Python package index was uploaded by somebody else than its
    authors, so no extra of neuronlens installs it. The authors' own repository is
    https://github.com/facebookresearch/sam2. Where transformers will do, use `Sam2`.

    The predictor keeps the image it was last given: do not use it elsewhere at the same time.
    Its input is float32, and so must be its weights.
    """

    def __init__(self, predictor: Predictor, *, batch_size: int = 16) -> None:
        """Mask with a predictor that was made by the caller.

        Args:
            predictor: Its model in evaluation mode, where it is to run.
            batch_size: Boxes decoded at a time; each needs a float per pixel of the image.

        Raises:
            SegmenterError: If the model is in training mode, or a number makes no sense.
        """
        require_eval(predictor.model)
        self.predictor = predictor
        self.batch_size = at_least_one("batch_size", batch_size)
        # Only here does the predictor keep from which sizes on it fills holes and drops specks.
        transforms = vars(predictor)["_transforms"]
        settings = {
            key: getattr(transforms, key, None)
            for key in ("resolution", "mask_threshold", "max_hole_area", "max_sprinkle_area")
        }
        self._checkpoint = describe(predictor.model, f"{settings} {predictor.mask_threshold}")
        self._turn = Lock()

    @classmethod
    def load(
        cls,
        name: str = "facebook/sam2.1-hiera-large",
        *,
        batch_size: int = 16,
        device: torch.device | str | None = None,
    ) -> Sam2Package:
        """The masker of a checkpoint on the hub that the package knows.

        Args:
            name: Name of the checkpoint.
            batch_size: Boxes decoded at a time.
            device: By default the first GPU if there is one.

        Raises:
            MissingSegmenterError: If the package is not installed.
        """
        try:
            package = import_module("sam2.sam2_image_predictor")
        except ImportError as error:
            raise MissingSegmenterError(
                f"Sam2Package needs the package 'sam2', which cannot be imported ({error}). "
                f"No extra brings it: install it from its authors, {_SOURCE}. The 'sam2' of the "
                "package index is somebody else's upload. neuronlens.segment.Sam2 does the same "
                "through transformers."
            ) from None
        # It is loaded on the CPU, as the package's own default is a GPU that may not be there.
        predictor = package.SAM2ImagePredictor.from_pretrained(name, device="cpu")
        settle(predictor.model, device)
        return cls(predictor, batch_size=batch_size)

    @property
    def name(self) -> str:
        """Class and checkpoint."""
        return f"Sam2Package({self._checkpoint})"

    def masks(
        self, image: Image.Image, boxes: Sequence[Float[np.ndarray, "box 4"]]
    ) -> Bool[np.ndarray, "phrase height width"]:
        """The united masks of each array of boxes; the image is encoded once."""

        def fill(some: Float[np.ndarray, "some 4"]) -> Bool[np.ndarray, "some height width"]:
            masks, _, _ = self.predictor.predict(box=some, multimask_output=False)
            # One box comes without the axis of boxes, several with one more for their masks.
            return np.asarray(masks.reshape(len(some), image.height, image.width) > 0)

        with self._turn, torch.inference_mode():
            if any(len(each) for each in boxes):
                self.predictor.set_image(np.array(image))
            try:
                return unite(boxes, image, fill, self.batch_size)
            finally:
                self.predictor.reset_predictor()

    def __repr__(self) -> str:
        return self.name

"""Masks for boxes: SAM 2 through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from neuronlens.segment.checkpoint import (
    at_least_one,
    describe,
    finite,
    require_eval,
    require_torchvision,
    settle,
)
from neuronlens.segment.segmenter import unite

if TYPE_CHECKING:
    from transformers import Sam2Model, Sam2Processor


class Sam2:
    """Finds the object in each box; one mask per box, no choice of three."""

    def __init__(self, model: Sam2Model, processor: Sam2Processor, *, batch_size: int = 16) -> None:
        """Mask with a model that was loaded by the caller.

        Args:
            model: In evaluation mode, where and in which dtype it is to run.
            processor: The one that belongs to it.
            batch_size: Boxes decoded at a time; each needs a float per pixel of the image.

        Raises:
            SegmenterError: If the model is in training mode, or a number makes no sense.
        """
        require_eval(model)
        self.model = model
        self.processor = processor
        self.batch_size = at_least_one("batch_size", batch_size)
        self._checkpoint = describe(model, processor.image_processor.to_json_string())

    @classmethod
    def load(
        cls,
        name: str = "facebook/sam2.1-hiera-large",
        *,
        batch_size: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Sam2:
        """The masker of a checkpoint, from the hub or from a folder.

        Args:
            name: Name or folder of the checkpoint.
            batch_size: Boxes decoded at a time.
            device: By default the first GPU if there is one.
            dtype: Of the weights; by default as they are stored.

        Raises:
            MissingExtraError: If torchvision is not installed: extra `segment`.
        """
        require_torchvision("SAM 2")
        from transformers import Sam2Model, Sam2Processor

        model = Sam2Model.from_pretrained(name, dtype=dtype or "auto")
        settle(model, device)
        return cls(
            model,
            Sam2Processor.from_pretrained(name),
            batch_size=batch_size,
        )

    @property
    def name(self) -> str:
        """Class and checkpoint."""
        return f"Sam2({self._checkpoint})"

    def masks(
        self, image: Image.Image, boxes: Sequence[Float[np.ndarray, "box 4"]]
    ) -> Bool[np.ndarray, "phrase height width"]:
        """The united masks of each array of boxes; the image is encoded once.

        Raises:
            SegmenterError: If the model's numbers are not finite.
        """
        embeddings: list[torch.Tensor] = []

        def fill(some: Float[np.ndarray, "some 4"]) -> Bool[np.ndarray, "some height width"]:
            if not embeddings:
                embeddings.extend(self._encode(image))
            return self._fill(image, embeddings, some)

        with torch.inference_mode():
            return unite(boxes, image, fill, self.batch_size)

    def _encode(self, image: Image.Image) -> list[torch.Tensor]:
        model = self.model
        pixels = self.processor.image_processor(images=image, return_tensors="pt").pixel_values
        return list(model.get_image_embeddings(pixels.to(model.device, model.dtype)))

    def _fill(
        self,
        image: Image.Image,
        embeddings: list[torch.Tensor],
        boxes: Float[np.ndarray, "some 4"],
    ) -> Bool[np.ndarray, "some height width"]:
        size = (image.height, image.width)
        inputs = self.processor(
            input_boxes=[boxes.tolist()], original_sizes=[list(size)], return_tensors="pt"
        )
        model = self.model
        # The boxes stay in float32: half precision would move their corners by some pixels.
        answer = model(
            image_embeddings=embeddings,
            input_boxes=inputs["input_boxes"].to(model.device),
            multimask_output=False,
        )
        logits = finite(answer.pred_masks[0], model)
        masks = self.processor.post_process_masks([logits], [list(size)])[0]
        return np.asarray(masks[:, 0].cpu().numpy())

    def __repr__(self) -> str:
        return self.name

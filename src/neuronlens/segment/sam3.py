"""Masks for phrases in one step: SAM 3 through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from neuronlens.samples import Sample
from neuronlens.segment.checkpoint import (
    at_least_one,
    describe,
    finite,
    require_eval,
    require_torchvision,
    settle,
    share,
)
from neuronlens.segment.segmenter import clean, open_image

if TYPE_CHECKING:
    from transformers import Sam3Model, Sam3Processor
    from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

LONGEST = 32
"""Tokens of a phrase, with begin and end, that SAM 3's text encoder was trained with."""


class Sam3Segmenter:
    """Masks of all instances of the concept a phrase names, without boxes in between.

    A phrase's mask is the union of the masks of the instances found. The image is encoded once
    for all its phrases. A phrase of more than 32 tokens loses its end, as the model reads no more.
    Several threads may share one segmenter; they take turns.

    Source: no paper of ours; it takes Grounded SAM 2's place in P1, section 3.3.
    """

    def __init__(
        self,
        model: Sam3Model,
        processor: Sam3Processor,
        *,
        threshold: float = 0.3,
        mask_threshold: float = 0.5,
        batch_size: int = 16,
    ) -> None:
        """Segment with a model that was loaded by the caller.

        Args:
            model: In evaluation mode, where and in which dtype it is to run.
            processor: The one that belongs to it.
            threshold: Instances with a score above it count; 0 to 1.
            mask_threshold: Pixels with a probability above it are in an instance's mask; 0 to 1.
            batch_size: Masks brought to the image's size at a time.

        Raises:
            SegmenterError: If the model is in training mode, or a number makes no sense.
        """
        require_eval(model)
        self.model = model
        self.processor = processor
        self.threshold = share("threshold", threshold)
        self.mask_threshold = share("mask_threshold", mask_threshold)
        self.batch_size = at_least_one("batch_size", batch_size)
        inputs = processor.image_processor.to_json_string()
        self._checkpoint = describe(model, f"{inputs} {len(processor.tokenizer)}")
        self._turn = Lock()

    @classmethod
    def load(
        cls,
        name: str = "facebook/sam3",
        *,
        threshold: float = 0.3,
        mask_threshold: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Sam3Segmenter:
        """The segmenter of a checkpoint, from the hub or from a folder.

        Args:
            name: Name or folder of the checkpoint.
            threshold: Instances with a score above it count.
            mask_threshold: Pixels with a probability above it are in an instance's mask.
            device: By default the first GPU if there is one.
            dtype: Of the weights; by default as they are stored.

        Raises:
            MissingExtraError: If torchvision is not installed: extra `segment`.
        """
        require_torchvision("SAM 3")
        from transformers import Sam3Model, Sam3Processor

        model = Sam3Model.from_pretrained(name, dtype=dtype or "auto")
        settle(model, device)
        return cls(
            model,
            Sam3Processor.from_pretrained(name),
            threshold=threshold,
            mask_threshold=mask_threshold,
        )

    @property
    def name(self) -> str:
        """Class, checkpoint, thresholds."""
        return (
            f"Sam3Segmenter({self._checkpoint}, threshold={self.threshold}, "
            f"mask_threshold={self.mask_threshold})"
        )

    def segment(
        self, sample: Sample, image: int, phrases: Sequence[str]
    ) -> Bool[np.ndarray, "phrase height width"]:
        """Masks of the phrases; empty where no instance is found.

        Raises:
            SampleError: If the image is missing or not readable.
            SegmenterError: If the model's numbers are not finite.
        """
        picture = open_image(sample, image)
        asked = [clean(phrase) for phrase in phrases]
        queries = [phrase for phrase in dict.fromkeys(asked) if phrase]
        masks = np.zeros((len(phrases), picture.height, picture.width), np.bool_)
        if not queries:
            return masks
        with self._turn, torch.inference_mode():
            seen = self._encode(picture)
            for query in queries:
                mask = self._find(seen, query, picture)
                for row, phrase in enumerate(asked):
                    if phrase == query:
                        masks[row] = mask
        return masks

    def _encode(self, image: Image.Image) -> Sam3VisionEncoderOutput:
        model = self.model
        pixels = self.processor.image_processor(images=image, return_tensors="pt").pixel_values
        features: Sam3VisionEncoderOutput = model.get_vision_features(
            pixel_values=pixels.to(model.device, model.dtype)
        )
        return features

    def _find(
        self, seen: Sam3VisionEncoderOutput, phrase: str, image: Image.Image
    ) -> Bool[np.ndarray, "height width"]:
        """The union of the instances of one phrase.

        One phrase at a time: the model takes no two phrases for one encoded image.
        """
        model = self.model
        # The processor would pad but not cut, and then the model refuses the length.
        words = self.processor.tokenizer(
            phrase, padding="max_length", max_length=LONGEST, truncation=True, return_tensors="pt"
        ).to(model.device)
        answer = model(
            vision_embeds=seen, input_ids=words.input_ids, attention_mask=words.attention_mask
        )
        scores = finite(answer.pred_logits[0], model).sigmoid()
        if answer.presence_logits is not None:
            scores = scores * finite(answer.presence_logits[0], model).sigmoid()
        found = finite(answer.pred_masks[0, scores > self.threshold], model).sigmoid()
        union = np.zeros((image.height, image.width), np.bool_)
        for some in found.split(self.batch_size):
            if len(some):  # splitting nothing gives one empty part
                union |= self._enlarge(some, image).any(0).cpu().numpy()
        return union

    def _enlarge(self, low: Tensor, image: Image.Image) -> Tensor:
        high = torch.nn.functional.interpolate(
            low[None], size=(image.height, image.width), mode="bilinear", align_corners=False
        )
        return high[0] > self.mask_threshold

    def __repr__(self) -> str:
        return self.name

"""Boxes for phrases: Grounding DINO through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from neuronlens.segment.checkpoint import (
    at_least_one,
    describe,
    finite,
    require_eval,
    settle,
    share,
)
from neuronlens.segment.segmenter import clean

if TYPE_CHECKING:
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor


class GroundingDino:
    """Draws a box wherever a phrase's score is above a threshold.

    Each phrase is a query of its own, in lower case and with a full stop behind it: in a text of
    several phrases the model's scores do not say which of them a box belongs to. So there is
    no text threshold either: it chooses the words of a box, and here they are known. Phrases
    share a batch, with padding; what is found does not depend on the batch, up to rounding.

    A phrase too long for the model loses its last words. The image goes through the detector's
    backbone once per phrase, because its forward takes pixels only.
    """

    def __init__(
        self,
        model: GroundingDinoForObjectDetection,
        processor: GroundingDinoProcessor,
        *,
        threshold: float = 0.3,
        batch_size: int = 8,
    ) -> None:
        """Detect with a model that was loaded by the caller.

        Args:
            model: In evaluation mode, where and in which dtype it is to run.
            processor: The one that belongs to it.
            threshold: Boxes with a score above it count; 0 to 1.
            batch_size: Phrases in one forward.

        Raises:
            SegmenterError: If the model is in training mode, or a number makes no sense.
        """
        require_eval(model)
        self.model = model
        self.processor = processor
        self.threshold = share("threshold", threshold)
        self.batch_size = at_least_one("batch_size", batch_size)
        inputs = processor.image_processor.to_json_string()
        self._checkpoint = describe(model, f"{inputs} {len(processor.tokenizer)}")

    @classmethod
    def load(
        cls,
        name: str = "IDEA-Research/grounding-dino-base",
        *,
        threshold: float = 0.3,
        batch_size: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GroundingDino:
        """The detector of a checkpoint, from the hub or from a folder.

        Args:
            name: Name or folder of the checkpoint.
            threshold: Boxes with a score above it count.
            batch_size: Phrases in one forward.
            device: By default the first GPU if there is one.
            dtype: Of the weights; by default as they are stored.
        """
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        model = AutoModelForZeroShotObjectDetection.from_pretrained(name, dtype=dtype or "auto")
        settle(model, device)
        return cls(
            model,
            AutoProcessor.from_pretrained(name),
            threshold=threshold,
            batch_size=batch_size,
        )

    @property
    def name(self) -> str:
        """Class, checkpoint, threshold."""
        return f"GroundingDino({self._checkpoint}, threshold={self.threshold})"

    def boxes(self, image: Image.Image, phrases: Sequence[str]) -> list[Float[np.ndarray, "box 4"]]:
        """Left, top, right, bottom of the boxes of each phrase, in pixels of the image.

        Raises:
            SegmenterError: If the model's numbers are not finite.
        """
        texts = [self._query(phrase) for phrase in phrases]
        found = [np.zeros((0, 4), np.float32) for _ in phrases]
        asked = [i for i, text in enumerate(texts) if text]
        if not asked:
            return found
        pixels = self.processor.image_processor(images=image, return_tensors="pt")
        for start in range(0, len(asked), self.batch_size):
            some = asked[start : start + self.batch_size]
            for i, boxes in zip(some, self._detect(pixels, [texts[i] for i in some]), strict=True):
                found[i] = boxes * np.array(image.size * 2, np.float32)
        return found

    def _detect(
        self, pixels: dict[str, torch.Tensor], texts: Sequence[str]
    ) -> list[Float[np.ndarray, "box 4"]]:
        """Boxes as shares of the image's width and height."""
        model = self.model
        words = self.processor.tokenizer(
            list(texts), padding=True, return_token_type_ids=True, return_tensors="pt"
        ).to(model.device)
        shown = {
            key: value.to(model.device).expand(len(texts), *value.shape[1:])
            for key, value in pixels.items()
        }
        shown["pixel_values"] = shown["pixel_values"].to(model.dtype)
        with torch.inference_mode():
            answer = model(**shown, **words)
        # Positions behind the text are -inf; a score is the best of the others.
        scores = finite(answer.logits.amax(-1), model).sigmoid()
        center, size = finite(answer.pred_boxes, model).split(2, -1)
        corners = torch.cat([center - size / 2, center + size / 2], -1)
        return [
            box[score > self.threshold].cpu().numpy()
            for box, score in zip(corners, scores, strict=True)
        ]

    def _query(self, phrase: str) -> str:
        """The text to ask for a phrase with; empty if it names nothing."""
        text = clean(phrase)
        limit = self.model.config.max_text_len
        while text and len(self.processor.tokenizer(f"{text}.").input_ids) > limit:
            shorter = " ".join(text.split()[: limit - 3][:-1])  # begin, full stop, end
            text = shorter or text[: len(text) // 2]
        return f"{text}." if text else ""

    def __repr__(self) -> str:
        return self.name

"""Images as codes of a vocabulary: Chameleon and Emu3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuronlens.adapters.base import register
from neuronlens.adapters.families.patches import size_of
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    Seen,
    cells,
    flat,
    nothing,
    raster,
    special,
)


@register("chameleon", "emu3")
class ImageCodesAdapter(FamilyAdapter):
    """Chameleon and Emu3: an image becomes codes of a vocabulary. One stream: `language`.

    A code's box is the cell that it stands for; the convolutions and norms of the image
    tokenizer see more of the image.
    """

    not_run = r"vqmodel"

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """Chameleon's processor must not end the text with a separator of its own."""
        if self._config.model_type == "emu3":
            return super().process(texts, images, add_special_tokens=add_special_tokens)
        inputs: Mapping[str, Any] = self.processor(
            images=[each for row in images for each in row] or None,
            text=list(texts),
            return_for_text_completion=True,
            add_special_tokens=add_special_tokens,
            padding=True,
            return_tensors="pt",
        )
        return dict(inputs)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One code per cell, in reading order; Emu3 ends every row with a marker."""
        pixels = inputs["pixel_values"]
        factor = 2 ** (len(self._config.vq_config.channel_multiplier) - 1)
        is_emu3 = self._config.model_type == "emu3"
        sizes = [size_of(pixels) for _ in pixels]
        if is_emu3:  # smaller images are padded on the right and below
            sizes = [(int(width), int(height)) for height, width in inputs["image_sizes"].tolist()]
        pieces = []
        for i, (width, height) in enumerate(sizes):
            down, across = height // factor, width // factor
            box = raster(down, across, (across * factor, down * factor))
            lines = [cells(line) for line in box.split(across)]
            end = special() if is_emu3 else nothing()
            pieces.append((i, sum((line + end for line in lines), nothing())))
        return Seen(sizes=sizes, language=flat(pieces))

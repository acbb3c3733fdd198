"""GIT: an image before the text, without placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.families.patches import one_each, patch_boxes, size_of
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    Piece,
    Seen,
    cells,
    flat,
    queries,
    rows,
    special,
)
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap


@register("git")
class GitAdapter(FamilyAdapter):
    """GIT: the image stands before the text, without placeholders.

    Streams: `vision` [image, CLS + patch], `language` [sample, CLS + patch + text], or, for
    videos, the frames' one after the other.
    """

    one_image = True

    prefixes_images = True

    def check_model(self) -> None:
        """Refuse what is not the language model."""
        if not hasattr(self.model, "output"):
            raise AdapterError(
                f"{type(self.model).__name__} is not GIT's language model (GitForCausalLM), "
                "which is the only one described."
            )

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """One image with each text."""
        pictures = [[each] for each in one_each(images, self.model)]
        return super().process(texts, pictures, add_special_tokens=add_special_tokens)

    def _frames(self, inputs: Mapping[str, Any]) -> int:
        pixels = inputs["pixel_values"]
        return int(pixels.shape[1]) if pixels.ndim == 5 else 1

    def _image(self, inputs: Mapping[str, Any], first: Piece) -> Piece:
        return first + cells(
            patch_boxes(inputs["pixel_values"], self._config.vision_config.patch_size)
        )

    def _prefix(self, inputs: Mapping[str, Any]) -> int:
        if not self.has_images(inputs):
            return 0
        return self._frames(inputs) * len(self._image(inputs, special()))

    def text_map(self, inputs: Mapping[str, Any]) -> TokenMap:
        """The text, with room for the image before it."""
        text = super().text_map(inputs)
        count = self._prefix(inputs)
        return TokenMap(
            role=_before(text.role, count, int(Role.SPECIAL)),
            sample=text.sample[:, :1].expand(-1, count + text.sample.shape[1]).contiguous(),
            image=_before(text.image, count, -1),
            box=_before(text.box, count, float("nan")),
        )

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """The positions before the text."""
        return _before(torch.zeros_like(ids, dtype=torch.bool), self._prefix(inputs), True)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch, in reading order; the CLS token sees the whole image."""
        pixels = inputs["pixel_values"]
        samples, frames = range(len(pixels)), range(self._frames(inputs))
        # The tower runs once per frame, for all samples.
        tower = [
            (s * len(frames) + f, self._image(inputs, special())) for f in frames for s in samples
        ]
        images = range(len(tower))
        return Seen(
            sizes=[size_of(pixels) for _ in images],
            language=flat((i, self._image(inputs, queries(1))) for i in images),
            streams={"vision": rows(tower)},
        )


def _before(values: Tensor, count: int, fill: Any) -> Tensor:
    """`count` positions before those of a text."""
    return torch.cat([values.new_full((len(values), count, *values.shape[2:]), fill), values], 1)

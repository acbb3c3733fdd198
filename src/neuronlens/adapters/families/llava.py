"""LLaVA 1.5 and its like: a CLIP-like tower, a projector, one token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuronlens.adapters.base import register
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    Piece,
    Seen,
    cells,
    flat,
    nothing,
    queries,
    raster,
    rows,
    special,
)
from neuronlens.errors import AdapterError

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Tokens before the patches of the vision towers whose tokens are described."""


@register("llava")
class LlavaAdapter(FamilyAdapter):
    """Streams: `vision` [image, CLS (CLIP's) + patch], `projector` [image, patch], `language`."""

    not_run = r"vision_tower.*\.head\."  # SigLIP's pooling head, of which LLaVA reads nothing

    def check_model(self) -> None:
        """Refuse vision towers whose tokens are not described here."""
        self._vision = self._config.vision_config
        if self._vision.model_type not in _CLASS_TOKENS:
            raise AdapterError(
                f"The vision tower is a {self._vision.model_type!r}; {type(self).__name__} knows "
                f"the tokens of {', '.join(_CLASS_TOKENS)}. To describe another: docs/adapters.md."
            )
        self._strategy = getattr(self._config, "vision_feature_select_strategy", "default")

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers behind the last one whose output is read."""
        chosen = self._config.vision_feature_layer
        # hidden_states[k] is the output of layer k - 1; negative numbers count from the last.
        read = [
            k if k >= 0 else last + 2 + k for k in ([chosen] if isinstance(chosen, int) else chosen)
        ]
        return stack == "vision" and layer >= max(read)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch, in reading order."""
        pixels = inputs["pixel_values"]
        height, width = pixels.shape[-2:]
        patch = self._vision.patch_size
        grid = cells(raster(height // patch, width // patch, (width, height)))
        first = special(_CLASS_TOKENS[self._vision.model_type])
        # The CLS token, passed on with "full", sees the whole image and no single region.
        passed_on: Piece = nothing()
        if self._strategy == "full" and len(first):
            passed_on = queries(1)
        images = range(len(pixels))
        return Seen(
            sizes=[(width, height) for _ in images],
            language=flat((i, passed_on + grid) for i in images),
            streams={
                "vision": rows((i, first + grid) for i in images),
                "projector": rows((i, passed_on + grid) for i in images),
            },
        )

"""LLaVA 1.5 and its like: a CLIP-like tower, a projector, one token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuronlens.adapters.base import register
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    Seen,
    cells,
    flat,
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
        super().check_model()
        self._vision = self._config.vision_config
        if self._vision.model_type not in _CLASS_TOKENS:
            raise AdapterError(
                f"The vision tower is a {self._vision.model_type!r}; {type(self).__name__} knows "
                f"the tokens of {', '.join(_CLASS_TOKENS)}. To describe another: docs/adapters.md."
            )
        self._strategy = getattr(self._config, "vision_feature_select_strategy", "default")

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """Patch size, image size and which tower tokens are passed on."""
        crop = getattr(self.image_processor, "crop_size", None)
        side = self._vision.image_size
        return {
            "patch size": (getattr(self.processor, "patch_size", None), self._vision.patch_size),
            "image size": ((crop.height, crop.width) if crop else None, (side, side)),
            "feature selection": (
                getattr(self.processor, "vision_feature_select_strategy", None),
                self._strategy,
            ),
        }

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
        first = _CLASS_TOKENS[self._vision.model_type]
        # "default" leaves the first token out, whether it is a CLS token or a patch. CLS, passed
        # on with "full", sees the whole image and no single region.
        passed_on = (
            queries(first) + grid if self._strategy == "full" else (special(first) + grid)[1:]
        )
        images = range(len(pixels))
        return Seen(
            sizes=[(width, height) for _ in images],
            language=flat((i, passed_on) for i in images),
            streams={
                "vision": rows((i, special(first) + grid) for i in images),
                "projector": rows((i, passed_on) for i in images),
            },
        )

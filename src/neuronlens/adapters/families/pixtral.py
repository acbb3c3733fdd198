"""Images at their native size, in whole patches: Pixtral's tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.families.patches import read_until
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    ImageSize,
    Seen,
    cells,
    flat,
    raster,
)
from neuronlens.errors import AdapterError


@register("mistral3", "mistral_large4", "lighton_ocr")
class PixtralAdapter(FamilyAdapter):
    """Streams: `vision` [patch] of all images, `projector` and `language`: 2 x 2 patches each."""

    def check_model(self) -> None:
        """Refuse vision towers other than Pixtral's."""
        self._vision = self._config.vision_config
        if self._vision.model_type != "pixtral":
            raise AdapterError(
                f"The vision tower is a {self._vision.model_type!r}; {type(self).__name__} knows "
                "the tokens of 'pixtral'. To describe another: docs/adapters.md."
            )

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """The sizes of patches and tokens."""
        merge = self._config.spatial_merge_size
        return {
            "patch_size": (self.processor.patch_size, self._vision.patch_size),
            "spatial_merge_size": (self.processor.spatial_merge_size, merge),
        }

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers behind the last one whose output is read."""
        chosen = getattr(self._config, "vision_feature_layer", -1)
        return stack == "vision" and layer >= read_until(chosen, last)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Cells in reading order; an image is as large as `image_sizes` says, without padding."""
        pixels, given = inputs["pixel_values"], inputs.get("image_sizes")
        if given is None:
            given = [pixels.shape[-2:]] * len(pixels)
        sizes = [(int(width), int(height)) for height, width in given]
        patch = int(self._vision.patch_size)
        token = patch * int(self._config.spatial_merge_size)
        merged = [cells(_whole(size, token)) for size in sizes]
        return Seen(
            sizes=sizes,
            language=flat(enumerate(merged)),
            streams={
                "vision": flat(enumerate(cells(_whole(size, patch)) for size in sizes)),
                "projector": flat(enumerate(merged)),
            },
        )


def _whole(size: ImageSize, cell: int) -> Tensor:
    """Boxes of the whole cells that fit into an image."""
    columns, lines = size[0] // cell, size[1] // cell
    return raster(lines, columns, (columns * cell, lines * cell))

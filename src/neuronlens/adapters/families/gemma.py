"""The Gemma family's: a SigLIP tower, a linear projector, pooled or plain grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.families.llava import GridAdapter
from neuronlens.adapters.geometry import Placement, stretched
from neuronlens.adapters.grids import (
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    pad,
    raster,
    rows,
    text_rows,
)
from neuronlens.adapters.taps import DownInput
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role


@register("paligemma", "gemma3", "shieldgemma2")
class GemmaAdapter(GridAdapter):
    """Streams: `vision` [image, patch], `language`. The projector has no neurons.

    Crops that pan and scan adds to an image count as further images.
    """

    def image_tokens(self, size: ImageSize) -> Piece:
        """One token per patch (PaliGemma), or the means of square blocks of patches."""
        count = getattr(self._config, "mm_tokens_per_image", None)
        if count is None:
            return super().image_tokens(size)
        side = int(count**0.5)
        return cells(raster(side, side, size))

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One grid per image, in reading order."""
        seen = super().look(inputs)
        return Seen(seen.sizes, seen.language, {"vision": seen.streams["vision"]})


@special_block("PI0ActionTimeEmbedding")
def _action_time(path: str, block: Any) -> Iterator[Block]:
    down = f"{path}.action_time_mlp_out"
    yield Block(path, "silu", DownInput(down), block.action_time_mlp_out.in_features)


@register("pi0")
class Pi0Adapter(GridAdapter):
    """A PaliGemma, of which an action expert reads the keys and values.

    Streams: `vision` [camera, patch], `language`, `action` [sample, state + action] (the
    expert), `action.time` [sample, action] (what embeds noisy actions and their time step).
    The images of a sample are its cameras.
    """

    parts = (("action", r"(^|\.)dit\."), ("action.time", r"embed_action_time"))

    def check_model(self) -> None:
        """The language model is the VLM's."""
        super().check_model()
        text = self._config.vlm_config.text_config
        self.max_tokens = getattr(text, "max_position_embeddings", None)

    def vision_config(self) -> Any:
        """The config of the VLM's tower."""
        return self._config.vlm_config.vision_config

    def placeholder_ids(self) -> list[int]:
        """The VLM's."""
        return [int(self._config.vlm_config.image_token_id)]

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """The language model's last layer: only its keys and values are read."""
        return stack == "language" and layer == last

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One grid per camera; those that only fill up run through the tower, too."""
        pixels = self.pixels(inputs)
        mask = inputs["pixel_attention_mask"].cpu().bool().flatten().tolist()
        size = (int(pixels.shape[-1]), int(pixels.shape[-2]))
        grid = self.patches(size)
        number = torch.tensor(mask).cumsum(0).tolist()
        tower = [
            (count - 1, grid) if here else (-1, pad(len(grid)))
            for count, here in zip(number, mask, strict=True)
        ]
        chunk = int(self._config.chunk_size)
        actions = torch.full((len(pixels), 1 + chunk), int(Role.SPECIAL))
        return Seen(
            sizes=[size] * sum(mask),
            language=flat((i, grid) for i in range(sum(mask))),
            streams={
                "vision": rows(tower),
                "action": text_rows(actions),
                "action.time": text_rows(actions[:, 1:]),
            },
        )

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized with its aspect ratio kept, padded on the right or below."""
        limit = getattr(self.image_processor, "size", None)
        across, down = getattr(limit, "max_width", None), getattr(limit, "max_height", None)
        if across is None or down is None:
            return stretched(original, size)
        if not getattr(self.image_processor, "do_resize", True):
            raise AdapterError("The image processor does not resize, so boxes cannot be placed.")
        share = min(across / original[0], down / original[1])
        resized = [int(each * share) for each in original]
        scale = (resized[0] / original[0], resized[1] / original[1])
        return Placement(original, scale, (0.0, 0.0))

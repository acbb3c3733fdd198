"""FastVLM and Gemma 3n: towers of convolutions, whose stages run on ever coarser grids."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement, stretched
from neuronlens.adapters.grids import Grid, ImageSize, Piece, Seen, cells, flat, raster, rows
from neuronlens.adapters.taps import CHANNELS_FIRST, DownInput
from neuronlens.errors import AdapterError


class ConvolutionalAdapter(FamilyAdapter):
    """Streams: `vision.STAGE` [image, row, column], `projector` [image, cell], `language`.

    Convolutions see more than the box of a token.

    Attributes:
        stages: Regular expression of a block's path in the tower; its group is the stage.
    """

    stages: str

    def check_model(self) -> None:
        """Refuse towers that are not timm's."""
        super().check_model()
        path = next((p for p, _ in self.model.named_modules() if p.endswith(".timm_model")), None)
        self._tower: Any = None if path is None else self.model.get_submodule(path)
        if not getattr(self._tower, "feature_info", None):
            raise AdapterError(
                f"{type(self).__name__} knows the tokens of timm's towers with stages only."
            )

    def stage_of(self, path: str) -> str:
        """The stage of the tower that a block belongs to."""
        found = re.search(self.stages, path)
        if found is None:
            raise AdapterError(f"{path!r} is in no stage of the tower that is described.")
        return found.group(1)

    def stream_of(self, stack: str, block: Block) -> str:
        """Each stage's blocks run on a grid of their own."""
        return f"vision.{self.stage_of(block.path)}" if stack == "vision" else stack

    def reduction(self, stage: str) -> int:
        """Pixels along the side of a stage's cell."""
        return next(
            int(info["reduction"]) for info in self._tower.feature_info if info["module"] == stage
        )

    @abstractmethod
    def image_tokens(self, size: ImageSize) -> Piece:
        """What the language model is given of an image."""

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """A grid of cells per stage."""
        pixels = inputs["pixel_values"]
        size = (int(pixels.shape[-1]), int(pixels.shape[-2]))
        images = range(len(pixels))
        streams: dict[str, Grid] = {}
        for site in self.sites.values():
            if site.stream.startswith("vision."):
                step = self.reduction(site.stream.removeprefix("vision."))
                down, across = -(-size[1] // step), -(-size[0] // step)
                grid = cells(raster(down, across, size))
                whole = rows((i, grid) for i in images).reshape(len(pixels), down, across)
                streams[site.stream] = whole
        tokens = self.image_tokens(size)
        return Seen(
            sizes=[size for _ in images],
            language=flat((i, tokens) for i in images),
            streams=streams | {"projector": rows((i, tokens) for i in images)},
        )


@register("fast_vlm")
class FastVlmAdapter(ConvolutionalAdapter):
    """FastViT's blocks; the activations between its convolutions are no neurons."""

    not_run = r"\.se$"
    stages = r"timm_model\.(stages\.\d+)"

    def image_tokens(self, size: ImageSize) -> Piece:
        """One token per cell of the last stage."""
        step = int(self._tower.feature_info[-1]["reduction"])
        return cells(raster(-(-size[1] // step), -(-size[0] // step), size))


@special_block("UniversalInvertedResidual")
def _inverted(path: str, block: Any) -> Iterator[Block]:
    # With a convolution between its projections it is no MLP of each cell by itself.
    if isinstance(block.dw_mid, nn.Identity) and isinstance(block.se, nn.Identity):
        tap = DownInput(f"{path}.pw_proj.conv", CHANNELS_FIRST)
        yield Block(path, "act", tap, block.pw_proj.conv.in_channels)


@register("gemma3n")
class Gemma3nAdapter(ConvolutionalAdapter):
    """MobileNet's blocks that widen and narrow each cell by itself. The projector is linear."""

    not_run = r"layers\.\d+$|\.se$"  # a layer's own activation gates per-layer embeddings
    stages = r"timm_model\.(blocks\.\d+|msfa)"

    def reduction(self, stage: str) -> int:
        """Pixels along the side of a stage's cell; the fusion works on the finest it is given."""
        if stage == "msfa":
            return int(self._tower.feature_info[min(self._tower.msfa_indices)]["reduction"])
        return super().reduction(stage)

    def image_tokens(self, size: ImageSize) -> Piece:
        """The cells of the whole tower, resized to a fixed number."""
        side = int(self._config.vision_soft_tokens_per_image**0.5)
        return cells(raster(side, side, size))

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """A grid of cells per stage."""
        seen = super().look(inputs)
        streams = {name: grid for name, grid in seen.streams.items() if name != "projector"}
        return Seen(seen.sizes, seen.language, streams)

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized."""
        return stretched(original, size)

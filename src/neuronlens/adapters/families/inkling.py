"""Inkling: a patch of pixels is a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.families.runs import ByRuns
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement
from neuronlens.adapters.grids import (
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    in_blocks,
    pad,
    raster,
    special,
)
from neuronlens.adapters.taps import EXPERTS_FIRST, ActOutput, NeuronKind, See
from neuronlens.errors import AdapterError
from neuronlens.hooks import Call, Point


@special_block("InklingVisionEncoderLayer")
def _inkling_patch_layer(path: str, block: Any) -> Iterator[Block]:
    """A projection, a norm and a GELU (a function), which is all that the layer gives."""
    if block.add_norm:
        yield Block(path, "gelu", ActOutput(path), int(block.projection.out_features))


class _SharedExperts(ActOutput):
    """Experts that all tokens run through, multiplied with 3-D weights and not by projections."""

    def reading(self, model: nn.Module, see: See, kind: NeuronKind) -> list[Point]:
        """The act_fn's output; times the up projection and the router's weight, if asked for."""
        if kind == "act_fn":
            return super().reading(model, see, kind)
        block: Any = model.get_submodule(self.path.removesuffix(".act_fn"))
        factor: list[Tensor] = []

        def enter(call: Call) -> None:
            x, gammas = (*call.args, *call.kwargs.values())[:2]
            rows = x.reshape(1, -1, x.shape[-1]).expand(len(block.up_proj), -1, -1)
            gammas = gammas.reshape(-1, len(block.up_proj), 1).transpose(0, 1)
            factor[:] = [torch.bmm(rows, block.up_proj.transpose(1, 2)) * gammas]

        return [
            Point(block, enter, before=True),
            Point(block.act_fn, lambda call: see(self.layout.arrange(call.out * factor.pop()))),
        ]


@special_block("InklingSharedExperts")
def _inkling_shared_experts(path: str, block: Any) -> Iterator[Block]:
    """Every token runs through each of them: one block of all their neurons."""
    experts, _, width = block.down_proj.shape
    tap = _SharedExperts(f"{path}.act_fn", None, True, EXPERTS_FIRST)
    yield Block(path, "act_fn", tap, int(experts * width))


@register("inkling_mm_model")
class InklingAdapter(ByRuns):
    """One token per patch; streams `vision.0`, `vision.1`, ... [patch, frame, row, column].

    Every layer of the tower folds parts of a patch into one.
    """

    def check_model(self) -> None:
        """Read how far the layers of the tower fold."""
        vision = self._config.vision_config
        time = int(vision.temporal_patch_size)
        side = self._patch = int(vision.patch_size)
        self._folds: dict[str, tuple[int, int]] = {}
        for path, module in self.model.named_modules():
            if type(module).__name__ == "InklingVisionEncoderLayer":
                layer: Any = module
                time, side = time // layer.t_fold, side // layer.hw_fold
                if layer.add_norm:
                    self._folds[self._stream(path)] = (time, side)

    @staticmethod
    def _stream(path: str) -> str:
        return f"vision.{path.rsplit('.', 1)[1]}"

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """The size of patches."""
        return {"patch size": (self.image_processor.size.height, self._patch)}

    @property
    def image_text(self) -> str:
        """Begun by a marker, without which two images would not be told apart."""
        return f"{getattr(self.processor, 'image_bos_token', '')}{self.image_token}"

    def stream_of(self, stack: str, block: Block) -> str:
        """Each layer of the tower has axes of its own."""
        return self._stream(block.path) if stack == "vision" else stack

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Patches in reading order; how many to a row is told by the padding on the right."""
        pixels = inputs["pixel_values"][:, 0].detach().cpu()
        found = self.runs(inputs)
        counts = [run.length for run in found]
        if sum(counts) != len(pixels):
            raise AdapterError(
                f"{len(pixels)} patches were given, but the text has image tokens for {counts}. "
                "Was the prompt expanded by the model's own processor?"
            )
        # The processor pads every image on the right, with a value below that of black.
        is_pad = (pixels == pixels.amin((0, 1, 2))).all(-1)
        sizes: list[ImageSize] = []
        language: list[tuple[int, Piece]] = []
        streams: dict[str, list[tuple[int, Piece]]] = {name: [] for name in self._folds}
        for number, patches in enumerate(is_pad.split(counts)):
            ends = patches[:, :, -1].all(1).nonzero().flatten().tolist()
            columns = ends[0] + 1 if ends else 0
            if columns == 0 or len(patches) % columns:
                raise AdapterError(
                    f"The {len(patches)} patches of image {number} make no grid: their padding "
                    "does not tell its rows. Were the pixels made by the model's own processor?"
                )
            image = ~rearrange(patches, "(r c) y x -> (r y) (c x)", c=columns)
            size = int(image.any(0).sum()), int(image.any(1).sum())
            sizes.append(size)
            lines = len(patches) // columns
            language.append((number, self._pieces(lines, columns, size, 1, special)))
            for name, (time, side) in self._folds.items():
                piece = self._pieces(lines, columns, size, side, pad)
                frames = piece.role.reshape(-1, 1, side**2).repeat(1, time, 1).flatten()
                boxes = piece.box.reshape(-1, 1, side**2, 4).repeat(1, time, 1, 1).flatten(0, 2)
                streams[name].append((number, Piece(frames, boxes)))
        return Seen(
            sizes,
            flat(language),
            {
                name: flat(pieces).reshape(-1, self._folds[name][0], *[self._folds[name][1]] * 2)
                for name, pieces in streams.items()
            },
        )

    def _pieces(self, lines: int, columns: int, size: ImageSize, side: int, rest: Any) -> Piece:
        """`side` x `side` cells of every patch, patch by patch, cut off where the image ends."""
        area = (columns * self._patch, lines * self._patch)
        box = raster(lines * side, columns * side, area)[
            in_blocks(lines * side, columns * side, side)
        ]
        end = torch.tensor([*size, *size])
        seen = cells(torch.minimum(box, end))
        outside = (box[:, :2] >= end[:2]).any(1)
        other = rest(len(box))
        return Piece(
            torch.where(outside, other.role, seen.role),
            torch.where(outside[:, None], other.box, seen.box),
        )


@register("inkling2")
class Inkling2Adapter(FamilyAdapter):
    """Streams: `vision` [CLS + patch of every image], `projector` and `language` [2 x 2 patches].

    The experts' act_fn takes gate and up projection together, so that both kinds of neuron,
    act_fn output and down_input, are the same.
    """

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """The size of a token."""
        vision = self._config.vision_config
        cell = vision.patch_size * vision.spatial_merge_size
        return {"size of a token": (self.image_processor.size.height, cell)}

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Cells of the image that was padded on the right and at the bottom."""
        vision = self._config.vision_config
        merge = int(vision.spatial_merge_size)
        cell = int(vision.patch_size) * merge
        sizes, patches, tokens = [], [], []
        for number, (_, lines, columns) in enumerate(inputs["image_grid_thw"].tolist()):
            size = (columns * cell, lines * cell)
            grid = (lines * merge, columns * merge)
            # The patches of a token stand together.
            boxes = raster(*grid, size)[in_blocks(*grid, merge)]
            sizes.append(size)
            patches.append((number, special() + cells(boxes)))
            tokens.append((number, cells(raster(lines, columns, size))))
        return Seen(sizes, flat(tokens), {"vision": flat(patches), "projector": flat(tokens)})

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Images are padded, not resized."""
        return Placement(original, (1.0, 1.0), (0.0, 0.0))

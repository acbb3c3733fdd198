"""Gemma 4: patches that know their places, pooled; also as an encoder of a diffusion model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block
from neuronlens.adapters.families.runs import ByRuns
from neuronlens.adapters.grids import (
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    pad,
    raster,
    rows,
    text_stream,
)
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap


@register("gemma4", "gemma4_unified")
class Gemma4Adapter(ByRuns):
    """Streams: `vision` [image, patch], padded; `language`: 3 x 3 patches each.

    The unified models have no tower. Frames of a video count as images of their own.
    """

    def check_model(self) -> None:
        """Read the sizes of patches and tokens."""
        vision = self._config.vision_config
        if vision is None:
            raise AdapterError("This model was built without vision (config.vision_config).")
        self._has_tower = "unified" not in self._config.model_type
        self._patch = int(vision.patch_size)
        self._pool = int(vision.pooling_kernel_size)

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """The sizes of patches and tokens."""
        image = self.image_processor
        return {
            "patch_size": (image.patch_size, self._patch),
            "pooling_kernel_size": (image.pooling_kernel_size, self._pool),
        }

    def blocks(self) -> Iterator[Block]:
        """Without the gates of per-layer embeddings, which look like feed-forward blocks."""
        for block in super().blocks():
            if "per_layer" not in (getattr(block.tap, "down", None) or ""):
                yield block

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Cells where the positions of patches say."""
        names = ("image_position_ids", "video_position_ids")
        given = [inputs.get(name) for name in names]
        places = [[] if each is None else list(each.cpu()) for each in given]
        found = self.runs(inputs)
        wanted = [sum(run.is_video == kind for run in found) for kind in (False, True)]
        if wanted != [len(each) for each in places]:
            raise AdapterError(
                f"{' + '.join(str(len(each)) for each in places)} images and frames were given, "
                f"but the text has {' + '.join(map(str, wanted))} runs of their tokens. Was the "
                "prompt expanded by the model's own processor?"
            )
        left = [iter(each) for each in places]
        order = [(run, next(left[run.is_video])) for run in found]
        laid = [self._pieces(place) for _, place in order]
        # The tower runs over all images first, then over all frames.
        vision = [
            (number, patches)
            for kind in (False, True)
            for number, ((run, _), (_, patches, _)) in enumerate(zip(order, laid, strict=True))
            if run.is_video == kind
        ]
        is_even = len({len(patches) for _, patches in vision}) == 1
        streams = {"vision": (rows if is_even else flat)(vision)} if self._has_tower else {}
        language = flat((number, tokens) for number, (_, _, tokens) in enumerate(laid))
        return Seen([size for size, _, _ in laid], language, streams)

    def _pieces(self, place: Int[Tensor, "patch 2"]) -> tuple[ImageSize, Piece, Piece]:
        """An image's size, its patches and its tokens, from columns and rows (-1: padding)."""
        real = place[(place >= 0).all(-1)]
        cell = self._patch if self._has_tower else self._patch * self._pool
        columns, lines = (int(n) + 1 for n in real.amax(0))
        size = (columns * cell, lines * cell)
        corner = real.float() * cell
        patches = cells(torch.cat([corner, corner + cell], 1)) + pad(len(place) - len(real))
        if not self._has_tower:
            return size, patches, patches[: len(real)]
        tokens = cells(raster(lines // self._pool, columns // self._pool, size))
        return size, patches, tokens


@register("diffusion_gemma")
class DiffusionGemmaAdapter(Gemma4Adapter):
    """A Gemma 4 whose stack `language` reads image and prompt for a decoder of the canvas.

    Further stacks: `language.decoder`, with the canvas as its stream, and the feed-forward
    block `language.self_conditioning`, which is given zeros in the first step. `generate()`
    calls the two stacks by themselves, so it cannot be recorded.
    """

    answer_stream = "language.decoder"
    growing = ()

    parts = (
        ("language.self_conditioning", r"decoder\.self_conditioning"),
        ("language.decoder", r"(^|\.)decoder\."),
    )

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Of the prompt's stack only keys and values are read."""
        return stack == "language.self_conditioning" or (stack == "language" and layer == last)

    def stream_of(self, stack: str, block: Block) -> str:
        """Self-conditioning runs on the canvas, too."""
        return "language.decoder" if stack == "language.self_conditioning" else stack

    def with_answers(self, inputs: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
        """The responses as canvases, which need no start token; prompt and canvas are masked."""
        tokenizer = self.processor.tokenizer
        said = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in answers]
        length = max(1, *map(len, said))
        canvas = torch.full((len(said), length), int(tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(canvas)
        for row, ids in enumerate(said):
            canvas[row, : len(ids)] = torch.tensor(ids)
            mask[row, : max(1, len(ids))] = 1
        prompt = inputs["attention_mask"].to(mask.dtype)
        both = torch.cat([prompt, mask.to(prompt.device)], 1)
        return {**inputs, "decoder_input_ids": canvas, "decoder_attention_mask": both}

    def text_streams(self, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
        """The canvas: drawn at random by the model where it is not given."""
        canvas, mask = inputs.get("decoder_input_ids"), inputs.get("decoder_attention_mask")
        if not isinstance(canvas, Tensor):
            shape = (len(self.text(inputs)), int(self._config.canvas_length))
            role = torch.full(shape, int(Role.RESPONSE), dtype=torch.int8)
        else:
            is_flat = isinstance(mask, Tensor) and mask.ndim == 2
            attended = cast(Tensor, mask)[:, -canvas.shape[1] :] if is_flat else None
            role = self.text_roles(canvas, attended)
            role[role == Role.PROMPT] = Role.RESPONSE
        return {"language.decoder": text_stream(role)}

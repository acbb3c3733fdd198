"""Idefics and Mllama: gated cross-attention to the image between a decoder's layers.

Images put no token into the language stream: text attends to them from its layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block
from neuronlens.adapters.families.patches import patch_boxes, size_of
from neuronlens.adapters.families.queries import is_filling
from neuronlens.adapters.family import FamilyAdapter, Part
from neuronlens.adapters.geometry import Placement
from neuronlens.adapters.grids import (
    Grid,
    ImageSize,
    Piece,
    Seen,
    cells,
    pad,
    queries,
    rows,
    special,
)
from neuronlens.tokens import Role, TokenMap


class _CrossAttending(FamilyAdapter):
    """Images put no token into the language stream: text attends to them from its layers."""

    parts: ClassVar[tuple[Part, ...]] = (
        ("language.cross", r"gated_cross_attn_layers"),
        ("vision.global", r"global_transformer"),
    )

    def stream_of(self, stack: str, block: Block) -> str:
        """Further blocks of a part run on its tokens."""
        return {"language.cross": "language", "vision.global": "vision"}.get(stack, stack)

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """None: the image token is a token like others, which says where the image belongs."""
        return torch.zeros_like(ids, dtype=torch.bool)

    def is_marker(self, ids: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
        """Which tokens stand for an image, or around one."""
        return torch.isin(ids, torch.tensor(self.placeholder_ids(), dtype=ids.dtype))

    def text_map(self, inputs: Mapping[str, Any]) -> TokenMap:
        """The language stream, in which an image's markers are SPECIAL."""
        language = super().text_map(inputs)
        marked = self.is_marker(self.text(inputs)) & (language.role != Role.PAD)
        language.role[marked] = Role.SPECIAL
        return language


@register("idefics")
class IdeficsAdapter(_CrossAttending):
    """Streams: `vision` [image, CLS + patch], `qformer` [image, latent], `language`.

    Sites `language.cross.k` are those of the cross-attention block that runs before
    `language.(k x cross_layer_interval)`.
    """

    def blocks(self) -> Iterable[Block]:
        """Cross-attention blocks are told before the layers they run before."""
        every = int(self._config.cross_layer_interval)

        def turn(block: Block) -> float:
            _, kind, *rest = block.path.split(".")
            if kind == "gated_cross_attn_layers":
                return int(rest[0]) * every - 0.5
            return int(rest[0]) if kind == "layers" else -1

        return sorted(super().blocks(), key=turn)

    def placeholder_ids(self) -> list[int]:
        """Where the text says that an image belongs."""
        found = getattr(self.processor, "image_token_id", None)
        return [] if found is None else [int(found)]

    @property
    def image_token(self) -> str:
        """What `process` takes apart."""
        return "<image>"

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """The processor takes text and images in turn; given apart, it puts images last."""
        prompts: list[list[Any]] = []
        for text, pictures in zip(texts, images, strict=True):
            first, *others = text.split(self.image_token)
            turns: list[Any] = [first]
            for picture, said in zip(pictures, others, strict=True):
                turns += [picture, said]
            prompts.append([turn for turn in turns if turn != ""])
        inputs: Mapping[str, Any] = self.processor(text=prompts, padding=True, return_tensors="pt")
        return dict(inputs)

    def as_processed(self, text: str) -> str:
        """The processor strips spaces around an image."""
        return re.sub(rf" *{re.escape(self.image_token)} *", self.image_token, text)

    def is_marker(self, ids: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
        """The tokens added to LLaMA's vocabulary."""
        added: Tensor = ids >= self._config.vocab_size
        return added

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Latents for every image; images that only fill up the batch are PAD."""
        pixels = inputs["pixel_values"]
        filling = is_filling(pixels.flatten(0, 1))
        owners = [i // pixels.shape[1] for i, fills in enumerate(filling) if not fills]
        numbers = [i - sum(filling[:i]) for i in range(len(filling))]
        tower = special() + cells(patch_boxes(pixels, self._config.vision_config.patch_size))
        streams = {"vision": _filled(numbers, filling, tower)}
        if self._config.use_resampler:
            latents = queries(self._config.perceiver_config.resampler_n_latents)
            streams["qformer"] = _filled(numbers, filling, latents)
        return Seen([size_of(pixels)] * len(owners), None, streams, owners)


def _filled(numbers: Sequence[int], filling: Sequence[bool], piece: Piece) -> Grid:
    """The same piece for every image, PAD for what only fills up."""
    return rows(
        (-1, pad(len(piece))) if fills else (number, piece)
        for number, fills in zip(numbers, filling, strict=True)
    )


@register("mllama")
class MllamaAdapter(_CrossAttending):
    """Streams: `vision` [image, tile x (CLS + patch, filled up to a multiple of 8)], `language`.

    Sites `vision.global.k` are those of the second transformer behind the first. A patch beside
    the image on its canvas of tiles has no box once the original size is known.
    """

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """A grid for every tile; tiles and images that only fill up are PAD."""
        pixels, tiles = inputs["pixel_values"], inputs["pixel_values"].shape[2]
        empty = pad(tiles * len(self._tile(pixels)))
        pieces: list[tuple[int, Piece]] = []
        sizes: list[ImageSize] = []
        owners: list[int] = []
        for sample, row in enumerate(inputs["aspect_ratio_ids"].tolist()):
            for ratio in row:
                if ratio == 0:
                    pieces.append((-1, empty))
                    continue
                down, across = self._config.vision_config.supported_aspect_ratios[ratio - 1]
                width, height = size_of(pixels)
                size = (across * width, down * height)
                piece = pad(0)
                for y, x in product(range(down), range(across)):
                    piece = piece + self._tile(pixels, (x * width, y * height))
                pieces.append((len(sizes), piece + empty[len(piece) :]))
                sizes.append(size)
                owners.append(sample)
        return Seen(sizes, None, {"vision": rows(pieces)}, owners)

    def _tile(self, pixels: Tensor, corner: tuple[int, int] = (0, 0)) -> Piece:
        """The tokens of a tile with its corner there; the model fills them up with zeros."""
        boxes = patch_boxes(pixels, self._config.vision_config.patch_size)
        here = special() + cells(boxes + torch.tensor(corner * 2))
        return here + pad(-len(here) % 8)

    def is_conditional(self, stack: str, layer: int) -> bool:
        """Cross-attention layers are skipped where no image was given."""
        return stack == "language" and layer in self._config.text_config.cross_attention_layers

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """The size of a tile, and how many there are."""
        vision, images = self._config.vision_config, self.image_processor
        return {
            "pixels of a tile": (images.size.height, vision.image_size),
            "tiles": (images.max_image_tiles, vision.max_num_tiles),
        }

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """As large as fits the canvas, but no larger than it is, in the top left."""
        tile = self._config.vision_config.image_size
        fits = [min(max(side, tile), canvas) for side, canvas in zip(original, size, strict=True)]
        across, down = (fit / side for fit, side in zip(fits, original, strict=True))
        if across < down:
            fits[1] = min(math.floor(original[1] * across) or 1, fits[1])
        else:
            fits[0] = min(math.floor(original[0] * down) or 1, fits[0])
        return Placement(original, (fits[0] / original[0], fits[1] / original[1]), (0.0, 0.0))

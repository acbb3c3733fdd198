"""Encoder-decoders that put the image's tokens into the encoder of the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block
from neuronlens.adapters.families.patches import one_each, patch_boxes, size_of
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import Seen, cells, flat, nothing, queries, raster, rows, text_stream
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap


class EncoderDecoderAdapter(FamilyAdapter):
    """Image and text in an encoder, the answer in a decoder of its own.

    Stream `language` is the encoder's, `language.decoder` the decoder's.
    """

    growing = ()
    answer_stream = "language.decoder"

    def text_streams(self, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
        """The decoder's tokens."""
        ids = inputs.get("decoder_input_ids")
        if not isinstance(ids, Tensor):
            if any(inputs.get(name) is not None for name in ("decoder_inputs_embeds", "labels")):
                raise AdapterError(
                    "The decoder's tokens cannot be told: give the model decoder_input_ids, not "
                    "decoder_inputs_embeds or labels."
                )
            # The model starts by itself.
            ids = torch.zeros(len(self.text(inputs)), 1, dtype=torch.long)
            return {"language.decoder": text_stream(torch.full_like(ids, Role.SPECIAL))}
        role = self.text_roles(ids, inputs.get("decoder_attention_mask"))
        # The first token starts the answer, whatever its id.
        role[:, 0] = torch.where(role[:, 0] == Role.PAD, role[:, 0], int(Role.SPECIAL))
        return {"language.decoder": text_stream(role)}


@register("florence2")
class Florence2Adapter(EncoderDecoderAdapter):
    """Florence-2. Streams: `vision.stages.N` [image, cell], `language`, `language.decoder`."""

    one_image = True

    parts = (("language.decoder", r"language_model\.decoder\."),)

    @property
    def image_token(self) -> str:
        """Nothing: the processor puts the image's tokens before the text by itself."""
        return ""

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """One image with each text; the processor adds the special tokens itself."""
        pictures = [[each] for each in one_each(images, self.model)]
        return super().process(texts, pictures, add_special_tokens=False)

    def stream_of(self, stack: str, block: Block) -> str:
        """A stream for each stage of the tower, which have ever fewer tokens."""
        stage = re.search(r"\.blocks\.(\d+)\.", block.path)
        return f"vision.stages.{stage.group(1)}" if stack == "vision" and stage else stack

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """A token for the mean of all cells, then one per cell, in reading order."""
        pixels = inputs["pixel_values"]
        vision = self._config.vision_config
        images, (width, height) = range(len(pixels)), size_of(pixels)
        streams, grid = {}, nothing()
        across, down, step = width, height, 1
        settings = zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True)
        for stage, (kernel, stride, padding) in enumerate(settings):
            across, down = ((n + 2 * padding - kernel) // stride + 1 for n in (across, down))
            step *= stride
            grid = cells(raster(down, across, (across * step, down * step)))
            streams[f"vision.stages.{stage}"] = rows((i, grid) for i in images)
        return Seen(
            sizes=[(width, height) for _ in images],
            language=flat((i, queries(1) + grid) for i in images),
            streams=streams,
        )


@register("t5gemma2")
class T5Gemma2Adapter(EncoderDecoderAdapter):
    """T5Gemma 2. Streams: `vision` [image, patch], `language`, `language.decoder`."""

    parts = (("language.decoder", r"^model\.decoder\."),)

    def check_model(self) -> None:
        """Refuse vision towers whose tokens are not described here."""
        tower = self._config.encoder.vision_config.model_type
        if tower != "siglip_vision_model":
            raise AdapterError(
                f"The vision tower is a {tower!r}; {type(self).__name__} knows the tokens of "
                "siglip_vision_model. To describe another: docs/adapters.md."
            )

    def blocks(self) -> Iterable[Block]:
        """The tower runs first, though the text model is listed before it."""
        return sorted(super().blocks(), key=lambda block: self.stack_of(block.path) != "vision")

    @property
    def placeholder_of_processor(self) -> int | None:
        """The tokenizer's; what the processor calls so stands before the placeholders."""
        found = getattr(getattr(self.processor, "tokenizer", None), "image_token_id", None)
        return None if found is None else int(found)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch; the language stream has means of several by several of them."""
        pixels = inputs["pixel_values"]
        encoder = self._config.encoder
        patch, side = encoder.vision_config.patch_size, int(encoder.mm_tokens_per_image**0.5)
        pooled = encoder.vision_config.image_size // patch // side * patch * side
        images = range(len(pixels))
        grid = cells(patch_boxes(pixels, patch))
        tokens = cells(raster(side, side, (pooled, pooled)))
        return Seen(
            sizes=[size_of(pixels) for _ in images],
            language=flat((i, tokens) for i in images),
            streams={"vision": rows((i, grid) for i in images)},
        )


@register("udop")
class UdopAdapter(EncoderDecoderAdapter):
    """UDOP: a patch is added to the words on it, and the other patches follow the text.

    Streams: `language` [sample, text + patch], `language.decoder`. A word with a patch in it
    is VISUAL and has the patch's box; the prompt is text. The patches that words hold stand
    nowhere else, so the end of the stream is PAD.
    """

    parts = (("language.decoder", r"^decoder\."),)
    prefixes_images = True

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """Refuses: a sample does not tell what words are on the page, and where."""
        raise AdapterError(
            "UDOP needs the words of a page and their boxes, which a sample does not have. Call "
            "its processor yourself, and take the maps of its inputs from adapter.tokens(inputs)."
        )

    def _side(self) -> int:
        return int(self._config.image_size // self._config.patch_size)

    def _patch_of(self, inputs: Mapping[str, Any]) -> Int[Tensor, "batch token"]:
        """The patch that the centre of each token's box is on; boxes from 0 to 1, as the model."""
        side, box = self._side(), inputs["bbox"].cpu()
        x, y = (
            torch.floor((box[..., k] + box[..., k + 2]) / 2.0 * side).long().clip(0, side - 1)
            for k in (0, 1)
        )
        return x + y * side

    def _left(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch patch"]:
        """Which patches no token's box is on; so it counts boxes of tokens that get no patch."""
        at = self._patch_of(inputs)
        left = torch.ones(len(at), self._side() ** 2, dtype=torch.bool)
        return left.scatter(1, at, False)

    def text_map(self, inputs: Mapping[str, Any]) -> TokenMap:
        """The text, with room for the patches behind it."""
        text = super().text_map(inputs)
        if not self.has_images(inputs):
            return text
        left = self._left(inputs)
        count = left.sum(1, keepdim=True)
        is_filled = torch.arange(left.shape[1])[None] < count
        role = torch.where(is_filled, int(Role.SPECIAL), int(Role.PAD)).to(text.role.dtype)
        none = torch.full_like(left, -1, dtype=text.image.dtype)
        return TokenMap(
            role=torch.cat([text.role, role], 1),
            sample=torch.cat([text.sample, text.sample[:, :1].expand_as(none)], 1),
            image=torch.cat([text.image, none], 1),
            box=torch.cat([text.box, torch.full((*none.shape, 4), float("nan"))], 1),
        )

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """Words that a patch is added to, and the patches behind the text."""
        if not self.has_images(inputs):
            return torch.zeros_like(ids, dtype=torch.bool)
        mean = inputs["bbox"].cpu().double().mean(-1)
        has_patch = (mean != 0) & (mean != 1)  # prompt and padding; the end
        left = self._left(inputs)
        count = left.sum(1, keepdim=True)
        return torch.cat([has_patch, torch.arange(left.shape[1])[None] < count], 1)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """The patches of words, in the order of the words, then the others in reading order."""
        if inputs["pixel_values"].shape[0] != len(self.text(inputs)):
            raise AdapterError(
                f"{len(inputs['pixel_values'])} images were given for {len(self.text(inputs))} "
                "texts; UDOP takes one page for each."
            )
        box = patch_boxes(inputs["pixel_values"], self._config.patch_size)
        at, left = self._patch_of(inputs), self._left(inputs)
        here = self.placeholders(inputs, self.text(inputs)) & (
            self.text_map(inputs).role != Role.PAD
        )
        pieces = [
            (i, cells(torch.cat([box[at[i][here[i, : at.shape[1]]]], box[left[i]]])))
            for i in range(len(at))
        ]
        return Seen(sizes=[size_of(inputs["pixel_values"]) for _ in pieces], language=flat(pieces))

"""Models that have the image only in the keys and values of a text decoder's cross-attention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block
from neuronlens.adapters.families.patches import one_each, pair, patch_boxes, size_of
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement, processed_by
from neuronlens.adapters.grids import ImageSize, Piece, Seen, cells, pad, raster, rows, special
from neuronlens.errors import AdapterError


def _nowhere(original: ImageSize) -> Placement:
    """For what a processor did to an image that cannot be told: every box becomes NaN."""
    return Placement(original, (1.0, 1.0), (float("-inf"), float("-inf")))


def _page(image_processor: Any, original: ImageSize, size: ImageSize) -> Placement:
    """Donut's way with pages: shrunk until the page fits, then padded around the centre."""
    if getattr(image_processor, "do_crop_margin", False):
        return _nowhere(original)  # what was cropped depends on the page
    turned = (original[0] - original[1]) * (size[0] - size[1]) < 0  # one is wide, one is high
    if getattr(image_processor, "do_align_long_axis", False) and turned:
        return _nowhere(original)  # a box that was turned is no scaled one
    width, height = original
    if getattr(image_processor, "do_resize", False):
        short, long = min(size), int(min(size) * max(original) / min(original))
        width, height = (short, long) if width <= height else (long, short)
    if getattr(image_processor, "do_thumbnail", False):
        fits = min(width, size[0]), min(height, size[1])
        if fits != (width, height):
            if height > width:
                fits = int(width * fits[1] / height), fits[1]
            elif width > height:
                fits = fits[0], int(height * fits[0] / width)
            width, height = fits
    scale = (width / original[0], height / original[1])
    left, top = ((size[0] - width) // 2, (size[1] - height) // 2)
    return Placement(original, scale, (-float(left), -float(top)))


class CrossAttentionAdapter(FamilyAdapter):
    """A text decoder that has the image only in the keys and values of its cross-attention."""

    one_image = True

    text_input = "decoder_input_ids"

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """None: the image puts no token into the text."""
        return torch.zeros_like(ids, dtype=torch.bool)

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """The processor's images; the texts go to the decoder, behind its start token."""
        shown = self.image_processor(images=one_each(images, self.model), return_tensors="pt")
        tokenizer, pad_id = self.processor.tokenizer, self.processor.tokenizer.pad_token_id
        start = self._start_id()
        ids = [
            torch.tensor([start, *tokenizer(text, add_special_tokens=add_special_tokens).input_ids])
            for text in texts
        ]
        mask = [torch.ones_like(each) for each in ids]
        rows = torch.nn.utils.rnn.pad_sequence
        return {
            **shown,
            "decoder_input_ids": rows(ids, batch_first=True, padding_value=pad_id or 0),
            "decoder_attention_mask": rows(mask, batch_first=True),
        }

    def _start_id(self) -> int:
        """The id that the decoder starts every text with."""
        config = self._config.get_text_config(decoder=True)
        holders = (getattr(self.model, "generation_config", None), self._config, config)
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            for holder in holders:
                if getattr(holder, name, None) is not None:
                    return int(getattr(holder, name))
        raise AdapterError(
            "The config has no decoder_start_token_id, so the decoder's text cannot begin. Set "
            "model.generation_config.decoder_start_token_id."
        )


@register("blip")
class BlipAdapter(CrossAttentionAdapter):
    """BLIP's captioning model. Streams: `vision` [image, CLS + patch], `language`."""

    one_image = True

    text_input = "input_ids"

    def check_model(self) -> None:
        """Refuse BLIP's other heads, which have other texts."""
        if not hasattr(self.model, "text_decoder") or hasattr(self.model, "text_encoder"):
            raise AdapterError(
                f"{type(self.model).__name__} is not BLIP's model for captions, "
                "BlipForConditionalGeneration, which is the only one described."
            )

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """One image with each text."""
        pictures = [[each] for each in one_each(images, self.model)]
        return FamilyAdapter.process(self, texts, pictures, add_special_tokens=add_special_tokens)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch, in reading order."""
        pixels = inputs["pixel_values"]
        grid = special() + cells(patch_boxes(pixels, self._config.vision_config.patch_size))
        images = range(len(pixels))
        return Seen(
            sizes=[size_of(pixels) for _ in images],
            language=None,
            streams={"vision": rows((i, grid) for i in images)},
        )


@register("vision-encoder-decoder")
class VisionEncoderDecoderAdapter(CrossAttentionAdapter):
    """A ViT, BEiT, DeiT, Swin or Donut encoder, and any decoder with cross-attention.

    Streams: `vision` [image, CLS (DeiT: and distillation) + patch], or, of a Swin or Donut,
    `vision.stages.N` [image, cell] for each stage; `language`.
    """

    parts = (("vision", r"^encoder\."), ("language", r"^decoder\."))
    not_run = r"(^encoder|\.bert)\.pooler|\.cls\.|lm_head"
    first_tokens: ClassVar[Mapping[str, int]] = {"vit": 1, "beit": 1, "deit": 2}
    staged: ClassVar[tuple[str, ...]] = ("donut-swin", "swin")

    def check_model(self) -> None:
        """Refuse encoders whose tokens are not described here."""
        self._encoder = self._config.encoder
        known = (*self.first_tokens, *self.staged)
        if self._encoder.model_type not in known:
            raise AdapterError(
                f"The encoder is a {self._encoder.model_type!r}; {type(self).__name__} knows the "
                f"tokens of {', '.join(known)}. To describe another: docs/adapters.md."
            )

    @property
    def _is_staged(self) -> bool:
        return self._encoder.model_type in self.staged

    def stream_of(self, stack: str, block: Block) -> str:
        """A stream for each of Swin's stages, which have ever fewer tokens."""
        stage = re.search(r"\.layers\.(\d+)\.", block.path)
        if stack == "vision" and self._is_staged and stage is not None:
            return f"vision.stages.{stage.group(1)}"
        return stack

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch, in reading order; Swin's stages merge 2 x 2 of them each."""
        pixels = inputs["pixel_values"]
        images, size = range(len(pixels)), size_of(pixels)
        if not self._is_staged:
            first = special(self.first_tokens[self._encoder.model_type])
            grid = first + cells(patch_boxes(pixels, self._encoder.patch_size))
            streams = {"vision": rows((i, grid) for i in images)}
        else:
            streams = {}
            high, wide = pair(self._encoder.patch_size)
            for stage in range(len(self._encoder.depths)):
                # Rows and columns that are missing at the end are filled up.
                down, across = -(-size[1] // high), -(-size[0] // wide)
                box = raster(down, across, (across * wide, down * high))
                streams[f"vision.stages.{stage}"] = rows((i, cells(box)) for i in images)
                high, wide = 2 * high, 2 * wide
        return Seen(sizes=[size for _ in images], language=None, streams=streams)

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Pages are padded; where Donut turns them, no box is told."""
        if hasattr(self.image_processor, "do_thumbnail"):
            return _page(self.image_processor, original, size)
        return processed_by(self.image_processor, original, size)


@register("pp_formulanet")
class PPFormulaNetAdapter(CrossAttentionAdapter):
    """PP-FormulaNet. Streams: `vision` [image, patch], `language`.

    Its processor crops a page to what is printed on it. Where that was cannot be told from
    sizes, so the patches have no boxes in the original image; in the processed one they have.
    """

    parts = (("vision", r"^model\.encoder\."),)

    def blocks(self) -> Iterable[Block]:
        """The tower runs first, though the decoder is listed before it."""
        return sorted(super().blocks(), key=lambda block: self.stack_of(block.path) != "vision")

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch, in reading order."""
        pixels = inputs["pixel_values"]
        grid = cells(patch_boxes(pixels, self._config.vision_config.patch_size))
        images = range(len(pixels))
        return Seen(
            sizes=[size_of(pixels) for _ in images],
            language=None,
            streams={"vision": rows((i, grid) for i in images)},
        )

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """As Donut places pages, if margins are not cropped."""
        return _page(self.image_processor, original, size)


@register("pix2struct")
class Pix2StructAdapter(CrossAttentionAdapter):
    """Pix2Struct. Streams: `vision` [image, patch], `language`."""

    parts = (("vision", r"^encoder\."),)

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Pixels come as patches, each with its row and column."""
        return isinstance(inputs.get("flattened_patches"), Tensor)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Each patch where its row and column say; what fills up has row 0."""
        patches = inputs["flattened_patches"]
        side = round(((patches.shape[-1] - 2) / 3) ** 0.5)
        if 3 * side * side != patches.shape[-1] - 2:
            raise AdapterError(
                f"flattened_patches of {patches.shape[-1]} numbers are no square patches of three "
                "colours with a row and a column, so their place cannot be told."
            )
        sizes: list[ImageSize] = []
        pieces: list[tuple[int, Piece]] = []
        for i, image in enumerate(patches.cpu()):
            is_patch = image[:, 0] > 0
            top, left = ((image[is_patch, axis] - 1) * side for axis in (0, 1))
            box = torch.stack([left, top, left + side, top + side], 1).float()
            sizes.append((int(box[:, 2].max()), int(box[:, 3].max())))
            # The processor puts what fills up at the end.
            pieces.append((i, cells(box) + pad(int((~is_patch).sum()))))
        return Seen(sizes=sizes, language=None, streams={"vision": rows(pieces)})

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """The texts go to the decoder; a model that reads questions in the image is refused."""
        if getattr(self.image_processor, "is_vqa", False):
            raise AdapterError(
                "This processor writes the question into the image (is_vqa). Call it yourself and "
                "give the model what it returns, with decoder_input_ids."
            )
        return super().process(texts, images, add_special_tokens=add_special_tokens)

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Stretched; with a question written above it (VQA), its place cannot be told."""
        if getattr(self.image_processor, "is_vqa", False):
            return _nowhere(original)
        return processed_by(self.image_processor, original, size)

"""Models unlike the rest: cross-attention, image codes, image prefixes, encoder-decoders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement, processed_by
from neuronlens.adapters.grids import (
    Boxes,
    Grid,
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    nothing,
    pad,
    queries,
    raster,
    rows,
    special,
    text_rows,
)
from neuronlens.adapters.taps import DownInput
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap


def _pair(size: Any) -> tuple[int, int]:
    """Height and width of what a config gives as one number or as both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _size(pixels: Tensor) -> ImageSize:
    return int(pixels.shape[-1]), int(pixels.shape[-2])


def _patches(pixels: Tensor, patch: Any) -> Boxes:
    """Boxes of the whole patches of an image."""
    width, height = _size(pixels)
    rows_, columns = height // _pair(patch)[0], width // _pair(patch)[1]
    return raster(rows_, columns, (columns * _pair(patch)[1], rows_ * _pair(patch)[0]))


def _stages(blocks: Iterable[Block], tower: str, block_of: str) -> Iterator[Block]:
    """Blocks of a tower that is a list of lists, numbered through as if it were one list."""
    order: dict[str, int] = {}
    for block in blocks:
        match = re.match(rf"{tower}{block_of}", block.path)
        if match:
            number = order.setdefault(match.group(0), len(order))
            block = replace(block, path=f"{tower}.{number}".replace("\\", ""))
        yield block


def _stage_of(block: Block) -> str:
    """The stage of a block of such a tower, from the path of its activation."""
    match = re.search(r"\.(\d+)\.", block.tap.path)
    return match.group(1) if match else "0"


def _nowhere(original: ImageSize) -> Placement:
    """For what a processor did to an image that cannot be told: every box becomes NaN."""
    return Placement(original, (1.0, 1.0), (float("-inf"), float("-inf")))


def _page(image_processor: Any, original: ImageSize, size: ImageSize) -> Placement:
    """Donut's way with pages: shrunk until the page fits, then padded around the centre."""
    if getattr(image_processor, "do_crop_margin", False):
        return _nowhere(original)  # what was cropped depends on the page
    turned = (original[0] > original[1]) != (size[0] > size[1]) and size[0] != size[1]
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

    text_input = "decoder_input_ids"

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """None: the image puts no token into the text."""
        return torch.zeros_like(ids, dtype=torch.bool)


@register("blip")
class BlipAdapter(CrossAttentionAdapter):
    """BLIP's captioning model. Streams: `vision` [image, CLS + patch], `language`."""

    text_input = "input_ids"

    def check_model(self) -> None:
        """Refuse BLIP's other heads, which have other texts."""
        _refuse_others(self.model, "text_decoder", without="text_encoder")

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch, in reading order."""
        pixels = inputs["pixel_values"]
        grid = special() + cells(_patches(pixels, self._config.vision_config.patch_size))
        images = range(len(pixels))
        return Seen(
            sizes=[_size(pixels) for _ in images],
            language=None,
            streams={"vision": rows((i, grid) for i in images)},
        )


def _refuse_others(model: Any, has: str, without: str | None = None) -> None:
    missing = not hasattr(model, has)
    if missing or (without is not None and hasattr(model, without)):
        raise AdapterError(
            f"{type(model).__name__} is not the model of its family that writes text from an image "
            "(the one AutoModelForImageTextToText loads), which is the only one described."
        )


@register("vision-encoder-decoder")
class VisionEncoderDecoderAdapter(CrossAttentionAdapter):
    """A ViT, DeiT, Swin or Donut encoder, and any decoder with cross-attention.

    Streams: `vision` [image, CLS (DeiT: and distillation) + patch], or, of a Swin or Donut,
    `vision.stageN` [image, cell] for each stage; `language`.
    """

    parts = (("vision", r"^encoder\."), ("language", r"^decoder\."))
    not_run = r"(^encoder|\.bert)\.pooler|\.cls\.|lm_head"
    first_tokens: ClassVar[Mapping[str, int]] = {"vit": 1, "deit": 2}
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

    def blocks(self) -> Iterable[Block]:
        """The blocks of Swin's stages are numbered through."""
        return _stages(super().blocks(), r"encoder\.encoder\.layers", r"\.\d+\.blocks\.\d+")

    def stream_of(self, stack: str, block: Block) -> str:
        """A stream for each of Swin's stages, which have ever fewer tokens."""
        if stack == "vision" and self._is_staged:
            return f"vision.stage{_stage_of(block)}"
        return stack

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch, in reading order; Swin's stages merge 2 x 2 of them each."""
        pixels = inputs["pixel_values"]
        images, size = range(len(pixels)), _size(pixels)
        if not self._is_staged:
            first = special(self.first_tokens[self._encoder.model_type])
            grid = first + cells(_patches(pixels, self._encoder.patch_size))
            streams = {"vision": rows((i, grid) for i in images)}
        else:
            streams = {}
            high, wide = _pair(self._encoder.patch_size)
            for stage in range(len(self._encoder.depths)):
                # Rows and columns that are missing at the end are filled up.
                down, across = -(-size[1] // high), -(-size[0] // wide)
                box = raster(down, across, (across * wide, down * high))
                streams[f"vision.stage{stage}"] = rows((i, cells(box)) for i in images)
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
        grid = cells(_patches(pixels, self._config.vision_config.patch_size))
        images = range(len(pixels))
        return Seen(
            sizes=[_size(pixels) for _ in images],
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

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Stretched; with a question written above it (VQA), its place cannot be told."""
        if getattr(self.image_processor, "is_vqa", False):
            return _nowhere(original)
        return processed_by(self.image_processor, original, size)


@register("git")
class GitAdapter(FamilyAdapter):
    """GIT: the image stands before the text, without placeholders.

    Streams: `vision` [image, CLS + patch], `language` [sample, CLS + patch + text], or, for
    videos, the frames' one after the other.
    """

    prefixes_images = True

    def check_model(self) -> None:
        """Refuse what is not the language model."""
        _refuse_others(self.model, "output")

    def _frames(self, inputs: Mapping[str, Any]) -> int:
        pixels = inputs["pixel_values"]
        return int(pixels.shape[1]) if pixels.ndim == 5 else 1

    def _image(self, inputs: Mapping[str, Any], first: Piece) -> Piece:
        return first + cells(
            _patches(inputs["pixel_values"], self._config.vision_config.patch_size)
        )

    def _prefix(self, inputs: Mapping[str, Any]) -> int:
        if not self.has_images(inputs):
            return 0
        return self._frames(inputs) * len(self._image(inputs, special()))

    def text_map(self, inputs: Mapping[str, Any]) -> TokenMap:
        """The text, with room for the image before it."""
        text = super().text_map(inputs)
        count = self._prefix(inputs)
        return TokenMap(
            role=_before(text.role, count, int(Role.SPECIAL)),
            sample=text.sample[:, :1].expand(-1, count + text.sample.shape[1]).contiguous(),
            image=_before(text.image, count, -1),
            box=_before(text.box, count, float("nan")),
        )

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """The positions before the text."""
        return _before(torch.zeros_like(ids, dtype=torch.bool), self._prefix(inputs), True)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch, in reading order; the CLS token sees the whole image."""
        pixels = inputs["pixel_values"]
        samples, frames = range(len(pixels)), range(self._frames(inputs))
        # The tower runs once per frame, for all samples.
        tower = [
            (s * len(frames) + f, self._image(inputs, special())) for f in frames for s in samples
        ]
        images = range(len(tower))
        return Seen(
            sizes=[_size(pixels) for _ in images],
            language=flat((i, self._image(inputs, queries(1))) for i in images),
            streams={"vision": rows(tower)},
        )


def _before(values: Tensor, count: int, fill: Any) -> Tensor:
    """`count` positions before those of a text."""
    return torch.cat([values.new_full((len(values), count, *values.shape[2:]), fill), values], 1)


@register("chameleon", "emu3")
class ImageCodesAdapter(FamilyAdapter):
    """Chameleon and Emu3: an image becomes codes of a vocabulary. One stream: `language`.

    A code's box is the cell that it stands for; the convolutions and norms of the image
    tokenizer see more of the image.
    """

    not_run = r"vqmodel"

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One code per cell, in reading order; Emu3 ends every row with a marker."""
        pixels = inputs["pixel_values"]
        factor = 2 ** (len(self._config.vq_config.channel_multiplier) - 1)
        is_emu3 = self._config.model_type == "emu3"
        sizes = [_size(pixels) for _ in pixels]
        if is_emu3:  # smaller images are padded on the right and below
            sizes = [(int(width), int(height)) for height, width in inputs["image_sizes"].tolist()]
        pieces = []
        for i, (width, height) in enumerate(sizes):
            down, across = height // factor, width // factor
            box = raster(down, across, (across * factor, down * factor))
            lines = [cells(line) for line in box.split(across)]
            end = special() if is_emu3 else nothing()
            pieces.append((i, sum((line + end for line in lines), nothing())))
        return Seen(sizes=sizes, language=flat(pieces))


@register("mistral4")
class Mistral4Adapter(FamilyAdapter):
    """Mistral 4, which takes no image. One stream: `language`."""

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Refuses images."""
        raise AdapterError(f"{type(self.model).__name__} is a text model; it takes no images.")


@special_block("EvollaSaProtIntermediate")
def _saprot(path: str, block: Any) -> Iterator[Block]:
    # Its GELU is a function of its own; the next module takes what it gives.
    owner = path.rsplit(".", 1)[0]
    yield Block(path, "gelu", DownInput(f"{owner}.output.dense"), block.dense.out_features)


@register("evolla")
class EvollaAdapter(FamilyAdapter):
    """Evolla: a protein takes the image's place.

    Streams: `vision` [sample, residue], the protein encoder; `qformer` [sample, latent], the
    resampler; `language`. Residues count as text (PROMPT), latents as SPECIAL.
    """

    parts = (
        ("vision", r"protein_encoder\.model\."),
        ("language", r"^model\.layers\.\d+\.adapter\."),
    )

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Refuses images."""
        raise AdapterError(f"{type(self.model).__name__} reads proteins; it takes no images.")

    def text_streams(self, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
        """The protein's residues, and the latents they are resampled to."""
        ids = inputs.get("protein_input_ids")
        mask = inputs.get("protein_attention_mask")
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
            return {}
        latents = torch.full((len(ids), self._config.resampler_num_latents), int(Role.SPECIAL))
        role = torch.full_like(ids.cpu(), int(Role.PROMPT))
        # SaProt's vocabulary starts with its special tokens: CLS, PAD, EOS, UNK, MASK.
        role[ids.cpu() <= self._config.protein_encoder_config.mask_token_id] = Role.SPECIAL
        role[mask.cpu() == 0] = Role.PAD
        return {"vision": _as_map(text_rows(role)), "qformer": _as_map(text_rows(latents))}


def _as_map(grid: Grid) -> TokenMap:
    return TokenMap(grid.role, grid.sample, grid.image, grid.box)


class EncoderDecoderAdapter(FamilyAdapter):
    """Image and text in an encoder, the answer in a decoder of its own.

    Stream `language` is the encoder's, `language.decoder` the decoder's.
    """

    growing = ()

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
            return {"language.decoder": _as_map(text_rows(torch.full_like(ids, Role.SPECIAL)))}
        role = self.text_roles(ids, inputs.get("decoder_attention_mask"))
        # The first token starts the answer, whatever its id.
        role[:, 0] = torch.where(role[:, 0] == Role.PAD, role[:, 0], int(Role.SPECIAL))
        return {"language.decoder": _as_map(text_rows(role))}


@register("florence2")
class Florence2Adapter(EncoderDecoderAdapter):
    """Florence-2. Streams: `vision.stageN` [image, cell], `language`, `language.decoder`."""

    parts = (("language.decoder", r"language_model\.decoder\."),)

    def blocks(self) -> Iterable[Block]:
        """The blocks of the tower's stages are numbered through."""
        return _stages(
            super().blocks(), r"model\.vision_tower\.blocks", r"\.\d+\.\d+\.(spatial|channel)_block"
        )

    def stream_of(self, stack: str, block: Block) -> str:
        """A stream for each stage of the tower, which have ever fewer tokens."""
        return f"vision.stage{_stage_of(block)}" if stack == "vision" else stack

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """A token for the mean of all cells, then one per cell, in reading order."""
        pixels = inputs["pixel_values"]
        vision = self._config.vision_config
        images, (width, height) = range(len(pixels)), _size(pixels)
        streams, grid = {}, nothing()
        across, down, step = width, height, 1
        settings = zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True)
        for stage, (kernel, stride, padding) in enumerate(settings):
            across, down = ((n + 2 * padding - kernel) // stride + 1 for n in (across, down))
            step *= stride
            grid = cells(raster(down, across, (across * step, down * step)))
            streams[f"vision.stage{stage}"] = rows((i, grid) for i in images)
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

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch; the language stream has means of several by several of them."""
        pixels = inputs["pixel_values"]
        encoder = self._config.encoder
        patch, side = encoder.vision_config.patch_size, int(encoder.mm_tokens_per_image**0.5)
        pooled = encoder.vision_config.image_size // patch // side * patch * side
        images = range(len(pixels))
        grid = cells(_patches(pixels, patch))
        tokens = cells(raster(side, side, (pooled, pooled)))
        return Seen(
            sizes=[_size(pixels) for _ in images],
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
        box = _patches(inputs["pixel_values"], self._config.patch_size)
        at, left = self._patch_of(inputs), self._left(inputs)
        here = self.placeholders(inputs, self.text(inputs)) & (
            self.text_map(inputs).role != Role.PAD
        )
        pieces = [
            (i, cells(torch.cat([box[at[i][here[i, : at.shape[1]]]], box[left[i]]])))
            for i in range(len(at))
        ]
        return Seen(sizes=[_size(inputs["pixel_values"]) for _ in pieces], language=flat(pieces))

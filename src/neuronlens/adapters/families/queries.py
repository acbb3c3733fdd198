"""Models whose image tokens are learned queries, and models that cross-attend to the image.

Queries depend on the image and see no single region: they have no box. The patches in the
vision tower have theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.family import FamilyAdapter, Part
from neuronlens.adapters.geometry import Placement
from neuronlens.adapters.grids import (
    NOWHERE,
    Grid,
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    pad,
    queries,
    raster,
    rows,
    special,
    text_rows,
)
from neuronlens.adapters.taps import ActOutput
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap


def _patches(pixels: Tensor, patch: int) -> Piece:
    """The patches of an image `[..., height, width]`, in reading order."""
    height, width = pixels.shape[-2:]
    down, across = height // patch, width // patch
    return cells(raster(down, across, (across * patch, down * patch)))


def _masked_patches(is_real: Bool[Tensor, "row column"], patch: int) -> Piece:
    """Patches of a canvas of which only a part is the image; the others are PAD."""
    down, across = is_real.shape
    grid = cells(raster(down, across, (across * patch, down * patch)))
    outside = ~is_real.flatten().cpu()
    grid.role[outside] = int(Role.PAD)
    grid.box[outside] = NOWHERE
    return grid


def _pixels_per_patch(mask: Tensor, patch: int) -> Int[Tensor, "image row column"]:
    """How many pixels of each patch a pixel mask `[image, height, width]` leaves."""
    count: Tensor = mask.long().unfold(1, patch, patch).unfold(2, patch, patch).sum((-1, -2))
    return count


def _size_of(pixels: Tensor) -> ImageSize:
    return pixels.shape[-1], pixels.shape[-2]


def _is_filling(images: Tensor) -> list[bool]:
    """Which images `[image, ...]` only fill up a batch: those of zeros throughout."""
    return [not bool(image.any()) for image in images]


def _check_one_each(processor: Any, images: Sequence[Sequence[Any]]) -> None:
    if any(len(each) != 1 for each in images):
        raise AdapterError(
            f"{type(processor).__name__} takes one image per text; these texts have "
            f"{[len(each) for each in images]}."
        )


_FRAMES = 4
"""Frames of a video: InstructBlipVideoProcessor makes room for these, whatever it is given."""


@register("blip-2", "instructblip", "instructblipvideo")
class BlipAdapter(FamilyAdapter):
    """BLIP-2 and InstructBLIP, with a decoder or T5 behind them.

    Streams: `vision` [image, CLS + patch], `qformer` [image, query], `qformer.text` [image,
    token of the instruction] (InstructBLIP), `language`, `language.decoder` (T5, whose encoder
    is `language`). A video is one image of four frames; `vision` and `qformer` have a row for
    each. `generate()` calls the language model by itself, so it cannot be recorded.
    """

    parts: ClassVar[tuple[Part, ...]] = (
        ("qformer.text", r"^qformer\..*\.intermediate$"),
        ("language.decoder", r"^language_model\.decoder\."),
    )

    def check_model(self) -> None:
        """Refuse encoder-decoders other than T5."""
        super().check_model()
        text = self._config.text_config
        if text.is_encoder_decoder:
            self.answer_stream = "language.decoder"
        if text.is_encoder_decoder and text.model_type != "t5":
            raise AdapterError(
                f"The language model is a {text.model_type!r}; of encoder-decoders only 't5' is "
                "described. To describe another: docs/adapters.md."
            )

    def stack_of(self, path: str) -> str | None:
        """Blocks of BLIP-2's Q-Former for text are for retrieval, and do not run."""
        stack = super().stack_of(path)
        return None if stack == "qformer.text" and self.model_type == "blip-2" else stack

    def blocks(self) -> Iterable[Block]:
        """A Q-Former layer runs its queries before its text."""
        text: list[Block] = []
        for block in super().blocks():
            if block.path.endswith(".intermediate"):
                text.append(block)
                continue
            yield block
            yield from text
            text.clear()

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """The instruction's last block: only what queries read of it is passed on."""
        return stack == "qformer.text" and layer == last

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Queries for every image, or for every frame of a video."""
        pixels = inputs["pixel_values"]
        frames = pixels.shape[1] if pixels.ndim == 5 else 1
        images = range(len(pixels))
        each_frame = [i for i in images for _ in range(frames)]
        tower = special() + _patches(pixels, self._config.vision_config.patch_size)
        asked = queries(self._config.num_query_tokens)
        streams = {
            "vision": rows((i, tower) for i in each_frame),
            "qformer": rows((i, asked) for i in each_frame),
        }
        if isinstance(inputs.get("qformer_input_ids"), Tensor):
            streams["qformer.text"] = self._instruction(inputs, frames)
        return Seen(
            sizes=[_size_of(pixels)] * len(pixels),
            language=flat((i, asked) for i in each_frame),
            streams=streams,
        )

    def _instruction(self, inputs: Mapping[str, Any], frames: int) -> Grid:
        """The text beside the queries, of every image, once for each of its frames."""
        ids = inputs["qformer_input_ids"].cpu()
        role = torch.full(ids.shape, int(Role.PROMPT), dtype=torch.int8)
        tokenizer = getattr(self.processor, "qformer_tokenizer", None)
        if tokenizer is not None:  # BERT's [CLS] and [SEP]; the config does not tell their ids
            role[torch.isin(ids, torch.tensor(tokenizer.all_special_ids))] = Role.SPECIAL
        mask = inputs.get("qformer_attention_mask")
        if isinstance(mask, Tensor):
            role[mask.cpu() == 0] = Role.PAD
        image = torch.arange(len(role))[:, None].expand(role.shape).contiguous()
        role, image = (part.repeat_interleave(frames, 0) for part in (role, image))
        box = torch.full((*role.shape, 4), NOWHERE)
        return Grid(role, image, box, torch.full_like(image, -1))

    def text_streams(self, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
        """What T5's decoder says."""
        if not self._config.text_config.is_encoder_decoder:
            return {}
        ids = inputs.get("decoder_input_ids")
        if not isinstance(ids, Tensor):
            raise AdapterError(
                "The language model is an encoder-decoder: call it with decoder_input_ids too "
                "(labels alone do not do), so that the decoder's tokens are known."
            )
        mask = inputs.get("decoder_attention_mask")
        role = self.text_roles(ids, mask if isinstance(mask, Tensor) else None)
        grid = text_rows(role)
        return {"language.decoder": TokenMap(grid.role, grid.sample, grid.image, grid.box)}

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """How many queries there are."""
        return {"query tokens": (self.processor.num_query_tokens, self._config.num_query_tokens)}

    @property
    def image_processor(self) -> Any:
        """Of a video model, the part that processes videos."""
        return getattr(self.processor, "video_processor", None) or super().image_processor

    @property
    def image_token(self) -> str:
        """Nothing: the processor puts an image's tokens before the text by itself."""
        return ""

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """One image per text; for a video model it is shown four times.

        Raises:
            AdapterError: If a text has no image, or several.
        """
        _check_one_each(self.processor, images)
        shown = images
        if self.model_type == "instructblipvideo":
            shown = [list(each) * _FRAMES for each in images]
        return super().process(texts, shown, add_special_tokens=add_special_tokens)


@register("aria")
class AriaAdapter(FamilyAdapter):
    """Streams: `vision` [image, patch], `projector` [image, query], `language`.

    The image lies in the top left of a square; patches beside it are PAD.
    """

    def check_model(self) -> None:
        """Refuse vision towers whose tokens are not described here."""
        super().check_model()
        kind = self._config.vision_config.model_type
        if kind != "idefics3_vision":
            raise AdapterError(
                f"The vision tower is a {kind!r}; AriaAdapter knows the tokens of "
                "'idefics3_vision'. To describe another: docs/adapters.md."
            )

    def check_processor(self) -> None:
        """Refuse a processor that cuts images into crops: inputs do not tell how many."""
        super().check_processor()
        # What the processor passes on goes before the image processor's own setting.
        passed = getattr(self.processor, "images_kwargs", {})
        if passed.get("split_image", getattr(self.image_processor, "split_image", False)):
            raise AdapterError(
                "The processor cuts images into crops (split_image=True), and its outputs do not "
                "tell which image a crop is of. Set processor.images_kwargs['split_image'] = False."
            )

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """How many queries there are, for a smaller and a larger square."""
        theirs = sorted(self.processor.size_conversion.values())
        return {
            "image tokens": (theirs, sorted(self._config.projector_patch_to_query_dict.values()))
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
        """As many queries as the square's number of patches asks for."""
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_mask")
        if mask is None:
            mask = torch.ones_like(pixels[:, 0])
        patch = self._config.vision_config.patch_size
        is_real = _pixels_per_patch(mask, patch) > 0
        asked = queries(self._config.projector_patch_to_query_dict[is_real[0].numel()])
        images = range(len(pixels))
        return Seen(
            sizes=[_size_of(pixels)] * len(pixels),
            language=flat((i, asked) for i in images),
            streams={
                "vision": rows((i, _masked_patches(is_real[i], patch)) for i in images),
                "projector": rows((i, asked) for i in images),
            },
        )

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """The longer side fills the square; the shorter one has at least `min_image_size`."""
        longest, least = size[0], getattr(self.image_processor, "min_image_size", 1)
        scale = longest / max(original)
        width, height = (max(int(side * scale), least) for side in original)
        if original[0] >= original[1]:
            width = longest
        else:
            height = longest
        return Placement(original, (width / original[0], height / original[1]), (0.0, 0.0))


_QUARTERS = 4
"""Crops that Idefics2 cuts an image into, before the image itself."""


@register("idefics2")
class Idefics2Adapter(FamilyAdapter):
    """Streams: `vision` and `projector` [picture, patch], `qformer` [picture, query], `language`.

    A picture is an image, or with `do_image_splitting` one of its quarters and then the whole.
    It lies in the top left of a canvas as large as the batch's largest; patches beside it are
    PAD. Without a processor, samples with a multiple of five pictures are taken to be split.
    """

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Queries for every picture."""
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
        if mask is None:
            mask = torch.ones_like(pixels[:, :, 0])
        shown = [[not filling for filling in _is_filling(row)] for row in pixels]
        # The model takes out the pictures that only fill up the batch.
        keep = torch.tensor(shown).flatten().to(pixels.device)
        mask = mask.flatten(0, 1)[keep]
        patch = self._config.vision_config.patch_size
        is_real = _pixels_per_patch(mask, patch) == patch**2
        extent = [(int(m.any(0).sum()), int(m.any(1).sum())) for m in mask]
        per_image = self._pictures([sum(row) for row in shown])
        pieces, sizes = [], []
        for number in range(len(mask)):
            image, part = divmod(number, per_image)
            first = image * per_image
            whole = extent[first + per_image - 1]
            if part == 0:
                sizes.append(whole)
            piece = _masked_patches(is_real[number], patch)
            if part < per_image - 1:
                area = _quarter(extent[first : first + per_image], part)
                piece = Piece(piece.role, _moved(piece.box, extent[number], area))
            pieces.append((image, piece))
        asked = queries(self._config.perceiver_config.resampler_n_latents)
        tower = rows(pieces)
        return Seen(
            sizes=sizes,
            language=flat((image, asked) for image, _ in pieces),
            streams={
                "vision": tower,
                "projector": tower,
                "qformer": rows((image, asked) for image, _ in pieces),
            },
        )

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """How many queries there are."""
        asked = self._config.perceiver_config.resampler_n_latents
        return {"image tokens": (self.processor.image_seq_len, asked)}

    def as_processed(self, text: str) -> str:
        """The processor puts a space between an image's markers and a word."""
        return re.sub(rf"{re.escape(self.image_token)}(?=[^\s<])", f"{self.image_token} ", text)

    def _pictures(self, counts: Sequence[int]) -> int:
        """How many pictures there are of each image, given those of each sample."""
        may_split = self.processor is None or self.image_processor.do_image_splitting
        is_split = may_split and all(count % (_QUARTERS + 1) == 0 for count in counts)
        return _QUARTERS + 1 if is_split else 1


Area = tuple[float, float, float, float]


def _quarter(extent: Sequence[ImageSize], part: int) -> Area:
    """Left, top, right, bottom of a quarter in the whole image, the last of these pictures."""
    whole, row, column = extent[-1], *divmod(part, 2)
    # Where nothing was resized, the quarters meet at a whole pixel.
    beside, below = extent[0][0] + extent[1][0], extent[0][1] + extent[2][1]
    across = extent[0][0] if beside == whole[0] else whole[0] / 2
    down = extent[0][1] if below == whole[1] else whole[1] / 2
    x, y = (0, across, whole[0]), (0, down, whole[1])
    return x[column], y[row], x[column + 1], y[row + 1]


def _moved(box: Tensor, size: ImageSize, area: Area) -> Tensor:
    """Boxes in a picture of that size, in the pixels of what it is a part of."""
    left, top, right, bottom = area
    scale = torch.tensor([(right - left) / size[0], (bottom - top) / size[1]] * 2)
    return box * scale + torch.tensor([left, top] * 2)


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
        filling = _is_filling(pixels.flatten(0, 1))
        owners = [i // pixels.shape[1] for i, fills in enumerate(filling) if not fills]
        numbers = [i - sum(filling[:i]) for i in range(len(filling))]
        tower = special() + _patches(pixels, self._config.vision_config.patch_size)
        streams = {"vision": _filled(numbers, filling, tower)}
        if self._config.use_resampler:
            latents = queries(self._config.perceiver_config.resampler_n_latents)
            streams["qformer"] = _filled(numbers, filling, latents)
        return Seen([_size_of(pixels)] * len(owners), None, streams, owners)


def _filled(numbers: Sequence[int], filling: Sequence[bool], piece: Piece) -> Grid:
    """The same piece for every image, PAD for what only fills up."""
    return rows(
        (-1, pad(len(piece))) if fills else (number, piece)
        for number, fills in zip(numbers, filling, strict=True)
    )


@register("mllama")
class MllamaAdapter(_CrossAttending):
    """Streams: `vision` [image, tile x (CLS + patch, filled up to a multiple of 8)], `language`.

    Sites `vision.global.k` are those of the second transformer behind the first.
    """

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """A grid for every tile; tiles and images that only fill up are PAD."""
        vision, pixels = self._config.vision_config, inputs["pixel_values"]
        ratios = inputs["aspect_ratio_ids"]
        tile, tiles = _size_of(pixels), pixels.shape[2]
        count = (tile[0] // vision.patch_size) * (tile[1] // vision.patch_size) + 1
        fill = pad(-count % 8)
        empty = pad(count) + fill
        pieces: list[tuple[int, Piece]] = []
        sizes: list[ImageSize] = []
        owners: list[int] = []
        for sample, row in enumerate(ratios.tolist()):
            for ratio in row:
                if ratio == 0:
                    pieces.append((-1, sum([empty] * (tiles - 1), empty)))
                    continue
                down, across = vision.supported_aspect_ratios[ratio - 1]
                piece = pad(0)
                for number in range(tiles):
                    y, x = divmod(number, across)
                    grid = _patches(pixels, vision.patch_size)
                    corner = torch.tensor([x * tile[0], y * tile[1]] * 2)
                    here = special() + cells(grid.box + corner) + fill
                    piece = piece + (here if number < down * across else empty)
                pieces.append((len(sizes), piece))
                sizes.append((across * tile[0], down * tile[1]))
                owners.append(sample)
        return Seen(sizes, None, {"vision": rows(pieces)}, owners)

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


@special_block("Kosmos2TextFFN", "Kosmos2_5TextFFN")
def _normed(path: str, block: Any) -> Iterable[Block]:
    # A LayerNorm stands before fc2: what fc2 takes is not the act_fn output, as in gated blocks.
    act = ActOutput(f"{path}.activation_fn", f"{path}.fc2", gated=True)
    yield Block(path, "activation_fn", act, block.fc1.out_features)


@register("kosmos-2")
class KosmosAdapter(FamilyAdapter):
    """Streams: `vision` [image, CLS + patch], `language`.

    Image tokens have ordinary ids: `image_embeds_position_mask` tells them.
    """

    def blocks(self) -> Iterable[Block]:
        """The tower runs first, though it is the model's second part."""
        return sorted(super().blocks(), key=lambda block: block.path.startswith("text_model"))

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """Where the processor's mask says that an image is put.

        Raises:
            AdapterError: If there are images, but no mask.
        """
        mask = inputs.get("image_embeds_position_mask")
        if isinstance(mask, Tensor):
            return mask.cpu() == 1
        if self.has_images(inputs):
            raise AdapterError(
                "The inputs have an image, but no image_embeds_position_mask, without which its "
                "tokens are not known. Pass the processor's whole output to the model."
            )
        return torch.zeros_like(ids, dtype=torch.bool)

    @property
    def image_token(self) -> str:
        """Marks the image's place for us; the processor writes it by itself."""
        return "<image>"

    def as_processed(self, text: str) -> str:
        """The processor puts a space between the image and the text."""
        head, token, tail = text.partition(self.image_token)
        return f"{head}{token} {tail.strip()}" if token else text

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """One image per text, before it.

        Raises:
            AdapterError: If a text has no image, or several.
        """
        _check_one_each(self.processor, images)
        bare = [text.replace(self.image_token, "") for text in texts]
        return super().process(bare, images, add_special_tokens=add_special_tokens)

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """How many queries there are."""
        return {"image tokens": (self.processor.num_image_tokens, self._config.latent_query_num)}

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Queries for every image."""
        pixels = inputs["pixel_values"]
        tower = special() + _patches(pixels, self._config.vision_config.patch_size)
        asked = queries(self._config.latent_query_num)
        images = range(len(pixels))
        return Seen(
            sizes=[_size_of(pixels)] * len(pixels),
            language=flat((i, asked) for i in images),
            streams={"vision": rows((i, tower) for i in images)},
        )


@register("kosmos-2.5")
class Kosmos25Adapter(KosmosAdapter):
    """Streams: `vision` [image, patch, filled up to `max_patches`], `language`."""

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Images come as rows of patches."""
        return isinstance(inputs.get("flattened_patches"), Tensor)

    def as_processed(self, text: str) -> str:
        """The text follows the image as it is."""
        return text

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Queries for every image; each row of patches says where it is from."""
        patches = inputs["flattened_patches"]
        features = patches.shape[-1] - 2
        patch = math.isqrt(features // 3)
        if 3 * patch**2 != features:
            raise AdapterError(
                f"Patches have {features} values, which is no square of three colours; only "
                "square patches are described."
            )
        pieces, sizes = [], []
        for number, image in enumerate(patches[..., :2].long().cpu()):
            down, across = image.amax(0).tolist()  # counted from 1; filling rows have 0
            sizes.append((across * patch, down * patch))
            grid = cells(raster(down, across, sizes[-1]))
            pieces.append((number, grid + pad(len(image) - len(grid))))
        asked = queries(self._config.latent_query_num)
        return Seen(
            sizes=sizes,
            language=flat((i, asked) for i in range(len(pieces))),
            streams={"vision": rows(pieces)},
        )

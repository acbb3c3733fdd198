"""Qwen-VL and its like: images of any size, a token for each block of neighbouring patches.

The patches of all images come as the rows of one matrix, block by block: the rows of a block,
in reading order, become one token. `image_grid_thw` tells how many patches each image has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from neuronlens.activations import Routed
from neuronlens.adapters.base import register
from neuronlens.adapters.change import Change
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.families.patches import interleaved
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.gates import expert_width
from neuronlens.adapters.geometry import Placement
from neuronlens.adapters.grids import Grid, ImageSize, Piece, Seen, cells, flat, in_blocks, raster
from neuronlens.adapters.taps import ActOutput, Experts, NeuronKind, See
from neuronlens.errors import AdapterError
from neuronlens.hooks import Call, Point
from neuronlens.tokens import Role

_RUNNING_ORDER = ("vision", "projector", "language")


@dataclass(frozen=True)
class Frame:
    """An image, or what a video's tokens see at one time.

    Attributes:
        rows, columns: Of patches.
        merge: How many of each become one token.
    """

    rows: int
    columns: int
    merge: int


@register(
    "cohere_compass",
    "cosmos3_omni",
    "dots3_note",
    "exaone4_5",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen4_exp",
)
class MergeBlockAdapter(FamilyAdapter):
    """Streams: `vision` [patch] and `projector` [token] of all images at once, `language`.

    Where the tower attends in windows, the first two are in the order of the windows. The
    frames of a video (its temporal patches) are images, after the sample's still ones.
    """

    def check_model(self) -> None:
        """Keep what tells the patches."""
        self._vision: Any = self._config.vision_config

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """Patch size, and how many patches are merged."""
        ours = self.image_processor
        merge = getattr(self._vision, "spatial_merge_size", None)
        return super().agreements() | {
            "patch size": (getattr(ours, "patch_size", None), self._vision.patch_size),
            "merge size": (None if merge is None else getattr(ours, "merge_size", None), merge),
        }

    @property
    def image_text(self) -> str:
        """The image token between the marks of an image's begin and end, if it has some."""
        for kind in ("vision", "image"):
            ends = [
                getattr(self._config, f"{kind}_{end}_token_id", None) for end in ("start", "end")
            ]
            if None not in ends:
                begin, end = self.processor.tokenizer.convert_ids_to_tokens(ends)
                return f"{begin}{self.image_token}{end}"
        return super().image_text

    def blocks(self) -> Iterable[Block]:
        """By stack; the last merger runs after those of earlier layers, where there are some."""
        ours = [block for block in super().blocks() if self.stack_of(block.path)]
        return sorted(
            ours,
            key=lambda block: (
                _RUNNING_ORDER.index(str(self.stack_of(block.path))),
                "visual.merger" in block.path,
            ),
        )

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell of merged patches per token."""
        stills = self.frames(inputs, "pixel_values", "image_grid_thw")
        moving = self.frames(inputs, "pixel_values_videos", "video_grid_thw")
        frames = [*stills, *moving]
        tokens = [self._tokens(frame) for frame in frames]
        count = sum(len(piece) for piece in tokens[: len(stills)])
        return Seen(
            sizes=[self._size(frame) for frame in frames],
            language=self._in_reading_order(inputs, flat(enumerate(tokens)), count),
            streams={
                "vision": flat((i, self._patches(frame)) for i, frame in enumerate(frames)),
                "projector": flat((i, tokens[i][self._order(f)]) for i, f in enumerate(frames)),
            },
        )

    def frames(self, inputs: Mapping[str, Any], pixels: str, grids: str) -> list[Frame]:
        """The images among the inputs, or the frames of the videos.

        Raises:
            AdapterError: If the grids do not explain the pixels.
        """
        if inputs.get(pixels) is None:
            return []
        if inputs.get(grids) is None:
            raise AdapterError(
                f"There are {pixels}, but no {grids}. Pass the processor's whole output to the "
                "model."
            )
        listed = inputs[grids].tolist()
        patches = sum(t * rows * columns for t, rows, columns in listed)
        if len(inputs[pixels]) != patches:
            raise AdapterError(
                f"{grids} tells of {patches} patches, but {pixels} has {len(inputs[pixels])} rows."
            )
        merges = self.merges(inputs, grids)
        return [
            Frame(rows, columns, merge)
            for (t, rows, columns), merge in zip(listed, merges, strict=True)
            for _ in range(t)
        ]

    def merges(self, inputs: Mapping[str, Any], grids: str) -> list[int]:
        """How many rows and columns of patches become one token, for each grid."""
        return [int(self._vision.spatial_merge_size)] * len(inputs[grids])

    def is_moving(self, ids: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
        """Which of the placeholders are those of videos."""
        video: int | None = getattr(self._config, "video_token_id", None)
        return torch.zeros_like(ids, dtype=torch.bool) if video is None else ids == video

    def _size(self, frame: Frame) -> ImageSize:
        side = int(self._vision.patch_size)
        return frame.columns * side, frame.rows * side

    def _tokens(self, frame: Frame) -> Piece:
        """In reading order, as they enter the language model."""
        rows, columns = frame.rows // frame.merge, frame.columns // frame.merge
        return cells(raster(rows, columns, self._size(frame)))

    def _patches(self, frame: Frame) -> Piece:
        """In the order of the tower's rows."""
        patches = cells(raster(frame.rows, frame.columns, self._size(frame)))
        order = in_blocks(frame.rows, frame.columns, frame.merge).reshape(-1, frame.merge**2)
        return patches[order[self._order(frame)].flatten()]

    def _order(self, frame: Frame) -> Int[Tensor, " token"]:
        """The order in which the tower has the tokens: window by window, if it has windows."""
        rows, columns = frame.rows // frame.merge, frame.columns // frame.merge
        grid = torch.arange(rows * columns).reshape(rows, columns)
        pixels: int | None = getattr(self._vision, "window_size", None)
        if pixels is None:
            return grid.flatten()
        side = pixels // frame.merge // int(self._vision.patch_size)
        windows = [band.split(side, 1) for band in grid.split(side, 0)]
        return torch.cat([window.flatten() for band in windows for window in band])

    def _in_reading_order(self, inputs: Mapping[str, Any], tokens: Grid, stills: int) -> Grid:
        """The tokens in the order of their placeholders: videos may stand before images.

        Args:
            inputs: Of the model.
            tokens: Of all images, then of all videos.
            stills: How many of them are the images'.
        """
        total = len(tokens.role)
        if stills == total:
            return tokens
        ids = self.text(inputs)
        here = self.placeholders(inputs, ids) & (self.text_map(inputs).role != Role.PAD)
        is_moving = self.is_moving(ids)[here]
        if len(is_moving) != total:
            return tokens  # told as an error where placeholders are filled
        return interleaved(is_moving, tokens, stills)


@register("cosmos3_edge")
class CosmosEdgeAdapter(MergeBlockAdapter):
    """The model needs to be told which tokens are an image's, which its processor does not do."""

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """The processor's inputs, and `mm_token_type_ids`."""
        inputs = super().process(texts, images, add_special_tokens=add_special_tokens)
        is_image = inputs["input_ids"] == self._config.image_token_id
        inputs.setdefault("mm_token_type_ids", is_image.long())
        return inputs


@register("hyperclovax_vision_v2")
class HyperClovaXAdapter(MergeBlockAdapter):
    """Qwen2.5-VL's vision tower, another language model."""

    def check_model(self) -> None:
        """Refuse vision towers whose tokens are not described here."""
        super().check_model()
        if self._vision.model_type != "qwen2_5_vl_vision":
            raise AdapterError(
                f"The vision tower is a {self._vision.model_type!r}; {type(self).__name__} knows "
                "the tokens of qwen2_5_vl_vision. To describe another: docs/adapters.md."
            )


@register("video_llama_3")
class VideoLlama3Adapter(MergeBlockAdapter):
    """Not the model but its inputs tell how many patches become one token: one, for images."""

    def merges(self, inputs: Mapping[str, Any], grids: str) -> list[int]:
        """As `image_merge_sizes` says.

        Raises:
            AdapterError: For videos, whose tokens may be left out where they repeat.
        """
        if grids != "image_grid_thw":
            raise AdapterError("The tokens of VideoLLaMA3's videos are not described; give images.")
        sizes: list[int] = inputs["image_merge_sizes"].tolist()
        return sizes


# GLM


@register("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga")
class GlmAdapter(MergeBlockAdapter):
    """A convolution merges the patches; the projector has two layers."""

    def is_moving(self, ids: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
        """Between the marks of a video: its frames have the id of images."""
        begun = (ids == self._config.video_start_token_id).cumsum(-1)
        ended = (ids == self._config.video_end_token_id).cumsum(-1)
        return torch.gt(begun, ended)


@register("glm5_next")
class Glm5Adapter(GlmAdapter):
    """Images are not stretched to whole blocks of patches, but filled up."""

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """At the top left, in its own proportions, and larger only if it is very small."""
        ours = self.image_processor
        if ours is None or not ours.do_resize:
            return super().place(original, size, index)
        width, height = original
        scale = min(size[0] / width, size[1] / height)
        block = (ours.patch_size * ours.merge_size) ** 2
        if height * width >= block * ours.min_image_tokens:
            scale = min(1.0, scale)
        drawn = [
            max(1, min(most, math.floor(side * scale)))
            for side, most in zip(original, size, strict=True)
        ]
        return Placement(original, (drawn[0] / width, drawn[1] / height), (0.0, 0.0))


@special_block(
    "Glm4vVisionPatchMerger",
    "Glm4vMoeVisionPatchMerger",
    "GlmOcrVisionPatchMerger",
    "Glm5NextVisionPatchMerger",
)
def _glm_merger(path: str, block: Any) -> Iterator[Block]:
    """A normalised and activated projection goes into a gated block: one layer after the other."""
    yield Block(f"{path}.act1", "act1", ActOutput(f"{path}.act1"), block.proj.out_features)
    gated = ActOutput(f"{path}.act_fn", f"{path}.down_proj", gated=True)
    yield Block(path, "act_fn", gated, block.gate_proj.out_features)


# Ernie


@dataclass(frozen=True)
class ModalityExperts:
    """Routed experts that only the text's tokens come to, or only the image's.

    An image's begin and end tokens count as the image's here, so that the token map does
    not tell who comes; the layer's own input does. It is read and written where the layer
    is entered and left, which happens for texts without images as well.

    Attributes:
        path: Of the experts; beside them is the `gate` that routes.
        layer: Path of the layer's block, which has the experts of both.
        visual: Whether they are the image's.
    """

    path: str
    layer: str
    visual: bool

    def reading(self, model: nn.Module, see: See, kind: NeuronKind) -> list[Point]:
        """Recomputed from what enters the layer; NaN at the tokens that do not come."""
        experts: Any = model.get_submodule(self.path)

        def look(call: Call) -> None:
            came, routed = self._routed(model, call)
            at = came.flatten().nonzero().squeeze(1)

            def spread(rows: Any) -> None:
                assert isinstance(rows, Routed)
                see(rows.spread(at, came.numel()).reshape(*came.shape))

            if len(at):
                inner = Experts(self.path).reading(model, spread, kind)
                inner[0].hook(Call(experts, routed, {}))
            else:
                x, index, _ = routed
                values = x.new_empty(*index.shape, expert_width(experts))
                spread(Routed(values, index, int(experts.num_experts)))

        return [Point(model.get_submodule(self.layer), look, before=True)]

    def writing(self, model: nn.Module, change: Change) -> list[Point]:
        """Adds the difference that the change makes to what the layer gives."""
        experts, inner = model.get_submodule(self.path), Experts(self.path)
        product = inner.product(model, change)

        def write(call: Call) -> tuple[Tensor, Tensor]:
            came, routed = self._routed(model, call)
            hidden, logits = call.out
            change.begin(came.numel())
            at = came.flatten().nonzero().squeeze(1)
            difference = torch.zeros_like(routed[0])
            inner.add_difference(experts, change, product, routed, difference, at)
            new = hidden.reshape(-1, hidden.shape[-1]).index_add(0, at, difference)
            return new.reshape(hidden.shape), logits

        return [Point(model.get_submodule(self.layer), write)]

    def _routed(
        self, model: nn.Module, call: Call
    ) -> tuple[Bool[Tensor, "batch token"], tuple[Tensor, Tensor, Tensor]]:
        """Which tokens come, and what the experts are given for them."""
        hidden, types = (*call.args, *call.kwargs.values(), None)[:2]
        is_visual = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if types is not None:
            is_visual = types.bool().to(hidden.device)
        came = is_visual if self.visual else ~is_visual
        rows = hidden[came]
        gate: Callable[[Tensor], tuple[Tensor, ...]] = model.get_submodule(
            f"{self.path.rsplit('.', 1)[0]}.gate"
        ).forward  # its hooks are for the model's own call
        _, weight, index = gate(rows)
        return came, (rows, index, weight)


@register("ernie4_5_vl_moe")
class ErnieAdapter(MergeBlockAdapter):
    """Text and images have experts of their own; the projector has two layers."""

    parts = (("projector", r"resampler_model"), ("language", r"language_model\."))

    def blocks(self) -> Iterable[Block]:
        """With experts that know whose tokens they get."""
        for block in super().blocks():
            owner, _, kind = block.path.removesuffix(".experts").rpartition(".")
            if block.experts:
                tap = ModalityExperts(block.path, owner, kind == "vision_moe")
                yield replace(block, tap=tap)
            else:
                yield block

    def frames(self, inputs: Mapping[str, Any], pixels: str, grids: str) -> list[Frame]:
        """The images.

        Raises:
            AdapterError: For videos, of which the projector's layers have different tokens.
        """
        found = super().frames(inputs, pixels, grids)
        if found and pixels != "pixel_values":
            raise AdapterError(
                "The tokens of Ernie 4.5 VL's videos are not described; give images."
            )
        return found

"""Images at their native size: Pixtral, MiniCPM-V, Gemma 4, Inkling, Molmo 2."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
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
    rows,
    special,
)
from neuronlens.adapters.taps import EXPERTS_FIRST, ActOutput
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap


@dataclass(frozen=True)
class Run:
    """Image tokens that stand side by side in a text.

    Attributes:
        sample: Of the batch.
        start: Position of the first.
        length: How many there are.
        before: The token id in front of them; -1 if there is none.
        is_video: Whether their id is that of videos.
    """

    sample: int
    start: int
    length: int
    before: int
    is_video: bool


def runs(
    ids: Int[Tensor, "batch token"], here: Bool[Tensor, "batch token"], video: int | None
) -> list[Run]:
    """The runs of image tokens, in reading order."""
    found = []
    for sample, (row, mine) in enumerate(zip(ids.tolist(), here.tolist(), strict=True)):
        start = 0
        while start < len(row):
            length = 0
            while start + length < len(row) and mine[start + length]:
                if row[start + length] != row[start]:
                    break
                length += 1
            if length:
                before = row[start - 1] if start else -1
                found.append(Run(sample, start, length, before, row[start] == video))
            start += max(1, length)
    return found


class _ByRuns(FamilyAdapter):
    """Families whose inputs do not tell which image a token is of; the text does."""

    def runs(self, inputs: Mapping[str, Any]) -> list[Run]:
        """The runs of image tokens, in reading order."""
        ids = self.text(inputs)
        here = self.placeholders(inputs, ids)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            here &= mask.cpu() != 0
        return runs(ids, here, getattr(self._config, "video_token_id", None))


# Pixtral: Mistral 3, Mistral Large 4, LightOnOCR.


@register("mistral3", "mistral_large4", "lighton_ocr")
class PixtralAdapter(FamilyAdapter):
    """Streams: `vision` [patch] of all images, `projector` and `language`: 2 x 2 patches each."""

    def check_model(self) -> None:
        """Refuse vision towers other than Pixtral's."""
        self._vision = self._config.vision_config
        if self._vision.model_type != "pixtral":
            raise AdapterError(
                f"The vision tower is a {self._vision.model_type!r}; {type(self).__name__} knows "
                "the tokens of 'pixtral'. To describe another: docs/adapters.md."
            )

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers behind the last one whose output is read."""
        chosen = getattr(self._config, "vision_feature_layer", -1)
        # hidden_states[k] is the output of layer k - 1; negative numbers count from the last.
        read = [
            k if k >= 0 else last + 2 + k for k in ([chosen] if isinstance(chosen, int) else chosen)
        ]
        return stack == "vision" and layer >= max(read)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Cells in reading order; an image is as large as `image_sizes` says, without padding."""
        pixels, given = inputs["pixel_values"], inputs.get("image_sizes")
        if given is None:
            given = [pixels.shape[-2:]] * len(pixels)
        sizes = [(int(width), int(height)) for height, width in given]
        patch = int(self._vision.patch_size)
        token = patch * int(self._config.spatial_merge_size)
        merged = [cells(_whole(size, token)) for size in sizes]
        return Seen(
            sizes=sizes,
            language=flat(enumerate(merged)),
            streams={
                "vision": flat(enumerate(cells(_whole(size, patch)) for size in sizes)),
                "projector": flat(enumerate(merged)),
            },
        )


def _whole(size: ImageSize, cell: int) -> Tensor:
    """Boxes of the whole cells that fit into an image."""
    columns, lines = size[0] // cell, size[1] // cell
    return raster(lines, columns, (columns * cell, lines * cell))


# MiniCPM-V.


@register("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
class MiniCpmAdapter(_ByRuns):
    """An overview of the image, then slices of it, as crops of one strip of patches.

    Streams: `vision` [patch], `vision.merged` [2 x 2 patches] behind the merger in the tower,
    `projector` and `language` [token]. With `downsample_mode="4x"` that merger does not run.
    """

    def check_model(self) -> None:
        """Refuse mergers other than the checkpoints'."""
        self._vision = self._config.vision_config
        kernels = [*self._vision.window_kernel_size, *self._config.merge_kernel_size]
        if self._config.merger_times != 1 or set(kernels) != {2}:
            raise AdapterError(
                f"{type(self).__name__} knows mergers of 2 x 2 patches that run once; this model "
                f"has kernels {kernels} and merger_times={self._config.merger_times}."
            )

    @property
    def _merges_inside(self) -> bool:
        return bool(self._config.downsample_mode != "4x")

    def stack_of(self, path: str) -> str | None:
        """The merger inside the tower is a projector, if it runs."""
        if "vit_merger" in path and not self._merges_inside:
            return None
        return super().stack_of(path)

    def stream_of(self, stack: str, block: Block) -> str:
        """Tower layers behind the merger run on a quarter of the tokens."""
        layer = re.search(r"encoder\.layers\.(\d+)", block.path)
        is_behind = layer and int(layer[1]) > self._vision.insert_layer_id
        if "vit_merger" in block.path or (is_behind and self._merges_inside):
            return "vision.merged"
        return stack

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Crops are dealt to images by the text: an overview has another marker than a slice."""
        mode = inputs.get("downsample_mode") or self._config.downsample_mode
        if (mode != "4x") != self._merges_inside:
            raise AdapterError(
                f"The model was called with downsample_mode={mode!r}, but its config says "
                f"{self._config.downsample_mode!r}. Set model.config.downsample_mode first."
            )
        found = self.runs(inputs)
        grids = [_pairs(inputs.get(name)) for name in ("target_sizes", "target_sizes_videos")]
        wanted = [sum(run.is_video == kind for run in found) for kind in (False, True)]
        if wanted != [len(each) for each in grids]:
            raise AdapterError(
                f"{' + '.join(str(len(each)) for each in grids)} crops of images and videos were "
                f"given, but the text has {' + '.join(map(str, wanted))} runs of their tokens. Was "
                "the prompt expanded by the model's own processor?"
            )
        left = [iter(each) for each in grids]
        crops = [(run, next(left[run.is_video])) for run in found]
        images: list[list[tuple[Run, ImageSize]]] = []
        for run, grid in crops:
            # The very first crop is an overview, and so tells their marker.
            if run.before == found[0].before:
                images.append([])
            images[-1].append((run, grid))
        patch = int(self._vision.patch_size)
        laid = [_canvas(image, patch) for image in images]
        # The tower runs over all images first, then over all videos.
        order = [
            (number, *part)
            for kind in (False, True)
            for number, (image, (_, parts)) in enumerate(zip(images, laid, strict=True))
            for part in parts
            if image[0][0].is_video == kind
        ]
        reading = [(number, *part) for number, (_, parts) in enumerate(laid) for part in parts]
        side = 4 if self._merges_inside else 2

        def stream(listed: Iterable[tuple[int, ImageSize, _Area]], merged: int) -> Any:
            return flat(
                (n, cells(raster(high // merged, wide // merged, area.size, area.corner)))
                for n, (wide, high), area in listed
            )

        streams = {"vision": stream(order, 1), "projector": stream(order, side)}
        if self._merges_inside:
            streams["vision.merged"] = stream(order, 2)
        return Seen([size for size, _ in laid], stream(reading, side), streams)


@dataclass(frozen=True)
class _Area:
    size: ImageSize
    corner: tuple[float, float]


def _pairs(sizes: Tensor | None) -> list[ImageSize]:
    return [] if sizes is None else [(int(wide), int(high)) for high, wide in sizes.tolist()]


def _canvas(
    crops: Sequence[tuple[Run, ImageSize]], patch: int
) -> tuple[ImageSize, list[tuple[ImageSize, _Area]]]:
    """Size of the image that slices are cut from, and every crop's grid and area in it."""
    (_, overview), *slices = crops
    if not slices:
        size = (overview[0] * patch, overview[1] * patch)
        return size, [(overview, _Area(size, (0, 0)))]
    # Rows of slices are separated by one more token than slices in a row are.
    ends = (run.start + run.length for run, _ in slices)
    gaps = [run.start - end for (run, _), end in zip(slices[1:], ends, strict=False)]
    columns = next((i + 1 for i, gap in enumerate(gaps) if gap > 2), len(slices))
    if len(slices) % columns:
        raise AdapterError(f"{len(slices)} slices do not make rows of {columns}.")
    # Slices of one image are of one size, unless the processor shrinks some.
    wide, high = (patch * max(grid[axis] for _, grid in slices) for axis in (0, 1))
    size = (columns * wide, len(slices) // columns * high)
    areas = [
        (grid, _Area((wide, high), (i % columns * wide, i // columns * high)))
        for i, (_, grid) in enumerate(slices)
    ]
    return size, [(overview, _Area(size, (0, 0))), *areas]


# Gemma 4.


@register("gemma4", "gemma4_unified")
class Gemma4Adapter(_ByRuns):
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
    block `language.self_conditioning`, which is given zeros in the first step.
    """

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

    def text_streams(self, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
        """The canvas: drawn at random by the model where it is not given."""
        canvas = inputs.get("decoder_input_ids")
        shape = (len(self.text(inputs)), int(self._config.canvas_length))
        role = torch.full(shape, int(Role.RESPONSE), dtype=torch.int8)
        if isinstance(canvas, Tensor):
            role = self.text_roles(canvas)
            role[role == Role.PROMPT] = Role.RESPONSE
        sample = torch.arange(len(role))[:, None].expand(role.shape).contiguous()
        box = torch.full((*role.shape, 4), float("nan"))
        return {"language.decoder": TokenMap(role, sample, torch.full_like(sample, -1), box)}


# Inkling.


@special_block("InklingVisionEncoderLayer")
def _inkling_patch_layer(path: str, block: Any) -> Iterator[Block]:
    """A projection, a norm and a GELU (a function), which is all that the layer gives."""
    if block.add_norm:
        yield Block(path, "gelu", ActOutput(path), int(block.projection.out_features))


@special_block("InklingSharedExperts")
def _inkling_shared_experts(path: str, block: Any) -> Iterator[Block]:
    """Every token runs through each of them: one block of all their neurons."""
    experts, _, width = block.down_proj.shape
    tap = ActOutput(f"{path}.act_fn", None, True, EXPERTS_FIRST)
    yield Block(path, "act_fn", tap, int(experts * width))


@register("inkling_mm_model")
class InklingAdapter(_ByRuns):
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


# Molmo 2.


@register("molmo2")
class Molmo2Adapter(FamilyAdapter):
    """The whole image, made smaller, and overlapping crops of it; tokens pool 2 x 2 patches.

    Streams: `vision` [crop, patch], `projector` and `language` [token]. Frames of a video
    count as images of their own.
    """

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers behind the last one whose output is read."""
        chosen = self._config.adapter_config.vision_feature_layer
        # hidden_states[k] is the output of layer k - 1; from 0 on, layers are counted instead.
        read = [k if k >= 0 else last + 1 + k for k in chosen]
        return stack == "vision" and layer > max(read)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Where a crop lies is told by which of its patches are pooled into which token."""
        if inputs.get("pixel_values") is not None:
            pooling, grids = inputs["image_token_pooling"], inputs["image_grids"].tolist()
            pixels = inputs["pixel_values"]
            views = [[(a, b), (c, d)] for a, b, c, d in grids]
        else:
            pooling, grids = inputs["video_token_pooling"], inputs["video_grids"].tolist()
            pixels = inputs["pixel_values_videos"]
            views = [[(a, b)] for frames, a, b in grids for _ in range(frames)]
        per_crop = pixels.shape[-2]
        side, edge = math.isqrt(per_crop), math.isqrt(pooling.shape[1])
        if side**2 != per_crop or edge**2 != pooling.shape[1]:
            raise AdapterError(
                f"{type(self).__name__} knows square crops and square pooling windows, not crops "
                f"of {per_crop} patches and windows of {pooling.shape[1]}."
            )
        counts = [a * b for image in views for a, b in image]
        windows = iter(pooling.cpu().split(counts))
        sizes: list[ImageSize] = []
        tokens: list[tuple[int, Piece]] = []
        patches: list[tuple[int, Piece]] = []
        for number, image in enumerate(views):
            pooled = [_pooled(next(windows), *grid, edge) for grid in image]
            patch = int(self._config.vision_config.patch_size)
            lines, columns = pooled[-1].patches.shape
            size = (columns * patch, lines * patch)
            sizes.append(size)
            for view in pooled:
                high, wide = view.patches.shape
                stretch = torch.tensor([columns / wide, lines / high] * 2) * patch
                tokens.append((number, view.tokens(stretch)))
                patches += [(number, crop) for crop in view.crops(side, stretch)]
        everything = flat(tokens)
        language = flat((number, piece[piece.role != Role.PAD]) for number, piece in tokens)
        return Seen(sizes, language, {"vision": rows(patches), "projector": everything})


@dataclass(frozen=True)
class _View:
    """A view of an image, as pooling sees it.

    Attributes:
        patches: Number of the patch at every place of the view.
        box: Of every token, in patches of the view; empty where it pools none.
    """

    patches: Int[Tensor, "row column"]
    box: Tensor

    def tokens(self, stretch: Tensor) -> Piece:
        """The tokens, in reading order."""
        piece = cells(self.box * stretch)
        piece.role[(self.box[:, :2] >= self.box[:, 2:]).any(1)] = int(Role.PAD)
        return piece

    def crops(self, side: int, stretch: Tensor) -> Iterator[Piece]:
        """The patches of every crop that the view is put together from."""
        own = raster(side, side, (side, side))
        for number in (self.patches // side**2).unique().tolist():
            at = (self.patches // side**2 == number).nonzero()[0]
            inside = int(self.patches[at[0], at[1]]) % side**2
            corner = at.flip(0) - torch.tensor([inside % side, inside // side])
            yield cells((own + corner.repeat(2)) * stretch)


def _pooled(windows: Int[Tensor, "token patch"], lines: int, columns: int, edge: int) -> _View:
    """The view of which `windows` of `edge` x `edge` patches (-1: none) make tokens."""
    places = rearrange(windows, "(r c) (a b) -> (r a) (c b)", r=lines, c=columns, a=edge, b=edge)
    there = places >= 0
    row, column = (there.any(axis).nonzero().flatten() for axis in (1, 0))
    kept = places[row[0] : row[-1] + 1, column[0] : column[-1] + 1]
    start = torch.stack([column[0], row[0]]).repeat(2)
    end = torch.tensor([*kept.T.shape, *kept.T.shape])
    box = raster(lines, columns, (columns * edge, lines * edge)) - start
    return _View(kept, torch.minimum(box.clamp(min=0), end))

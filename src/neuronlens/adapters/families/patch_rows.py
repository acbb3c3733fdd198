"""Images of any size as rows of patches, where 2 x 2 patches become one token.

Rows are in raster order and the model groups them; LFM3-VL and MiniMax-M3-VL are given them
in merge-block order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.families.patches import interleaved
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.gates import GATES
from neuronlens.adapters.geometry import Placement, stretched
from neuronlens.adapters.grids import (
    Grid,
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    in_blocks,
    nothing,
    pad,
    raster,
    rows,
    special,
)
from neuronlens.adapters.taps import CHANNELS_FIRST, ActOutput, Functional
from neuronlens.errors import AdapterError

# Blocks whose structure does not tell their activation.


@special_block("Lfm2MLP", "Lfm2MoeMLP", "Lfm3MLP", "Lfm3VlVisionMLP")
def _silu_function(path: str, block: Any) -> Iterator[Block]:
    tap = Functional(path, f"{path}.w1", F.silu, f"{path}.w2", f"{path}.w3")
    yield Block(path, "w1", tap, int(block.w2.in_features))


@special_block("MiniMaxM3VLDenseMLP")
def _clamped_swish(path: str, block: Any) -> Iterator[Block]:
    act = partial(GATES["MiniMaxM3VLExperts"], block)

    def product(act: Tensor, gate_up: Tensor, _up: Tensor | None) -> Tensor:
        limit = block.swiglu_limit
        return (gate_up.chunk(2, dim=-1)[1].clamp(-limit, limit) + 1) * act

    tap = Functional(
        path, f"{path}.gate_up_proj", act, f"{path}.down_proj", up=None, product=product
    )
    yield Block(path, "gate_up_proj", tap, int(block.down_proj.in_features))


@special_block("MiniMaxM3VLMultiModalProjector")
def _two_in_a_row(path: str, block: Any) -> Iterator[Block]:
    for act, down in (("act", "linear_2"), ("merge_act", "merge_linear_2")):
        # A block each: the first runs on patches, the second on tokens.
        tap = ActOutput(f"{path}.{act}", f"{path}.{down}")
        yield Block(f"{path}.{act}", act, tap, int(getattr(block, down).in_features))


@special_block("MuseGlimmerVisionAdapter", "MuseSparkVisionAdapter")
def _called_twice(path: str, block: Any) -> Iterator[Block]:
    # act(fc2(act(fc1(x)))), and a projection beside the block takes the second.
    for call, before in enumerate(("fc1", "fc2")):
        tap = ActOutput(f"{path}.act", call=call, calls=2)
        yield Block(f"{path}.{before}", "act", tap, int(getattr(block, before).out_features))


@special_block("HunYuanVLVisionPatchMerger")
def _convolutions(path: str, block: Any) -> Iterator[Block]:
    tap = ActOutput(f"{path}.proj_act", f"{path}.proj_out", layout=CHANNELS_FIRST)
    yield Block(path, "proj_act", tap, int(block.proj_out.in_channels))


@special_block("NemotronHMamba2Mixer")
def _no_feed_forward(_path: str, _block: Any) -> Iterable[Block]:
    return ()  # its act is of the state-space mixer


# Families.


Grids = list[tuple[int, int]]
"""Rows and columns of patches, by image."""


class PatchRowsAdapter(FamilyAdapter):
    """All images' patches one after the other, and how many rows and columns each image has.

    Streams: `vision` [patch], `projector` [token], `language`. Each frame (or group of frames
    that share their tokens) of a video counts as an image, after the batch's still images.
    """

    def check_model(self) -> None:
        """Read the sizes of patches and of what is merged."""
        super().check_model()
        vision = self._config.vision_config
        self._patch = int(vision.patch_size)
        self._merge = self.merged()

    def merged(self) -> int:
        """How many patches on each side become one token."""
        return int(self._config.vision_config.spatial_merge_size)

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """Patch size, and how many patches are merged."""
        ours = self.image_processor
        return {
            "patch size": (getattr(ours, "patch_size", None), self._patch),
            "merge size": (getattr(ours, "merge_size", None), self._merge),
        }

    def order(self, rows: int, columns: int) -> Int[Tensor, " token"]:
        """Raster positions of the patches, in the order in which the tower has them."""
        return torch.arange(rows * columns)

    def before_patches(self) -> Piece:
        """Tokens of the tower before each image's patches."""
        return nothing()

    def at_placeholders(self, rows: int, columns: int, size: ImageSize) -> Piece:
        """The tokens of an image of so many rows and columns of tokens."""
        return cells(raster(rows, columns, size))

    def grids(self, inputs: Mapping[str, Any]) -> tuple[Grids, Grids]:
        """Of the images, and of the frames of the videos."""
        found: list[Grids] = []
        for pixels, sizes in (
            ("pixel_values", "image_grid_thw"),
            ("pixel_values_videos", "video_grid_thw"),
        ):
            thw = inputs[sizes].tolist() if inputs.get(pixels) is not None else []
            found.append([(height, width) for times, height, width in thw for _ in range(times)])
        return found[0], found[1]

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch in the tower, and one per merged block elsewhere."""
        images, frames = self.grids(inputs)
        sizes, tower, merged, tokens = [], [], [], []
        for number, (height, width) in enumerate([*images, *frames]):
            size = (width * self._patch, height * self._patch)
            grid = (height // self._merge, width // self._merge)
            patches = cells(raster(height, width, size))[self.order(height, width)]
            sizes.append(size)
            tower.append((number, self.before_patches() + patches))
            merged.append((number, cells(raster(*grid, size))))
            tokens.append((number, self.at_placeholders(*grid, size)))
        count = sum(len(piece) for _, piece in tokens[: len(images)])
        return Seen(
            sizes=sizes,
            language=self._in_reading_order(inputs, flat(tokens), count),
            streams={"vision": flat(tower), "projector": flat(merged)},
        )

    def _in_reading_order(self, inputs: Mapping[str, Any], tokens: Grid, images: int) -> Grid:
        """The tokens in the order of their placeholders: videos may stand before images.

        Args:
            inputs: Of the model.
            tokens: Of all images, then of all videos.
            images: How many of them are the images'.
        """
        total = len(tokens.role)
        if images in (0, total):
            return tokens
        ids = self.text(inputs)
        is_video = ids[self.placeholders(inputs, ids)] == self._config.video_token_id
        if int(is_video.sum()) != total - images or len(is_video) != total:
            return tokens  # told as an error where placeholders are filled
        return interleaved(is_video, tokens, images)


class _Marked(PatchRowsAdapter):
    """Chat templates, not processors, write a start and an end around each image."""

    def marks(self) -> tuple[str, str]:
        """What stands before and after the image token."""
        ids = [self._config.vision_start_token_id, self._config.vision_end_token_id]
        tokenizer: Any = self.processor
        start, end = tokenizer.tokenizer.convert_ids_to_tokens(ids)
        return start, end

    @property
    def image_text(self) -> str:
        """The image token between its marks."""
        start, end = self.marks()
        return f"{start}{self.image_token}{end}"


@register("paddleocr_vl")
class PaddleOcrAdapter(_Marked):
    """The projector runs image by image; there is no video."""


@register("hunyuan_vl")
class HunYuanAdapter(_Marked):
    """Learned markers stand at some placeholders: begin, a newline after each row, end."""

    def marks(self) -> tuple[str, str]:
        """The processor knows them."""
        processor: Any = self.processor
        return processor.image_start_token, processor.image_end_token

    def at_placeholders(self, rows: int, columns: int, size: ImageSize) -> Piece:
        """Begin, each row and a newline, end."""
        grid = cells(raster(rows, columns, size))
        piece = special()
        for row in range(rows):
            piece = piece + grid[row * columns : (row + 1) * columns] + special()
        return piece + special()


@register("kimi_k25")
class KimiAdapter(_Marked):
    """Images are filled up, not stretched, to whole tokens."""

    def marks(self) -> tuple[str, str]:
        """The start also says what kind of media follows."""
        start, end = super().marks()
        return f"{start}image<|media_content|>", end

    def merged(self) -> int:
        """The side of the merge kernel, which has to be square."""
        height, width = self._config.vision_config.merge_kernel_size
        if height != width:
            raise AdapterError(
                f"The model merges {height} x {width} patches (merge_kernel_size); only squares "
                "are described."
            )
        return int(height)

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Never enlarged, and filled up at the right and at the bottom."""
        ours = self.image_processor
        if not getattr(ours, "do_resize", False):
            return stretched(original, size)
        width, height = original
        patch, side = ours.patch_size, ours.size.max_height
        patches = max(1.0, height // patch) * max(1.0, width // patch)
        scale = min(
            1.0,
            math.sqrt(ours.max_patches / patches),
            side * patch / height,
            side * patch / width,
        )
        resized = [min(max(1, int(length * scale)), side * patch) for length in original]
        factor = ours.merge_size * patch
        filled = tuple(math.ceil(length / factor) * factor for length in resized)
        if filled != size:
            raise AdapterError(
                f"{type(ours).__name__} should turn an image of {original} into one of {filled} "
                f"(width, height), but the model was given {size}. Boxes cannot be placed; was "
                "the image processed with other settings?"
            )
        return Placement(original, (resized[0] / width, resized[1] / height), (0.0, 0.0))


@register("muse_glimmer", "muse_spark")
class MuseAdapter(PatchRowsAdapter):
    """The tower keeps its rows in the order of attention windows."""

    def merged(self) -> int:
        """It is called otherwise here."""
        return int(self._config.vision_config.merge_size)

    def order(self, rows: int, columns: int) -> Int[Tensor, " token"]:
        """Window by window; those at the right and at the bottom may be smaller."""
        side = int(self._config.vision_config.pos_emb_height)
        grid = torch.arange(rows * columns).reshape(rows, columns)
        windows = [
            grid[top : top + side, left : left + side].flatten()
            for top in range(0, rows, side)
            for left in range(0, columns, side)
        ]
        return torch.cat(windows)


@register("lfm3_vl")
class Lfm3VlAdapter(_Marked):
    """Patches in merge-block order; convolutions in the tower look at neighbours too."""

    def order(self, rows: int, columns: int) -> Int[Tensor, " token"]:
        """Merge block by merge block."""
        return in_blocks(rows, columns, self._merge)


@register("minimax_m3_vl")
class MiniMaxAdapter(PatchRowsAdapter):
    """Patches in merge-block order; the projector's first block runs on patches."""

    def order(self, rows: int, columns: int) -> Int[Tensor, " token"]:
        """Merge block by merge block."""
        return in_blocks(rows, columns, self._merge)

    def stream_of(self, stack: str, block: Block) -> str:
        """The first block of the projector is before the merging."""
        return "vision" if stack == "projector" and block.name == "act" else stack


@register("nemotron_h_omni")
class NemotronOmniAdapter(PatchRowsAdapter):
    """The tower puts class and register tokens before each image's patches."""

    def merged(self) -> int:
        """The reciprocal of the downsampling."""
        return round(1 / float(self._config.downsample_ratio))

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """Patch size, and the downsampling."""
        ours = self.image_processor
        ratio = self._config.downsample_ratio
        return {
            "patch size": (getattr(ours, "patch_size", None), self._patch),
            "downsampling": (getattr(ours, "downsample_ratio", None), ratio),
        }

    def before_patches(self) -> Piece:
        """Class tokens and registers."""
        return special(int(self._config.vision_config.num_summary_tokens))

    def grids(self, inputs: Mapping[str, Any]) -> tuple[Grids, Grids]:
        """Of the images; the model's own code for videos does not run (transformers 5.23)."""
        sizes = inputs["image_grid_hw"].tolist() if inputs.get("pixel_values") is not None else []
        return [(height, width) for height, width in sizes], []


@dataclass(frozen=True)
class _Views:
    """What the tower is shown of an image: the whole of it, or its tiles and a thumbnail."""

    shapes: tuple[tuple[int, int], ...]
    rows: int = 1
    columns: int = 1


@register("lfm2_vl")
class Lfm2VlAdapter(FamilyAdapter):
    """A large image is cut into tiles, which a thumbnail of it follows.

    Streams: `vision` [tile or image, patch and padding], `projector` [token], `language`.
    Boxes are told in the pixels of the tiles put together, or of the image if it is not cut.
    """

    def check_model(self) -> None:
        """Refuse towers whose tokens are not described here."""
        super().check_model()
        vision = self._config.vision_config
        if vision.model_type != "siglip2_vision_model":
            raise AdapterError(
                f"The vision tower is a {vision.model_type!r}; {type(self).__name__} knows the "
                "tokens of siglip2_vision_model. To describe another: docs/adapters.md."
            )
        self._patch = int(vision.patch_size)
        self._merge = int(self._config.downsample_factor)

    def check_processor(self) -> None:
        """Refuse tiles without a thumbnail, which tells how they are laid out."""
        super().check_processor()
        ours = self.image_processor
        if getattr(ours, "do_image_splitting", True) and not getattr(ours, "use_thumbnail", True):
            raise AdapterError(
                f"{type(ours).__name__} cuts images into tiles without a thumbnail, and the inputs "
                "do not tell how many of them are in a row. Set its use_thumbnail to True, or its "
                "do_image_splitting to False."
            )

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """Patch size, and how many patches are merged."""
        ours = self.image_processor
        return {
            "patch size": (getattr(ours, "encoder_patch_size", None), self._patch),
            "downsampling": (getattr(ours, "downsample_factor", None), self._merge),
        }

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One cell per patch or merged block, tile by tile; the thumbnail's are larger."""
        longest = inputs["pixel_values"].shape[1]
        sizes, tower, tokens = [], [], []
        for number, image in enumerate(self._images(inputs)):
            *tiles, last = image.shapes
            height, width = tiles[0] if tiles else last
            size = (image.columns * width * self._patch, image.rows * height * self._patch)
            sizes.append(size)
            for index, shape in enumerate(image.shapes):
                area, corner = size, (0, 0)
                if index < len(tiles):
                    area = (shape[1] * self._patch, shape[0] * self._patch)
                    row, column = divmod(index, image.columns)
                    corner = (column * area[0], row * area[1])
                patches = cells(raster(*shape, area, corner))
                grid = (shape[0] // self._merge, shape[1] // self._merge)
                tower.append((number, patches + pad(longest - len(patches))))
                tokens.append((number, cells(raster(*grid, area, corner))))
        return Seen(
            sizes=sizes,
            language=flat(tokens),
            streams={"vision": rows(tower), "projector": flat(tokens)},
        )

    def _images(self, inputs: Mapping[str, Any]) -> list[_Views]:
        """The images whose views `pixel_values` holds.

        Which views are of one image is not in the inputs. The text tells: one marker stands
        between an image's views, and at least two between images (its end, the next start).
        """
        shapes = [(int(h), int(w)) for h, w in inputs["spatial_shapes"].tolist()]
        ids = self.text(inputs)
        here = self.placeholders(inputs, ids)
        left = iter(shapes)
        images: list[_Views] = []
        for row, is_image in zip(ids.tolist(), here.tolist(), strict=True):
            views: list[tuple[int, int]] = []
            gap: list[int] = []
            markers: set[int] = set()
            for visual, run in groupby(range(len(row)), key=is_image.__getitem__):
                at = list(run)
                if not visual:
                    gap = [row[i] for i in at]
                    continue
                if len(gap) != 1 or gap[0] in markers:
                    images += self._split(views)
                    views, markers = [], set()
                markers |= set(gap[-1:])
                views += self._of_run(left, len(at))
            images += self._split(views)
        unused = len(list(left))
        if unused:
            raise AdapterError(
                f"{len(shapes)} images and tiles were given, but input_ids hold image tokens for "
                f"{len(shapes) - unused} of them. Does each prompt have one image token per image?"
            )
        return images

    def _of_run(self, left: Iterator[tuple[int, int]], length: int) -> list[tuple[int, int]]:
        """The views whose tokens are the next `length` image tokens."""
        views: list[tuple[int, int]] = []
        while length > 0:
            shape = next(left, None)
            if shape is None:
                raise AdapterError(
                    "input_ids hold more image tokens than the images and tiles in pixel_values "
                    "have. Was the prompt expanded by the model's own processor?"
                )
            views.append(shape)
            length -= (shape[0] // self._merge) * (shape[1] // self._merge)
        if length < 0:
            raise AdapterError(
                f"A row of image tokens in input_ids ends within a view of {views[-1]} patches. "
                "Was the prompt expanded by the model's own processor?"
            )
        return views

    @staticmethod
    def _split(views: list[tuple[int, int]]) -> list[_Views]:
        """Tiles and their thumbnail as one image, anything else as images that are not cut."""
        *tiles, thumbnail = views or [(0, 0)]
        if len(tiles) < 2 or len(set(tiles)) > 1 or tiles[0][0] != tiles[0][1]:
            return [_Views((view,)) for view in views]
        # The grid of tiles is the one nearest in shape to the image, and so to its thumbnail.
        wanted = math.log(thumbnail[1] / thumbnail[0])
        grids = [(n, len(tiles) // n) for n in range(1, len(tiles) + 1) if len(tiles) % n == 0]
        down, across = min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0]) - wanted))
        return [_Views(tuple(views), down, across)]

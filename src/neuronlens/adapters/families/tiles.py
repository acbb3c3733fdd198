"""Models that cut an image into tiles, each encoded by itself, with pixel shuffle behind.

InternVL's inputs, and those of its like, do not tell the rows and columns of the tiles; the
original's size does. Without it, their tiles' tokens have no box.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.families.patches import read_until
from neuronlens.adapters.families.tiling import (
    Areas,
    Cut,
    Originals,
    Text,
    least_enlarged_grid,
    nearest_grid,
    original,
    over,
    texts,
    whole,
)
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import ImageSize, Seen, flat, rows, special
from neuronlens.adapters.taps import ActOutput, DownInput
from neuronlens.errors import AdapterError


@special_block("Llama4VisionMLP2")
def _called_twice(path: str, block: Any) -> Iterator[Block]:
    """One activation module behind both projections: two layers."""
    act = f"{path}.activation_fn"
    first = ActOutput(act, f"{path}.fc2", call=0, calls=2)
    second = ActOutput(act, None, call=1, calls=2)
    for name, tap in (("fc1", first), ("fc2", second)):
        yield Block(f"{path}.{name}", "activation_fn", tap, getattr(block, name).out_features)


@special_block("GraniteDoclingConnector")
def _coarse_path(path: str, block: Any) -> Iterator[Block]:
    """The DeepStack mergers, which run first, and a GELU that is no module."""
    for i, merger in enumerate(block.coarse.deepstack_mergers):
        inside = f"{path}.coarse.deepstack_mergers.{i}"
        tap = ActOutput(f"{inside}.act", f"{inside}.linear_2")
        yield Block(inside, "act", tap, merger.linear_2.in_features)
    yield Block(path, "gelu", DownInput(f"{path}.mlp_fc2"), block.mlp_fc2.in_features)


class TileAdapter(FamilyAdapter):
    """Streams: `vision` [tile, class tokens + patch], `projector` [tile, token], `language`.

    Attributes:
        towers: Types of the vision towers whose tokens are described.
        class_tokens: Of the tower, before and after the patches.
    """

    towers: ClassVar[tuple[str, ...]]
    class_tokens: ClassVar[tuple[int, int]] = (0, 0)

    def check_model(self) -> None:
        """Refuse vision towers whose tokens are not described here."""
        found = self._config.vision_config.model_type
        if found not in self.towers:
            raise AdapterError(
                f"The vision tower is a {found!r}; {type(self).__name__} knows the tokens of "
                f"{', '.join(self.towers)}. To describe another: docs/adapters.md."
            )

    @abstractmethod
    def merged(self, side: int) -> int:
        """Tokens on the side of a tile that has so many patches on its side."""

    @abstractmethod
    def cuts(self, text: Text, per_tile: int, tile: int, sizes: list[ImageSize]) -> Iterable[Cut]:
        """How the images of one sample were cut, in order.

        Args:
            text: The sample's text.
            per_tile: Placeholders of one tile.
            tile: Pixels of a tile's side.
            sizes: Of the originals, as far as they were given.
        """

    def areas(self, cut: Cut, tile: ImageSize, before: ImageSize | None) -> tuple[ImageSize, Areas]:
        """Size of the image that was cut, and what each tile shows of it.

        Args:
            cut: How it was cut.
            tile: Size of a tile.
            before: Size of the original, if it was given.
        """
        return cut.areas(tile)

    def pixels(self, inputs: Mapping[str, Any]) -> tuple[int, ImageSize]:
        """How many tiles there are, and their size."""
        values = inputs["pixel_values"]
        return len(values), (values.shape[-1], values.shape[-2])

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """What the inputs alone tell."""
        return self.look_with(inputs, None)

    def look_with(self, inputs: Mapping[str, Any], originals: Originals) -> Seen:
        """Tile after tile, one cell per patch and, in the language model, per merged patches."""
        count, tile = self.pixels(inputs)
        patch = self._config.vision_config.patch_size
        side = tile[0] // (patch if isinstance(patch, int) else patch[0])
        tokens = self.merged(side)
        ids = self.text(inputs)
        sizes: list[ImageSize] = []
        tiles = []
        for sample, text in enumerate(texts(ids, self.placeholders(inputs, ids))):
            given = list(originals[sample]) if originals and sample < len(originals) else []
            for number, cut in enumerate(self.cuts(text, tokens**2, tile[0], given)):
                size, areas = self.areas(cut, tile, original(originals, sample, number))
                tiles += [(len(sizes), area) for area in areas]
                sizes.append(size)
        if len(tiles) != count:
            raise AdapterError(
                f"{count} tiles were given, but the image tokens are those of {len(tiles)}. Was "
                "the prompt expanded by the model's own processor, for these images?"
            )
        before, after = self.class_tokens
        merged = [(image, over(area, tokens)) for image, area in tiles]
        return Seen(
            sizes=sizes,
            language=flat(merged),
            streams={
                "vision": rows(
                    (image, special(before) + over(area, side) + special(after))
                    for image, area in tiles
                ),
                "projector": rows(merged),
            },
        )


class _UntoldGridAdapter(TileAdapter):
    """The text tells how many tiles an image has, the original's aspect ratio their grid."""

    @abstractmethod
    def counts(self, text: Text, per_tile: int) -> list[int]:
        """How many tiles each image has, the view of the whole among them."""

    def cuts(self, text: Text, per_tile: int, tile: int, sizes: list[ImageSize]) -> Iterable[Cut]:
        """An image's rows and columns, where the original's size is known."""
        for number, count in enumerate(self.counts(text, per_tile)):
            tiles = max(1, count - 1)
            known = number < len(sizes)
            yield Cut.of(count, self.columns(tiles, sizes[number], tile) if known else None)

    def columns(self, tiles: int, before: ImageSize, tile: int) -> int:
        """Of the grid of so many tiles that the processor takes for an image of that size."""
        return nearest_grid(tiles, before, tile)


@register("aya_vision")
class AyaVisionAdapter(_UntoldGridAdapter):
    """A marker before each tile."""

    towers: ClassVar[tuple[str, ...]] = ("siglip_vision_model",)

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers behind the last one whose output is read."""
        chosen = self._config.vision_feature_layer
        return stack == "vision" and layer >= read_until(chosen, last)

    def merged(self, side: int) -> int:
        """Pixel shuffle."""
        return side // int(self._config.downsample_factor)

    def counts(self, text: Text, per_tile: int) -> list[int]:
        """How many tiles each image has, the view of the whole among them."""
        return [len(group) for group in text.until(text.image_ends())]


@register("cohere2_vision")
class Cohere2VisionAdapter(_UntoldGridAdapter):
    """A line break behind each tile."""

    towers: ClassVar[tuple[str, ...]] = ("siglip_vision_model",)

    def merged(self, side: int) -> int:
        """Pixel shuffle."""
        return side // int(self._config.downsample_factor)

    def columns(self, tiles: int, before: ImageSize, tile: int) -> int:
        """Of the grid of so many tiles that the processor takes for an image of that size."""
        return least_enlarged_grid(tiles, before, tile)

    def counts(self, text: Text, per_tile: int) -> list[int]:
        """How many tiles each image has, the view of the whole among them."""
        return [len(group) for group in text.until(text.image_ends(skip=1))]


@register("internvl")
class InternVLAdapter(_UntoldGridAdapter):
    """All tiles of an image, or a frame of a video, follow each other without a marker."""

    towers: ClassVar[tuple[str, ...]] = ("internvl_vision",)
    class_tokens = (1, 0)

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers behind the last one whose output is read."""
        chosen = self._config.vision_feature_layer
        return stack == "vision" and layer >= read_until(chosen, last)

    def merged(self, side: int) -> int:
        """Pixel shuffle."""
        return int(side * self._config.downsample_ratio)

    def counts(self, text: Text, per_tile: int) -> list[int]:
        """How many tiles each image has, the view of the whole among them."""
        return [(end - start) // per_tile for start, end in text.runs]


@register("qianfan_ocr")
class QianfanOCRAdapter(InternVLAdapter):
    """InternVL with a Qwen 3; another token is written for an image than fills its place."""

    towers: ClassVar[tuple[str, ...]] = ("qianfan_ocr_vision",)

    @property
    def image_token(self) -> str:
        """What stands for one image in a text that is given to the processor."""
        return str(self.processor.image_placeholder_token)


@register("pp_chart2table")
class PPChart2TableAdapter(_UntoldGridAdapter):
    """SAM and two convolutions of stride 2; one view of the whole, squared."""

    towers: ClassVar[tuple[str, ...]] = ("pp_chart2table_vision",)

    def merged(self, side: int) -> int:
        """Two convolutions of stride 2."""
        return -(-side // 4)

    def counts(self, text: Text, per_tile: int) -> list[int]:
        """How many tiles each image has, the view of the whole among them."""
        return [(end - start) // per_tile for start, end in text.runs]


@register("got_ocr2")
class GotOcr2Adapter(PPChart2TableAdapter):
    """As PP-Chart2Table; tiles, or pages, if its processor is asked for them."""

    one_image = True

    towers: ClassVar[tuple[str, ...]] = ("got_ocr2_vision",)

    def cuts(self, text: Text, per_tile: int, tile: int, sizes: list[ImageSize]) -> Iterable[Cut]:
        """Tiles of an image, or its pages if the originals are as many as there are tiles."""
        total = sum(self.counts(text, per_tile))
        if len(sizes) == total:
            return [Cut(1, 1)] * total
        return super().cuts(text, per_tile, tile, sizes)

    @property
    def image_text(self) -> str:
        """The image token between its markers, as the processor's own prompt has it."""
        return f"<img>{self.image_token}</img>\n"

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """One image per text: several would be pages of one document, at one image token."""
        if any(len(row) != 1 for row in images):
            raise AdapterError("GOT-OCR 2 takes one image per sample. Make each a sample.")
        inputs: Mapping[str, Any] = self.processor(
            images=[row[0] for row in images],
            text=list(texts),
            add_special_tokens=add_special_tokens,
            padding=True,
            return_tensors="pt",
        )
        return dict(inputs)


@register("idefics3", "smolvlm")
class Idefics3Adapter(TileAdapter):
    """`<fake><row_r_col_c>` before each tile, a line break behind a row, a view of the whole.

    A frame of a video is an image of one tile.
    """

    towers: ClassVar[tuple[str, ...]] = ("idefics3_vision", "smolvlm_vision")

    def merged(self, side: int) -> int:
        """Pixel shuffle."""
        return side // int(self._config.scale_factor)

    def pixels(self, inputs: Mapping[str, Any]) -> tuple[int, ImageSize]:
        """Tiles of zeros only fill up, and are not run."""
        values = inputs["pixel_values"]
        real = (values != 0).flatten(2).any(-1)
        return int(real.sum()), (values.shape[-1], values.shape[-2])

    def cuts(self, text: Text, per_tile: int, tile: int, sizes: list[ImageSize]) -> Iterable[Cut]:
        """Behind a tile follows the next one's <fake>; behind a row, something else."""
        for group in text.until(self.ends(text)):
            fake = text.at(group[0][0] - 2)
            row_ends = [text.at(end) != fake for _, end in group]
            yield Cut.of(len(group), row_ends.index(True) + 1 if True in row_ends else 1)

    def ends(self, text: Text) -> list[bool]:
        """Which runs are the last of their image: <fake> follows, and no tile behind it."""
        if not text.runs:
            return []
        fake = text.at(text.runs[0][0] - 2)
        inside = [
            text.at(run[1]) != fake or after[0] - run[1] == 2 for run, after in pairwise(text.runs)
        ]
        return [*(not each for each in inside), True]


@register("granite_docling")
class GraniteDoclingAdapter(Idefics3Adapter):
    """As Idefics 3; a single tile has no view of the whole, and no marker behind it."""

    towers: ClassVar[tuple[str, ...]] = ("granite_docling_vision",)
    not_run = r"density_router"

    def merged(self, side: int) -> int:
        """Pixel shuffle."""
        return side // int(self._config.vision_config.scale_factor)

    def pixels(self, inputs: Mapping[str, Any]) -> tuple[int, ImageSize]:
        """Which tiles only fill up is told by a mask."""
        if inputs.get("tile_fine_mask") is not None:
            raise AdapterError(
                "The processor was called with fine_route=True; of the connector only the coarse "
                "path is described. Process the images with fine_route=False."
            )
        values = inputs["pixel_values"]
        real = int(inputs["pixel_attention_mask"].sum())
        return real, (values.shape[-1], values.shape[-2])

    def ends(self, text: Text) -> list[bool]:
        """Which runs are the last of their image: the next one has the marker of a first tile."""
        markers = [text.at(start - 1) for start, _ in text.runs]
        return [marker == markers[0] for marker in markers[1:]] + [True] * bool(markers)


@register("llama4")
class Llama4Adapter(TileAdapter):
    """The tiles' canvas is filled up at the right and bottom; the view of the whole is not."""

    towers: ClassVar[tuple[str, ...]] = ("llama4_vision_model",)
    class_tokens = (0, 1)

    @property
    def placeholder_of_processor(self) -> int | None:
        """What its processor calls the image token is written in a text, not the placeholder."""
        token = getattr(self.processor, "img_patch_token", None)
        return None if token is None else int(self.processor.tokenizer.convert_tokens_to_ids(token))

    def merged(self, side: int) -> int:
        """Pixel shuffle."""
        return int(side * self._config.vision_config.pixel_shuffle_ratio)

    def cuts(self, text: Text, per_tile: int, tile: int, sizes: list[ImageSize]) -> Iterable[Cut]:
        """One token stands behind the tiles of a row, another behind its last."""
        for group in text.until(text.image_ends()):
            behind = [text.at(end) for _, end in group[:-1]]
            yield Cut.of(len(group), behind.index(behind[-1]) + 1 if behind else 1)

    def areas(self, cut: Cut, tile: ImageSize, before: ImageSize | None) -> tuple[ImageSize, Areas]:
        """Parts of the resized image, if the original tells how much of the canvas it fills."""
        canvas, areas = cut.areas(tile)
        if before is None:
            return canvas, [*areas[: cut.tiles], *[None] * cut.view]
        inside = self._resized(before, canvas, tile[0])
        return inside, [*areas[: cut.tiles], *[whole(inside)] * cut.view]

    def _resized(self, before: ImageSize, canvas: ImageSize, tile: int) -> ImageSize:
        """As the processor fits an image into its canvas."""
        width, height = canvas
        if not getattr(self.image_processor, "resize_to_max_canvas", False):
            # An image is not enlarged, except to the size of one tile.
            width, height = min(max(before[0], tile), width), min(max(before[1], tile), height)
        across, down = width / before[0], height / before[1]
        if across < down:
            return width, max(1, min(math.floor(before[1] * across), height))
        return max(1, min(math.floor(before[0] * down), width)), height

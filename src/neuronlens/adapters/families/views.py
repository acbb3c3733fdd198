"""Models with a view of the whole image and, for large ones, tiles; and Fuyu's bare patches.

Where view and tiles are laid out differently, only the original's size tells what both show;
without it, some of their tokens have no box.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from neuronlens.adapters.base import register
from neuronlens.adapters.families.tiling import (
    Area,
    Areas,
    Cut,
    Originals,
    nearest_grid,
    original,
    over,
    texts,
    whole,
)
from neuronlens.adapters.family import FamilyAdapter, Part, as_pixel_values
from neuronlens.adapters.grids import (
    Grid,
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    nothing,
    queries,
    raster,
    special,
)
from neuronlens.errors import AdapterError

Shown = tuple[int, Area | None, int]
"""Number of the image, what a view or tile shows of it, and patches on its side."""


class ViewAdapter(FamilyAdapter):
    """In the text the tiles come first, then the view.

    Streams: `vision` [patch]: the views of all images and then, from a second run of the
    tower, the tiles of all images; `language`.
    """

    @property
    def patch(self) -> int:
        """Pixels of a patch's side."""
        return int(self._config.vision_config.patch_size)

    @abstractmethod
    def cuts(
        self,
        inputs: Mapping[str, Any],
        counts: Sequence[int],
        sizes: Sequence[ImageSize | None],
    ) -> Iterable[Cut]:
        """How the images of the batch were cut.

        Args:
            inputs: Of the model.
            counts: Tiles of each image.
            sizes: Of the originals, if they were given.
        """

    @abstractmethod
    def language(self, cut: Cut, size: ImageSize, areas: Areas, sides: tuple[int, int]) -> Piece:
        """An image's tokens in the language model; `sides` are those of a tile and the view."""

    def areas(
        self, cut: Cut, tile: int, view: int, before: ImageSize | None
    ) -> tuple[ImageSize, Areas]:
        """Size of the image, and what its tiles and, last, its view show of it.

        Args:
            cut: How it was cut.
            tile: Pixels of a tile's side.
            view: Pixels of the view's side.
            before: Size of the original, if it was given.
        """
        if not cut.tiles:
            return (view, view), [whole((view, view))]
        return cut.areas((tile, tile))

    def towers(self, shown: Sequence[Shown]) -> dict[str, Grid]:
        """The streams of the tower, by what it is shown."""
        return {"vision": flat((image, over(area, side)) for image, area, side in shown)}

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """What the inputs alone tell."""
        return self.look_with(inputs, None)

    def look_with(self, inputs: Mapping[str, Any], originals: Originals) -> Seen:
        """Of every image its view and its tiles."""
        local = inputs.get("pixel_values_local")
        view = inputs["pixel_values"].shape[-1]
        tile = view if local is None else local.shape[-1]
        told = inputs.get("num_local_patches")
        images, tiles = len(inputs["pixel_values"]), 0 if local is None else len(local)
        counts = [0] * images if told is None else [int(count) for count in told]
        if (len(counts), sum(counts)) != (images, tiles):
            raise AdapterError(
                f"{images} images with {tiles} tiles were given, but num_local_patches tells of "
                f"{counts} tiles. Pass the processor's whole output to the model."
            )
        given = [size for row in originals or () for size in row]
        befores: list[ImageSize | None] = [*given, *[None] * images][:images]
        sizes, pieces = [], []
        views: list[Shown] = []
        parts: list[Shown] = []
        for image, cut in enumerate(self.cuts(inputs, counts, befores)):
            size, areas = self.areas(cut, tile, view, befores[image])
            sides = tile // self.patch, view // self.patch
            sizes.append(size)
            tokens = (_halved_twice(sides[0]), _halved_twice(sides[1]))
            pieces.append((image, self.language(cut, size, areas, tokens)))
            views.append((image, areas[-1], sides[1]))
            parts += [(image, area, sides[0]) for area in areas[:-1]]
        return Seen(sizes=sizes, language=flat(pieces), streams=self.towers([*views, *parts]))


def _halved_twice(side: int) -> int:
    """Cells that two convolutions of stride 2 leave."""
    return -(-side // 4)


@register("step3p7")
class Step3p7Adapter(ViewAdapter):
    """View and tiles are both the whole image, stretched."""

    def cuts(
        self,
        inputs: Mapping[str, Any],
        counts: Sequence[int],
        sizes: Sequence[ImageSize | None],
    ) -> Iterator[Cut]:
        """Two tokens stand between the tiles of a row, and a third at its end."""
        ids = self.text(inputs)
        runs = [text.runs for text in texts(ids, self.placeholders(inputs, ids))]
        sample = 0
        for count in counts:
            while sample < len(runs) and not runs[sample]:
                sample += 1
            mine = runs[sample][: count + 1] if sample < len(runs) else []
            if len(mine) != count + 1:
                raise AdapterError(
                    f"An image of {count} tiles was given, of which the text shows "
                    f"{max(0, len(mine) - 1)}. Was it expanded by the model's own processor?"
                )
            runs[sample] = runs[sample][count + 1 :]
            gaps = [after[0] - run[1] for run, after in pairwise(mine[:-1])]
            yield Cut(count, gaps.index(3) + 1 if 3 in gaps else max(1, count), view=True)

    def areas(
        self, cut: Cut, tile: int, view: int, before: ImageSize | None
    ) -> tuple[ImageSize, Areas]:
        """A narrow strip is filled up to a square, at the right or bottom."""
        size, areas = super().areas(cut, tile, view, before)
        if before is not None and min(before) < 32 and max(before) > 4 * min(before):
            size = (
                max(1, round(size[0] * before[0] / max(before))),
                max(1, round(size[1] * before[1] / max(before))),
            )
        return size, areas

    def language(self, cut: Cut, size: ImageSize, areas: Areas, sides: tuple[int, int]) -> Piece:
        """Tile after tile, then the view."""
        tile, view = sides
        return sum((over(area, tile) for area in areas[:-1]), nothing()) + over(areas[-1], view)


class _OcrAdapter(ViewAdapter):
    """SAM (`vision`) before a second encoder (`vision.2`); the view is centred on gray."""

    parts: ClassVar[tuple[Part, ...]] = (("vision.2", r"vision_tower\.vision_encoder\."),)

    @property
    def patch(self) -> int:
        """Pixels of a patch's side."""
        return int(self._config.vision_config.sam_config.patch_size)

    def areas(
        self, cut: Cut, tile: int, view: int, before: ImageSize | None
    ) -> tuple[ImageSize, Areas]:
        """The view goes beyond the image; how far, only the original's size tells.

        Without it, the view of an image with tiles has no area, and an image without is its
        view, gray and all.
        """
        size, areas = super().areas(cut, tile, view, before)
        if before is None:
            return size, [*areas[:-1], None] if cut.tiles else areas
        scale = view / max(before)
        inside = round(before[0] * scale), round(before[1] * scale)
        left, top = (view - inside[0]) // 2, (view - inside[1]) // 2
        size = size if cut.tiles and cut.columns else inside
        x, y = size[0] / inside[0], size[1] / inside[1]
        shown = (-left * x, -top * y, (view - left) * x, (view - top) * y)
        return size, [*areas[:-1], shown]

    @abstractmethod
    def encoded(self, area: Area | None, side: int) -> Piece:
        """The tokens of a tile or view in the second encoder."""

    def towers(self, shown: Sequence[Shown]) -> dict[str, Grid]:
        """Both encoders, one token axis each."""
        second = flat(
            (image, self.encoded(area, _halved_twice(side))) for image, area, side in shown
        )
        return super().towers(shown) | {"vision.2": second}


@register("unlimited_ocr")
class UnlimitedOcrAdapter(_OcrAdapter):
    """The tiles' tokens by rows of the whole image, a newline behind each; a separator last."""

    def cuts(
        self,
        inputs: Mapping[str, Any],
        counts: Sequence[int],
        sizes: Sequence[ImageSize | None],
    ) -> Iterator[Cut]:
        """The inputs tell the grid."""
        grids = inputs.get("patches_grid") or [[1, 1]] * len(counts)
        for count, (columns, _) in zip(counts, grids, strict=True):
            yield Cut(count, int(columns), view=True)

    def language(self, cut: Cut, size: ImageSize, areas: Areas, sides: tuple[int, int]) -> Piece:
        """Rows of the tiles together, rows of the view, the separator."""
        tile, view = sides
        told = nothing()
        if cut.tiles and cut.columns:
            down, across = cut.tiles // cut.columns * tile, cut.columns * tile
            told = _with_newlines(cells(raster(down, across, size)), across)
        return told + _with_newlines(over(areas[-1], view), view) + special()

    def encoded(self, area: Area | None, side: int) -> Piece:
        """CLIP with its CLS token."""
        return special() + over(area, side)


def _with_newlines(piece: Piece, columns: int) -> Piece:
    parts = (piece[start : start + columns] for start in range(0, len(piece), columns))
    return sum((part + special() for part in parts), nothing())


@register("deepseek_ocr2")
class DeepseekOcr2Adapter(_OcrAdapter):
    """Learned queries behind the patches: only they reach the language model."""

    def cuts(
        self,
        inputs: Mapping[str, Any],
        counts: Sequence[int],
        sizes: Sequence[ImageSize | None],
    ) -> Iterator[Cut]:
        """The grid follows from the original's aspect ratio."""
        tile = inputs.get("pixel_values_local", inputs["pixel_values"]).shape[-1]
        for count, before in zip(counts, sizes, strict=True):
            columns = nearest_grid(count, before, tile) if count and before else None
            yield Cut(count, columns, view=True)

    def language(self, cut: Cut, size: ImageSize, areas: Areas, sides: tuple[int, int]) -> Piece:
        """The queries of each tile and of the view, and a separator."""
        tile, view = (self._queries(side) for side in sides)
        return queries(cut.tiles * tile + view) + special()

    def encoded(self, area: Area | None, side: int) -> Piece:
        """The tokens from SAM, then the queries."""
        return over(area, side) + queries(self._queries(side))

    def _queries(self, side: int) -> int:
        tower: Any = self.model.get_submodule("model.vision_tower")
        small, large = tower.query_768_resolution, tower.query_1024_resolution
        chosen = small if side * side <= small.num_embeddings else large
        return int(chosen.num_embeddings)


@register("fuyu")
class FuyuAdapter(FamilyAdapter):
    """No tower: a Linear makes a token of each patch; a newline behind each row.

    One image per text, as its processor has it.
    """

    one_image = True

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """The processor's inputs, the patches as the model takes them."""
        inputs = super().process(texts, images, add_special_tokens=add_special_tokens)
        return as_pixel_values(self.model, inputs, "image_patches")

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """What the inputs alone tell."""
        return self.look_with(inputs, None)

    def look_with(self, inputs: Mapping[str, Any], originals: Originals) -> Seen:
        """Every run of placeholders is a row of patches."""
        patch = int(self._config.patch_size)
        ids = self.text(inputs)
        sizes: list[ImageSize] = []
        pieces = []
        for sample, text in enumerate(texts(ids, self.placeholders(inputs, ids))):
            lengths = {end - start for start, end in text.runs}
            if len(lengths) > 1:
                raise AdapterError(
                    f"The image of row {sample} has rows of {sorted(lengths)} patches. Fuyu's "
                    "processor takes one image per text."
                )
            for columns in lengths:
                canvas = (columns * patch, len(text.runs) * patch)
                pieces.append((len(sizes), cells(raster(len(text.runs), columns, canvas))))
                sizes.append(self._inside(original(originals, sample, 0), canvas))
        patches = inputs["image_patches" if "image_patches" in inputs else "pixel_values"]
        given, told = math.prod(patches.shape[:-1]), sum(len(piece) for _, piece in pieces)
        if given != told:
            raise AdapterError(
                f"{given} patches were given for {told} image tokens. Pass the processor's whole "
                "output to the model."
            )
        return Seen(sizes=sizes, language=flat(pieces))

    def _inside(self, before: ImageSize | None, canvas: ImageSize) -> ImageSize:
        """The part of the canvas that is not filled up, at the right and bottom."""
        if before is None:
            return canvas
        limit = getattr(self.image_processor, "size", None)
        width, height = canvas if limit is None else (limit.width, limit.height)
        if before[0] <= width and before[1] <= height:
            return before
        scale = min(height / before[1], width / before[0])
        return int(before[0] * scale), int(before[1] * scale)

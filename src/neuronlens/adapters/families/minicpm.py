"""MiniCPM-V: an overview and slices of an image, in one strip of patches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block
from neuronlens.adapters.families.runs import ByRuns, Run
from neuronlens.adapters.grids import (
    ImageSize,
    Seen,
    cells,
    flat,
    raster,
)
from neuronlens.errors import AdapterError


@register("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
class MiniCpmAdapter(ByRuns):
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

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """The size of patches, and how many make a token."""
        image = self.image_processor
        return {
            "patch_size": (image.patch_size, self._vision.patch_size),
            "downsample_mode": (image.downsample_mode, self._config.downsample_mode),
        }

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

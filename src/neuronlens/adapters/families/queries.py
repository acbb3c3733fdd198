"""Aria and Idefics2: image tokens are learned queries.

Queries depend on the image and see no single region: they have no box. The patches in the
vision tower have theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.families.patches import read_until, size_of
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement
from neuronlens.adapters.grids import (
    NOWHERE,
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    queries,
    raster,
    rows,
)
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role


def is_filling(images: Tensor) -> list[bool]:
    """Which images `[image, ...]` only fill up a batch: those of zeros throughout."""
    return [not bool(image.any()) for image in images]


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
        passed = getattr(self.processor, "images_kwargs", None)
        if passed is None:  # before transformers 5.23
            arguments = getattr(self.processor, "valid_processor_kwargs", None)
            passed = getattr(arguments, "_defaults", {}).get("images_kwargs", {})
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
        return stack == "vision" and layer >= read_until(chosen, last)

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
            sizes=[size_of(pixels)] * len(pixels),
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
        shown = [[not filling for filling in is_filling(row)] for row in pixels]
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

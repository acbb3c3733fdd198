"""Kosmos-2 and 2.5: queries at places that a mask tells, not an id."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.families.patches import one_each, patch_boxes, size_of
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    Seen,
    cells,
    flat,
    pad,
    queries,
    raster,
    rows,
    special,
)
from neuronlens.adapters.taps import ActOutput
from neuronlens.errors import AdapterError


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

    one_image = True

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
        one_each(images, self.model)
        bare = [text.replace(self.image_token, "") for text in texts]
        return super().process(bare, images, add_special_tokens=add_special_tokens)

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """How many queries there are; processors before transformers 5.23 do not tell."""
        theirs = getattr(self.processor, "num_image_tokens", None)
        return {"image tokens": (theirs, self._config.latent_query_num)}

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Queries for every image."""
        pixels = inputs["pixel_values"]
        tower = special() + cells(patch_boxes(pixels, self._config.vision_config.patch_size))
        asked = queries(self._config.latent_query_num)
        images = range(len(pixels))
        return Seen(
            sizes=[size_of(pixels)] * len(pixels),
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

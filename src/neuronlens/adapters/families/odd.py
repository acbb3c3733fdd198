"""Models unlike the rest: an image before the text, images as codes, no image at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.families.patches import one_each, patch_boxes, size_of
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    Piece,
    Seen,
    cells,
    flat,
    nothing,
    queries,
    raster,
    rows,
    special,
    text_rows,
)
from neuronlens.adapters.taps import DownInput
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap


@register("git")
class GitAdapter(FamilyAdapter):
    """GIT: the image stands before the text, without placeholders.

    Streams: `vision` [image, CLS + patch], `language` [sample, CLS + patch + text], or, for
    videos, the frames' one after the other.
    """

    one_image = True

    prefixes_images = True

    def check_model(self) -> None:
        """Refuse what is not the language model."""
        if not hasattr(self.model, "output"):
            raise AdapterError(
                f"{type(self.model).__name__} is not GIT's language model (GitForCausalLM), "
                "which is the only one described."
            )

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """One image with each text."""
        pictures = [[each] for each in one_each(images, self.model)]
        return super().process(texts, pictures, add_special_tokens=add_special_tokens)

    def _frames(self, inputs: Mapping[str, Any]) -> int:
        pixels = inputs["pixel_values"]
        return int(pixels.shape[1]) if pixels.ndim == 5 else 1

    def _image(self, inputs: Mapping[str, Any], first: Piece) -> Piece:
        return first + cells(
            patch_boxes(inputs["pixel_values"], self._config.vision_config.patch_size)
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
            sizes=[size_of(pixels) for _ in images],
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

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """Chameleon's processor must not end the text with a separator of its own."""
        if self._config.model_type == "emu3":
            return super().process(texts, images, add_special_tokens=add_special_tokens)
        inputs: Mapping[str, Any] = self.processor(
            images=[each for row in images for each in row] or None,
            text=list(texts),
            return_for_text_completion=True,
            add_special_tokens=add_special_tokens,
            padding=True,
            return_tensors="pt",
        )
        return dict(inputs)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One code per cell, in reading order; Emu3 ends every row with a marker."""
        pixels = inputs["pixel_values"]
        factor = 2 ** (len(self._config.vq_config.channel_multiplier) - 1)
        is_emu3 = self._config.model_type == "emu3"
        sizes = [size_of(pixels) for _ in pixels]
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
        return {"vision": _as_map(role), "qformer": _as_map(latents)}


def _as_map(role: Tensor) -> TokenMap:
    grid = text_rows(role)
    return TokenMap(grid.role, grid.sample, grid.image, grid.box)

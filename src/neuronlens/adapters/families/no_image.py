"""Models that take no image: Mistral 4 reads text, Evolla proteins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import (
    Seen,
    text_stream,
)
from neuronlens.adapters.taps import DownInput
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap


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
        return {"vision": text_stream(role), "qformer": text_stream(latents)}

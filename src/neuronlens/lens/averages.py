"""Measures of every token at every layer, one forward at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import SampleError
from neuronlens.lens.curves import By, Totals
from neuronlens.lens.decode import Decoder, divergences, entropies
from neuronlens.lens.states import show_states
from neuronlens.samples import Batch
from neuronlens.tokens import Role


@dataclass(frozen=True)
class Averager:
    """Adds the tokens of batches to totals.

    Attributes:
        adapter: Of the model.
        decoder: From states to distributions, chunk by chunk.
        layers: Which layers are measured.
        roles: Which tokens are text; visual ones are measured too.
        compare: Whether each layer is compared with the last.
        group: A sample's group.
    """

    adapter: ModelAdapter
    decoder: Decoder
    layers: tuple[int, ...]
    roles: tuple[Role, ...]
    compare: bool
    group: By

    @property
    def measures(self) -> int:
        """How many numbers there are of a token at a layer."""
        return 3 if self.compare else 1

    def add(self, batch: Batch, totals: Totals, skipped: dict[str, SampleError]) -> int:
        """Add a batch's samples; how many could be."""
        tokens = batch.tokens[self.adapter.answer_stream]
        is_text = tokens.is_role(*self.roles).flatten()
        at = (is_text | tokens.is_role(Role.VISUAL).flatten()).nonzero().squeeze(1)
        kind = is_text[at].numpy().astype(int)
        values = self._measured(batch, tokens.role.shape, at)
        owner = tokens.sample.flatten()[at].numpy()
        usable = 0
        for row, sample in enumerate(batch.samples):
            mine = owner == row
            if not np.isfinite(values[:, mine]).all():
                skipped[sample.id] = SampleError(
                    sample.id, "non-finite states", "the model gives NaN or infinity."
                )
                continue
            totals.add(self.group(sample), sample.unit(), kind[mine], values[:, mine])
            usable += 1
        return usable

    def _measured(
        self, batch: Batch, shape: torch.Size, at: Int[Tensor, " token"]
    ) -> Float[np.ndarray, "layer token measure"]:
        """Per layer and token its entropy; and, compared with the last layer, two numbers more."""
        inputs = batch.on(self.adapter.device)
        last: list[Tensor] = []
        if self.compare:
            final = len(self.adapter.decoding.layers)
            show_states(
                self.adapter, inputs, shape, at, [final], lambda _, state: last.append(state)
            )
        found: dict[int, Tensor] = {}

        def see(layer: int, states: Tensor) -> None:
            out = torch.empty(len(states), self.measures, device=states.device)
            for rows, log in self.decoder.chunks(states):
                out[rows, 0] = entropies(log)
                if self.compare:
                    # Its logits once more: kept, they would be those of all tokens.
                    ((_, other),) = self.decoder.chunks(last[0][rows])
                    other = other.to(log.device)
                    out[rows, 1] = divergences(other, log)
                    out[rows, 2] = (other.argmax(-1) == log.argmax(-1)).float()
            found[layer] = out

        show_states(self.adapter, inputs, shape, at, self.layers, see)
        return np.stack([found[layer].cpu().numpy() for layer in self.layers])

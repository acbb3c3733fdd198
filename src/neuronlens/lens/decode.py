"""From states to what is said of their distribution over words, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuronlens.adapters import ModelAdapter

MEMORY: Final = 2**28
"""Bytes that a chunk's logits, and what is computed from them, take at most: 256 MB."""

_BYTES_PER_LOGIT: Final = 24
"""Up to six float32 tensors of a chunk's logits exist at once (a capped, compared model's)."""

_LOWEST: Final = -1e30
"""Log-probability of a word that cannot come: finite, so that 0 times it is 0 and not NaN."""


class Decoder:
    """The model's own way from a state to a distribution over words, in chunks of tokens.

    Attributes:
        words: How many words there are.
        size: How many tokens' logits are computed at once.
    """

    def __init__(self, adapter: ModelAdapter, memory: int) -> None:
        self._adapter = adapter
        device, dtype = adapter.device, adapter.dtype
        with torch.inference_mode():
            state = torch.zeros(1, *adapter.decoding.shape, device=device, dtype=dtype)
            self.words = int(adapter.decoding.logits(adapter.model, state).shape[-1])
        self.size = max(1, memory // (self.words * _BYTES_PER_LOGIT))

    def chunks(
        self, states: Float[Tensor, token * state]
    ) -> Iterator[tuple[slice, Float[Tensor, "chunk word"]]]:
        """Log-probabilities in float32 of one chunk of tokens after the other.

        The logits have the precision of the model's: in bfloat16, three digits.
        """
        for start in range(0, len(states), self.size):
            at = slice(start, start + self.size)
            logits = self._adapter.decoding.logits(self._adapter.model, states[at])
            yield at, logits.float().log_softmax(-1).clamp_(min=_LOWEST)


def entropies(log: Float[Tensor, "token word"]) -> Float[Tensor, " token"]:
    """Entropy in nats, from 0 to ln(word); a word of probability 0 adds nothing."""
    return -(log.exp().mul_(log)).sum(-1)


def divergences(
    last: Float[Tensor, "token word"], log: Float[Tensor, "token word"]
) -> Float[Tensor, " token"]:
    """Kullback-Leibler divergence KL(last || log) in nats, of log-probabilities."""
    return (last - log).mul_(last.exp()).sum(-1)


def top(
    log: Float[Tensor, "token word"], k: int
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    """The k most likely words and their probabilities, the likeliest first."""
    found = log.topk(k, dim=-1)
    return found.indices, found.values.exp()

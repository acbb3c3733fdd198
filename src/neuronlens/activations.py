"""What a site gives: a tensor, or the activations of routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routed:
    """Activations of a routed feed-forward block: each token ran through some experts only.

    Attributes:
        values: act_fn outputs `[*token axes, chosen, neuron]`.
        expert: Which expert each row of `values` is of, `[*token axes, chosen]`; -1 where a
            token was sent to fewer, and where it was not routed at all (`values` is NaN there).
        experts: How many experts the block has.
    """

    values: Float[Tensor, "*axes chosen neuron"]
    expert: Int[Tensor, "*axes chosen"]
    experts: int

    @property
    def shape(self) -> torch.Size:
        """Shape of `dense()`: `[*token axes, experts, neuron]`."""
        return torch.Size((*self.expert.shape[:-1], self.experts, self.values.shape[-1]))

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def dense(self) -> Float[Tensor, "*axes expert neuron"]:
        """Every expert's activations; NaN where a token was not routed to it."""
        full = self.values.new_full(self.shape, float("nan"))
        rows = full.reshape(-1, *self.shape[-2:])
        expert = self.expert.reshape(len(rows), -1)
        token, chosen = (expert >= 0).nonzero(as_tuple=True)
        values = self.values.reshape(len(rows), -1, self.shape[-1])
        rows[token, expert[token, chosen]] = values[token, chosen]
        return rows.reshape(self.shape)

    def column(self, expert: int, index: int) -> Float[Tensor, "*axes"]:
        """One neuron's activations; NaN where a token was not routed to its expert."""
        sent = self.expert == expert
        values = torch.where(sent, self.values[..., index], 0).sum(-1)
        return torch.where(sent.any(-1), values, float("nan"))

    def reshape(self, *axes: int) -> Routed:
        """The same with other token axes."""
        chosen, width = self.values.shape[-2:]
        return Routed(
            self.values.reshape(*axes, chosen, width),
            self.expert.reshape(*axes, chosen),
            self.experts,
        )

    def flat(self) -> Routed:
        """The same with one token axis."""
        return self.reshape(-1)

    def copy(self, device: torch.device | str | None = None) -> Routed:
        """A copy that shares nothing with the model, on `device` or where it is."""
        to = device or self.device
        return Routed(
            self.values.detach().to(to, copy=True), self.expert.to(to, copy=True), self.experts
        )

    def spread(self, rows: Int[Tensor, " row"], total: int) -> Routed:
        """Put row i of this at position `rows[i]` of `total`; nothing was routed elsewhere."""
        flat = self.flat()
        values = self.values.new_full((total, *flat.values.shape[1:]), float("nan"))
        expert = flat.expert.new_full((total, flat.expert.shape[1]), -1)
        values[rows], expert[rows] = flat.values, flat.expert
        return Routed(values, expert, self.experts)

    @staticmethod
    def cat(parts: Sequence[Routed], axis: int = 0) -> Routed:
        """Several along a token axis, counted from the first."""
        return Routed(
            torch.cat([part.values for part in parts], axis),
            torch.cat([part.expert for part in parts], axis),
            parts[0].experts,
        )


Activation = Tensor | Routed
"""`[*token axes, neuron]`, or the sparse form of a routed block."""

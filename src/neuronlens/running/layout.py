"""Which tokens of a stream belong to which sample and role."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuronlens.tokens import Role, TokenMap

BLOCKS = 16
"""Samples are dealt by a hash of their group, or of their images, to this many blocks.

So samples that are not independent are in one block, for bootstrap and permutation.
"""

COUNTED = (Role.SPECIAL, Role.PROMPT, Role.RESPONSE, Role.VISUAL)
"""Roles with a running maximum, firing count and mean each; padding has none."""

Rows = slice | Tensor
"""Rows of the flat token axis: a slice where they lie side by side, else their positions."""


def block_of(unit: str) -> int:
    """The block of a sample's unit, the same in every process and for ever."""
    return hashlib.sha256(unit.encode()).digest()[0] % BLOCKS


@dataclass(frozen=True)
class Padded:
    """Rows of several samples as one rectangle.

    Attributes:
        index: Flat positions; a place without a token repeats another one.
        missing: True at such places; None where there is none.
        grid: First position, and steps between samples, where they lie evenly; else None.
    """

    index: Int[Tensor, "sample token"]
    missing: Bool[Tensor, "sample token"] | None
    grid: tuple[int, int] | None

    def of(self, flat: Float[Tensor, "token neuron"]) -> Float[Tensor, "sample token neuron"]:
        """The rows; they are not copied where they lie evenly."""
        if self.grid is None or not flat.is_contiguous():
            return flat[self.index]
        first, step = self.grid
        width = flat.shape[1]
        return flat.as_strided(
            (*self.index.shape, width),
            (step * width, width, 1),
            flat.storage_offset() + first * width,
        )


@dataclass(frozen=True, eq=False)
class Layout:
    """Which flat positions of one stream belong to which sample and role.

    Made once per batch and stream.

    Attributes:
        samples: How many samples the batch has.
        text_roles: Roles of the text that is eligible beside visual tokens.
        role: Role of each flat position, on the CPU.
        sample: Sample of each flat position, likewise.
        device: Of the activations.
    """

    samples: int
    text_roles: tuple[Role, ...]
    role: Int[Tensor, " token"]
    sample: Int[Tensor, " token"]
    device: torch.device

    @classmethod
    def of(
        cls, tokens: TokenMap, samples: int, text_roles: Sequence[Role], device: torch.device
    ) -> Layout:
        """The layout of a batch of `samples` samples."""
        role, sample = (each.flatten().cpu().long() for each in (tokens.role, tokens.sample))
        # Room for images that a sample does not have is padding of no sample: -1.
        role = role.masked_fill(sample < 0, int(Role.PAD))
        return cls(samples, tuple(text_roles), role, sample.clamp(min=0), device)

    @cached_property
    def _positions(self) -> tuple[dict[Role, Int[Tensor, " token"]], ...]:
        """Positions by sample and role, rising."""
        key = self.sample * (max(Role) + 1) + self.role
        sizes = torch.bincount(key, minlength=self.samples * (max(Role) + 1)).tolist()
        parts = key.argsort(stable=True).split(sizes)
        per = max(Role) + 1
        return tuple({role: parts[s * per + role] for role in COUNTED} for s in range(self.samples))

    @cached_property
    def _text(self) -> tuple[Int[Tensor, " token"], ...]:
        return tuple(
            torch.cat([roles[role] for role in self.text_roles]).sort().values
            for roles in self._positions
        )

    @cached_property
    def rows(self) -> tuple[Mapping[Role, Rows], ...]:
        """Each sample's rows by role."""
        return tuple(
            {role: self._rows(at) for role, at in roles.items() if len(at)}
            for roles in self._positions
        )

    @cached_property
    def text_rows(self) -> tuple[Rows | None, ...]:
        """Each sample's eligible text; None where there is none."""
        return tuple(self._rows(at) if len(at) else None for at in self._text)

    def _rows(self, at: Int[Tensor, " token"]) -> Rows:
        first, last = int(at[0]), int(at[-1])
        if last - first + 1 == len(at):
            return slice(first, last + 1)
        return at.to(self.device)

    @cached_property
    def tokens(self) -> Int[Tensor, "sample role"]:
        """How many tokens each sample has of each counted role, on the CPU."""
        counts = [[len(roles[role]) for role in COUNTED] for roles in self._positions]
        return torch.tensor(counts, dtype=torch.int64)

    @cached_property
    def padded(self) -> Mapping[Role, Padded]:
        """All samples' rows of each role that occurs, on the device."""
        return {
            role: self._padded([roles[role] for roles in self._positions])
            for role in COUNTED
            if any(len(roles[role]) for roles in self._positions)
        }

    @cached_property
    def padded_text(self) -> Padded | None:
        """All samples' eligible text, on the device; None where there is none."""
        return self._padded(self._text) if any(map(len, self._text)) else None

    @cached_property
    def order(self) -> Int[Tensor, " token"]:
        """Positions of all counted tokens, by sample and then by role, on the device."""
        parts = [roles[role] for roles in self._positions for role in COUNTED]
        return sent(torch.cat(parts).to(torch.int32), self.device)

    @cached_property
    def starts(self) -> Int[Tensor, " group"]:
        """Where each sample's tokens of each role begin in `order`, and the end, on the device."""
        ends = self.tokens.flatten().cumsum(0)
        return sent(torch.cat([ends.new_zeros(1), ends]).to(torch.int32), self.device)

    def scratch(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory to work in, which all sites of the stream share."""
        key = (shape, dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return self._scratch[key]

    @cached_property
    def _scratch(self) -> dict[tuple[tuple[int, int], torch.dtype], Tensor]:
        return {}

    def _padded(self, rows: Sequence[Int[Tensor, " token"]]) -> Padded:
        index = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(each) for each in rows])
        missing = torch.arange(index.shape[1]) >= lengths[:, None]
        first, step = int(index[0, 0]), int(index[-1, 0] - index[0, 0]) // max(1, len(index) - 1)
        even = torch.arange(len(index))[:, None] * step + torch.arange(index.shape[1]) + first
        return Padded(
            sent(index, self.device),
            sent(missing, self.device) if bool(missing.any()) else None,
            (first, step) if step >= 0 and torch.equal(even, index) else None,
        )


def sent(made: Tensor, device: torch.device) -> Tensor:
    """On the device; not waited for where the memory allows it."""
    if device.type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)

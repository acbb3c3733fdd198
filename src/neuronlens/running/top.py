"""Each neuron's top samples, kept while samples stream by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ABSENT = -1
"""Stands where a neuron has fewer samples."""

_LAST = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Gate:
    """What a sample has to beat to enter a neuron's list: its last entry.

    Attributes:
        value: Of the last entry; -inf where the list is not full.
        id: Its position, which decides between equal values.
    """

    value: Float[Tensor, " neuron"]
    id: Int[Tensor, " neuron"]

    def passes(
        self, value: Float[Tensor, "sample neuron"], ids: Int[Tensor, " sample"]
    ) -> Bool[Tensor, "sample neuron"]:
        """Whether a sample with this value enters the list."""
        return (value > self.value) | ((value == self.value) & (ids[:, None] < self.id))


class TopSamples:
    """Each neuron's top samples by their largest eligible activation.

    Ordered by (value falling, id rising), whatever order they came in. Between two looks at
    them the entries may lie in any order: what enters takes the place of the last one.

    Attributes:
        n: How many are kept.
    """

    def __init__(
        self,
        neurons: int,
        n: int,
        keep_visual: int,
        keep_text: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        low = float("-inf")
        self.n = n
        self._ids = torch.full((neurons, n), ABSENT, dtype=torch.int32, device=device)
        self._visual = torch.full((neurons, n, keep_visual), low, dtype=dtype, device=device)
        self._text = torch.full((neurons, n, keep_text), low, dtype=dtype, device=device)
        self._value = torch.full((neurons, n), low, dtype=dtype, device=device)
        self._is_sorted = True
        self._last = torch.full((neurons,), n - 1, device=device)
        self._gate = Gate(self._value[:, -1].clone(), self._ids[:, -1].clone())

    @classmethod
    def of(
        cls,
        ids: Int[Tensor, "neuron rank"],
        visual: Float[Tensor, "neuron rank kept_visual"],
        text: Float[Tensor, "neuron rank kept_text"],
        device: torch.device | str = "cpu",
    ) -> TopSamples:
        """The lists that these were taken from."""
        neurons, n = ids.shape
        made = cls(neurons, n, visual.shape[2], text.shape[2], visual.dtype, device)
        made._merge(ids.to(device), visual.to(device), text.to(device))
        return made

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self._ids.device

    @property
    def gate(self) -> Gate:
        """What a sample has to beat."""
        return self._gate

    @property
    def ids(self) -> Int[Tensor, "neuron rank"]:
        """Sample positions, best first; ABSENT where there are fewer samples."""
        self._sort()
        return self._ids

    @property
    def visual(self) -> Float[Tensor, "neuron rank kept_visual"]:
        """Largest visual activations of each sample, falling, -inf where there are fewer."""
        self._sort()
        return self._visual

    @property
    def text(self) -> Float[Tensor, "neuron rank kept_text"]:
        """Largest eligible text activations of each sample, likewise."""
        self._sort()
        return self._text

    @property
    def value(self) -> Float[Tensor, "neuron rank"]:
        """What ranks a sample: its largest activation over all eligible tokens."""
        self._sort()
        return self._value

    def insert(
        self,
        id: int,
        neuron: Int[Tensor, " entry"],
        visual: Float[Tensor, "entry kept_visual"],
        text: Float[Tensor, "entry kept_text"],
    ) -> None:
        """Let one sample enter the lists of some neurons, where it beats their last entry.

        Its cost is that of the entries, so it pays to give only those that pass `gate`; but how
        many enter has to be looked at.
        """
        value = torch.maximum(visual[:, 0], text[:, 0])
        beaten, last = self._gate.value[neuron], self._gate.id[neuron]
        enters = (value > beaten) | ((value == beaten) & (id < last))
        if not bool(enters.any()):
            return
        if not bool(enters.all()):
            neuron, visual, text, value = (each[enters] for each in (neuron, visual, text, value))
        at = self._last[neuron]
        self._ids[neuron, at] = id
        self._visual[neuron, at] = visual
        self._text[neuron, at] = text
        self._value[neuron, at] = value
        self._is_sorted = False
        values, ids = self._value[neuron], self._ids[neuron]
        lowest = values.amin(1)
        tied = torch.where(values == lowest[:, None], ids, ABSENT - 1).max(1)
        self._gate.value[neuron] = lowest
        self._gate.id[neuron] = tied.values
        self._last[neuron] = tied.indices

    def update(
        self,
        ids: Int[Tensor, " sample"],
        visual: Float[Tensor, "sample neuron kept_visual"],
        text: Float[Tensor, "sample neuron kept_text"],
        keep: Bool[Tensor, " sample"] | None = None,
    ) -> None:
        """Take in samples on every neuron, without a look at any number.

        One without any eligible token, or that is not to be kept, enters no list.
        """
        shape = (visual.shape[1], len(ids))
        new_ids = ids.to(torch.int32).expand(shape)
        present = torch.maximum(visual[..., 0], text[..., 0]) > float("-inf")
        if keep is not None:
            present = present & keep[:, None]
        absent = ~present.T
        low = float("-inf")
        self._merge(
            new_ids.masked_fill(absent, ABSENT),
            visual.transpose(0, 1).masked_fill(absent[..., None], low),
            text.transpose(0, 1).masked_fill(absent[..., None], low),
        )

    def in_place(self) -> dict[str, Tensor]:
        """The lists, to be changed, in any order: by the names that `kernels.take_in` has."""
        self._is_sorted = False
        return {
            "top_ids": self._ids,
            "top_visual": self._visual,
            "top_text": self._text,
            "top_value": self._value,
            "gate_value": self._gate.value,
            "gate_id": self._gate.id,
            "last": self._last,
        }

    def merge(self, other: TopSamples) -> None:
        """Take in the top samples of other data."""
        self._merge(other._ids, other._visual, other._text)

    def _merge(
        self,
        ids: Int[Tensor, "neuron more"],
        visual: Float[Tensor, "neuron more kept_visual"],
        text: Float[Tensor, "neuron more kept_text"],
    ) -> None:
        self._ids = torch.cat([self._ids, ids], 1)
        self._visual = torch.cat([self._visual, visual], 1)
        self._text = torch.cat([self._text, text], 1)
        self._value = torch.maximum(self._visual[..., 0], self._text[..., 0])
        self._is_sorted = False
        self._sort()

    def _sort(self) -> None:
        if self._is_sorted:
            return
        order = _best(self._value, self._ids, self.n)
        self._ids = self._ids.gather(1, order)
        self._value = self._value.gather(1, order)
        self._visual, self._text = (
            kept.gather(1, order[..., None].expand(-1, -1, kept.shape[2]))
            for kept in (self._visual, self._text)
        )
        self._is_sorted = True
        self._gate = Gate(self._value[:, -1].clone(), self._ids[:, -1].clone())
        self._last = torch.full_like(self._last, self.n - 1)


def _best(
    value: Float[Tensor, "neuron entry"], ids: Int[Tensor, "neuron entry"], n: int
) -> Int[Tensor, "neuron rank"]:
    """Columns of the first n entries by (value falling, id rising); absent ones last."""
    behind = torch.where(ids == ABSENT, _LAST, ids)
    if value.element_size() > 4:  # topk leaves the order of ties open, and so needs one number
        order = behind.argsort(1)
        by_value = value.gather(1, order).argsort(dim=1, descending=True, stable=True)
        return order.gather(1, by_value)[:, :n]
    # The bits of a float, with those of negative ones turned over, are ordered like the float.
    bits = value.float().view(torch.int32)
    rising = torch.where(bits < 0, bits ^ _LAST, bits).long()
    return ((rising << 32) + (_LAST - behind)).topk(n, dim=1).indices

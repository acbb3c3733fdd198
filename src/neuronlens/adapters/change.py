"""What is made of act_fn outputs while a model runs: of which neurons, at which tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Expert = int | None
"""Number of a routed expert; None where a block is dense."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some of a site's rows: the flat positions of the tokens that run through it in one call.

    Attributes:
        index: Their numbers, in order.
        count: How many rows the call has in all.
    """

    index: Int[Tensor, " row"]
    count: int
    _sent: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Int[Tensor, " row"]:
        """The numbers on a device; sent there once."""
        return self._kept("index", device, lambda: self.index)

    def mask(self, device: torch.device) -> Bool[Tensor, " count"]:
        """True at these rows, on a device; sent there once."""

        def made() -> Tensor:
            mask = torch.zeros(self.count, dtype=torch.bool)
            mask[self.index] = True
            return mask

        return self._kept("mask", device, made)

    def part(self, first: int, count: int) -> Rows:
        """Those among `count` rows from `first` on, numbered from there."""
        ends = torch.tensor([first, first + count])
        start, stop = torch.searchsorted(self.index, ends).tolist()
        return Rows(self.index[start:stop] - first, count)

    def _kept(self, what: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        key = what, device
        if key not in self._sent:
            self._sent[key] = make().to(device, non_blocking=True)
        return self._sent[key]


Where = Callable[[int], Rows]
"""From the number of rows of a site's next call to those of them that are meant."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What is made of some neurons of one site: either multiplied or set.

    Attributes:
        neurons: Which, in order, by expert.
        factor: What their act_fn outputs are multiplied by.
        values: What they are set to, as `neurons`; None where they are multiplied.
        where: At which rows; None at all.
    """

    neurons: Mapping[Expert, Int[Tensor, " neuron"]]
    factor: float = 1.0
    values: Mapping[Expert, Float[Tensor, " neuron"]] | None = None
    where: Where | None = None
    _sent: dict[object, Tensor] = field(default_factory=dict, repr=False)

    @property
    def keeps_zero(self) -> bool:
        """Whether an activation of 0 stays 0."""
        return self.values is None or not any(each.any() for each in self.values.values())

    def index(self, expert: Expert, device: torch.device) -> Int[Tensor, " neuron"]:
        """The neurons of a block, or of one expert, on a device; sent there once."""
        key = expert, device
        if key not in self._sent:
            self._sent[key] = self.neurons[expert].to(device)
        return self._sent[key]

    def new(
        self,
        old: Float[Tensor, "*axes neuron"],
        expert: Expert,
        some: Int[Tensor, " neuron"] | None = None,
    ) -> Float[Tensor, "*axes neuron"]:
        """The new values of an expert's neurons, from the old ones.

        Args:
            old: Of all of `neurons`, or of `some`.
            expert: Whose.
            some: Which of `neurons`, by their place there.
        """
        if self.values is None:
            return old * self.factor
        key = expert, old.device, old.dtype
        if key not in self._sent:
            self._sent[key] = self.values[expert].to(old.dtype).to(old.device)
        values = self._sent[key]
        return (values if some is None else values[some]).expand_as(old)

    def write(
        self, values: Float[Tensor, "*axes neuron"], expert: Expert, rows: Rows | None
    ) -> None:
        """Change the values of all neurons of a block, or of one expert, where they are."""
        at = self.index(expert, values.device)
        if rows is None:
            if self.values is None:
                old = values.index_select(-1, at)
            else:
                old = values.new_empty(1).expand(*values.shape[:-1], len(at))  # not looked at
            values.index_copy_(-1, at, self.new(old, expert))
        elif len(rows.index):
            row = rows.on(values.device)[:, None]
            places = (row,) if values.ndim == 2 else torch.unravel_index(row, values.shape[:-1])
            values[(*places, at)] = self.new(values[(*places, at)], expert)


class Change:
    """The edits of one site that were entered together, and what was entered before them.

    A tap calls `begin` once for each call of its module, and then `within` or `earlier` and
    `later`. Taps that replace a tensor are handed what the changes before made of it. Those
    that work an activation out again have to make them again: that is what `earlier` is for.
    """

    def __init__(self, edits: Sequence[Edit], site: list[Change]) -> None:
        """Take the edits in the order in which they are made.

        Args:
            edits: Of one site.
            site: All changes of the site that are in force, in order of entering: this one
                is among them while it is.
        """
        self.edits = tuple(edits)
        self._site = site
        self._now: tuple[Rows | None, ...] = ()
        self._columns: dict[Expert, Tensor] = {}
        self._sent: dict[tuple[Expert, torch.device], Tensor] = {}
        self._among: dict[tuple[Edit, Expert, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def experts(self) -> list[Expert]:
        """Whose neurons are changed."""
        return list(dict.fromkeys(expert for edit in self.edits for expert in edit.neurons))

    @property
    def keeps_zero(self) -> bool:
        """Whether an activation of 0 stays 0."""
        return all(edit.keeps_zero for edit in self.edits)

    def begin(self, rows: int) -> None:
        """Find out which of a call's rows are meant."""
        self._now = tuple(None if edit.where is None else edit.where(rows) for edit in self.edits)

    def within(self, values: Float[Tensor, "*axes neuron"], expert: Expert = None) -> Tensor:
        """The values of all neurons with these edits, written where they are."""
        for edit, rows in zip(self.edits, self._now, strict=True):
            if expert in edit.neurons:
                edit.write(values, expert, rows)
        return values

    def columns(self, expert: Expert, device: torch.device) -> Int[Tensor, " column"]:
        """The neurons that any of the edits changes, in order."""
        key = expert, device
        if key not in self._sent:
            self._sent[key] = self._own_columns(expert).to(device)
        return self._sent[key]

    def earlier(
        self,
        values: Float[Tensor, "*axes column"],
        expert: Expert = None,
        *,
        whole: bool = False,
        token: Int[Tensor, " *axes"] | None = None,
    ) -> Tensor:
        """What the changes before this one made of act_fn outputs.

        Args:
            values: Of `columns`, as the model gives them; of all neurons if `whole`.
            expert: Whose.
            whole: Whether all of the site's neurons are given.
            token: Which of the call's rows those of `values` are; all, in order, for None.
        """
        for before in self._site[: self._site.index(self)] if self in self._site else ():
            for edit, rows in before._edits(expert):
                values = self._edited(values, edit, rows, expert, whole, token)
        return values

    def later(
        self,
        values: Float[Tensor, "*axes column"],
        expert: Expert = None,
        *,
        whole: bool = False,
        token: Int[Tensor, " *axes"] | None = None,
    ) -> Tensor:
        """What these edits make of what `earlier` gave; the arguments are the same."""
        for edit, rows in self._edits(expert):
            values = self._edited(values, edit, rows, expert, whole, token)
        return values

    def _edits(self, expert: Expert) -> Iterator[tuple[Edit, Rows | None]]:
        for edit, rows in zip(self.edits, self._now, strict=True):
            if expert in edit.neurons:
                yield edit, rows

    def _own_columns(self, expert: Expert) -> Int[Tensor, " column"]:
        if expert not in self._columns:
            mine = [edit.neurons[expert] for edit in self.edits if expert in edit.neurons]
            self._columns[expert] = torch.cat(mine).unique()
        return self._columns[expert]

    def _edited(
        self,
        values: Tensor,
        edit: Edit,
        rows: Rows | None,
        expert: Expert,
        whole: bool,
        token: Tensor | None,
    ) -> Tensor:
        at, some = self._places(edit, expert, whole, values.device)
        old = values.index_select(-1, at)
        new = edit.new(old, expert, some)
        if rows is not None:
            mask = rows.mask(values.device)
            mask = mask.reshape(old.shape[:-1]) if token is None else mask[token]
            new = torch.where(mask[..., None], new, old)
        return values.index_copy(-1, at, new)

    def _places(
        self, edit: Edit, expert: Expert, whole: bool, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Where an edit's neurons are among the columns, and which of its neurons these are."""
        if whole:
            return edit.index(expert, device), None
        key = edit, expert, device
        if key not in self._among:
            columns, wanted = self._own_columns(expert), edit.neurons[expert]
            at = torch.searchsorted(columns, wanted).clamp(max=len(columns) - 1)
            here = columns[at] == wanted
            self._among[key] = at[here].to(device), here.nonzero().squeeze(1).to(device)
        return self._among[key]

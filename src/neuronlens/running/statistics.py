"""Everything a scan keeps of one site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuronlens.running.fused import kernels_for
from neuronlens.running.layout import BLOCKS, COUNTED, block_of, sent
from neuronlens.running.reduce import Reduction
from neuronlens.running.top import TopSamples


@dataclass(frozen=True, eq=False)
class Incoming:
    """The samples of a batch that has run, the same ones at every site.

    Made once per batch, so that a device is told about them once.

    Attributes:
        positions: Each sample's position in the caller's sequence.
        units: What each sample's block follows from: its group, or its images.
        domains: Each sample's domain.
        keep: False for samples that are skipped; on the CPU.
    """

    positions: Sequence[int]
    units: Sequence[str]
    domains: Sequence[str]
    keep: Bool[Tensor, " sample"]

    def ids_on(self, device: torch.device) -> Int[Tensor, " sample"]:
        """The positions."""
        return self._on("ids", self.ids, device)

    def keep_on(self, device: torch.device) -> Bool[Tensor, " sample"]:
        """Which samples are kept."""
        return self._on("keep", self.keep, device)

    def rows_on(self, domain: str, device: torch.device) -> Int[Tensor, " row"]:
        """The samples of a domain that are kept."""
        return self._on(f"rows of {domain}", self.rows[domain], device)

    def blocks_on(self, domain: str, device: torch.device) -> Int[Tensor, " row"]:
        """Their blocks."""
        return self._on(f"blocks of {domain}", self.blocks[domain], device)

    @cached_property
    def ids(self) -> Int[Tensor, " sample"]:
        """The positions, on the CPU."""
        return torch.tensor(self.positions, dtype=torch.int32)

    @cached_property
    def is_whole(self) -> bool:
        """Whether every sample is kept."""
        return bool(self.keep.all())

    @cached_property
    def rows(self) -> Mapping[str, Int[Tensor, " row"]]:
        """By domain, the samples that are kept, on the CPU."""
        found: dict[str, list[int]] = {}
        for row in self.keep.nonzero().squeeze(1).tolist():
            found.setdefault(self.domains[row], []).append(row)
        return {domain: torch.tensor(rows) for domain, rows in found.items()}

    @cached_property
    def blocks(self) -> Mapping[str, Int[Tensor, " row"]]:
        """By domain, the blocks of its samples that are kept, on the CPU."""
        return {
            domain: torch.tensor([block_of(self.units[row]) for row in rows.tolist()])
            for domain, rows in self.rows.items()
        }

    def _on(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        if (name, device) not in self._sent:
            self._sent[name, device] = sent(value, device)
        return self._sent[name, device]

    @cached_property
    def _sent(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}


class RoleSummary:
    """Maximum and mean of each neuron over the tokens of each role."""

    def __init__(
        self, neurons: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (len(COUNTED), neurons)
        self.maximum = torch.full(shape, float("-inf"), dtype=dtype, device=device)
        self.total = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(
        self,
        maximum: Float[Tensor, "sample role neuron"],
        total: Int[Tensor, "sample role neuron"],
        keep: Bool[Tensor, " sample"] | None = None,
    ) -> None:
        """Take in samples; those that are not to be kept change nothing."""
        if keep is not None:
            gone = ~keep.to(maximum.device)[:, None, None]
            maximum = maximum.masked_fill(gone, float("-inf"))
            total = total.masked_fill(gone, 0)
        if len(maximum):
            self.maximum = torch.maximum(self.maximum, maximum.amax(0))
            self.total = self.total + total.sum(0)

    def merge(self, other: RoleSummary) -> None:
        """Take in the summary of other data."""
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.total = self.total + other.total


class FiringCounts:
    """How often each neuron fired (act_fn output above 0), by domain, block and role.

    Attributes:
        fired: By domain, `[block, role, neuron]`.
        tokens: By domain, how many tokens there were, `[block, role]`.
        routed: By domain, how many of them ran through each expert, `[block, role, expert]`;
            without experts the last axis is empty.
    """

    def __init__(self, neurons: int, experts: int = 0, device: torch.device | str = "cpu") -> None:
        self.neurons = neurons
        self.experts = experts
        self.device = device
        self.fired: dict[str, Int[Tensor, "block role neuron"]] = {}
        self.tokens: dict[str, Int[Tensor, "block role"]] = {}
        self.routed: dict[str, Int[Tensor, "block role expert"]] = {}

    def update(
        self,
        domain: str,
        blocks: Int[Tensor, " sample"],
        fired: Int[Tensor, "sample role neuron"],
        tokens: Int[Tensor, "sample role"],
        routed: Int[Tensor, "sample role expert"] | None = None,
        sent_blocks: Int[Tensor, " sample"] | None = None,
    ) -> None:
        """Take in samples of one domain, each with its block.

        `sent_blocks` are the same blocks, where they are on the device already.
        """
        self.open(domain)
        at = blocks.to(self.device) if sent_blocks is None else sent_blocks
        self.fired[domain].index_add_(0, at, fired.long())
        self.tokens[domain].index_add_(0, blocks, tokens)
        if routed is not None:
            self.routed[domain].index_add_(0, blocks, routed)

    def merge(self, other: FiringCounts) -> None:
        """Take in the counts of other data."""
        for domain in other.fired:
            self.open(domain)
            self.fired[domain] += other.fired[domain]
            self.tokens[domain] += other.tokens[domain]
            self.routed[domain] += other.routed[domain]

    def open(self, domain: str) -> None:
        """Begin to count a domain, if that has not been done."""
        if domain not in self.fired:
            shape = (BLOCKS, len(COUNTED))
            self.fired[domain] = torch.zeros(
                (*shape, self.neurons), dtype=torch.int64, device=self.device
            )
            self.tokens[domain] = torch.zeros(shape, dtype=torch.int64)
            self.routed[domain] = torch.zeros((*shape, self.experts), dtype=torch.int64)


class SiteStatistics:
    """Everything a scan keeps of one site."""

    def __init__(
        self,
        neurons: int,
        n: int,
        keep_visual: int,
        keep_text: int,
        dtype: torch.dtype,
        experts: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.top = TopSamples(neurons, n, keep_visual, keep_text, dtype, device)
        self.roles = RoleSummary(neurons, dtype, device)
        self.firing = FiringCounts(neurons, experts, device)

    def update(self, reduction: Reduction, incoming: Incoming) -> None:
        """Take in the samples of a batch that are to be kept; the reduction is of all of them."""
        device = self.top.device
        chosen = None if incoming.is_whole else incoming.keep_on(device)
        visual, text = reduction.visual.to(device), reduction.text.to(device)
        maximum, total = reduction.maximum.to(device), reduction.total.to(device)
        entries = reduction.entries
        keep = max(visual.shape[-1], text.shape[-1])
        kernels = kernels_for(device, visual.dtype, keep, self.top.n)
        if device.type == "cpu" and kernels is None and entries is None:
            value = torch.maximum(visual[..., 0], text[..., 0])
            passes = self.top.gate.passes(value, incoming.ids_on(device))
            sample, neuron = passes.nonzero(as_tuple=True)
            entries = sample, neuron
            visual, text = visual[entries], text[entries]
        elif device.type != "cpu" and entries is not None:
            shape = maximum.shape[0], maximum.shape[2]
            visual, text = (_spread(kept, entries, shape) for kept in (visual, text))
            entries = None
        if entries is None and kernels is not None:
            kernels.take_in(
                incoming.ids_on(device),
                incoming.keep_on(device),
                maximum=maximum,
                total=total,
                visual=visual,
                text=text,
                **self.top.in_place(),
                role_maximum=self.roles.maximum,
                role_total=self.roles.total,
            )
        else:
            self.roles.update(maximum, total, chosen)
            if entries is not None:
                self._insert(entries, visual, text, incoming)
            else:
                self.top.update(incoming.ids_on(device), visual, text, chosen)
        fired = reduction.fired.to(device)
        for domain, rows in incoming.rows.items():
            whole = len(rows) == len(incoming.keep)
            self.firing.update(
                domain,
                incoming.blocks[domain],
                fired if whole else fired[incoming.rows_on(domain, device)],
                reduction.tokens[rows],
                None if reduction.routed is None else reduction.routed[rows],
                incoming.blocks_on(domain, device),
            )

    def _insert(
        self,
        entries: tuple[Tensor, Tensor],
        visual: Float[Tensor, "entry kept_visual"],
        text: Float[Tensor, "entry kept_text"],
        incoming: Incoming,
    ) -> None:
        """Let the samples that are kept enter the lists, one behind the other."""
        sample, neuron = (each.to(self.top.device) for each in entries)
        bounds = torch.arange(len(incoming.keep) + 1, device=sample.device)
        first = torch.searchsorted(sample, bounds).tolist()
        for row in incoming.keep.nonzero().squeeze(1).tolist():
            here = slice(first[row], first[row + 1])
            self.top.insert(incoming.positions[row], neuron[here], visual[here], text[here])

    def move(self, device: torch.device) -> None:
        """Go on counting on another device."""
        if device != self.top.device:
            self.top = TopSamples.of(self.top.ids, self.top.visual, self.top.text, device)
            self.roles.maximum = self.roles.maximum.to(device)
            self.roles.total = self.roles.total.to(device)
            self.firing.device = device
            self.firing.fired = {d: each.to(device) for d, each in self.firing.fired.items()}

    def merge(self, other: SiteStatistics) -> None:
        """Take in the statistics of other samples."""
        self.top.merge(other.top)
        self.roles.merge(other.roles)
        self.firing.merge(other.firing)

    def state_dict(self, domains: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by name, on the CPU, each neuron's numbers side by side.

        Counts are stacked in the order of `domains`.
        """
        known = self.firing
        empty = FiringCounts(known.neurons, known.experts, known.device)
        for domain in domains:
            if domain not in known.fired:
                empty.open(domain)

        def stacked(name: str) -> Tensor:
            found = {**getattr(empty, name), **getattr(known, name)}
            if domains:
                return torch.stack([found[domain].cpu() for domain in domains])
            empty.open("")
            nothing: Tensor = getattr(empty, name)[""].cpu()
            return nothing[None][:0]

        return {
            "top.ids": self.top.ids.to("cpu", copy=True),
            "top.visual": self.top.visual.to("cpu", copy=True),
            "top.text": self.top.text.to("cpu", copy=True),
            "role.maximum": self.roles.maximum.T.cpu(),
            "role.total": self.roles.total.T.cpu(),
            "fired": stacked("fired").movedim(-1, 0),
            "tokens": stacked("tokens"),
            "routed": stacked("routed").movedim(-1, 0),
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        domains: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> SiteStatistics:
        """The statistics `state_dict` was made from."""
        ids, visual, text = state["top.ids"], state["top.visual"], state["top.text"]
        shape = len(ids), ids.shape[1], visual.shape[2], text.shape[2]
        made = cls(*shape, visual.dtype, len(state["routed"]), device)
        made.top = TopSamples.of(ids, visual, text, device)
        made.roles.maximum = state["role.maximum"].T.contiguous().to(device)
        made.roles.total = state["role.total"].T.contiguous().to(device)
        for place, domain in enumerate(domains):
            fired, routed = state["fired"][:, place], state["routed"][:, place]
            made.firing.open(domain)
            made.firing.fired[domain].copy_(fired.movedim(0, -1))
            made.firing.tokens[domain].copy_(state["tokens"][place])
            made.firing.routed[domain].copy_(routed.movedim(0, -1))
        return made


def _spread(
    kept: Float[Tensor, "entry count"], entries: tuple[Tensor, Tensor], shape: tuple[int, int]
) -> Float[Tensor, "sample neuron count"]:
    """What was kept of some entries among all; -inf elsewhere."""
    spread = kept.new_full((*shape, kept.shape[1]), float("-inf"))
    spread[tuple(each.to(kept.device) for each in entries)] = kept
    return spread

"""Everything a scan keeps of one site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuronlens.running.layout import BLOCKS, COUNTED, block_of
from neuronlens.running.reduce import Reduction
from neuronlens.running.top import TopSamples


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
    ) -> None:
        """Take in samples of one domain, each with its block."""
        self.open(domain)
        at = blocks.to(self.device)
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

    def update(
        self,
        reduction: Reduction,
        positions: Sequence[int],
        sample_ids: Sequence[str],
        domains: Sequence[str],
        keep: Bool[Tensor, " sample"],
    ) -> None:
        """Take in the samples of a batch that are to be kept.

        Args:
            reduction: Of the whole batch.
            positions: Each sample's position in the caller's sequence.
            sample_ids: Each sample's own id; its hash gives the block.
            domains: Each sample's domain.
            keep: False for samples that are skipped; on the CPU.
        """
        device = self.top.device
        chosen = None if bool(keep.all()) else keep.to(device)
        visual, text = reduction.visual.to(device), reduction.text.to(device)
        ids = torch.tensor(positions, dtype=torch.int32)
        entries = reduction.entries
        if device.type == "cpu" and entries is None:
            value = torch.maximum(visual[..., 0], text[..., 0])
            passes = self.top.gate.passes(value, ids)
            sample, neuron = passes.nonzero(as_tuple=True)
            entries = sample, neuron
            visual, text = visual[entries], text[entries]
        elif device.type != "cpu" and entries is not None:
            shape = reduction.maximum.shape[0], reduction.maximum.shape[2]
            visual, text = (_spread(kept, entries, shape) for kept in (visual, text))
            entries = None
        if entries is None:
            self.top.update(ids.to(device, non_blocking=True), visual, text, chosen)
        else:
            sample, neuron = (each.to(device) for each in entries)
            first = torch.searchsorted(sample, torch.arange(len(keep) + 1, device=device)).tolist()
            for row in keep.nonzero().squeeze(1).tolist():
                here = slice(first[row], first[row + 1])
                self.top.insert(positions[row], neuron[here], visual[here], text[here])
        self.roles.update(reduction.maximum.to(device), reduction.total.to(device), chosen)
        fired = reduction.fired.to(device)
        for domain in dict.fromkeys(domains):
            rows = [i for i, each in enumerate(domains) if each == domain and bool(keep[i])]
            if rows:
                whole = len(rows) == len(domains)
                self.firing.update(
                    domain,
                    torch.tensor([block_of(sample_ids[row]) for row in rows]),
                    fired if whole else fired[torch.tensor(rows, device=device)],
                    reduction.tokens[rows],
                    None if reduction.routed is None else reduction.routed[rows],
                )

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

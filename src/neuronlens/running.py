"""Mergeable running statistics of one site: the contract that makes one pass exact.

Three steps: `reduce` turns a batch's activations into a `Reduction` while the model runs;
`SiteStatistics.update` takes it in once the forward has ended and was finite; `merge` joins
two scans of different samples. Merging is associative and commutative, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuronlens.tokens import Role, TokenMap

BLOCKS = 16
"""Samples are dealt by a hash of their id to this many blocks, for bootstrap and permutation."""

COUNTED = (Role.SPECIAL, Role.PROMPT, Role.RESPONSE, Role.VISUAL)
"""Roles with a running maximum, firing count and mean each; padding has none."""

FIXED_POINT = 2**24
"""Sums are kept as int64 multiples of 1 / FIXED_POINT: float sums differ by order of merging."""

LARGEST_SUM = 2.0**30
"""Sums of one sample's activations beyond this are not finite: int64 would overflow unseen."""

ABSENT = -1


def block_of(sample_id: str) -> int:
    """The block of a sample, the same in every process and for ever."""
    return hashlib.sha256(sample_id.encode()).digest()[0] % BLOCKS


@dataclass(frozen=True)
class Layout:
    """Which tokens of one stream belong to which sample and role, as flat positions.

    Made once per batch and stream, on the device of the layer.
    """

    positions: tuple[Mapping[Role, Int[Tensor, " token"]], ...]
    eligible_text: tuple[Int[Tensor, " token"], ...]

    @classmethod
    def of(
        cls, tokens: TokenMap, samples: int, text_roles: Sequence[Role], device: torch.device
    ) -> Layout:
        """The layout of a batch of `samples` samples."""
        role, owner = tokens.role.flatten().cpu(), tokens.sample.flatten().cpu()
        text = torch.isin(role, torch.tensor([int(each) for each in text_roles]))
        return cls(
            tuple(
                {each: _at((owner == sample) & (role == each), device) for each in COUNTED}
                for sample in range(samples)
            ),
            tuple(_at((owner == sample) & text, device) for sample in range(samples)),
        )


def _at(mask: Bool[Tensor, " token"], device: torch.device) -> Int[Tensor, " token"]:
    return mask.nonzero().squeeze(1).to(device)


@dataclass(frozen=True)
class Reduction:
    """One site's activations over one batch, reduced per sample.

    -inf stands where a sample has no such token; `finite` is False for a sample in which
    any activation was NaN or infinite, or so large that its sum does not fit in fixed point.
    """

    visual: Float[Tensor, "sample neuron kept_visual"]
    text: Float[Tensor, "sample neuron kept_text"]
    maximum: Float[Tensor, "sample role neuron"]
    fired: Int[Tensor, "sample role neuron"]
    total: Int[Tensor, "sample role neuron"]
    tokens: Int[Tensor, "sample role"]
    finite: Bool[Tensor, " sample"]


def reduce(
    activation: Float[Tensor, "*axes neuron"], layout: Layout, keep_visual: int, keep_text: int
) -> Reduction:
    """Reduce one site's activations of one batch; nothing of `activation` is kept.

    Args:
        activation: act_fn outputs, on any device.
        layout: Of the site's stream.
        keep_visual: How many of the largest visual activations to keep per sample.
        keep_text: How many of the largest eligible text activations.
    """
    # Adding zero turns -0.0 into 0.0, which would otherwise depend on the order of merging.
    flat = rearrange(activation, "... neuron -> (...) neuron") + 0
    visual, text, maximum, fired, total, count, finite = [], [], [], [], [], [], []
    for roles, eligible in zip(layout.positions, layout.eligible_text, strict=True):
        by_role = [flat[roles[role]] for role in COUNTED]
        summed = [rows.double().sum(0) for rows in by_role]
        # NaN and infinity survive summing, or cancel to NaN.
        finite.append(torch.stack([(s.abs() < LARGEST_SUM).all() for s in summed]).all())
        visual.append(_largest(flat[roles[Role.VISUAL]], keep_visual))
        text.append(_largest(flat[eligible], keep_text))
        maximum.append(torch.stack([_largest(rows, 1)[:, 0] for rows in by_role]))
        fired.append(torch.stack([(rows > 0).sum(0) for rows in by_role]))
        total.append(torch.stack([_fixed_point(s) for s in summed]))
        count.append(torch.tensor([len(rows) for rows in by_role]))
    return Reduction(
        torch.stack(visual),
        torch.stack(text),
        torch.stack(maximum),
        torch.stack(fired),
        torch.stack(total),
        torch.stack(count),
        torch.stack(finite),
    )


def _largest(rows: Float[Tensor, "token neuron"], count: int) -> Float[Tensor, "neuron count"]:
    """The largest values per neuron, in falling order, filled up with -inf."""
    kept = rows.new_full((rows.shape[1], count), float("-inf"))
    present = min(count, len(rows))
    if present:
        kept[:, :present] = rows.topk(present, dim=0).values.T
    return kept


def _fixed_point(summed: Float[Tensor, " neuron"]) -> Int[Tensor, " neuron"]:
    known = summed.nan_to_num(0.0, 0.0, 0.0)  # samples that are not finite are dropped
    return (known.clamp(-LARGEST_SUM, LARGEST_SUM) * FIXED_POINT).round().long()


class TopSamples:
    """Each neuron's top samples by their largest eligible activation.

    Attributes:
        ids: Sample positions `[neuron, rank]`, ABSENT where there are fewer samples.
        visual: Largest visual activations of that sample, falling, -inf where none.
        text: Largest eligible text activations, likewise.
    """

    def __init__(
        self, neurons: int, n: int, keep_visual: int, keep_text: int, dtype: torch.dtype
    ) -> None:
        low = float("-inf")
        self.n = n
        self.ids = torch.full((neurons, n), ABSENT, dtype=torch.int32)
        self.visual = torch.full((neurons, n, keep_visual), low, dtype=dtype)
        self.text = torch.full((neurons, n, keep_text), low, dtype=dtype)

    @property
    def value(self) -> Float[Tensor, "neuron rank"]:
        """What ranks a sample: its largest activation over all eligible tokens."""
        return torch.maximum(self.visual[..., 0], self.text[..., 0])

    def update(
        self,
        ids: Int[Tensor, " sample"],
        visual: Float[Tensor, "sample neuron kept_visual"],
        text: Float[Tensor, "sample neuron kept_text"],
    ) -> None:
        """Take in samples; one without any eligible token enters no list."""
        shape = (visual.shape[1], len(ids))
        new_ids = ids.to(torch.int32).expand(shape).clone()
        visual, text = visual.transpose(0, 1), text.transpose(0, 1)
        present = torch.maximum(visual[..., 0], text[..., 0]) > float("-inf")
        new_ids[~present] = ABSENT
        self._take(new_ids, visual, text)

    def merge(self, other: TopSamples) -> None:
        """Take in the top samples of other data."""
        self._take(other.ids, other.visual, other.text)

    def _take(
        self,
        ids: Int[Tensor, "neuron more"],
        visual: Float[Tensor, "neuron more kept_visual"],
        text: Float[Tensor, "neuron more kept_text"],
    ) -> None:
        ids = torch.cat([self.ids, ids], 1)
        visual = torch.cat([self.visual, visual], 1)
        text = torch.cat([self.text, text], 1)
        # (value falling, id rising): topk leaves the order of ties open. Absent rows last.
        order = torch.where(ids == ABSENT, torch.iinfo(torch.int32).max, ids).argsort(1)
        value = torch.maximum(visual[..., 0], text[..., 0]).gather(1, order)
        by_value = value.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, by_value)[:, : self.n]
        self.ids = ids.gather(1, order)
        self.visual = visual.gather(1, order[..., None].expand(-1, -1, visual.shape[2]))
        self.text = text.gather(1, order[..., None].expand(-1, -1, text.shape[2]))


class RoleSummary:
    """Maximum and mean of each neuron over the tokens of each role."""

    def __init__(self, neurons: int, dtype: torch.dtype) -> None:
        self.maximum = torch.full((len(COUNTED), neurons), float("-inf"), dtype=dtype)
        self.total = torch.zeros((len(COUNTED), neurons), dtype=torch.int64)

    def update(
        self,
        maximum: Float[Tensor, "sample role neuron"],
        total: Int[Tensor, "sample role neuron"],
    ) -> None:
        """Take in samples."""
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
    """

    def __init__(self, neurons: int) -> None:
        self.neurons = neurons
        self.fired: dict[str, Int[Tensor, "block role neuron"]] = {}
        self.tokens: dict[str, Int[Tensor, "block role"]] = {}

    def update(
        self,
        domain: str,
        block: int,
        fired: Int[Tensor, "role neuron"],
        tokens: Int[Tensor, " role"],
    ) -> None:
        """Take in one sample."""
        self._open(domain)
        self.fired[domain][block] += fired
        self.tokens[domain][block] += tokens

    def merge(self, other: FiringCounts) -> None:
        """Take in the counts of other data."""
        for domain in other.fired:
            self._open(domain)
            self.fired[domain] += other.fired[domain]
            self.tokens[domain] += other.tokens[domain]

    def _open(self, domain: str) -> None:
        if domain not in self.fired:
            shape = (BLOCKS, len(COUNTED), self.neurons)
            self.fired[domain] = torch.zeros(shape, dtype=torch.int64)
            self.tokens[domain] = torch.zeros(shape[:2], dtype=torch.int64)


class SiteStatistics:
    """Everything a scan keeps of one site."""

    def __init__(
        self, neurons: int, n: int, keep_visual: int, keep_text: int, dtype: torch.dtype
    ) -> None:
        self.top = TopSamples(neurons, n, keep_visual, keep_text, dtype)
        self.roles = RoleSummary(neurons, dtype)
        self.firing = FiringCounts(neurons)

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
            keep: False for samples that are skipped.
        """
        rows = keep.nonzero().squeeze(1).tolist()
        device = reduction.visual.device
        at = torch.tensor(rows, dtype=torch.long, device=device)
        self.top.update(
            torch.tensor([positions[row] for row in rows], dtype=torch.int64),
            reduction.visual[at].cpu(),
            reduction.text[at].cpu(),
        )
        self.roles.update(reduction.maximum[at].cpu(), reduction.total[at].cpu())
        for row in rows:
            self.firing.update(
                domains[row],
                block_of(sample_ids[row]),
                reduction.fired[row].cpu(),
                reduction.tokens[row],
            )

    def merge(self, other: SiteStatistics) -> None:
        """Take in the statistics of other samples."""
        self.top.merge(other.top)
        self.roles.merge(other.roles)
        self.firing.merge(other.firing)

    def state_dict(self, domains: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by name; counts are stacked in the order of `domains`."""
        firing = FiringCounts(self.firing.neurons)
        firing.merge(self.firing)
        for domain in domains:
            firing._open(domain)
        return {
            "top.ids": self.top.ids,
            "top.visual": self.top.visual,
            "top.text": self.top.text,
            "role.maximum": self.roles.maximum,
            "role.total": self.roles.total,
            "fired": torch.stack([firing.fired[domain] for domain in domains]),
            "tokens": torch.stack([firing.tokens[domain] for domain in domains]),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], domains: Sequence[str]) -> SiteStatistics:
        """The statistics `state_dict` was made from."""
        ids, visual, text = state["top.ids"], state["top.visual"], state["top.text"]
        made = cls(len(ids), ids.shape[1], visual.shape[2], text.shape[2], visual.dtype)
        made.top.ids, made.top.visual, made.top.text = ids, visual, text
        made.roles.maximum, made.roles.total = state["role.maximum"], state["role.total"]
        made.firing.fired = dict(zip(domains, state["fired"].clone(), strict=True))
        made.firing.tokens = dict(zip(domains, state["tokens"].clone(), strict=True))
        return made

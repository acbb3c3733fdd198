"""One site's activations over one batch, reduced while the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuronlens.activations import Activation, Routed
from neuronlens.running.fused import kernels_for
from neuronlens.running.layout import COUNTED, Layout, Padded, Rows
from neuronlens.running.top import Gate
from neuronlens.tokens import Role

FIXED_POINT = 2**24
"""Sums are kept as int64 multiples of 1 / FIXED_POINT: float sums differ by order of merging."""

LARGEST_SUM = 2.0**30
"""Sums of one sample's activations beyond this are not finite: int64 would overflow unseen."""

LOW = float("-inf")

_CHUNK = 2**18
"""Activations that are read at a time, so that they are read again from the processor's cache."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """One site's activations over one batch, reduced per sample.

    -inf stands where a sample has no such token. The largest activations are either those of
    every sample on every neuron, in this order (`entries` is None), or those of some entries.

    Attributes:
        maximum: By role.
        fired: Tokens with an activation above 0.
        total: Sum of the activations, in fixed point.
        finite: False for a sample in which any activation was NaN or infinite, or so large
            that its sum does not fit in fixed point.
        visual: The largest visual activations, falling.
        text: The largest eligible text activations, likewise.
        entries: Sample and neuron of each row of `visual` and `text`, sample by sample; None
            for all of them.
        tokens: How many tokens there were, on the CPU.
        routed: How many of them ran through each expert; None for dense blocks.
    """

    maximum: Float[Tensor, "sample role neuron"]
    fired: Int[Tensor, "sample role neuron"]
    total: Int[Tensor, "sample role neuron"]
    finite: Bool[Tensor, " sample"]
    visual: Float[Tensor, "*entries kept_visual"]
    text: Float[Tensor, "*entries kept_text"]
    entries: tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]] | None
    tokens: Int[Tensor, "sample role"]
    routed: Int[Tensor, "sample role expert"] | None = None


def reduce(
    activation: Activation,
    layout: Layout,
    keep_visual: int,
    keep_text: int,
    gate: Gate | None = None,
    ids: Int[Tensor, " sample"] | None = None,
) -> Reduction:
    """Reduce one site's activations of one batch, sample by sample; nothing of them is kept.

    Every activation is read for the role's maximum, count and sum. The largest ones are looked
    for only where the maximum passes the gate, so that what rarely happens costs nothing. How
    many pass has to be looked at: on a CPU that is free.

    Args:
        activation: act_fn outputs, or those of routed experts: an unrouted token is in
            nothing that is counted here.
        layout: Of the site's stream.
        keep_visual: How many of the largest visual activations to keep per sample.
        keep_text: How many of the largest eligible text activations.
        gate: What a sample must beat, by neuron; None to keep every sample's.
        ids: Positions of the samples, if there is a gate.
    """
    if isinstance(activation, Routed):
        return _reduce_routed(activation, layout, keep_visual, keep_text, gate, ids)
    flat = rearrange(activation, "... neuron -> (...) neuron")
    made = _Reducing(layout, flat, flat.shape[1], (keep_visual, keep_text), gate, ids)
    for sample, (roles, text) in enumerate(zip(layout.rows, layout.text_rows, strict=True)):
        made.take(flat, sample, roles, text)
    return made.done()


class _Reducing:
    """A reduction in the making; activations come sample by sample, and expert by expert."""

    def __init__(
        self,
        layout: Layout,
        like: Tensor,
        neurons: int,
        keep: tuple[int, int],
        gate: Gate | None,
        ids: Int[Tensor, " sample"] | None,
    ) -> None:
        shape = (layout.samples, len(COUNTED), neurons)
        self.maximum = like.new_full(shape, LOW)
        self.fired = torch.zeros(shape, dtype=torch.int32, device=like.device)
        self.total = torch.zeros(shape, dtype=torch.int64, device=like.device)
        self.finite = torch.ones(layout.samples, dtype=torch.bool, device=like.device)
        self._layout, self._keep, self._gate, self._ids = layout, keep, gate, ids
        self._entries: list[tuple[Tensor, ...]] = []

    def take(
        self,
        flat: Float[Tensor, "token neuron"],
        sample: int,
        roles: Mapping[Role, Rows],
        text: Rows | None,
        first: int = 0,
    ) -> None:
        """Take in one sample; `flat` has the neurons from `first` on."""
        here = slice(first, first + flat.shape[1])
        for role, at in roles.items():
            place = COUNTED.index(role)
            maximum, fired, summed = self._read(flat[at])
            self.maximum[sample, place, here] = maximum
            self.fired[sample, place, here] = fired
            self.total[sample, place, here] = _fixed_point(summed)
            # NaN and infinity survive summing, or cancel to NaN.
            self.finite[sample] &= (summed.abs() < LARGEST_SUM).all()
        columns = self._passing(sample, here)
        if columns is not None and len(columns) == 0:
            return
        kept = [
            _largest(flat[rows] if rows is not None else flat[:0], count, columns)
            for rows, count in zip((roles.get(Role.VISUAL), text), self._keep, strict=True)
        ]
        if columns is None:
            columns = torch.arange(flat.shape[1], device=flat.device)
        self._entries.append((torch.full_like(columns, sample), columns + first, *kept))

    def _read(self, rows: Float[Tensor, "token neuron"]) -> tuple[Tensor, Tensor, Tensor]:
        """Each column's maximum, how many values are above 0, and the sum."""
        width, device = rows.shape[1], rows.device
        chunk = max(1, _CHUNK // width)
        # Large pieces of fresh memory cost more than what is done in them.
        ones = self._layout.scratch((chunk, width), rows.dtype)
        wide = self._layout.scratch((chunk, width), _summing(device))
        maximum = rows.new_full((width,), LOW)
        fired = rows.new_zeros(width, dtype=torch.float32)  # exact: it counts tokens
        summed = rows.new_zeros(width, dtype=wide.dtype)
        for part in rows.split(chunk):
            here = slice(0, len(part))
            maximum = torch.maximum(maximum, part.amax(0))
            # Ones and zeros of the values' own type: a sum of booleans is several times slower.
            fired += torch.gt(part, 0, out=ones[here]).sum(0, dtype=torch.float32)
            summed += wide[here].copy_(part).sum(0)
        return maximum + 0, fired.int(), summed  # -0.0 becomes 0.0

    def _passing(self, sample: int, here: slice) -> Int[Tensor, " entry"] | None:
        if self._gate is None or self._ids is None:
            return None
        eligible = [COUNTED.index(role) for role in (Role.VISUAL, *self._layout.text_roles)]
        value = self.maximum[sample, eligible, here].amax(0)
        gate = Gate(self._gate.value[here], self._gate.id[here])
        return gate.passes(value[None], self._ids[sample, None])[0].nonzero().squeeze(1)

    def done(self, routed: Int[Tensor, "sample role expert"] | None = None) -> Reduction:
        """The reduction."""
        none = torch.zeros(0, dtype=torch.int64, device=self.maximum.device)
        empty = (none, none, *(self.maximum.new_zeros(0, count) for count in self._keep))
        sample, neuron, visual, text = (
            torch.cat(parts) for parts in zip(empty, *self._entries, strict=True)
        )
        if routed is not None:  # they came expert by expert
            order = sample.argsort(stable=True)
            sample, neuron, visual, text = (e[order] for e in (sample, neuron, visual, text))
        return Reduction(
            self.maximum,
            self.fired,
            self.total,
            self.finite,
            visual,
            text,
            (sample, neuron),
            self._layout.tokens,
            routed,
        )


def _largest(
    rows: Float[Tensor, "token neuron"], count: int, columns: Int[Tensor, " entry"] | None
) -> Float[Tensor, "entry count"]:
    """The largest values of some columns, in falling order, filled up with -inf."""
    width = rows.shape[1] if columns is None else len(columns)
    kept = rows.new_full((width, count), LOW)
    present = min(count, len(rows))
    if present == 0:
        return kept
    if columns is not None and 2 * len(columns) < rows.shape[1]:
        rows, columns = rows.index_select(1, columns), None
    found = rows.topk(present, dim=0).values
    kept[:, :present] = (found if columns is None else found[:, columns]).T + 0
    return kept


def _summing(device: torch.device) -> torch.dtype:
    """The type sums are added up in: Apple's GPUs have no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def _fixed_point(summed: Float[Tensor, "*axes"]) -> Int[Tensor, "*axes"]:
    known = summed.nan_to_num(0.0, 0.0, 0.0)  # samples that are not finite are dropped
    return (known.clamp(-LARGEST_SUM, LARGEST_SUM) * FIXED_POINT).round().long()


def _reduce_routed(
    activation: Routed,
    layout: Layout,
    keep_visual: int,
    keep_text: int,
    gate: Gate | None,
    ids: Int[Tensor, " sample"] | None,
) -> Reduction:
    """Expert by expert: the rows of each lie together, ordered by sample and role."""
    flat = activation.flat()
    width, experts = flat.values.shape[-1], activation.experts
    made = _Reducing(layout, flat.values, experts * width, (keep_visual, keep_text), gate, ids)
    roles = max(Role) + 1
    groups = layout.samples * roles
    group = (layout.sample * roles + layout.role).to(activation.device)
    key = torch.where(flat.expert < 0, experts, flat.expert) * groups + group[:, None]
    sizes = torch.bincount(key.flatten(), minlength=(experts + 1) * groups).cpu()
    order = key.flatten().argsort(stable=True)
    rows = flat.values.reshape(-1, width)
    counts = sizes[: experts * groups].reshape(experts, layout.samples, roles)
    start = 0
    for expert, of_expert in enumerate(counts):
        end = start + int(of_expert.sum())
        own = rows[order[start:end]]
        start, offset = end, 0
        for sample, of_role in enumerate(of_expert.tolist()):
            where: dict[Role, Rows] = {}
            for role in Role:
                if of_role[role] and role in COUNTED:
                    where[role] = slice(offset, offset + of_role[role])
                offset += of_role[role]
            if where:
                text = _joined([where[role] for role in layout.text_roles if role in where])
                made.take(own, sample, where, text, expert * width)
    routed = counts[:, :, [int(role) for role in COUNTED]].permute(1, 2, 0)
    return made.done(routed.contiguous())


def _joined(roles: Sequence[Rows]) -> slice | None:
    """The rows of one or both roles of text, which lie side by side."""
    there = [each for each in roles if isinstance(each, slice)]
    if not there:
        return None
    return slice(min(each.start for each in there), max(each.stop for each in there))


def reduce_everything(
    activation: Float[Tensor, "*axes neuron"], layout: Layout, keep_visual: int, keep_text: int
) -> Reduction:
    """Reduce one site's activations of one batch without a look at any number.

    For devices that run behind the program: it launches the same few operations whatever the
    activations are, and never waits. It finds what `reduce` finds without a gate. A kernel reads
    each activation once, where the device has one; of a sample that is not finite it finds other
    numbers, which are of no use either way.

    Args:
        activation: act_fn outputs.
        layout: Of the site's stream.
        keep_visual: How many of the largest visual activations to keep per sample.
        keep_text: How many of the largest eligible text activations.
    """
    flat = rearrange(activation, "... neuron -> (...) neuron")
    shape = (layout.samples, len(COUNTED), flat.shape[1])
    made = Reduction(
        flat.new_empty(shape),
        flat.new_empty(shape, dtype=torch.int32),
        flat.new_empty(shape, dtype=torch.int64),
        flat.new_ones(layout.samples, dtype=torch.bool),
        flat.new_empty(layout.samples, flat.shape[1], keep_visual),
        flat.new_empty(layout.samples, flat.shape[1], keep_text),
        None,
        layout.tokens,
    )
    kernels = kernels_for(flat.device, flat.dtype, max(keep_visual, keep_text))
    if kernels is None:
        _fill(made, flat, layout)
    else:
        kernels.reduce_site(
            flat,
            layout.order,
            layout.starts,
            maximum=made.maximum,
            fired=made.fired,
            total=made.total,
            finite=made.finite,
            visual=made.visual,
            text=made.text,
            visual_place=COUNTED.index(Role.VISUAL),
            text_places=sum(1 << COUNTED.index(role) for role in set(layout.text_roles)),
            largest=LARGEST_SUM,
            steps=float(FIXED_POINT),
        )
    return made


def _fill(made: Reduction, flat: Float[Tensor, "token neuron"], layout: Layout) -> None:
    for each in (made.maximum, made.visual, made.text):
        each.fill_(LOW)
    for each in (made.fired, made.total):
        each.zero_()
    for role, padded in layout.padded.items():
        rows, place = padded.of(flat), COUNTED.index(role)
        low = _filled(rows, padded, LOW)
        zero = _filled(rows, padded, 0)
        made.maximum[:, place] = low.amax(1) + 0
        made.fired[:, place] = (zero > 0).sum(1, dtype=torch.int32)
        summed = zero.sum(1, dtype=_summing(flat.device))
        made.total[:, place] = _fixed_point(summed)
        made.finite.logical_and_((summed.abs() < LARGEST_SUM).all(1))
        if role == Role.VISUAL:
            _put_largest(made.visual, low)
    if layout.padded_text is not None:
        rows = layout.padded_text.of(flat)
        _put_largest(made.text, _filled(rows, layout.padded_text, LOW))


def _filled(rows: Tensor, padded: Padded, value: float) -> Tensor:
    return rows if padded.missing is None else rows.masked_fill(padded.missing[..., None], value)


def _put_largest(
    kept: Float[Tensor, "sample neuron count"], rows: Float[Tensor, "sample token neuron"]
) -> None:
    present = min(kept.shape[2], rows.shape[1])
    kept[..., :present] = rows.topk(present, dim=1).values.transpose(1, 2) + 0

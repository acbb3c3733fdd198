# mypy: disable-error-code="import-not-found,import-untyped"
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803
"""What a scan does with one site on a GPU, in one launch each: reducing, and taking in.

Imported only where Triton is there. What comes out is what comes out without it, to the bit; only
the order in which a sum is added up in double precision is another one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 1024
"""Entries of lists of top samples that a program holds at a time."""

_LOW = tl.constexpr(float("-inf"))

_WHOLE = tl.constexpr(2.0**52)
"""From here on, numbers in double precision have no fraction."""

_TOKENS, _NEURONS, _WARPS = 4, 64, 1  # of eight shapes the fastest on an H200: no warp waits


def reduce_site(
    flat: Tensor,
    order: Tensor,
    starts: Tensor,
    *,
    maximum: Tensor,
    fired: Tensor,
    total: Tensor,
    finite: Tensor,
    visual: Tensor,
    text: Tensor,
    visual_place: int,
    text_places: int,
    largest: float,
    steps: float,
) -> None:
    """Reduce the activations of one site, each of which is read once.

    Args:
        flat: Activations, by token and neuron.
        order: Tokens by sample and role.
        starts: Where each sample's tokens of each role begin in it, and the end.
        maximum: By sample, role and neuron; filled like all of the following.
        fired: Likewise.
        total: Likewise.
        finite: By sample. Only False is written.
        visual: By sample, neuron and rank.
        text: Likewise.
        visual_place: Which of the roles is the visual one.
        text_places: Which are eligible text, as bits.
        largest: A sum beyond it is not finite.
        steps: Of fixed point, in 1.
    """
    samples, roles, width = maximum.shape
    with _on(flat.device):
        _reduce[(triton.cdiv(width, _NEURONS), samples)](
            flat,
            order,
            starts,
            maximum,
            fired,
            total,
            finite.view(torch.uint8),
            visual,
            text,
            width,
            *flat.stride(),
            LARGEST=largest,
            STEPS=steps,
            ROLES=roles,
            VISUAL=visual_place,
            TEXT=text_places,
            KEEP_VISUAL=visual.shape[2],
            KEEP_TEXT=text.shape[2],
            TOKENS=_TOKENS,
            NEURONS=_NEURONS,
            num_warps=_WARPS,
        )


@triton.jit
def _reduce(
    values,
    order,
    starts,
    maximum,
    fired,
    total,
    finite,
    visual,
    text,
    width,
    row_step,
    column_step,
    LARGEST: tl.constexpr,
    STEPS: tl.constexpr,
    ROLES: tl.constexpr,
    VISUAL: tl.constexpr,
    TEXT: tl.constexpr,
    KEEP_VISUAL: tl.constexpr,
    KEEP_TEXT: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    """One sample on some neurons. Each thread keeps its own running numbers until the end."""
    sample = tl.program_id(1)
    column = (tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)).to(tl.int64)
    inside = column < width
    column_at = values + column * column_step
    row_of = sample.to(tl.int64) * width + column
    none = tl.full((TOKENS, NEURONS), _LOW, tl.float32)
    a, b, c, d, e, f, g, h = none, none, none, none, none, none, none, none
    for place in tl.static_range(ROLES):
        if place != VISUAL:
            most, count, summed, a, b, c, d, e, f, g, h = _role(
                column_at, inside, order, starts, sample * ROLES + place, row_step,
                a, b, c, d, e, f, g, h, KEEP_TEXT * ((TEXT >> place) & 1), TOKENS, NEURONS,
            )  # fmt: skip
            _put_numbers(
                most, count, summed, maximum, fired, total, finite, sample, place, column, inside,
                width, LARGEST, STEPS, ROLES,
            )  # fmt: skip
    _put_largest(text, row_of, inside, a, b, c, d, e, f, g, h, KEEP_TEXT, TOKENS)
    most, count, summed, a, b, c, d, e, f, g, h = _role(
        column_at, inside, order, starts, sample * ROLES + VISUAL, row_step,
        none, none, none, none, none, none, none, none, KEEP_VISUAL, TOKENS, NEURONS,
    )  # fmt: skip
    _put_numbers(
        most, count, summed, maximum, fired, total, finite, sample, VISUAL, column, inside,
        width, LARGEST, STEPS, ROLES,
    )  # fmt: skip
    _put_largest(visual, row_of, inside, a, b, c, d, e, f, g, h, KEEP_VISUAL, TOKENS)


@triton.jit
def _role(
    column_at, inside, order, starts, group, row_step,
    a, b, c, d, e, f, g, h,
    KEEP: tl.constexpr, TOKENS: tl.constexpr, NEURONS: tl.constexpr,
):  # fmt: skip
    """Running numbers over the tokens of one role, and the largest values with those given."""
    start = tl.load(starts + group)
    stop = tl.load(starts + group + 1)
    most = tl.full((TOKENS, NEURONS), _LOW, tl.float32)
    count = tl.full((TOKENS, NEURONS), 0, tl.int32)
    summed = tl.full((TOKENS, NEURONS), 0, tl.float64)
    token = tl.arange(0, TOKENS)
    # The next values are asked for before the present ones are used.
    following = _values(column_at, inside, order, start + token, stop, row_step)
    for at in range(start, stop, TOKENS):
        value = following
        following = _values(column_at, inside, order, at + TOKENS + token, stop, row_step)
        there = (at + token < stop)[:, None] & inside[None, :]
        most = tl.maximum(most, value)
        count += (value > 0).to(tl.int32)
        summed += tl.where(there, value, 0.0).to(tl.float64)
        if KEEP > 0:
            value, a = tl.minimum(a, value), tl.maximum(a, value)
        if KEEP > 1:
            value, b = tl.minimum(b, value), tl.maximum(b, value)
        if KEEP > 2:
            value, c = tl.minimum(c, value), tl.maximum(c, value)
        if KEEP > 3:
            value, d = tl.minimum(d, value), tl.maximum(d, value)
        if KEEP > 4:
            value, e = tl.minimum(e, value), tl.maximum(e, value)
        if KEEP > 5:
            value, f = tl.minimum(f, value), tl.maximum(f, value)
        if KEEP > 6:
            value, g = tl.minimum(g, value), tl.maximum(g, value)
        if KEEP > 7:
            value, h = tl.minimum(h, value), tl.maximum(h, value)
    return most, count, summed, a, b, c, d, e, f, g, h


@triton.jit
def _values(column_at, inside, order, at, stop, row_step):
    """Activations of some tokens; -inf beyond the last one."""
    row = tl.load(order + at, mask=at < stop, other=0).to(tl.int64)
    there = (at < stop)[:, None] & inside[None, :]
    found = tl.load(column_at[None, :] + (row * row_step)[:, None], mask=there, other=_LOW)
    return found.to(tl.float32)


@triton.jit
def _put_numbers(
    most, count, summed, maximum, fired, total, finite, sample, place, column, inside, width,
    LARGEST: tl.constexpr, STEPS: tl.constexpr, ROLES: tl.constexpr,
):  # fmt: skip
    at = (sample * ROLES + place).to(tl.int64) * width + column
    largest = tl.max(most, 0)
    tl.store(maximum + at, tl.where(largest == 0, 0.0, largest), mask=inside)  # no -0.0
    tl.store(fired + at, tl.sum(count, 0), mask=inside)
    whole = tl.sum(summed, 0)
    is_finite = tl.abs(whole) < LARGEST  # not so of NaN
    step = tl.where(is_finite, whole, 0.0) * STEPS
    tl.store(total + at, _rounded(step).to(tl.int64), mask=inside)
    all_finite = tl.min(is_finite.to(tl.int32), 0)  # what is not inside sums up to 0
    tl.store(finite + sample, 0, mask=all_finite == 0)


@triton.jit
def _rounded(number):
    """To the nearest whole number, and to the even one of two."""
    shift = tl.where(number < 0, -_WHOLE, _WHOLE).to(tl.float64)
    return tl.where(tl.abs(number) < _WHOLE, (number + shift) - shift, number)


@triton.jit
def _put_largest(
    into, row_of, inside, a, b, c, d, e, f, g, h, KEEP: tl.constexpr, TOKENS: tl.constexpr
):
    """The largest of what the threads kept, in falling order: each has its own in that order."""
    row = tl.arange(0, TOKENS)[:, None]
    for rank in tl.static_range(KEEP):
        largest = tl.max(a, 0)
        at = into + row_of * KEEP + rank
        tl.store(at, tl.where(largest == 0, 0.0, largest), mask=inside)
        first = tl.min(tl.where(a == largest[None, :], row, TOKENS), 0)
        taken = row == first[None, :]
        a, b, c, d = (
            tl.where(taken, b, a),
            tl.where(taken, c, b),
            tl.where(taken, d, c),
            tl.where(taken, e, d),
        )
        e, f, g = tl.where(taken, f, e), tl.where(taken, g, f), tl.where(taken, h, g)


def take_in(
    ids: Tensor,
    keep: Tensor,
    *,
    maximum: Tensor,
    total: Tensor,
    visual: Tensor,
    text: Tensor,
    top_ids: Tensor,
    top_visual: Tensor,
    top_text: Tensor,
    top_value: Tensor,
    gate_value: Tensor,
    gate_id: Tensor,
    last: Tensor,
    role_maximum: Tensor,
    role_total: Tensor,
) -> None:
    """Take the samples of one site's batch into its lists and its summary by role, in place.

    Lists may lie in any order, with the gate and the place of what is last in them.

    Args:
        ids: Of the samples, int32.
        keep: False for samples that are to change nothing.
        maximum: Of the batch, by sample, role and neuron, like the total.
        total: Likewise.
        visual: The largest of the batch, by sample, neuron and rank, like the text.
        text: Likewise.
        top_ids: The lists, by neuron and entry.
        top_visual: Likewise.
        top_text: Likewise.
        top_value: Likewise.
        gate_value: Of the last entry, by neuron.
        gate_id: Likewise.
        last: Where in its list it lies.
        role_maximum: The summary, by role and neuron.
        role_total: Likewise.
    """
    width, n = top_ids.shape
    held = triton.next_power_of_2(n)
    neurons = max(1, _ENTRIES // held)
    with _on(top_ids.device):
        _take[(triton.cdiv(width, neurons), len(role_maximum) + 1)](
            ids,
            keep.view(torch.uint8),
            maximum,
            total,
            visual,
            text,
            top_ids,
            top_visual,
            top_text,
            top_value,
            gate_value,
            gate_id,
            last,
            role_maximum,
            role_total,
            len(ids),
            width,
            n,
            ROLES=len(role_maximum),
            SAMPLES=triton.next_power_of_2(len(ids)),
            KEEP_VISUAL=visual.shape[2],
            KEEP_TEXT=text.shape[2],
            HELD_VISUAL=triton.next_power_of_2(visual.shape[2]),
            HELD_TEXT=triton.next_power_of_2(text.shape[2]),
            HELD=held,
            NEURONS=neurons,
            num_warps=4,
        )


@triton.jit
def _take(
    ids,
    keep,
    maximum,
    total,
    visual,
    text,
    top_ids,
    top_visual,
    top_text,
    top_value,
    gate_value,
    gate_id,
    last,
    role_maximum,
    role_total,
    samples,
    width,
    n,
    ROLES: tl.constexpr,
    SAMPLES: tl.constexpr,
    KEEP_VISUAL: tl.constexpr,
    KEEP_TEXT: tl.constexpr,
    HELD_VISUAL: tl.constexpr,
    HELD_TEXT: tl.constexpr,
    HELD: tl.constexpr,
    NEURONS: tl.constexpr,
):
    """Some neurons: their summary of one role, or their lists."""
    column = (tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)).to(tl.int64)
    inside = column < width
    sample = tl.arange(0, SAMPLES)
    is_kept = tl.load(keep + sample, mask=sample < samples, other=0) != 0
    kept = is_kept[:, None] & inside[None, :]
    role = tl.program_id(1)
    if role < ROLES:
        row = (sample * ROLES + role).to(tl.int64)[:, None] * width + column[None, :]
        new = tl.max(tl.load(maximum + row, mask=kept, other=_LOW).to(tl.float32), 0)
        more = tl.sum(tl.load(total + row, mask=kept, other=0), 0)
        at = role.to(tl.int64) * width + column
        most = tl.load(role_maximum + at, mask=inside).to(tl.float32)
        summed = tl.load(role_total + at, mask=inside)
        tl.store(role_maximum + at, tl.maximum(most, new), mask=inside)
        tl.store(role_total + at, summed + more, mask=inside)
    else:
        row = sample.to(tl.int64)[:, None] * width + column[None, :]
        seen = tl.load(visual + row * KEEP_VISUAL, mask=kept, other=_LOW).to(tl.float32)
        said = tl.load(text + row * KEEP_TEXT, mask=kept, other=_LOW).to(tl.float32)
        value = tl.maximum(seen, said)
        id = tl.load(ids + sample, mask=sample < samples, other=0)[:, None]
        beaten = tl.load(gate_value + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        beaten_id = tl.load(gate_id + column, mask=inside, other=0)[None, :]
        passes = kept & ((value > beaten) | ((value == beaten) & (id < beaten_id)))
        # Gates only rise, so most programs have nothing to do.
        if tl.max(tl.max(passes.to(tl.int32), 1), 0) > 0:
            _enter(
                ids, keep, visual, text, top_ids, top_visual, top_text, top_value, gate_value,
                gate_id, last, samples, width, n, column, inside, KEEP_VISUAL, KEEP_TEXT,
                HELD_VISUAL, HELD_TEXT, HELD, NEURONS,
            )  # fmt: skip


@triton.jit
def _enter(
    ids, keep, visual, text, top_ids, top_visual, top_text, top_value, gate_value, gate_id, last,
    samples, width, n, column, inside,
    KEEP_VISUAL: tl.constexpr, KEEP_TEXT: tl.constexpr, HELD_VISUAL: tl.constexpr,
    HELD_TEXT: tl.constexpr, HELD: tl.constexpr, NEURONS: tl.constexpr,
):  # fmt: skip
    """The samples, one behind the other: what passes takes the place of the last entry."""
    beaten = tl.load(gate_value + column, mask=inside, other=0.0).to(tl.float32)
    beaten_id = tl.load(gate_id + column, mask=inside, other=0)
    place = tl.load(last + column, mask=inside, other=0).to(tl.int32)
    entry = tl.arange(0, HELD)[None, :]
    there = inside[:, None] & (entry < n)
    at = column[:, None] * n + entry
    # What lies beyond the list is never its last entry.
    listed = tl.load(top_value + at, mask=there, other=float("inf")).to(tl.float32)
    listed_ids = tl.load(top_ids + at, mask=there, other=-1)
    changed = tl.zeros((NEURONS,), tl.int32)
    for sample in range(samples):
        if tl.load(keep + sample) != 0:
            id = tl.load(ids + sample)
            row = tl.full((), sample, tl.int64) * width + column
            seen = tl.load(visual + row * KEEP_VISUAL, mask=inside).to(tl.float32)
            said = tl.load(text + row * KEEP_TEXT, mask=inside).to(tl.float32)
            value = tl.maximum(seen, said)
            passes = inside & ((value > beaten) | ((value == beaten) & (id < beaten_id)))
            if tl.max(passes.to(tl.int32), 0) > 0:
                changed |= passes.to(tl.int32)
                enters = passes[:, None] & (entry == place[:, None])
                listed = tl.where(enters, value[:, None], listed)
                listed_ids = tl.where(enters, id, listed_ids)
                into = column * n + place
                _copy(visual, row, top_visual, into, passes, KEEP_VISUAL, HELD_VISUAL)
                _copy(text, row, top_text, into, passes, KEEP_TEXT, HELD_TEXT)
                # The last entry is that with the highest id among those with the lowest value.
                beaten = tl.min(listed, 1)
                is_low = listed == beaten[:, None]
                beaten_id = tl.max(tl.where(is_low, listed_ids, -2), 1)
                is_last = is_low & (listed_ids == beaten_id[:, None])
                place = tl.min(tl.where(is_last, entry, HELD), 1)
    has_changed = changed != 0
    there = there & has_changed[:, None]
    tl.store(top_value + at, listed, mask=there)
    tl.store(top_ids + at, listed_ids, mask=there)
    tl.store(gate_value + column, beaten, mask=has_changed)
    tl.store(gate_id + column, beaten_id, mask=has_changed)
    tl.store(last + column, place.to(tl.int64), mask=has_changed)


@triton.jit
def _copy(source, row, target, into, passes, KEEP: tl.constexpr, HELD: tl.constexpr):
    rank = tl.arange(0, HELD)[None, :]
    there = passes[:, None] & (rank < KEEP)
    found = tl.load(source + row[:, None] * KEEP + rank, mask=there)
    tl.store(target + into[:, None] * KEEP + rank, found, mask=there)


def try_out(device: torch.device) -> None:
    """Compile both for a few numbers; whatever Triton raises where it cannot comes through."""
    one = torch.zeros(1, 1, device=device)
    index = torch.zeros(2, dtype=torch.int32, device=device)
    number, whole = one.new_zeros(1, 1, 1), index[:1].long()
    keep = torch.ones(1, dtype=torch.bool, device=device)
    reduce_site(
        one,
        index,
        index,
        maximum=number,
        fired=index[:1].reshape(1, 1, 1),
        total=whole.reshape(1, 1, 1),
        finite=keep,
        visual=number,
        text=number,
        visual_place=0,
        text_places=0,
        largest=1.0,
        steps=1.0,
    )
    take_in(
        index[:1],
        keep,
        maximum=number,
        total=whole,
        visual=number,
        text=number,
        top_ids=index[:1, None],
        top_visual=number,
        top_text=number,
        top_value=one,
        gate_value=one[0],
        gate_id=index[:1],
        last=whole,
        role_maximum=one,
        role_total=whole,
    )


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the device that is current, wherever their tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

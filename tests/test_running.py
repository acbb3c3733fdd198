from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handmade import token_map
from neuronlens.activations import Activation, Routed
from neuronlens.running import (
    ABSENT,
    BLOCKS,
    COUNTED,
    FIXED_POINT,
    FiringCounts,
    Gate,
    Incoming,
    Layout,
    Reduction,
    RoleSummary,
    SiteStatistics,
    TopSamples,
    block_of,
    reduce,
    reduce_everything,
)
from neuronlens.tokens import Role, TokenMap

N, KEEP_VISUAL, KEEP_TEXT = 3, 3, 2
RESPONSE = (Role.RESPONSE,)
READINGS = (RESPONSE, (Role.PROMPT,), (Role.PROMPT, Role.RESPONSE))
DOMAINS = ("", "road", "sea")
CPU, META = torch.device("cpu"), torch.device("meta")
EXPERTS, WIDTH = 3, 2

# Multiples of 1/16 below 4 are exact in bfloat16, and few enough to tie; so are their sums.
GRID = [k / 16 for k in (-63, -8, -1, 1, 2, 8, 24, 48, 63)]
VALUES = st.sampled_from([*GRID, 0.0, -0.0])
# Two of these tie in float32 alone, and three in bfloat16.
CLOSE = st.sampled_from([1.0, 1 + 2.0**-40, 1 + 2.0**-20, -1.0, -1 - 2.0**-40])
ANY = st.one_of(VALUES, CLOSE, st.floats(-60, 60))
ROLES = st.sampled_from([Role.SPECIAL, Role.PROMPT, *[Role.RESPONSE] * 2, *[Role.VISUAL] * 2])
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

Way = Literal["gated", "ungated", "everything"]
"""How a batch is reduced: with the running gate, without one, or without a look."""
LAID = ["right", "left", "packed", "woven"]
"""How samples lie on the token axis: padded, one behind the other, or token by token in turn."""


@dataclass(frozen=True)
class Case:
    """A sample as the model sees it: its tokens' roles and each one's activations.

    Of a routed site, also which experts each token ran through, with `values` behind one another.
    """

    position: int
    id: str
    domain: str
    roles: tuple[Role, ...]
    values: tuple[tuple[float, ...], ...]  # [token][neuron], or [token][chosen * neuron]
    experts: tuple[tuple[int, ...], ...] | None = None  # [token][chosen]


@st.composite
def cases(draw, most: int = 7, values: st.SearchStrategy[float] = VALUES) -> list[Case]:
    neurons = draw(st.integers(1, 3))
    side_by_side = draw(st.booleans())
    alike = draw(st.none() | st.lists(ROLES, min_size=1, max_size=5))
    made = []
    for position in draw(st.permutations(range(draw(st.integers(1, most))))):
        roles = alike or draw(st.lists(ROLES, min_size=1, max_size=5))
        roles = tuple(sorted(roles) if side_by_side else roles)
        row = st.tuples(*[values] * neurons)
        activations = tuple(draw(st.lists(row, min_size=len(roles), max_size=len(roles))))
        domain = draw(st.sampled_from(DOMAINS))
        made.append(Case(position, f"id-{position}", domain, roles, activations))
    return made


@st.composite
def routed_cases(draw, most: int = 6) -> list[Case]:
    """Each token runs through up to two of three experts."""
    made = []
    two = st.permutations(range(EXPERTS)).map(lambda order: tuple(order[:2]))
    chosen = st.one_of(two, two.map(lambda e: (e[0], -1)), st.just((-1, -1)))
    for position in draw(st.permutations(range(draw(st.integers(1, most))))):
        roles = tuple(draw(st.lists(ROLES, min_size=1, max_size=5)))
        experts = tuple(draw(chosen) for _ in roles)
        values = tuple(
            tuple(draw(VALUES) if e >= 0 else math.nan for e in each for _ in range(WIDTH))
            for each in experts
        )
        domain = draw(st.sampled_from(DOMAINS))
        made.append(Case(position, f"id-{position}", domain, roles, values, experts))
    return made


@st.composite
def cut(draw, items: list[Case], parts: int | None = None) -> list[list[Case]]:
    """The items in consecutive groups; a given number of them may be empty."""
    if parts is not None:
        edge = st.integers(0, len(items))
        edges = sorted(draw(st.lists(edge, min_size=parts - 1, max_size=parts - 1)))
    else:
        edges = sorted(draw(st.sets(st.integers(1, len(items)))))
    bounds = [0, *edges, len(items)]
    groups = [items[a:b] for a, b in pairwise(bounds)]
    return groups if parts is not None else [group for group in groups if group]


def empty(neurons: int, dtype: torch.dtype, experts: int = 0) -> SiteStatistics:
    return SiteStatistics(neurons, N, KEEP_VISUAL, KEEP_TEXT, dtype, experts)


def places(batch: list[Case], laid: str) -> tuple[tuple[int, ...], list[list[int]]]:
    """The shape of the token axes, and where each sample's tokens lie on the flat one."""
    lengths = [len(case.roles) for case in batch]
    longest = max(lengths) + 1
    if laid in ("right", "left"):
        starts = [
            row * longest + (longest - length if laid == "left" else 0)
            for row, length in enumerate(lengths)
        ]
        found = [list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]
        return (len(batch), longest), found
    if laid == "packed":
        order = [row for row, length in enumerate(lengths) for _ in range(length)]
    else:
        order = [row for turn in range(longest) for row, n in enumerate(lengths) if turn < n]
    return (len(order) + 2,), [
        [1 + at for at, each in enumerate(order) if each == row] for row in range(len(batch))
    ]


def batch_of(batch: list[Case], dtype: torch.dtype, laid: str) -> tuple[Activation, TokenMap]:
    """Padded activations and their map; padding holds what no statistic survives."""
    shape, where = places(batch, laid)
    count, width = math.prod(shape), len(batch[0].values[0])
    spoilt = torch.tensor([math.nan, 1e6, math.inf, -math.inf], dtype=dtype)
    # Where activations begin in memory, and whether they lie side by side, must not matter.
    more = 1 if laid in ("left", "woven") else 0
    values = spoilt[torch.arange(count + 1) % 4][:, None].repeat(1, width + more)[1:, :width]
    role = torch.full((count,), int(Role.PAD), dtype=torch.int8)
    # Padding belongs to a row, or, as room for images that are not there, to no sample.
    row_of = torch.arange(count) * len(batch) // count
    sample = row_of if laid in ("right", "left") else torch.full_like(row_of, -1)
    for row, (case, at) in enumerate(zip(batch, where, strict=True)):
        values[at] = torch.tensor(case.values, dtype=dtype)
        role[at] = torch.tensor([int(each) for each in case.roles], dtype=torch.int8)
        sample[at] = row
    nowhere = torch.full((*shape, 4), math.nan)
    role, sample = role.reshape(shape), sample.reshape(shape)
    tokens = TokenMap(role, sample, torch.full_like(sample, -1), nowhere)
    if batch[0].experts is None:
        return values.reshape(*shape, width), tokens
    expert = torch.arange(2 * count).reshape(count, 2) % EXPERTS  # padding is routed like any token
    for case, at in zip(batch, where, strict=True):
        expert[at] = torch.tensor(case.experts)
    values = values.contiguous()
    return Routed(values.reshape(*shape, 2, WIDTH), expert.reshape(*shape, 2), EXPERTS), tokens


def reduced(
    activation: Activation,
    tokens: TokenMap,
    samples: int = 1,
    text_roles: Sequence[Role] = RESPONSE,
    way: Way = "ungated",
    gate: tuple[Gate, torch.Tensor] | tuple[()] = (),
) -> Reduction:
    layout = Layout.of(tokens, samples, text_roles, CPU)
    if way == "everything":
        return reduce_everything(activation, layout, KEEP_VISUAL, KEEP_TEXT)
    return reduce(activation, layout, KEEP_VISUAL, KEEP_TEXT, *gate)


def streamed(
    batches: list[list[Case]],
    dtype: torch.dtype = torch.float32,
    laid: str = "right",
    way: Way = "gated",
    text_roles: Sequence[Role] = RESPONSE,
) -> SiteStatistics:
    first = next(case for batch in batches for case in batch)
    if first.experts is None:
        made = empty(len(first.values[0]), dtype)
    else:
        made = empty(EXPERTS * WIDTH, dtype, EXPERTS)
    for batch in batches:
        if batch:
            activation, tokens = batch_of(batch, dtype, laid)
            positions = [case.position for case in batch]
            gate = (made.top.gate, torch.tensor(positions, dtype=torch.int32))
            incoming = Incoming(
                positions,
                [case.id for case in batch],
                [case.domain for case in batch],
                torch.ones(len(batch), dtype=torch.bool),
            )
            given = gate if way == "gated" else ()
            made.update(reduced(activation, tokens, len(batch), text_roles, way, given), incoming)
    return made


def seen_by(case: Case, neuron: int, dtype: torch.dtype) -> dict[Role, list[float]]:
    """One neuron's activations on the tokens that ran through it, by role, as `dtype` has them."""
    of = defaultdict(list)
    rounded = torch.tensor(case.values, dtype=dtype).tolist()
    for token, (role, values) in enumerate(zip(case.roles, rounded, strict=True)):
        if case.experts is None:
            of[role].append(values[neuron] or 0.0)  # -0.0 is 0.0
        else:
            for slot, expert in enumerate(case.experts[token]):
                if expert == neuron // WIDTH:
                    of[role].append(values[slot * WIDTH + neuron % WIDTH] or 0.0)
    return of


def by_brute_force(
    data: list[Case], dtype: torch.dtype, text_roles: Sequence[Role] = RESPONSE
) -> dict[str, torch.Tensor]:
    """What a site's state should be: loops, sorted() and integers."""
    experts = EXPERTS if data[0].experts is not None else 0
    neurons, low = EXPERTS * WIDTH if experts else len(data[0].values[0]), -math.inf
    top_ids, top_visual, top_text = [], [], []
    maximum = torch.full((neurons, len(COUNTED)), low, dtype=dtype)
    total = torch.zeros((neurons, len(COUNTED)), dtype=torch.int64)
    shape = (len(DOMAINS), BLOCKS, len(COUNTED))
    fired = torch.zeros((neurons, *shape), dtype=torch.int64)
    tokens = torch.zeros(shape, dtype=torch.int64)
    routed = torch.zeros((experts, *shape), dtype=torch.int64)
    for case in data:
        key = DOMAINS.index(case.domain), block_of(case.id)
        for token, role in enumerate(case.roles):
            tokens[*key, COUNTED.index(role)] += 1
            for expert in case.experts[token] if case.experts else ():
                if expert >= 0:
                    routed[expert, *key, COUNTED.index(role)] += 1
    for neuron in range(neurons):
        ranked = []
        for case in data:
            of = seen_by(case, neuron, dtype)
            key = DOMAINS.index(case.domain), block_of(case.id)
            for place, role in enumerate(COUNTED):
                if of[role]:
                    maximum[neuron, place] = max(maximum[neuron, place].item(), *of[role])
                    total[neuron, place] += round(math.fsum(of[role]) * FIXED_POINT)
                    fired[neuron, *key, place] += sum(value > 0 for value in of[role])
            said = [value for role in text_roles for value in of[role]]
            visual = sorted(of[Role.VISUAL], reverse=True) + [low] * KEEP_VISUAL
            text = sorted(said, reverse=True) + [low] * KEEP_TEXT
            if max(visual[0], text[0]) > low:
                best = max(visual[0], text[0])
                ranked.append((-best, case.position, visual[:KEEP_VISUAL], text[:KEEP_TEXT]))
        filler = [(0, ABSENT, [low] * KEEP_VISUAL, [low] * KEEP_TEXT)] * N
        _, ids, visual, text = zip(*[*sorted(ranked), *filler][:N], strict=True)
        top_ids.append(ids)
        top_visual.append(visual)
        top_text.append(text)
    return {
        "top.ids": torch.tensor(top_ids, dtype=torch.int32),
        "top.visual": torch.tensor(top_visual, dtype=dtype),
        "top.text": torch.tensor(top_text, dtype=dtype),
        "role.maximum": maximum,
        "role.total": total,
        "fired": fired,
        "tokens": tokens,
        "routed": routed,
    }


def assert_same_bits(
    one: SiteStatistics | dict, other: SiteStatistics | dict, steps: int = 0
) -> None:
    """Equal to the bit; totals may differ by some steps where sums were added in another order."""
    one, other = (
        each if isinstance(each, dict) else each.state_dict(DOMAINS) for each in (one, other)
    )
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        if name == "role.total" and steps:
            assert (one[name] - other[name]).abs().max() <= steps
            continue
        assert torch.equal(one[name], other[name]), name
        assert torch.equal(torch.signbit(one[name]), torch.signbit(other[name])), name  # -0.0


def loaded(made: SiteStatistics) -> SiteStatistics:
    """The same, as it comes back from the disk."""
    state = {name: tensor.clone() for name, tensor in made.state_dict(DOMAINS).items()}
    return SiteStatistics.from_state_dict(state, DOMAINS)


def merged(*parts: SiteStatistics) -> SiteStatistics:
    made = empty(parts[0].firing.neurons, parts[0].top.visual.dtype, parts[0].firing.experts)
    for part in parts:
        made.merge(part)
    return made


# Streams.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_stream_in_any_batches_is_a_sort_by_value_then_id(dtype, data):
    samples, text_roles = data.draw(cases()), data.draw(st.sampled_from(READINGS))
    expected = by_brute_force(samples, dtype, text_roles)
    for way in ("gated", "ungated", "everything"):
        batches, laid = data.draw(cut(samples)), data.draw(st.sampled_from(LAID))
        assert_same_bits(streamed(batches, dtype, laid, way, text_roles), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_whether_a_reduction_looks_changes_no_more_than_a_step_of_each_sum(dtype, data):
    samples, text_roles = data.draw(cases(values=ANY)), data.draw(st.sampled_from(READINGS))
    expected = by_brute_force(samples, dtype, text_roles)
    once = streamed([samples], dtype, "right", "ungated", text_roles)
    # A sum in double precision may lie on the other side of a step's middle.
    assert_same_bits(once, expected, steps=len(samples))
    for way in ("gated", "ungated", "everything"):
        batches, laid = data.draw(cut(samples)), data.draw(st.sampled_from(LAID))
        made = streamed(batches, dtype, laid, way, text_roles)
        assert_same_bits(made, once, steps=len(samples) if way == "everything" else 0)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_routed_stream_counts_and_ranks_only_the_tokens_an_expert_ran_on(data):
    samples, text_roles = data.draw(routed_cases()), data.draw(st.sampled_from(READINGS))
    dtype = data.draw(st.sampled_from(DTYPES))
    expected = by_brute_force(samples, dtype, text_roles)
    for way in ("gated", "ungated"):
        batches, laid = data.draw(cut(samples)), data.draw(st.sampled_from(LAID))
        assert_same_bits(streamed(batches, dtype, laid, way, text_roles), expected)


def test_a_routed_sample_by_hand():
    """Expert 0 runs on both visual tokens, expert 1 on the response, expert 2 on none."""
    nan = math.nan
    values = torch.tensor([[[1.0], [-2.0]], [[3.0], [nan]], [[5.0], [nan]]])
    expert = torch.tensor([[0, 1], [0, -1], [1, -1]])
    activation = Routed(values, expert, 3)
    layout = Layout.of(token_map("vvr"), 1, RESPONSE, CPU)
    one = reduce(activation, layout, 2, 1)
    low = -math.inf
    made = SiteStatistics(3, 2, 2, 1, torch.float32, experts=3)
    made.update(one, Incoming([7], ["a"], [""], one.finite))
    assert made.top.ids.tolist() == [[7, ABSENT], [7, ABSENT], [ABSENT, ABSENT]]
    assert made.top.visual[:, 0].tolist() == [[3.0, 1.0], [-2.0, low], [low, low]]
    assert made.top.text[:, 0].tolist() == [[low], [5.0], [low]]
    state = made.state_dict([""])
    visual, response = COUNTED.index(Role.VISUAL), COUNTED.index(Role.RESPONSE)
    assert state["fired"].sum((1, 2))[:, [visual, response]].tolist() == [[2, 0], [0, 1], [0, 0]]
    assert state["routed"].sum((1, 2))[:, [visual, response]].tolist() == [[2, 0], [1, 1], [0, 0]]
    assert state["tokens"].sum((0, 1))[[visual, response]].tolist() == [2, 1]
    assert (made.roles.total[visual] / FIXED_POINT).tolist() == [4.0, -2.0, 0.0]
    assert made.roles.maximum[response].tolist() == [low, 5.0, low]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_only_the_sample_with_a_routed_activation_that_is_not_finite_is_flagged(bad):
    roles, experts = (Role.VISUAL,) * 2, ((0, 1), (2, -1))
    rows = ((1.0,) * 4, (1.0, 1.0, math.nan, math.nan))  # NaN where nothing was routed
    data = [Case(i, str(i), "", roles, rows, experts) for i in range(3)]
    data[1] = replace(data[1], values=((1.0, 1.0, bad, 1.0), rows[1]))
    activation, tokens = batch_of(data, torch.float32, "right")
    assert reduced(activation, tokens, 3).finite.tolist() == [True, False, True]


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_merging_routed_statistics_is_one_stream_also_where_an_expert_never_ran(data):
    samples = data.draw(routed_cases())
    shards = data.draw(cut(samples, parts=3))
    dtype = torch.float32
    whole = streamed([samples])
    a, b, c = (
        streamed([shard]) if shard else empty(EXPERTS * WIDTH, dtype, EXPERTS) for shard in shards
    )
    a = loaded(a) if data.draw(st.booleans()) else a
    assert_same_bits(merged(merged(a, b), c), whole)
    assert_same_bits(merged(a, merged(c, b)), whole)
    assert_same_bits(merged(c, a, b), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_role_longer_than_what_is_read_at_a_time_is_reduced_as_a_whole(dtype):
    # So wide a site is read in pieces of four tokens.
    width, length = 2**16, 11
    made = torch.randint(-63, 64, (2, length, width), generator=torch.Generator().manual_seed(0))
    activation = (made / 16).to(dtype)
    role = torch.full((2, length), int(Role.VISUAL), dtype=torch.int8)
    role[1, ::2] = int(Role.RESPONSE)
    sample = torch.arange(2)[:, None].expand(2, length)
    tokens = TokenMap(
        role, sample, torch.full((2, length), -1), torch.full((2, length, 4), math.nan)
    )
    found, dense = (reduced(activation, tokens, 2, way=way) for way in ("ungated", "everything"))
    for name in ("maximum", "fired", "total", "finite", "tokens"):
        assert torch.equal(getattr(found, name), getattr(dense, name)), name
    visual = activation[0].float()
    place = COUNTED.index(Role.VISUAL)
    assert torch.equal(found.maximum[0, place].float(), visual.amax(0))
    assert torch.equal(found.fired[0, place], (visual > 0).sum(0, dtype=torch.int32))
    assert torch.equal(found.total[0, place], (visual.double().sum(0) * FIXED_POINT).long())


def test_the_gate_lets_a_reduction_hold_only_what_enters():
    values = [((float(i % 2), -1.0 - i),) for i in range(8)]
    data = [Case(10 + i, str(i), "", (Role.VISUAL,), each) for i, each in enumerate(values)]
    made = streamed([data])
    assert (made.top.gate.value.tolist(), made.top.gate.id.tolist()) == ([1.0, -3.0], [15, 12])
    late = [
        replace(data[0], position=position, values=(each,))
        for position, each in ((20, (1.0, -3.0)), (4, (1.0, -3.0)), (21, (9.0, -9.0)))
    ]
    activation, tokens = batch_of(late, torch.float32, "right")
    ids = torch.tensor([case.position for case in late], dtype=torch.int32)
    one = reduced(activation, tokens, len(late), gate=(made.top.gate, ids))
    assert [each.tolist() for each in one.entries] == [[1, 1, 2], [0, 1, 0]]
    assert one.visual[:, 0].tolist() == [1.0, -3.0, 9.0]


# Without a look.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("laid", LAID)
def test_reducing_everything_never_looks_at_a_number(dtype, laid):
    data = [
        Case(0, "a", "road", (Role.VISUAL, Role.RESPONSE, Role.VISUAL), ((1.0, 2.0),) * 3),
        Case(1, "b", "sea", (Role.PROMPT,), ((1.0, 2.0),)),
    ]
    activation, tokens = batch_of(data, dtype, laid)
    layout = Layout.of(tokens, 2, RESPONSE, META)
    # There are no numbers on this device: what asks for one raises.
    found = reduce_everything(activation.to(META), layout, KEEP_VISUAL, KEEP_TEXT)
    expected = reduced(activation, tokens, 2, way="everything")
    for field in fields(Reduction):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, torch.Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), field.name
            assert one.device == (CPU if field.name == "tokens" else META), field.name
        else:
            assert one is other is None
    assert torch.equal(found.tokens, expected.tokens)
    made = SiteStatistics(2, N, KEEP_VISUAL, KEEP_TEXT, dtype, device=META)
    for keep in ([True, True], [False, True]):
        made.update(found, Incoming([0, 1], ["a", "b"], ["road", "sea"], torch.tensor(keep)))
    assert made.top.ids.device == made.firing.fired["sea"].device == META


# Lists.


@st.composite
def offers(draw) -> tuple[int, list[tuple[int, dict[int, tuple[list[float], list[float]]]]]]:
    """How many neurons, and samples in any order, each with what it has on some of them."""
    neurons = draw(st.integers(1, 3))
    number = st.sampled_from([-math.inf, -1.0, 0.5, 1.0, 1.0, 2.0])
    falling = st.lists(number, min_size=2, max_size=2).map(lambda v: sorted(v, reverse=True))
    kept = st.tuples(falling, falling)
    made = []
    for id in draw(st.permutations(range(draw(st.integers(0, 9))))):
        at = draw(st.lists(st.integers(0, neurons - 1), unique=True, max_size=neurons))
        made.append((id, {neuron: draw(kept) for neuron in at}))
    return neurons, made


def offered(top: TopSamples, id: int, entries: dict) -> None:
    neuron = torch.tensor(list(entries), dtype=torch.int64)
    visual, text = (
        torch.tensor([each[side] for each in entries.values()]).reshape(-1, 2) for side in (0, 1)
    )
    top.insert(id, neuron, visual, text)


def assert_lists(top: TopSamples, neurons: int, given: list) -> None:
    for neuron in range(neurons):
        ranked = sorted(
            (-max(visual[0], text[0]), id, visual, text)
            for id, entries in given
            for visual, text in [entries.get(neuron, ([-math.inf],) * 2)]
            if max(visual[0], text[0]) > -math.inf
        )[: top.n]
        present = len(ranked)
        assert top.ids[neuron].tolist() == [e[1] for e in ranked] + [ABSENT] * (top.n - present)
        assert top.value[neuron, :present].tolist() == [-e[0] for e in ranked]
        assert top.visual[neuron, :present].tolist() == [e[2] for e in ranked]
        assert top.text[neuron, :present].tolist() == [e[3] for e in ranked]
        for rest in (top.value, top.visual, top.text):
            assert (rest[neuron, present:] == -math.inf).all()


def assert_gate(top: TopSamples, neurons: int, given: list) -> None:
    """The gate is the last entry of the lists, though they may lie in any order."""
    value, id = top.gate.value.tolist(), top.gate.id.tolist()
    for neuron in range(neurons):
        ranked = sorted(
            (-max(visual[0], text[0]), number)
            for number, entries in given
            for visual, text in [entries.get(neuron, ([-math.inf],) * 2)]
            if max(visual[0], text[0]) > -math.inf
        )[: top.n]
        last = ranked[-1] if len(ranked) == top.n else (math.inf, ABSENT)
        assert (-value[neuron], id[neuron]) == last


@settings(deadline=None, max_examples=150)
@given(data=st.data(), n=st.integers(1, 4))
def test_inserting_whether_it_passes_the_gate_or_not_is_a_sort(data, n):
    neurons, given_ = data.draw(offers())
    top = TopSamples(neurons, n, 2, 2, torch.float32)
    for done, (id, entries) in enumerate(given_, 1):
        offered(top, id, entries)
        assert_gate(top, neurons, given_[:done])
        if data.draw(st.booleans()):  # a look puts the lists in order, which changes no result
            assert_lists(top, neurons, given_[:done])
    assert_lists(top, neurons, given_)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), n=st.integers(1, 4))
def test_inserts_updates_and_merges_in_any_turn_are_a_sort(data, n):
    neurons, given_ = data.draw(offers())
    top = TopSamples(neurons, n, 2, 2, torch.float32)
    for id, entries in given_:
        how = data.draw(st.sampled_from(["insert", "update", "merge"]))
        if how == "update":
            visual, text = (torch.full((2, neurons, 2), -math.inf) for _ in range(2))
            for neuron, kept in entries.items():
                visual[0, neuron], text[0, neuron] = map(torch.tensor, kept)
            visual[1] = 9.0  # of a sample that is skipped
            top.update(torch.tensor([id, 90]), visual, text, torch.tensor([True, False]))
        elif how == "merge":
            other = TopSamples(neurons, n, 2, 2, torch.float32)
            offered(other, id, entries)
            top.merge(other)
        else:
            offered(top, id, entries)
    assert_lists(top, neurons, given_)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), n=st.integers(1, 4))
def test_lists_made_of_others_hold_the_same_and_share_nothing(data, n):
    neurons, given_ = data.draw(offers())
    top = TopSamples(neurons, n, 2, 2, torch.float32)
    for id, entries in given_:
        offered(top, id, entries)
    again = TopSamples.of(top.ids, top.visual, top.text)
    assert_lists(again, neurons, given_)
    assert_gate(again, neurons, given_)
    better = {neuron: ([9.0, 8.0], [7.0, 6.0]) for neuron in range(neurons)}
    offered(again, 50, better)
    assert_lists(top, neurons, given_)
    assert_lists(again, neurons, [*given_, (50, better)])


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_merging_is_associative_and_commutative_and_equals_one_stream(dtype, data):
    samples = data.draw(cases())
    shards = data.draw(cut(samples, parts=3))
    whole = streamed([samples], dtype)
    neurons = len(samples[0].values[0])
    a, b, c = (streamed([shard], dtype) if shard else empty(neurons, dtype) for shard in shards)
    if data.draw(st.booleans()):
        a, b, c = loaded(a), loaded(b), loaded(c)
    assert_same_bits(merged(merged(a, b), c), whole)
    assert_same_bits(merged(a, merged(b, c)), whole)
    assert_same_bits(merged(c, b, a), whole)
    assert_same_bits(merged(b, a, c), whole)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_merging_leaves_what_was_merged_as_it_was(data):
    one, other = data.draw(cases(3)), data.draw(cases(3))
    neurons = min(len(one[0].values[0]), len(other[0].values[0]))
    one, other = (
        [replace(case, values=tuple(row[:neurons] for row in case.values)) for case in side]
        for side in (one, other)
    )
    other = [replace(case, position=case.position + 100, id=f"b{case.id}") for case in other]
    target, taken = streamed([one]), streamed([other])
    target.merge(taken)
    target.merge(streamed([[replace(other[0], position=500, id="late", domain="sea")]]))
    assert_same_bits(taken, streamed([other]))


@settings(deadline=None, max_examples=25)
@given(samples=st.one_of(cases(), routed_cases()))
def test_a_state_dict_gives_the_statistics_back(samples):
    made = streamed([samples])
    assert_same_bits(loaded(made), made)


@pytest.mark.parametrize("experts", [0, EXPERTS], ids=["dense", "routed"])
def test_statistics_without_a_sample_come_back_and_change_nothing(experts):
    nothing = empty(6, torch.float32, experts)
    state = nothing.state_dict([])
    assert state["fired"].shape == (6, 0, BLOCKS, len(COUNTED))
    assert state["routed"].shape == (experts, 0, BLOCKS, len(COUNTED))
    back = SiteStatistics.from_state_dict(state, [])
    assert_same_bits(back, nothing)
    roles, rows = (Role.VISUAL,), ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0),)
    one = Case(0, "a", "road", roles, rows)
    if experts:
        one = replace(one, values=(rows[0][:4],), experts=((0, 2),))
    made, expected = streamed([[one]]), streamed([[one]])
    made.merge(back)
    back.merge(expected)
    assert_same_bits(made, expected)
    assert_same_bits(back, expected)


@settings(deadline=None, max_examples=10)
@given(samples=cases())
def test_restored_statistics_go_on_as_if_they_had_never_stopped(samples):
    first, rest = samples[:1], samples[1:]
    restored = loaded(streamed([first]))
    if rest:
        restored.merge(streamed([rest]))
    assert_same_bits(restored, streamed([first, rest]))


def some_reduction():
    tokens = token_map("vvrrp")
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    return reduced(values, tokens)


def test_a_state_dict_stays_as_it_was_when_the_statistics_go_on():
    made = empty(1, torch.float32)
    made.update(some_reduction(), Incoming([0], ["a"], [""], torch.tensor([True])))
    state = made.state_dict(DOMAINS)
    before = {name: tensor.clone() for name, tensor in state.items()}
    made.update(some_reduction(), Incoming([1], ["b"], [""], torch.tensor([True])))
    made.merge(streamed([[Case(7, "c", "sea", (Role.VISUAL,), ((9.0,),))]]))
    assert_same_bits(state, before)


def test_going_on_from_a_state_dict_leaves_it_as_it_was():
    made = empty(1, torch.float32)
    made.update(some_reduction(), Incoming([0], ["a"], [""], torch.tensor([True])))
    state = {name: tensor.clone() for name, tensor in made.state_dict(DOMAINS).items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    restored = SiteStatistics.from_state_dict(state, DOMAINS)
    restored.update(some_reduction(), Incoming([1], ["b"], [""], torch.tensor([True])))
    assert_same_bits(state, before)


def test_saving_does_not_add_the_domains_it_was_asked_for():
    made = streamed([[Case(0, "a", "road", (Role.VISUAL,), ((1.0,),))]])
    made.state_dict(DOMAINS)
    assert set(made.firing.fired) == {"road"}


def test_three_tokens_by_hand():
    tokens = token_map("vrp")
    values = torch.tensor([[-0.5, 2.0], [0.25, -1.0], [7.0, 7.0]])
    layout, low = Layout.of(tokens, 1, RESPONSE, CPU), -math.inf
    one, everything = reduce(values, layout, 2, 2), reduce_everything(values, layout, 2, 2)
    assert [each.tolist() for each in one.entries] == [[0, 0], [0, 1]]
    assert one.visual.tolist() == [[-0.5, low], [2.0, low]]
    assert one.text.tolist() == [[0.25, low], [-1.0, low]]
    assert everything.entries is None
    assert everything.visual.tolist() == [one.visual.tolist()]
    assert everything.text.tolist() == [one.text.tolist()]
    assert one.maximum.tolist() == [[[low, low], [7.0, 7.0], [0.25, -1.0], [-0.5, 2.0]]]
    assert one.fired.tolist() == [[[0, 0], [1, 1], [1, 0], [0, 1]]]
    assert one.tokens.tolist() == [[0, 1, 1, 1]]
    assert (one.total / FIXED_POINT).tolist() == [[[0, 0], [7.0, 7.0], [0.25, -1.0], [-0.5, 2.0]]]
    assert one.finite.tolist() == [True]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_of_equal_values_the_lower_id_stays_whatever_comes_first(n):
    for order in ([4, 0, 2, 3, 1], [0, 1, 2, 3, 4], [3, 4, 1, 0, 2]):
        top = TopSamples(1, n, 1, 1, torch.float32)
        for position in order:
            seen, said = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), -1.0)
            top.update(torch.tensor([position]), seen, said)
        assert top.ids.tolist() == [list(range(n))]


@pytest.mark.parametrize("how", ["insert", "update"])
def test_values_that_differ_only_in_double_precision_are_not_tied(how):
    top = TopSamples(1, 2, 1, 1, torch.float64)
    values = [-1.0, -1 - 2.0**-40, -1 + 2.0**-40]
    for position, value in enumerate(values):
        seen, said = (torch.tensor([[each]], dtype=torch.float64) for each in (value, -9.0))
        if how == "insert":
            top.insert(position, torch.tensor([0]), seen, said)
        else:
            top.update(torch.tensor([position]), seen[None], said[None])
    assert top.ids.tolist() == [[2, 0]]
    assert top.value.tolist() == [[values[2], values[0]]]


def test_a_negative_maximum_is_a_maximum():
    data = [Case(i, str(i), "", (Role.VISUAL,), ((-1.0 - i,),)) for i in range(5)]
    made = streamed([data])
    assert made.top.ids.tolist() == [[0, 1, 2]]
    assert made.top.value.tolist() == [[-1.0, -2.0, -3.0]]
    assert made.roles.maximum[COUNTED.index(Role.VISUAL)].tolist() == [-1.0]


def test_a_sample_without_eligible_tokens_enters_no_list_but_is_counted():
    made = streamed(
        [
            [
                Case(0, "text only", "", (Role.RESPONSE,), ((1.0,),)),
                Case(1, "prompt only", "", (Role.PROMPT, Role.SPECIAL), ((9.0,), (9.0,))),
                Case(2, "visual only", "", (Role.VISUAL,), ((2.0,),)),
            ]
        ]
    )
    assert made.top.ids.tolist() == [[2, 0, ABSENT]]
    assert made.top.value.tolist() == [[2.0, 1.0, -math.inf]]
    assert made.firing.tokens[""].sum(0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", [Role.VISUAL, Role.RESPONSE, Role.PROMPT, Role.SPECIAL], ids=str)
@pytest.mark.parametrize("way", ["ungated", "everything"])
def test_only_the_sample_with_an_activation_that_is_not_finite_is_flagged(way, bad, role):
    data = [Case(i, str(i), "", (Role.VISUAL, role), ((1.0, 1.0), (1.0, 1.0))) for i in range(3)]
    data[1] = Case(1, "1", "", (Role.VISUAL, role), ((1.0, 1.0), (1.0, bad)))
    activation, tokens = batch_of(data, torch.float32, "right")
    reduction = reduced(activation, tokens, 3, way=way)
    assert reduction.finite.tolist() == [True, False, True]
    made = empty(2, torch.float32)
    made.update(reduction, Incoming([0, 1, 2], list("012"), [""] * 3, reduction.finite))
    assert_same_bits(made, streamed([[data[0], data[2]]]))


@pytest.mark.parametrize("way", ["ungated", "everything"])
def test_a_batch_of_which_nothing_is_kept_changes_nothing(way):
    data = [Case(0, "0", "", (Role.VISUAL, Role.RESPONSE), ((1.0,), (2.0,)))]
    activation, tokens = batch_of(data, torch.float32, "right")
    reduction = reduced(activation, tokens, way=way)
    made = empty(1, torch.float32)
    made.update(reduction, Incoming([0], ["0"], [""], torch.tensor([False])))
    assert_same_bits(made, empty(1, torch.float32))


@settings(deadline=None, max_examples=25)
@given(
    values=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40),
    order=st.randoms(use_true_random=False),
)
def test_means_are_exact_under_merging_and_near_the_true_mean(values, order):
    def summary(some):
        made = RoleSummary(1, torch.float32)
        for value in some:
            one = reduced(torch.tensor([[value]]), token_map("v"))
            made.update(one.maximum, one.total)
        return made

    whole = summary(values)
    shuffled = order.sample(values, len(values))
    part = summary(shuffled[: len(values) // 2])
    part.merge(summary(shuffled[len(values) // 2 :]))
    assert torch.equal(part.total, whole.total)
    assert torch.equal(part.maximum, whole.maximum)
    mean = whole.total[COUNTED.index(Role.VISUAL)].item() / FIXED_POINT / len(values)
    assert mean == pytest.approx(math.fsum(values) / len(values), abs=0.5 / FIXED_POINT)


def test_sums_are_rounded_to_the_nearest_step_and_added_in_double_precision():
    steps = torch.tensor([[0.75], [-0.75], [0.25]]) / FIXED_POINT
    for step, expected in zip(steps, (1, -1, 0), strict=True):
        one = reduced(step[None], token_map("v"))
        assert one.total[0, COUNTED.index(Role.VISUAL)].tolist() == [expected]
    # In float32, adding 2**-10 to 2**14 changes nothing.
    many = torch.tensor([[2.0**14], *[[2.0**-10]] * 1024])
    one = reduced(many, token_map("v" * 1025))
    assert one.total[0, COUNTED.index(Role.VISUAL)].tolist() == [(2**14 + 1) * FIXED_POINT]


def test_firing_is_counted_by_domain_block_and_role():
    counts = FiringCounts(1)
    of_first, seen_first = [[0], [1], [2], [3]], [1, 1, 2, 5]
    of_second, seen_second = [[1], [0], [0], [1]], [1, 0, 0, 1]
    of_third, seen_third = [[0], [0], [0], [4]], [0, 0, 0, 4]
    # Two samples of one block, and one of another, in one batch.
    counts.update(
        "road",
        torch.tensor([3, 7, 3]),
        torch.tensor([of_first, of_third, of_second]),
        torch.tensor([seen_first, seen_third, seen_second]),
    )
    counts.update("sea", torch.tensor([0]), torch.tensor([of_third]), torch.tensor([seen_third]))
    assert counts.fired["road"][3].tolist() == [[1], [1], [2], [4]]
    assert counts.tokens["road"][3].tolist() == [2, 1, 2, 6]
    assert counts.fired["road"][7].tolist() == of_third
    assert counts.fired["sea"][0].tolist() == of_third
    assert counts.fired["road"].sum() + counts.fired["sea"].sum() == 16


def test_a_domain_that_is_opened_again_keeps_its_counts():
    counts = FiringCounts(2, experts=1)
    counts.open("road")
    assert counts.fired["road"].shape == (BLOCKS, len(COUNTED), 2)
    assert counts.routed["road"].shape == (BLOCKS, len(COUNTED), 1)
    counts.update(
        "road",
        torch.tensor([1]),
        torch.ones(1, len(COUNTED), 2, dtype=torch.int32),
        torch.ones(1, len(COUNTED), dtype=torch.int64),
        torch.ones(1, len(COUNTED), 1, dtype=torch.int64),
    )
    counts.open("road")
    assert (counts.fired["road"].sum(), counts.tokens["road"].sum()) == (8, 4)
    assert counts.routed["road"].sum() == 4


def test_the_block_of_a_sample_is_the_same_for_ever():
    names = ("scene-5-0", "scene-5-1", "coco/000000000139", "é")
    assert [block_of(name) for name in names] == [4, 8, 15, 10]
    assert {block_of(str(i)) for i in range(400)} == set(range(BLOCKS))


def test_a_site_of_one_modality_has_no_text():
    made = streamed([[Case(0, "a", "", (Role.SPECIAL, Role.VISUAL), ((5.0,), (3.0,)))]])
    assert made.top.value[0, 0] == 3.0
    assert made.top.text.max() == -math.inf
    assert made.roles.maximum[COUNTED.index(Role.RESPONSE)].tolist() == [-math.inf]


@pytest.mark.parametrize("way", ["ungated", "everything"])
def test_a_sum_that_would_overflow_is_not_finite(way):
    roles = torch.tensor([Role.VISUAL, Role.VISUAL, Role.VISUAL], dtype=torch.int8)
    sample = torch.tensor([0, 0, 1])
    nothing = torch.full((3,), -1), torch.full((3, 4), float("nan"))
    tokens = TokenMap(roles, sample, *nothing)
    made = reduced(torch.tensor([[1e12], [1e12], [1.0]]), tokens, 2, way=way)
    assert made.finite.tolist() == [False, True]

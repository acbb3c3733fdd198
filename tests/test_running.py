from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handmade import token_map
from neuronlens.running import (
    ABSENT,
    BLOCKS,
    COUNTED,
    FIXED_POINT,
    FiringCounts,
    Layout,
    Reduction,
    RoleSummary,
    SiteStatistics,
    TopSamples,
    block_of,
    reduce,
)
from neuronlens.tokens import Role, TokenMap

N, KEEP_VISUAL, KEEP_TEXT = 3, 3, 2
TEXT_ROLES = (Role.RESPONSE,)
DOMAINS = ("", "road", "sea")
CPU = torch.device("cpu")

# Multiples of 1/16 below 4 are exact in bfloat16, and few enough to tie.
GRID = [k / 16 for k in (-63, -8, -1, 1, 2, 8, 24, 48, 63)]
VALUES = st.sampled_from([*GRID, 0.0, -0.0])
ROLES = st.sampled_from([Role.SPECIAL, Role.PROMPT, *[Role.RESPONSE] * 2, *[Role.VISUAL] * 2])


@dataclass(frozen=True)
class Case:
    """A sample as the model sees it: its tokens' roles and each one's activations."""

    position: int
    id: str
    domain: str
    roles: tuple[Role, ...]
    values: tuple[tuple[float, ...], ...]  # [token][neuron]


@st.composite
def cases(draw, most: int = 7) -> list[Case]:
    neurons = draw(st.integers(1, 3))
    count = draw(st.integers(1, most))
    made = []
    for position in draw(st.permutations(range(count))):
        roles = tuple(draw(st.lists(ROLES, min_size=0, max_size=5)))
        row = st.tuples(*[VALUES] * neurons)
        values = tuple(draw(st.lists(row, min_size=len(roles), max_size=len(roles))))
        if not roles:
            roles, values = (Role.SPECIAL,), ((0.5,) * neurons,)
        domain = draw(st.sampled_from(DOMAINS))
        made.append(Case(position, f"id-{position}", domain, roles, values))
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


def empty(neurons: int, dtype: torch.dtype) -> SiteStatistics:
    return SiteStatistics(neurons, N, KEEP_VISUAL, KEEP_TEXT, dtype)


def batch_of(batch: list[Case], dtype: torch.dtype, left: bool) -> tuple[torch.Tensor, TokenMap]:
    """Padded activations and their map; padding holds what no statistic survives."""
    longest = max(len(case.roles) for case in batch) + 1
    activation = torch.full((len(batch), longest, len(batch[0].values[0])), 1e6, dtype=dtype)
    activation[0, 0 if left else -1] = float("nan")
    role = torch.full((len(batch), longest), int(Role.PAD), dtype=torch.int8)
    for row, case in enumerate(batch):
        at = slice(longest - len(case.roles), longest) if left else slice(0, len(case.roles))
        activation[row, at] = torch.tensor(case.values, dtype=dtype)
        role[row, at] = torch.tensor([int(each) for each in case.roles], dtype=torch.int8)
    sample = torch.arange(len(batch))[:, None].expand_as(role)
    nowhere = torch.full((*role.shape, 4), float("nan"))
    return activation, TokenMap(role, sample, torch.full_like(sample, -1), nowhere)


def reduced(activation: torch.Tensor, tokens: TokenMap, samples: int = 1) -> Reduction:
    return reduce(activation, Layout.of(tokens, samples, TEXT_ROLES, CPU), KEEP_VISUAL, KEEP_TEXT)


def streamed(
    batches: list[list[Case]], dtype: torch.dtype = torch.float32, left: bool = False
) -> SiteStatistics:
    made = empty(len(next(case for batch in batches for case in batch).values[0]), dtype)
    for batch in batches:
        if batch:
            activation, tokens = batch_of(batch, dtype, left)
            made.update(
                reduced(activation, tokens, len(batch)),
                [case.position for case in batch],
                [case.id for case in batch],
                [case.domain for case in batch],
                torch.ones(len(batch), dtype=torch.bool),
            )
    return made


def by_brute_force(data: list[Case], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a site's state should be: loops, sorted() and integers."""
    neurons, low = len(data[0].values[0]), -math.inf
    top_ids, top_visual, top_text = [], [], []
    maximum = [[low] * neurons for _ in COUNTED]
    total = [[0] * neurons for _ in COUNTED]
    fired = defaultdict(int)
    tokens = defaultdict(int)
    for neuron in range(neurons):
        ranked = []
        for case in data:
            of = defaultdict(list)
            for role, values in zip(case.roles, case.values, strict=True):
                of[role].append(values[neuron] or 0.0)  # -0.0 is 0.0
            for place, role in enumerate(COUNTED):
                maximum[place][neuron] = max([maximum[place][neuron], *of[role]])
                total[place][neuron] += round(sum(of[role]) * FIXED_POINT)
                key = case.domain, block_of(case.id), place
                fired[*key, neuron] += sum(value > 0 for value in of[role])
                tokens[key] += len(of[role]) if neuron == 0 else 0
            visual = sorted(of[Role.VISUAL], reverse=True) + [low] * KEEP_VISUAL
            text = sorted(of[Role.RESPONSE], reverse=True) + [low] * KEEP_TEXT
            if max(visual[0], text[0]) > low:
                best = max(visual[0], text[0])
                ranked.append((-best, case.position, visual[:KEEP_VISUAL], text[:KEEP_TEXT]))
        filler = [(0, ABSENT, [low] * KEEP_VISUAL, [low] * KEEP_TEXT)] * N
        _, ids, visual, text = zip(*[*sorted(ranked), *filler][:N], strict=True)
        top_ids.append(ids)
        top_visual.append(visual)
        top_text.append(text)
    shape = (len(DOMAINS), BLOCKS, len(COUNTED))
    counted = torch.zeros((*shape, neurons), dtype=torch.int64)
    for (domain, block, place, neuron), count in fired.items():
        counted[DOMAINS.index(domain), block, place, neuron] = count
    seen = torch.zeros(shape, dtype=torch.int64)
    for (domain, block, place), count in tokens.items():
        seen[DOMAINS.index(domain), block, place] = count
    return {
        "top.ids": torch.tensor(top_ids, dtype=torch.int32),
        "top.visual": torch.tensor(top_visual, dtype=dtype),
        "top.text": torch.tensor(top_text, dtype=dtype),
        "role.maximum": torch.tensor(maximum, dtype=dtype),
        "role.total": torch.tensor(total),
        "fired": counted,
        "tokens": seen,
    }


def assert_same_bits(one: SiteStatistics | dict, other: SiteStatistics | dict) -> None:
    one, other = (
        each if isinstance(each, dict) else each.state_dict(DOMAINS) for each in (one, other)
    )
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
        assert torch.equal(torch.signbit(one[name]), torch.signbit(other[name])), name  # -0.0


def merged(*parts: SiteStatistics) -> SiteStatistics:
    neurons, dtype = parts[0].firing.neurons, parts[0].top.visual.dtype
    made = empty(neurons, dtype)
    for part in parts:
        made.merge(part)
    return made


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_stream_in_any_batches_is_a_sort_by_value_then_id(dtype, left, data):
    samples = data.draw(cases())
    batches = data.draw(cut(samples))
    assert_same_bits(streamed(batches, dtype, left), by_brute_force(samples, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_merging_is_associative_and_commutative_and_equals_one_stream(dtype, data):
    samples = data.draw(cases())
    shards = data.draw(cut(samples, parts=3))
    whole = streamed([samples], dtype)
    neurons = len(samples[0].values[0])
    a, b, c = (streamed([shard], dtype) if shard else empty(neurons, dtype) for shard in shards)
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
@given(samples=cases())
def test_a_state_dict_gives_the_statistics_back(samples):
    made = streamed([samples])
    state = {name: tensor.clone() for name, tensor in made.state_dict(DOMAINS).items()}
    assert_same_bits(SiteStatistics.from_state_dict(state, DOMAINS), made)


@settings(deadline=None, max_examples=10)
@given(samples=cases())
def test_restored_statistics_go_on_as_if_they_had_never_stopped(samples):
    first, rest = samples[:1], samples[1:]
    half = streamed([first])
    state = {name: tensor.clone() for name, tensor in half.state_dict(DOMAINS).items()}
    restored = SiteStatistics.from_state_dict(state, DOMAINS)
    if rest:
        restored.merge(streamed([rest]))
    assert_same_bits(restored, streamed([first, rest]))


def some_reduction():
    tokens = token_map("vvrrp")
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    return reduced(values, tokens)


def test_a_state_dict_stays_as_it_was_when_the_statistics_go_on():
    made = empty(1, torch.float32)
    made.update(some_reduction(), [0], ["a"], [""], torch.tensor([True]))
    state = made.state_dict(DOMAINS)
    before = {name: tensor.clone() for name, tensor in state.items()}
    made.update(some_reduction(), [1], ["b"], [""], torch.tensor([True]))
    made.merge(streamed([[Case(7, "c", "sea", (Role.VISUAL,), ((9.0,),))]]))
    assert_same_bits(state, before)


def test_going_on_from_a_state_dict_leaves_it_as_it_was():
    made = empty(1, torch.float32)
    made.update(some_reduction(), [0], ["a"], [""], torch.tensor([True]))
    state = {name: tensor.clone() for name, tensor in made.state_dict(DOMAINS).items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    restored = SiteStatistics.from_state_dict(state, DOMAINS)
    restored.update(some_reduction(), [1], ["b"], [""], torch.tensor([True]))
    assert_same_bits(state, before)


def test_saving_does_not_add_the_domains_it_was_asked_for():
    made = streamed([[Case(0, "a", "road", (Role.VISUAL,), ((1.0,),))]])
    made.state_dict(DOMAINS)
    assert set(made.firing.fired) == {"road"}


def test_three_tokens_by_hand():
    tokens = token_map("vrp")
    values = torch.tensor([[-0.5, 2.0], [0.25, -1.0], [7.0, 7.0]])
    one = reduce(values, Layout.of(tokens, 1, TEXT_ROLES, CPU), 2, 2)
    low = -math.inf
    assert one.visual.tolist() == [[[-0.5, low], [2.0, low]]]
    assert one.text.tolist() == [[[0.25, low], [-1.0, low]]]
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
def test_only_the_sample_with_an_activation_that_is_not_finite_is_flagged(bad, role):
    data = [Case(i, str(i), "", (Role.VISUAL, role), ((1.0, 1.0), (1.0, 1.0))) for i in range(3)]
    data[1] = Case(1, "1", "", (Role.VISUAL, role), ((1.0, 1.0), (1.0, bad)))
    activation, tokens = batch_of(data, torch.float32, left=False)
    reduction = reduced(activation, tokens, 3)
    assert reduction.finite.tolist() == [True, False, True]
    made = empty(2, torch.float32)
    made.update(reduction, [0, 1, 2], list("012"), [""] * 3, reduction.finite)
    assert_same_bits(made, streamed([[data[0], data[2]]]))


def test_a_batch_of_which_nothing_is_kept_changes_nothing():
    data = [Case(0, "0", "", (Role.VISUAL, Role.RESPONSE), ((1.0,), (2.0,)))]
    activation, tokens = batch_of(data, torch.float32, left=False)
    reduction = reduced(activation, tokens)
    made = empty(1, torch.float32)
    made.update(reduction, [0], ["0"], [""], torch.tensor([False]))
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
    counts.update("road", 3, torch.tensor([[0], [1], [2], [3]]), torch.tensor([1, 1, 2, 5]))
    counts.update("road", 3, torch.tensor([[1], [0], [0], [1]]), torch.tensor([1, 0, 0, 1]))
    counts.update("sea", 0, torch.tensor([[0], [0], [0], [4]]), torch.tensor([0, 0, 0, 4]))
    assert counts.fired["road"][3].tolist() == [[1], [1], [2], [4]]
    assert counts.tokens["road"][3].tolist() == [2, 1, 2, 6]
    assert counts.fired["sea"][0].tolist() == [[0], [0], [0], [4]]
    assert counts.fired["road"].sum() + counts.fired["sea"].sum() == 12


def test_the_block_of_a_sample_is_the_same_for_ever():
    names = ("scene-5-0", "scene-5-1", "coco/000000000139", "é")
    assert [block_of(name) for name in names] == [4, 8, 15, 10]
    assert {block_of(str(i)) for i in range(400)} == set(range(BLOCKS))


def test_a_site_of_one_modality_has_no_text():
    made = streamed([[Case(0, "a", "", (Role.SPECIAL, Role.VISUAL), ((5.0,), (3.0,)))]])
    assert made.top.value[0, 0] == 3.0
    assert made.top.text.max() == -math.inf
    assert made.roles.maximum[COUNTED.index(Role.RESPONSE)].tolist() == [-math.inf]


def test_a_sum_that_would_overflow_is_not_finite():
    roles = torch.tensor([Role.VISUAL, Role.VISUAL, Role.VISUAL], dtype=torch.int8)
    sample = torch.tensor([0, 0, 1])
    nothing = torch.full((3,), -1), torch.full((3, 4), float("nan"))
    layout = Layout.of(TokenMap(roles, sample, *nothing), 2, (Role.RESPONSE,), torch.device("cpu"))
    made = reduce(torch.tensor([[1e12], [1e12], [1.0]]), layout, 5, 3)
    assert made.finite.tolist() == [False, True]

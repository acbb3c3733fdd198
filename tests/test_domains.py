from __future__ import annotations

import math
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import handmade
import neuronlens as nl
from domained import Counted, counted_atlas
from neuronlens.domains import Rule, choose, dape, domain_neurons, equal_blocks
from neuronlens.errors import DataError, MissingExtraError, UnknownNameError
from neuronlens.neurons import NeuronId, NeuronSite
from neuronlens.running import COUNTED
from neuronlens.tokens import Role

LN2 = math.log(2)


# DAPE.


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.5, 0.0, 0.0], 0.0),  # one domain
        ([0.25, 0.25, 0.0], LN2),
        ([0.01, 0.01, 0.01], math.log(3)),  # alike in all: it is not about how often
        ([1.0, 1.0, 1.0], math.log(3)),
        ([0.3, 0.1, 0.0], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
    ],
)
def test_dape_by_hand(rates, expected):
    assert dape(np.array(rates)) == pytest.approx(expected, abs=1e-15)


def test_a_silent_neuron_has_no_dape():
    found = dape(np.array([[0.0, 0.0], [0.2, 0.0]]))
    assert math.isnan(found[0])
    assert found[1] == 0
    assert not math.copysign(1, found[1]) < 0  # not -0, which would print as such


def test_dape_is_nan_where_a_rate_is():
    assert math.isnan(dape(np.array([0.2, math.nan])))


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=6), st.floats(0.1, 10), st.randoms())
def test_dape_ignores_scale_and_order_and_stays_in_bounds(rates, factor, random):
    found = float(dape(np.array(rates)))
    assert 0 <= found <= math.log(len(rates))
    other = [rate * factor for rate in rates]
    random.shuffle(other)
    assert float(dape(np.array(other))) == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize(
    ("rates", "said"), [([0.5], "fewer than two"), (0.5, "fewer than two"), ([0.5, -0.1], "-0.1")]
)
def test_what_are_no_rates_over_domains_is_refused(rates, said):
    with pytest.raises(ValueError, match=said):
        dape(np.array(rates))


# The whole selection in loops, from the paper and its code's quantile.


def by_loops(fired, tokens, used, share, prefilter, bar, assign):
    """(surely chosen, tied at the cut, how many of these, probabilities, bar) of one module."""
    neurons, domains = range(len(fired)), range(len(tokens))
    p = {}
    for u in neurons:
        for i in domains:
            blocks = [b for b in range(len(tokens[i])) if used[i][b]]
            p[u, i] = sum(fired[u][i][b] for b in blocks) / sum(tokens[i][b] for b in blocks)
    rising = sorted(p.values())
    at = [rising[max(1, round(q * len(rising))) - 1] for q in (prefilter or 0, bar)]
    entropy = {}
    for u in neurons:
        total = sum(p[u, i] for i in domains)
        if total == 0:
            continue  # silent: no entropy, never chosen
        if prefilter is not None and not any(p[u, i] > at[0] for i in domains):
            continue
        shares = [p[u, i] / total for i in domains]
        entropy[u] = -sum(s * math.log(s) for s in shares if s > 0)
    ranked = sorted(entropy, key=entropy.__getitem__)
    count = min(round(share * len(fired)), len(ranked))
    if not count:
        return set(), set(), 0, p, at[1]
    cut = entropy[ranked[count - 1]]
    below = {u for u in ranked if entropy[u] < cut - 1e-10}
    tied = {u for u in ranked if abs(entropy[u] - cut) <= 1e-10}
    return below, tied, count - len(below), p, at[1]


COUNTS = st.integers(2, 4).flatmap(
    lambda domains: st.tuples(
        st.lists(
            st.lists(
                st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 5, 8]), min_size=3, max_size=3),
                min_size=domains,
                max_size=domains,
            ),
            min_size=1,
            max_size=30,
        ),
        st.lists(
            st.lists(st.integers(8, 12), min_size=3, max_size=3),
            min_size=domains,
            max_size=domains,
        ),
    )
)


@settings(deadline=None, max_examples=80)
@given(
    counts=COUNTS,
    share=st.sampled_from([0.01, 0.1, 0.35, 1]),
    prefilter=st.sampled_from([None, 0, 0.5, 0.95]),
    bar=st.sampled_from([0, 0.5, 0.95]),
    assign=st.sampled_from(["bar", "argmax"]),
    budget=st.sampled_from(["equal", "all"]),
    seed=st.integers(0, 3),
)
def test_a_selection_is_what_loops_over_the_papers_text_give(
    counts, share, prefilter, bar, assign, budget, seed
):
    fired, tokens = counts
    names = [f"d{i}" for i in range(len(tokens))]
    with tempfile.TemporaryDirectory() as folder:
        atlas = counted_atlas(
            Path(folder) / "a", {"language.0": Counted(fired, tokens)}, names, samples=1
        )
        found = domain_neurons(
            atlas,
            share=share,
            prefilter=prefilter,
            bar=bar,
            assign=assign,
            budget=budget,
            seed=seed,
        )
    each = found.modules["language"]
    used = each.used[:, :3].tolist()
    if budget == "all":
        assert all(map(all, used))
    below, tied, drawn, p, height = by_loops(fired, tokens, used, share, prefilter, bar, assign)
    chosen = {neuron.index for neuron in found.select()}
    assert below <= chosen <= below | tied
    assert len(chosen) == len(below) + drawn == len(each.choice.rows)
    assert (each.choice.tied, each.choice.drawn) == (len(tied), drawn)
    for place, name in enumerate(names):
        mine = {neuron.index for neuron in found.select(name)}
        assert found.counts()["language"][name] == len(mine)
        if assign == "bar":
            assert mine == {u for u in chosen if p[u, place] > height}
        else:
            top = {u: max(p[u, i] for i in range(len(names))) for u in chosen}
            sure = {u for u in chosen if [p[u, i] for i in range(len(names))].count(top[u]) == 1}
            assert mine & sure == {u for u in sure if p[u, place] == top[u]}
            assert all(p[u, place] == top[u] for u in mine)
    if assign == "argmax":
        assert sum(found.counts()["language"].values()) == len(chosen)


# By hand: rates over 10 tokens of each of two domains.


def two_domains(folder, neurons, **how):
    """Domain-specific neurons among some that fired so often in `a` and in `b`, of 10 tokens."""
    fired = [[[a], [b]] for a, b in neurons]
    atlas = counted_atlas(folder / "atlas", {"language.0": Counted(fired, [[10], [10]])})
    return domain_neurons(atlas, **how)


def test_silent_one_domain_and_uniform_neurons_by_hand(tmp_path):
    found = two_domains(
        tmp_path, [(0, 0), (5, 0), (4, 4), (1, 3)], share=0.5, prefilter=None, bar=0.5
    )
    each = found.modules["language"]
    assert math.isnan(each.choice.dape[0])
    assert each.choice.dape[1] == 0
    assert each.choice.dape[2] == pytest.approx(LN2)
    # Two of four are asked for: the one-domain neuron, then the one that leans to b.
    assert found.select() == [NeuronId("language.0", 1), NeuronId("language.0", 3)]
    # The eight probabilities 0 0 0 .1 .3 .4 .4 .5: the fourth of them is the bar.
    assert each.choice.bar == 0.1
    assert found.counts() == {"language": {"a": 1, "b": 1}}
    assert found.silent("language") == {0: (1, 4)}


def test_what_equals_the_bar_does_not_exceed_it(tmp_path):
    neurons = [(2, 0), (2, 1), (8, 3)]
    found = two_domains(tmp_path, neurons, share=1, prefilter=0.8, bar=0.8)
    each = found.modules["language"]
    # Probabilities 0 .1 .2 .2 .3 .8: the fifth of six is .3, which the third's .3 does not exceed.
    assert each.choice.bar == 0.3
    assert each.choice.passing.tolist() == [False, False, True]
    assert found.counts() == {"language": {"a": 1, "b": 0}}


def test_fewer_that_pass_than_asked_for_are_all_chosen_and_said(tmp_path):
    found = two_domains(tmp_path, [(2, 0), (2, 1), (8, 3)], share=1, prefilter=0.8, bar=0.8)
    choice = found.modules["language"].choice
    assert (choice.wanted, len(choice.rows)) == (3, 1)
    assert "1 of 3 asked for: no more pass" in found._repr_html_()


def test_a_silent_neuron_is_not_chosen_even_if_all_are_asked_for(tmp_path):
    found = two_domains(tmp_path, [(0, 0), (0, 0), (3, 1)], share=1, prefilter=None)
    assert found.select() == [NeuronId("language.0", 2)]


def test_ties_at_the_cut_are_drawn_by_seed_and_counted(tmp_path):
    # 40 neurons fire in one domain only (DAPE 0), 60 in both alike: 10 are asked for.
    neurons = [(3, 3)] * 30 + [(4, 0), (0, 4)] * 20 + [(3, 3)] * 30
    atlas = counted_atlas(
        tmp_path / "atlas",
        {"language.0": Counted([[[a], [b]] for a, b in neurons], [[10], [10]])},
    )
    drawn = []
    for seed in range(30):
        found = domain_neurons(atlas, share=0.1, prefilter=None, seed=seed)
        choice = found.modules["language"].choice
        assert (choice.tied, choice.drawn, len(choice.rows)) == (40, 10, 10)
        assert ((choice.rows >= 30) & (choice.rows < 70)).all()
        drawn.append(choice.rows.tolist())
    assert "10 drawn of 40 that tie" in found._repr_html_()
    again = domain_neurons(atlas, share=0.1, prefilter=None, seed=29)
    assert again.modules["language"].choice.rows.tolist() == drawn[-1]
    # 300 draws of 40: every neuron has its turn, and none is drawn by where it stands.
    often = np.bincount(np.concatenate(drawn), minlength=100)[30:70]
    assert often.min() > 0
    assert often.max() < 20
    assert abs(np.mean(np.concatenate(drawn)) - 49.5) < 3


def test_entropies_that_only_round_apart_tie():
    # The same three probabilities in six orders, and at another scale.
    base = np.array([0.1, 0.3, 0.7])
    orders = [base[list(o)] for o in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1))]
    rates = np.array([*orders, base / 3, base / 7])
    choice = choose(rates, Rule(2 / 7, None, 0.95, "bar"), np.random.default_rng(0))
    assert (choice.tied, choice.drawn) == (7, 2)


def test_equal_largest_probabilities_are_drawn_not_given_to_the_first_name():
    rates = np.full((200, 3), 0.5)
    choice = choose(rates, Rule(1, None, 0.95, "argmax"), np.random.default_rng(0))
    assert choice.member.sum(1).tolist() == [1] * 200
    assert choice.member.sum(0).min() > 40


def test_without_a_prefilter_a_chosen_neuron_may_belong_to_no_domain(tmp_path):
    found = two_domains(tmp_path, [(1, 0), (9, 9), (9, 9)], share=0.4, prefilter=None, bar=0.5)
    assert found.select() == [NeuronId("language.0", 0)]
    assert found.of(NeuronId("language.0", 0)) == ()
    assert found.select("a") == []


sys.path.append(str(Path(__file__).parent.parent / "docs"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LLaVA-NeXT Vicuna 7B", {"vision": 983, "projector": 41, "language": 3523}),
        ("InstructBLIP Vicuna 7B", {"vision": 2396, "qformer": 737, "language": 3523}),
    ],
)
def test_one_percent_is_as_many_as_the_paper_has(name, expected):
    import generate_models

    sites = generate_models.published(name).sites.values()
    rng = np.random.default_rng(0)
    rule = Rule(0.01, 0.95, 0.95, "bar")
    for module, count in expected.items():
        neurons = sum(site.neurons for site in sites if site.module == module)
        choice = choose(rng.random((neurons, 5)), rule, rng)
        assert (choice.wanted, len(choice.rows)) == (count, count)


# Roles, experts, branches, sites that cannot be compared.


def test_only_tokens_of_the_roles_count(tmp_path):
    # It fires on 2 and 4 of 10 visual tokens; beside them are 10 prompt tokens in b only.
    more = {Role.PROMPT: [[0], [10]], Role.SPECIAL: [[1], [1]]}
    atlas = counted_atlas(
        tmp_path / "atlas", {"language.0": Counted([[[2], [4]]], [[10], [10]], more=more)}
    )
    rates = {
        "all": [2 / 11, 4 / 21],
        "visual": [0.2, 0.4],
        (Role.VISUAL, Role.PROMPT): [0.2, 4 / 20],
    }
    for tokens, expected in rates.items():
        found = domain_neurons(atlas, tokens=tokens, budget="all")
        assert found.modules["language"].rates[0].tolist() == pytest.approx(expected)
    # Of the texts, a has no token: nothing is left to compare.
    with pytest.raises(DataError, match=r"no prompt/response token in a\."):
        domain_neurons(atlas, tokens="text")


def test_a_site_without_such_tokens_is_left_out_and_says_why(tmp_path):
    atlas = counted_atlas(
        tmp_path / "atlas",
        {
            "vision.0": Counted([[[2], [4]]], [[10], [10]]),
            "language.0": Counted([[[2], [4]]], [[10], [10]], Role.PROMPT),
            "language.1": Counted([[[2], [0]]], [[10], [0]], Role.PROMPT),
        },
    )
    found = domain_neurons(atlas, tokens="text")
    assert list(found.modules) == ["language"]
    assert [site.name for site in found.modules["language"].counts.sites] == ["language.0"]
    assert found.left_out == {
        "vision.0": "no prompt/response token in any domain",
        "language.1": "no prompt/response token in b",
    }
    assert "no prompt/response token in any domain" in found._repr_html_()
    with pytest.raises(UnknownNameError, match=r"vision.0 was left out: no prompt/response"):
        found.module("vision")
    with pytest.raises(UnknownNameError, match="in any domain"):
        found.of(NeuronId("vision.0", 0))


def test_a_routed_experts_rate_is_over_all_tokens_or_over_its_own(tmp_path):
    # Two experts of one neuron. The first is chosen by 8 of 10 tokens in a, by 2 of 10 in b, and
    # its neuron fires on half of them: that is routing, not firing.
    atlas = counted_atlas(
        tmp_path / "atlas",
        {
            "language.0": Counted(
                [[[4], [1]], [[2], [0]]],
                [[10], [10]],
                routed=[[[8], [2]], [[2], [0]]],
            ),
            "language.1": Counted([[[3], [6]]], [[10], [10]]),
        },
    )
    over_all = domain_neurons(atlas).modules["language"]
    assert over_all.rates.tolist() == [[0.4, 0.1], [0.2, 0.0], [0.3, 0.6]]
    over_routed = domain_neurons(atlas, rate="routed", share=1, prefilter=None)
    each = over_routed.modules["language"]
    assert each.rates[0].tolist() == [0.5, 0.5]
    assert each.choice.dape[0] == pytest.approx(LN2)
    # No token of b was sent to the second expert: what it does there is not known.
    assert math.isnan(each.rates[1, 1])
    assert math.isnan(each.choice.dape[1])
    assert each.rates[2].tolist() == [0.3, 0.6]
    assert NeuronId("language.0", 0, expert=1) not in over_routed.select()
    assert NeuronId("language.0", 0, expert=0) in over_routed.select()
    table = over_routed.table()
    assert table["expert"].tolist() == [0, 1, 0]
    assert table["index"].tolist() == [0, 0, 0]


def test_the_qformer_is_one_module_unless_its_branches_are_asked_for(tmp_path):
    described = {
        f"qformer.{branch}.0": NeuronSite(
            f"qformer.{branch}.0", "qformer", 0, 2, "p", f"stream.{branch}", branch=branch
        )
        for branch in ("text", "query")
    }
    fired = [[[2], [4]], [[1], [1]]]
    atlas = counted_atlas(
        tmp_path / "atlas",
        {name: Counted(fired, [[10], [20]]) for name in described},
        described=described,
    )
    whole = domain_neurons(atlas, budget="all")
    assert {name: len(each.counts) for name, each in whole.modules.items()} == {"qformer": 4}
    assert whole.modules["qformer"].tokens == {"a": 20, "b": 40}  # each stream once
    split = domain_neurons(atlas, split_branches=True)
    assert {name: len(each.counts) for name, each in split.modules.items()} == {
        "qformer.text": 2,
        "qformer.query": 2,
    }


def test_neurons_of_inert_sites_are_flagged_and_can_be_left_out(tmp_path):
    described = {
        "vision.1": handmade.site("vision.1", 2, flags=frozenset({"inert"})),
    }
    fired = [[[8], [0]], [[5], [5]]]
    atlas = counted_atlas(
        tmp_path / "atlas",
        {name: Counted(fired, [[10], [10]]) for name in ("vision.0", "vision.1")},
        described=described,
    )
    with pytest.warns(UserWarning, match=r"1 of the chosen neurons are of inert sites \(vision.1"):
        found = domain_neurons(atlas, share=0.5, prefilter=None)
    assert found.table().query("chosen")["inert"].tolist() == [False, True]
    assert "2, 1 inert" in found._repr_html_()
    without = domain_neurons(atlas, share=0.5, prefilter=None, inert=False)
    assert without.select() == [NeuronId("vision.0", 0)]
    assert without.left_out == {"vision.1": "inert: it cannot affect the model's output"}


# Budgets.


def test_equal_budgets_take_blocks_until_the_smallest_domain_is_met(tmp_path):
    # a has 20 tokens in 2 blocks, b 80 in 8, c 21 in 3.
    tokens = [[10] * 2 + [0] * 6, [10] * 8, [7] * 3 + [0] * 5]
    fired = [[[1] * 2 + [0] * 6, [1] * 8, [1] * 3 + [0] * 5]]
    atlas = counted_atlas(tmp_path / "a", {"language.0": Counted(fired, tokens)}, ("a", "b", "c"))
    equal = domain_neurons(atlas).modules["language"]
    assert equal.tokens == {"a": 20, "b": 20, "c": 21}
    assert equal.used.sum(1).tolist() == [2, 2, 3]
    everything = domain_neurons(atlas, budget="all").modules["language"]
    assert everything.tokens == {"a": 20, "b": 80, "c": 21}


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.data())
def test_of_blocks_of_one_size_the_number_that_comes_closest_is_taken(sizes, data):
    some = [data.draw(st.lists(st.booleans(), min_size=16, max_size=16).filter(any)) for _ in sizes]
    tokens = np.array(some) * np.array(sizes)[:, None]
    names = [f"d{i}" for i in range(len(sizes))]
    used = equal_blocks(tokens, names, seed=data.draw(st.integers(0, 5)))
    assert not (used & (tokens == 0)).any()
    target = tokens.sum(1).min()
    for row, size in enumerate(sizes):
        possible = range(1, int((tokens[row] > 0).sum()) + 1)
        # Of two that are as close, the larger.
        best = min(possible, key=lambda k, size=size: (abs(k * size - target), -k))
        assert used[row].sum() == best


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=16, max_size=16).filter(any), min_size=2))
def test_a_domain_uses_the_same_blocks_whatever_the_others_are_called(size):
    tokens = np.array(size)
    names = [f"d{i}" for i in range(len(size))]
    used = equal_blocks(tokens, names, 0)
    assert used.any(1).all()
    assert (equal_blocks(tokens[::-1], names[::-1], 0)[::-1] == used).all()


def test_a_larger_domain_uses_other_blocks_with_another_seed():
    size = np.array([[10] * 4 + [0] * 12, [10] * 16])
    chosen = {tuple(np.flatnonzero(equal_blocks(size, "ab", seed)[1])) for seed in range(20)}
    assert len(chosen) > 10
    assert {len(each) for each in chosen} == {4}


# From a real scan.


def test_a_scan_by_domain_gives_the_rates_its_statistics_have(atlas):
    found = domain_neurons(atlas, budget="all", tokens="visual")
    assert found.domains == ("checked", "dotted", "plain", "striped")
    for module, name in (("vision", "vision.1"), ("language", "language.3")):
        firing = atlas.statistics(name).firing
        each = found.modules[module]
        first = each.counts.starts[name]
        place = COUNTED.index(Role.VISUAL)
        for column, domain in enumerate(found.domains):
            fired = firing.fired[domain][:, place].sum(0)
            tokens = firing.tokens[domain][:, place].sum()
            assert each.tokens[domain] == tokens  # layers of one stream count once
            rates = each.rates[first : first + len(fired), column]
            assert rates.tolist() == pytest.approx((fired / tokens).tolist(), rel=1e-6)


def test_layers_counts_overlap_and_selection_agree(atlas):
    found = domain_neurons(atlas, share=0.05)
    for module in found.modules:
        overlap = found.overlap(module)
        for row, domain in enumerate(found.domains):
            chosen = set(found.select(domain, module))
            assert len(chosen) == found.counts()[module][domain] == overlap.shared[row, row]
            layers = found.layers(module)[domain]
            assert sum(layers.values()) == len(chosen)
            for layer, count in layers.items():
                assert count == sum(n.site == f"{module}.{layer}" for n in chosen)
            for column, other in enumerate(found.domains):
                others = set(found.select(other, module))
                assert overlap.shared[row, column] == len(chosen & others)
                if chosen | others:
                    share = len(chosen & others) / len(chosen | others)
                    assert overlap.jaccard[row, column] == pytest.approx(share)
                else:
                    assert math.isnan(overlap.jaccard[row, column])
            assert all(domain in found.of(neuron) for neuron in chosen)
    assert len(found.select()) == sum(len(e.choice.rows) for e in found.modules.values())


def test_the_table_has_a_row_per_neuron_and_says_what_the_selection_does(atlas):
    found = domain_neurons(atlas, share=0.05)
    whole = found.table()
    assert len(whole) == sum(site.neurons for site in atlas.sites.values())
    some = found.table("language", chosen=True)
    listed = [NeuronId(*each) for each in zip(some["site"], some["index"], strict=True)]
    assert listed == found.select(module="language")
    plain = [n for n, is_in in zip(listed, some["in_plain"], strict=True) if is_in]
    assert plain == found.select("plain", "language")
    row = some.iloc[0]
    rates = np.array([row[f"p_{domain}"] for domain in found.domains])
    assert row["dape"] == pytest.approx(float(dape(rates)))


def test_the_selection_can_be_deactivated(vlm, atlas):
    chosen = domain_neurons(atlas, share=0.1).select("plain", "vision")
    assert chosen
    assert set(nl.deactivate(vlm, chosen).neurons) == set(chosen)


def test_names_in_html_are_escaped(tmp_path):
    atlas = counted_atlas(
        tmp_path / "a", {"language.0": Counted([[[1], [2]]], [[9], [9]])}, ("<b>", "b")
    )
    html = domain_neurons(atlas)._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


def test_all_neurons_firing_alike_are_still_chosen_but_chance_is_named(tmp_path):
    # The lowest share exists in any data; that is what `chance` is for.
    found = two_domains(tmp_path, [(5, 5)] * 100, share=0.1, prefilter=None, bar=0)
    assert len(found.select()) == 10
    assert found.modules["language"].choice.tied == 100


# What is refused.


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"share": 0}, ValueError, "share=0 is no share"),
        ({"share": 1.5}, ValueError, "share=1.5"),
        ({"share": math.nan}, ValueError, "share=nan"),
        ({"prefilter": 1}, ValueError, "prefilter=1"),
        ({"bar": -0.1}, ValueError, "bar=-0.1"),
        ({"budget": "half"}, UnknownNameError, "No budget 'half'. Known: equal, all"),
        ({"assign": "both"}, UnknownNameError, "bar, argmax"),
        ({"rate": "experts"}, UnknownNameError, "all, routed"),
        ({"tokens": "image"}, UnknownNameError, "all, visual, text"),
        ({"tokens": [Role.PAD]}, ValueError, "cannot be counted"),
        ({"tokens": []}, ValueError, "no role"),
        ({"domains": ["a", "c"]}, UnknownNameError, "'c'. Known: a, b"),
        ({"domains": ["a", ""]}, UnknownNameError, "Known: a, b"),
        ({"domains": ["a"]}, DataError, "domains=['a'] was given. Give two or more of 'a', 'b'"),
        ({"domains": "b"}, DataError, "domains=['b'] was given"),
        ({"domains": []}, DataError, "domains=[] was given"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_makes_no_sense_is_refused(tmp_path, how, error, said):
    with pytest.raises(error, match=re.escape(said)):
        two_domains(tmp_path, [(1, 2)], **how)


@pytest.mark.parametrize(("domain", "said"), [("a", "only 'a'"), (None, "none: its samples have")])
def test_samples_of_one_domain_or_of_none_cannot_be_compared(tmp_path, domain, said):
    atlas = counted_atlas(
        tmp_path / "a", {"language.0": Counted([[[1]]], [[9]])}, (domain,), samples=2
    )
    with pytest.raises(DataError, match=f"{said}.*with `domain` set on each"):
        domain_neurons(atlas)


def test_samples_without_a_domain_beside_others_are_left_out_with_a_warning(tmp_path):
    counted = Counted([[[1], [2], [3]]], [[9], [9], [9]])
    atlas = counted_atlas(tmp_path / "a", {"language.0": counted}, ("a", "b", None), samples=2)
    with pytest.warns(UserWarning, match="2 of 6 samples have no domain and are left out"):
        found = domain_neurons(atlas)
    assert found.domains == ("a", "b")
    # As the warning advises, naming them is enough; the order is kept.
    assert domain_neurons(atlas, domains=["b", "a"]).domains == ("b", "a")
    named = domain_neurons(atlas, domains=["b", "a"]).modules["language"].rates[0]
    plain = found.modules["language"].rates[0]
    assert sorted(named) == sorted(plain)
    assert named[0] == max(named) != plain[0]


def test_unknown_names_list_the_known_ones(atlas):
    found = domain_neurons(atlas)
    with pytest.raises(UnknownNameError, match="Known: checked, dotted, plain, striped"):
        found.select("tartan")
    with pytest.raises(UnknownNameError, match="Known: vision, projector, language"):
        found.select("plain", "qformer")
    with pytest.raises(UnknownNameError, match=r"language\.9"):
        found.of(NeuronId("language.9", 0))


def test_a_table_without_pandas_names_the_extra(atlas, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"\[table\]"):
        domain_neurons(atlas).table()

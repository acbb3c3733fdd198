"""Chance, intervals and stability of domain-specific neurons: what they promise of any data."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import neuronlens as nl
from domained import Counted, counted_atlas, module_counts, overdispersed
from neuronlens import testbed
from neuronlens.domains import (
    Rule,
    benjamini_hochberg,
    choose,
    dape,
    domain_neurons,
    equal_blocks,
)
from neuronlens.domains import chance as chances
from neuronlens.domains.chance import lower_by_chance, module_chance
from neuronlens.domains.resample import (
    _random_jaccard,
    module_intervals,
    module_stability,
    resampled_blocks,
)
from neuronlens.errors import UnknownNameError
from neuronlens.neurons import NeuronId

RULE = Rule(0.1, 0.9, 0.9, "bar")


def chance_of(counts, draws=199, seed=0, q=0.05):
    return module_chance(counts, np.zeros(len(counts), bool), draws=draws, q=q, seed=seed, blocks=0)


# The permutation null, against every way there is to deal the names.


def entropy(rates):
    total = sum(rates)
    return -sum(r / total * math.log(r / total) for r in rates if r > 0)


def by_every_dealing(fired, tokens):
    """Share of all ways to deal the blocks to the domains with as low a DAPE, for one neuron."""
    units = [(d, b) for d in range(len(tokens)) for b in range(len(tokens[d])) if tokens[d][b]]
    sizes = [sum(u[0] == d for u in units) for d in range(len(tokens))]

    def of(groups):
        return entropy(
            [sum(fired[d][b] for d, b in g) / sum(tokens[d][b] for d, b in g) for g in groups]
        )

    def dealings(left, sizes):
        if not sizes:
            yield []
            return
        for group in itertools.combinations(left, sizes[0]):
            rest = [unit for unit in left if unit not in group]
            for others in dealings(rest, sizes[1:]):
                yield [group, *others]

    observed = of([[u for u in units if u[0] == d] for d in range(len(tokens))])
    every = [of(groups) for groups in dealings(units, sizes)]
    return sum(each <= observed + 1e-9 for each in every) / len(every)


def test_a_p_value_is_the_share_of_dealings_with_as_low_a_dape():
    tokens = np.array([[10, 10, 10], [10, 10, 10], [10, 10, 0]])
    rng = np.random.default_rng(0)
    fired = rng.binomial(10, rng.beta(0.4, 1.5, (12, 3, 3))) * (tokens > 0)
    fired[0] = [[9, 8, 9], [0, 0, 0], [0, 0, 0]]  # separates the first domain
    used = equal_blocks(tokens, "abc", 0)
    fired[1] = 0
    fired[1][tuple(np.argwhere(used)[0])] = 7  # fires in one block: wherever that goes
    fired[2] = [[3, 3, 3], [3, 3, 3], [3, 3, 0]]  # fires alike
    found = chance_of(module_counts(fired, tokens), draws=4000)
    assert found.used.sum(1).tolist() == [2, 2, 2]  # equal budgets: 20 tokens of each
    kept = tokens * found.used
    expected = [by_every_dealing((each * found.used).tolist(), kept.tolist()) for each in fired]
    assert found.p == pytest.approx(expected, abs=0.025)
    assert found.p[1] == found.p[2] == 1
    assert found.p[0] == pytest.approx(18 / 90, abs=0.025) == found.p.min()


def test_the_smallest_p_value_is_one_of_all_draws_and_the_observed():
    fired = np.zeros((1, 2, 16), int)
    fired[:, 0] = 9
    found = chance_of(module_counts(fired, np.full((2, 16), 10)), draws=499)
    assert found.p.tolist() == [1 / 500]


def test_a_silent_neuron_is_not_tested():
    fired = np.zeros((3, 2, 16), int)
    fired[1:, 0] = 9
    found = chance_of(module_counts(fired, np.full((2, 16), 10)), draws=99)
    assert np.isnan([found.p[0], found.adjusted[0], found.dape[0]]).all()
    assert found.specific.tolist() == [False, True, True]
    assert found.tested == 2


def test_a_p_value_depends_on_the_neuron_and_not_on_its_company(monkeypatch):
    counts = overdispersed([30, 30, 30], 60, seed=3)
    whole = chance_of(counts).p
    alone = module_counts(counts.fired[17:18], counts.size)
    assert chance_of(alone).p[0] == whole[17]
    monkeypatch.setattr(chances, "_NEURONS", 7)
    monkeypatch.setattr(chances, "_DRAWS", 13)
    np.testing.assert_array_equal(chance_of(counts).p, whole)


def test_what_cannot_be_told_in_a_draw_counts_as_low():
    # An expert with tokens in one block of each domain: in most draws some domain has none.
    fired = np.zeros((1, 2, 4), int)
    tokens = np.zeros((1, 2, 4), int)
    tokens[0, :, 0] = 10
    fired[0, 0, 0] = 8
    made = module_counts(fired, tokens[0])
    counts = replace(made, size=np.full((2, 4), 50))
    found = lower_by_chance(counts, np.ones((2, 4), bool), dape(np.array([[0.8, 0.0]])), 50, 0)
    assert found.tolist() == [50]


# False-discovery control.


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.one_of(st.integers(1, 40), st.none()), max_size=30),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_benjamini_hochberg_calls_what_the_textbook_calls(numerators, q):
    p = np.array([np.nan if n is None else n / 41 for n in numerators])
    tested = sorted(Fraction(n, 41) for n in numerators if n is not None)
    bounds = [Fraction(k, len(tested)) * Fraction(q) for k in range(1, len(tested) + 1)]
    assume(all(abs(each - bound) > 1e-9 for each, bound in zip(tested, bounds, strict=True)))
    below = [each for each, bound in zip(tested, bounds, strict=True) if each <= bound]
    cut = max(below, default=Fraction(0))
    called = [n is not None and Fraction(n, 41) <= cut for n in numerators]
    adjusted = benjamini_hochberg(p)
    assert (adjusted <= q).tolist() == called
    assert (np.isnan(adjusted) == np.isnan(p)).all()


# Calibration: data whose domains mean nothing.

SHUFFLED = {
    "as large": [60, 60, 60, 60],
    "two": [50, 50],
    "few samples": [6, 6, 6],
    "unlike sizes": [100, 90, 70, 60],
    "one small": [200, 200, 20],
    "one large": [30, 30, 400],
}


@pytest.mark.parametrize("samples", SHUFFLED.values(), ids=SHUFFLED)
def test_of_shuffled_domains_at_most_the_nominal_share_is_called(samples):
    nominal, small, called = [], [], []
    for seed in range(10):
        found = chance_of(overdispersed(samples, 60, seed), draws=1200, seed=seed)
        nominal.append((found.p <= 0.05).mean())
        small.append((found.p <= 0.01).mean())
        called.append(found.specific.any())
    # 600 independent neurons: a true 5 % is seen as 6.8 % or more once in 40 times.
    assert np.mean(nominal) <= 0.068
    assert np.mean(small) <= 0.02
    assert sum(called) <= 2  # with 1200 draws, a single one may be called


def test_tokens_of_one_sample_are_not_independent_so_a_binomial_test_is_not_calibrated():
    counts = overdispersed([60, 60, 60, 60], 300, seed=1)
    rng = np.random.default_rng(0)
    tokens = counts.tokens[0].sum(1)
    rates = counts.fired.sum((1, 2)) / tokens.sum()
    observed = dape(counts.rates(np.ones((4, 16), bool)))
    null = dape(rng.binomial(tokens, rates[:, None, None], (300, 400, 4)) / tokens)
    p = (1 + (null <= observed[:, None]).sum(1)) / 401
    assert np.nanmean(p <= 0.05) > 0.5
    assert (chance_of(counts).p <= 0.05).mean() < 0.1


def test_blocks_of_unlike_domains_cannot_be_exchanged_which_is_why_budgets_are_equal():
    everything = []
    for seed in range(4):
        counts = overdispersed([30, 30, 400], 60, seed)
        used = counts.size > 0
        observed = dape(counts.rates(used))
        p = (1 + lower_by_chance(counts, used, observed, 199, seed)) / 200
        everything.append(np.nanmean(p <= 0.05))
    assert np.mean(everything) > 0.2


def test_neurons_that_are_specific_are_found_among_others():
    counts = overdispersed([60, 60, 60], 200, seed=5)
    fired = counts.fired.copy()
    # Twenty that fire often do so on a fifth of these tokens in two domains.
    changed = np.argsort(fired.sum((1, 2)))[-40::2]
    fired[changed, 1:] //= 5
    found = chance_of(module_counts(fired, counts.size), draws=2000)
    assert found.specific[changed].sum() >= 18
    assert found.specific.sum() - found.specific[changed].sum() <= 3


def test_shuffled_domains_of_the_testbed_are_not_found_and_its_textures_are(vlm, tmp_path):
    scenes = testbed.scenes(64, seed=8)
    order = np.random.default_rng(0)

    def share(samples, name):
        atlas = nl.scan(vlm, samples, out=tmp_path / name, sites="vision.1", n=1, batch_size=16)
        found = domain_neurons(atlas).chance(200).counts()["vision"]
        return found["nominal"] / found["tested"]

    shuffled = []
    for number in range(2):
        names = order.permutation([sample.domain for sample in scenes])
        samples = [replace(s, domain=str(d)) for s, d in zip(scenes, names, strict=True)]
        shuffled.append(share(samples, f"{number}"))
    # Neurons of one network move together, so that two shuffles say less than 512 tests.
    assert np.mean(shuffled) <= 0.1
    assert share(scenes, "true") > 0.5


# What the result says.


def test_chance_compares_equal_budgets_whatever_the_choice_used(tmp_path):
    tokens = [[10] * 4 + [0] * 12, [10] * 16]
    fired = [[[3] * 4 + [0] * 12, [1] * 16], [[1] * 4 + [0] * 12, [9] * 16]]
    atlas = counted_atlas(tmp_path / "a", {"language.0": Counted(fired, tokens)})
    found = domain_neurons(atlas, budget="all", seed=3, share=0.5, prefilter=None)
    assert found.modules["language"].used.sum(1).tolist() == [4, 16]
    each = found.chance(99).modules["language"]
    assert (each.used == equal_blocks(np.array(tokens), ("a", "b"), 3)).all()
    assert each.used.sum(1).tolist() == [4, 4]
    assert each.chosen.tolist() == [False, True]


def test_chance_counts_selects_and_says_how_many_are_needed(tmp_path):
    rng = np.random.default_rng(0)
    fired = rng.binomial(10, 0.3, (40, 2, 16))
    fired[:4, 0] = 0
    atlas = counted_atlas(
        tmp_path / "a", {"language.0": Counted(fired, np.full((2, 16), 10).tolist())}
    )
    found = domain_neurons(atlas, share=0.05, prefilter=None)
    chance = found.chance(199, q=0.1)
    numbers = chance.counts()["language"]
    assert (numbers["tested"], numbers["chosen"], numbers["chosen_specific"]) == (40, 2, 2)
    assert 4 <= numbers["specific"] <= 6
    assert numbers["nominal"] >= 4
    # 40 tests at q = 0.1, smallest p 1/200: k of them pass if 1/200 <= 0.1 k / 40.
    assert chance.least("language") == 2
    specific = set(chance.select())
    assert {NeuronId("language.0", row) for row in range(4)} <= specific
    assert set(chance.select("language", chosen=True)) == specific & set(found.select())
    assert f"language {numbers['specific']} of 40 specific at q=0.1" in repr(chance)
    assert "2 of 2" in chance._repr_html_()
    with pytest.raises(UnknownNameError, match="Known: language"):
        chance.select("vision")


def test_what_makes_no_sense_is_refused(atlas):
    found = domain_neurons(atlas)
    with pytest.raises(ValueError, match="draws=0"):
        found.chance(0)
    with pytest.raises(ValueError, match="q=1 is no share"):
        found.chance(q=1)
    with pytest.raises(ValueError, match="resamples=1 give no interval"):
        found.intervals(1)
    with pytest.raises(ValueError, match="splits=0"):
        found.stability(0)


# Intervals.


def test_intervals_are_quantiles_over_resampled_blocks():
    counts = overdispersed([20, 30], 9, seed=2)
    used = counts.size > 0
    made = module_intervals(counts, used, RULE, 40, seed=7)
    weights = resampled_blocks(used, 40, np.random.default_rng(7))
    silent = 0
    for neuron in range(9):
        rates = [
            [
                sum(w[d][b] * counts.fired[neuron, d, b] for b in range(16))
                / sum(w[d][b] * counts.size[d, b] for b in range(16))
                for d in range(2)
            ]
            for w in weights
        ]
        low, high = np.quantile(rates, [0.025, 0.975], axis=0)
        assert made.rates[neuron] == pytest.approx(np.stack([low, high], 1))
        if any(sum(each) == 0 for each in rates):
            silent += 1
            assert np.isnan(made.dape[neuron]).all()
        else:
            entropies = [entropy(each) for each in rates]
            assert made.dape[neuron] == pytest.approx(np.quantile(entropies, [0.025, 0.975]))
    assert 0 < silent < 9


def test_a_resample_has_as_many_blocks_of_each_domain_as_there_are():
    units = np.zeros((2, 16), bool)
    units[0, :5] = True
    units[1, 3:] = True
    weight = resampled_blocks(units, 200, np.random.default_rng(0))
    assert (weight.sum(2) == [5, 13]).all()
    assert not weight[:, ~units].any()
    # Each block is drawn as often as the others.
    assert weight[:, 0, :5].mean(0) == pytest.approx(np.ones(5), abs=0.25)
    # With replacement: the variance of a binomial of 5 draws at 1/5.
    assert weight[:, 0, :5].var() == pytest.approx(0.8, abs=0.15)


def test_intervals_of_rates_cover_the_truth_and_binomial_ones_do_not():
    covered, binomial = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        mean = np.full((40, 1), 0.2)
        rate = rng.beta(mean * 2, (1 - mean) * 2, (40, 160))
        fired = rng.binomial(60, rate).reshape(40, 2, 16, 5).sum(3)
        counts = module_counts(fired, np.full((2, 16), 300))
        found = module_intervals(counts, counts.size > 0, RULE, 200, seed).rates
        covered.append(((found[..., 0] <= 0.2) & (found[..., 1] >= 0.2)).mean())
        p = fired.sum(2) / 4800
        binomial.append((abs(p - 0.2) <= 1.96 * np.sqrt(p * (1 - p) / 4800)).mean())
    assert 0.88 <= np.mean(covered) <= 0.97  # 16 blocks: a little narrow
    assert np.mean(binomial) < 0.5


def test_a_domain_whose_samples_lie_in_one_block_has_no_interval():
    fired = np.array([[[1, 2, 3], [4, 0, 0]]])
    tokens = np.array([[9, 9, 9], [9, 0, 0]])
    found = module_intervals(module_counts(fired, tokens), tokens > 0, RULE, 20, 0)
    assert np.isnan(found.rates[0, 1]).all()
    assert np.isfinite(found.rates[0, 0]).all()
    assert np.isnan(found.dape).all()


def test_intervals_of_counts_are_of_choices_from_resamples(atlas):
    found = domain_neurons(atlas, share=0.05)
    made = found.intervals(60)
    for module, of_domain in made.counts().items():
        wanted = found.modules[module].choice.wanted
        for domain, (low, high) in of_domain.items():
            assert 0 <= low <= high <= wanted
            assert f"{low:,.0f} to {high:,.0f}" in made._repr_html_(), (module, domain)
            assert f"{domain} {low:.0f} to {high:.0f}" in repr(made), module
        frequency = made.modules[module].frequency
        assert frequency.sum() == pytest.approx(wanted)
        assert frequency.max() <= 1
        # What was chosen is chosen more often than what was not.
        chosen = found.modules[module].chosen
        assert frequency[chosen].mean() > 5 * frequency[~chosen].mean()


# Stability.


def test_neurons_that_are_specific_in_every_block_are_chosen_from_both_halves():
    rng = np.random.default_rng(0)
    fired = rng.binomial(100, 0.3, (100, 3, 16))
    fired[:10] = np.array([90, 0, 0])[:, None]
    counts = module_counts(fired, np.full((3, 16), 100))
    found = module_stability(counts, counts.size > 0, Rule(0.1, None, 0.6, "bar"), 10, 0)
    assert found.neurons.tolist() == found.members.tolist() == [1] * 10
    assert found.chosen.tolist() == [[10, 10]] * 10
    assert found.random == pytest.approx([1 / 19] * 10)  # 10 x 10 / 100 of 20 - 1: all pass
    # They differ between blocks, so they are chosen all the same, but not for the same domains.
    assert found.neurons_shuffled.mean() > 0.8
    assert found.members_shuffled.mean() < 0.6


def test_random_sets_are_drawn_from_what_passes_in_each_half():
    rng = np.random.default_rng(0)
    rule = Rule(0.1, 0.8, 0.8, "bar")
    first, second = (choose(rng.random((60, 2)), rule, rng) for _ in range(2))
    passing = [np.flatnonzero(each.passing) for each in (first, second)]
    assert [len(each) < 30 for each in passing] == [True, True]
    both = np.mean(
        [
            len(set.intersection(*(set(rng.choice(p, 6, replace=False)) for p in passing)))
            for _ in range(4000)
        ]
    )
    assert _random_jaccard(first, second) == pytest.approx(both / (12 - both), abs=0.01)


def test_without_specific_neurons_halves_agree_as_much_as_with_shuffled_domains():
    # Rare neurons have a low DAPE whatever the domains: more than two random sets share.
    alike, shuffled, random = [], [], []
    for seed in range(6):
        counts = overdispersed([80, 80, 80], 150, seed)
        found = module_stability(counts, counts.size > 0, Rule(0.1, None, 0.3, "bar"), 6, seed)
        alike.append([found.neurons.mean(), found.members.mean()])
        shuffled.append([found.neurons_shuffled.mean(), found.members_shuffled.mean()])
        random.append(found.random.mean())
    assert np.mean(alike, 0) == pytest.approx(np.mean(shuffled, 0), abs=0.06)
    assert np.mean(alike, 0)[0] > 3 * np.mean(random)


def test_a_domain_in_one_block_cannot_be_halved():
    tokens = np.array([[9, 9, 9], [9, 0, 0]])
    fired = np.ones((4, 2, 3), int)
    found = module_stability(module_counts(fired, tokens), tokens > 0, RULE, 3, 0)
    assert np.isnan(found.neurons).all()


def test_stability_of_a_scan_is_told_by_module(atlas):
    made = domain_neurons(atlas, share=0.05).stability(4)
    summary = made.summary()
    assert list(summary) == ["vision", "projector", "language"]
    for name, means in summary.items():
        assert all(0 <= value <= 1 for value in means.values())
        assert f"{means['members']:.2f}" in made._repr_html_(), name
        said = f"{name} {means['members']:.2f} (shuffled {means['members_shuffled']:.2f})"
        assert said in repr(made)
    assert made.summary() == domain_neurons(atlas, share=0.05).stability(4).summary()

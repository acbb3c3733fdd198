from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neuronlens.errors import UnknownNameError
from neuronlens.score import (
    ModalityScore,
    Score,
    Summary,
    correlation,
    modality_score,
    neuron_score,
    summarise,
)

NAN = math.nan
NUMBERS = st.integers(-1000, 1000).map(lambda k: k / 8)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30)


def columns(pairs) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array(side, float) for side in zip(*pairs, strict=True))


# One correlation.


@settings(max_examples=200, deadline=None)
@given(pairs=PAIRS)
def test_the_correlation_is_numpys(pairs):
    x, y = columns(pairs)
    r, why = correlation(x, y)
    if np.ptp(x) == 0:
        assert (math.isnan(r), why) == (True, "constant truth")
    elif np.ptp(y) == 0:
        assert (math.isnan(r), why) == (True, "constant prediction")
    else:
        assert why is None
        assert r == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
        assert -1 <= r <= 1


@settings(max_examples=100, deadline=None)
@given(
    pairs=PAIRS,
    factor=st.sampled_from([0.01, 0.5, 7, 1e4]),
    shift=st.sampled_from([-50, 0, 3]),
    order=st.randoms(use_true_random=False),
)
def test_the_correlation_ignores_scale_shift_and_order_and_is_symmetric(
    pairs, factor, shift, order
):
    x, y = columns(pairs)
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)
    r = correlation(x, y)[0]
    assert correlation(factor * x + shift, y)[0] == pytest.approx(r, abs=1e-6)
    assert correlation(-x, y)[0] == pytest.approx(-r, abs=1e-9)
    assert correlation(y, x)[0] == pytest.approx(r, abs=1e-9)
    shuffled = order.sample(range(len(x)), len(x))
    assert correlation(x[shuffled], y[shuffled])[0] == pytest.approx(r, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, extra=st.lists(NUMBERS, min_size=1, max_size=5))
def test_tokens_nothing_was_predicted_for_are_left_out(pairs, extra):
    x, y = columns(pairs)
    longer = np.concatenate([extra, x]), np.concatenate([np.full(len(extra), NAN), y])
    np.testing.assert_equal(correlation(*longer), correlation(x, y))


@pytest.mark.parametrize(
    ("true", "simulated", "why"),
    [
        ([1, 2, 3], [5, 5, 5], "constant prediction"),
        ([1, 2, 3], [0, 0, 0], "constant prediction"),
        ([2, 2, 2], [1, 2, 3], "constant truth"),
        ([2, 2, 2], [1, 1, 1], "constant truth"),
        ([0.1 + 0.2, 0.3, 0.3], [1, 2, 3], "constant truth"),  # differs by rounding only
        ([1, 2, 3], [0.1 + 0.2, 0.3, 0.3], "constant prediction"),
        ([1, 2, 2], [NAN, 1, 2], "constant truth"),
        ([1, 2, 3], [NAN, NAN, NAN], "no tokens"),
        ([1, 2, 3], [NAN, NAN, 1], "no tokens"),
        ([], [], "no tokens"),
    ],
)
def test_an_undefined_correlation_is_nan_with_its_reason(true, simulated, why):
    r, reason = correlation(np.array(true, float), np.array(simulated, float))
    assert math.isnan(r)
    assert reason == why


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["true", "simulated"])
def test_activations_that_are_not_finite_are_never_agreement(bad, side):
    true, simulated = np.array([1.0, 2, 3, 5]), np.array([0.0, 1, 0, 1])
    if side == "simulated":
        if math.isnan(bad):
            return  # a token nothing was predicted for: tested above
        simulated[1] = bad
    else:
        true[1] = bad
    try:
        r, _ = correlation(true, simulated)
    except ValueError:
        return  # refusing them is right as well
    assert math.isnan(r)


@pytest.mark.parametrize("scale", [1e-9, 1e100])
def test_the_correlation_survives_extreme_scales(scale):
    x, y = np.array([1.0, 2, 3]) * scale, np.array([0.0, 2, 1]) * scale
    assert correlation(x, y)[0] == pytest.approx(0.5)


def test_three_tokens_by_hand():
    # Deviations (-1, 0, 1) and (-1, 1, 0): r = 1 / 2.
    assert correlation(np.array([1.0, 2, 3]), np.array([0.0, 2, 1]))[0] == pytest.approx(0.5)


# Several samples.


def test_pooled_and_per_sample_by_hand():
    # Each sample alone agrees perfectly; pooled, the second one's offset spoils it.
    pairs = [
        (np.array([0.0, 1.0]), np.array([0.0, 1.0])),
        (np.array([0.0, 1.0]), np.array([1.0, 2.0])),
    ]
    score = modality_score(pairs)
    pooled = np.corrcoef([0, 1, 0, 1], [0, 1, 1, 2])[0, 1]
    assert score.r == pytest.approx(pooled) == pytest.approx(math.sqrt(0.5))
    assert score.mean_per_sample == pytest.approx(1)
    assert (score.tokens, score.undefined) == (4, None)


def test_per_sample_a_constant_prediction_counts_0_and_a_constant_truth_nothing():
    pairs = [
        (np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0])),  # 1
        (np.array([0.0, 1.0]), np.array([1.0, 1.0])),  # 0
        (np.array([3.0, 3.0]), np.array([0.0, 1.0])),  # left out
        (np.array([0.0, 1.0]), np.array([NAN, NAN])),  # left out
    ]
    score = modality_score(pairs)
    assert score.mean_per_sample == pytest.approx(0.5)
    assert score.tokens == 7
    assert score.r == pytest.approx(np.corrcoef([0, 1, 2, 0, 1, 3, 3], [0, 1, 2, 1, 1, 0, 1])[0, 1])


@settings(max_examples=50, deadline=None)
@given(pairs=PAIRS, cut=st.integers(0, 30))
def test_the_pooled_score_does_not_depend_on_where_samples_end(pairs, cut):
    x, y = columns(pairs)
    cut = min(cut, len(x))
    whole, parts = (
        modality_score([(x, y)]),
        modality_score([(x[:cut], y[:cut]), (x[cut:], y[cut:])]),
    )
    assert (whole.r, whole.undefined, whole.tokens) == (parts.r, parts.undefined, parts.tokens)


def test_no_samples_have_no_score():
    score = modality_score([])
    assert (score.r, score.undefined, score.mean_per_sample, score.tokens) == (
        None,
        "no tokens",
        None,
        0,
    )


# Row 14 of docs/methods.md.


def side(r=None, undefined=None, per_sample=None) -> ModalityScore:
    return ModalityScore(r=r, undefined=undefined, mean_per_sample=per_sample, tokens=9)


FLAT = side(undefined="constant prediction", per_sample=0.0)
SILENT = side(undefined="constant truth")
EMPTY = side(undefined="no tokens")


@pytest.mark.parametrize(
    ("visual", "text", "value"),
    [
        (side(0.4), None, 0.4),
        (None, side(-0.2), -0.2),
        (side(0.4), side(0.2), 0.3),  # multi-modal: the mean
        (FLAT, None, 0.0),  # a constant prediction failed
        (SILENT, None, None),  # a constant truth cannot be predicted
        (EMPTY, None, None),
        (FLAT, side(0.6), 0.3),  # the same rule on each side
        (SILENT, side(0.6), 0.6),
        (side(0.6), EMPTY, 0.6),
        (FLAT, SILENT, 0.0),
        (SILENT, SILENT, None),
        (None, None, None),
    ],
)
def test_what_a_neurons_score_counts(visual, text, value):
    score = Score(visual=visual, text=text)
    assert score.value == (value if value is None else pytest.approx(value))


def test_the_score_per_sample_is_the_mean_of_both_sides():
    score = Score(visual=side(0.9, per_sample=0.2), text=side(0.9, per_sample=0.6))
    assert score.per_sample == pytest.approx(0.4)
    assert Score(visual=SILENT, text=side(0.9, per_sample=0.6)).per_sample == pytest.approx(0.6)
    assert Score(visual=SILENT).per_sample is None


def test_a_summary_counts_constant_predictions_as_0_and_leaves_constant_truth_out():
    scores = [
        Score(visual=side(0.9)),
        Score(visual=FLAT),
        Score(visual=SILENT),
        Score(visual=side(0.3), text=FLAT),
        Score(text=EMPTY),
    ]
    summary = summarise(scores)
    assert summary.mean == pytest.approx((0.9 + 0.0 + 0.15) / 3)
    assert (summary.neurons, summary.constant_predictions, summary.undefined) == (3, 2, 2)


def test_a_summary_of_nothing_has_no_mean():
    summary = summarise([])
    assert (summary.mean, summary.neurons, summary.undefined) == (None, 0, 0)


def test_a_score_survives_json():
    score = Score(visual=modality_score([(np.arange(3.0), np.arange(3.0))]), text=FLAT)
    assert Score.model_validate_json(score.model_dump_json()) == score


# Ranks, firing, overlap.


def one(x, y, active=None) -> ModalityScore:
    return modality_score(
        [(np.array(x, float), np.array(y, float))],
        active=None if active is None else [np.array(active, bool)],
    )


def slow_auroc(true, simulated) -> float | None:
    """Every firing token against every silent one."""
    points = [
        1.0 if p > q else 0.5 if p == q else 0.0
        for t, p in zip(true, simulated, strict=True)
        for u, q in zip(true, simulated, strict=True)
        if t > 0 and not u > 0
    ]
    return sum(points) / len(points) if points else None


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS)
def test_spearman_is_scipys(pairs):
    from scipy.stats import spearmanr

    x, y = columns(pairs)
    score = one(x, y)
    if score.r is None:
        assert score.spearman is None
    else:
        assert score.spearman == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)


SMALL = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(pairs=SMALL)
def test_auroc_compares_every_firing_token_with_every_silent_one(pairs):
    x, y = columns(pairs)
    expected = slow_auroc(x, y)
    assert one(x, y).auroc == (expected if expected is None else pytest.approx(expected))


MONOTONE = {
    "cube": lambda v: v**3 + v,
    "exponential": lambda v: np.exp(v / 100),
    "scaled": lambda v: 7 * v + 3,
    "arctan": lambda v: np.arctan(v / 50),
}


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, name=st.sampled_from(sorted(MONOTONE)))
def test_spearman_and_auroc_see_only_the_order_of_predictions(pairs, name):
    x, y = columns(pairs)
    plain, mapped = one(x, y), one(x, MONOTONE[name](y))
    assert mapped.undefined == plain.undefined
    for measure in ("spearman", "auroc"):
        expected = getattr(plain, measure)
        found = getattr(mapped, measure)
        assert found == (expected if expected is None else pytest.approx(expected, abs=1e-9))


@settings(max_examples=50, deadline=None)
@given(pairs=PAIRS)
def test_the_opposite_prediction_has_the_opposite_spearman_and_auroc(pairs):
    x, y = columns(pairs)
    plain, opposite = one(x, y), one(x, -y)
    if plain.spearman is not None:
        assert opposite.spearman == pytest.approx(-plain.spearman, abs=1e-9)
    if plain.auroc is not None:
        assert opposite.auroc == pytest.approx(1 - plain.auroc)


def test_ranks_by_hand():
    # Ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: deviations -1.5, 0, 0, 1.5 and -.5, -1.5, .5, 1.5.
    score = one([-1, 0, 0, 8], [1, 0, 2, 9])
    assert score.spearman == pytest.approx((0.75 + 2.25) / math.sqrt(4.5 * 5))


def test_firing_by_hand():
    # An activation of exactly 0 is silent. Firing: 1, 0; silent: 0, 0: one won, three ties.
    assert one([2, 1e-9, 0, -5], [1, 0, 0, 0]).auroc == pytest.approx((2 + 2 * 0.5) / 4)


@pytest.mark.parametrize("true", [[0, -1, -2], [1, 2, 3]], ids=["never", "always"])
def test_a_neuron_that_fires_everywhere_or_nowhere_has_no_auroc(true):
    score = one(true, [0, 1, 3])
    assert score.auroc is None
    assert score.spearman is not None


def test_a_constant_prediction_is_chance_for_firing_and_has_no_rank_correlation():
    score = one([0, 1, 2], [3, 3, 3])
    assert (score.auroc, score.spearman, score.undefined) == (0.5, None, "constant prediction")


def test_a_spread_of_rounding_has_no_rank_correlation_either():
    assert one([0.1 + 0.2, 0.3, 0.3], [1, 2, 3]).spearman is None


BITS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, NAN]), st.booleans()), min_size=1, max_size=20
)


@settings(max_examples=150, deadline=None)
@given(tokens=BITS, cut=st.integers(0, 20))
def test_the_overlap_is_that_of_two_sets_of_tokens(tokens, cut):
    simulated = np.array([value for value, _ in tokens])
    active = np.array([flag for _, flag in tokens])
    heard = {i for i, (value, _) in enumerate(tokens) if not math.isnan(value)}
    first = {i for i in heard if tokens[i][0] in (0.5, 1.0)}
    second = {i for i in heard if tokens[i][1]}
    expected = len(first & second) / len(first | second) if first | second else None
    true = np.arange(len(tokens), dtype=float)
    pairs = [(true[:cut], simulated[:cut]), (true[cut:], simulated[cut:])]
    found = modality_score(pairs, active=[active[:cut], active[cut:]]).iou
    assert found == (expected if expected is None else pytest.approx(expected))


def test_overlap_by_hand():
    # Predicted 0, 1, 2 (0.5 is predicted); active 2, 3; both: 2.
    active = [False, False, True, True, False]
    assert one([0, 0, 5, 4, 0], [1, 0.5, 1, 0.49, 0], active).iou == pytest.approx(1 / 4)


def test_no_overlap_without_active_tokens_given_or_with_neither_predicted_nor_active():
    assert one([0, 1], [0, 1]).iou is None
    assert one([0, 1], [0, 0.4], [False, False]).iou is None
    assert one([0, 1], [0, 0.4], [False, True]).iou == 0
    assert modality_score([], active=[]).iou is None


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, extra=st.lists(NUMBERS, min_size=1, max_size=5))
def test_tokens_nothing_was_predicted_for_are_in_no_measure(pairs, extra):
    x, y = columns(pairs)
    longer = np.concatenate([extra, x]), np.concatenate([np.full(len(extra), NAN), y])
    active = np.concatenate([np.ones(len(extra), bool), x > 1])
    assert modality_score([longer], active=[active]) == modality_score([(x, y)], active=[x > 1])


@settings(max_examples=50, deadline=None)
@given(pairs=PAIRS, cut=st.integers(0, 30))
def test_every_pooled_measure_is_blind_to_where_samples_end(pairs, cut):
    x, y = columns(pairs)
    cut = min(cut, len(x))
    whole = modality_score([(x, y)], active=[x > 1])
    parts = modality_score(
        [(x[:cut], y[:cut]), (x[cut:], y[cut:])], active=[x[:cut] > 1, x[cut:] > 1]
    )
    for measure in ("spearman", "auroc", "iou"):
        assert getattr(whole, measure) == getattr(parts, measure)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN])
def test_activations_that_are_not_finite_have_no_agreement_in_any_measure(bad):
    score = one([bad, 1, 0, -1], [0, 1, 0, 1], [True, True, False, False])
    assert score.undefined == "not finite"
    assert (score.r, score.spearman, score.auroc, score.iou) == (None, None, None, None)


@pytest.mark.parametrize(
    ("pairs", "active", "said"),
    [
        ([(np.zeros(3), np.zeros(2))], None, r"sample 0 have the shapes \(3,\), \(2,\)"),
        ([(np.zeros((3, 1)), np.zeros((3, 1)))], None, "one value per token"),
        ([(np.zeros(3), np.zeros(3))], [np.zeros(2, bool)], "one value per token"),
        ([(np.zeros(3), np.zeros(3))], [], "0 arrays of active tokens for 1 samples"),
        ([(np.zeros(3), np.zeros(3))], [np.zeros(3)], "float64, not boolean"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(pairs, active, said):
    with pytest.raises(ValueError, match=said):
        modality_score(pairs, active=active)


# The interval of a neuron.


def slow_values(sides, resamples: int, seed: int) -> list[float | None]:
    """Scores of resamples that are really put together."""
    names = [name for name in sides if modality_score(sides[name]).counted is not None]
    count = len(sides[names[0]]) if names else 0
    spoken = [
        i for i in range(count) if any((~np.isnan(sides[name][i][1])).any() for name in names)
    ]
    rows = np.random.default_rng(seed).integers(len(spoken), size=(len(spoken), resamples))
    found = []
    for column in rows.T:
        drawn = {name: [sides[name][spoken[i]] for i in column] for name in names}
        found.append(Score(**{name: modality_score(pairs) for name, pairs in drawn.items()}).value)
    return found


def check_interval(sides, resamples=40, seed=0):
    score = neuron_score(sides, resamples=resamples, seed=seed)
    values = slow_values(sides, resamples, seed)
    defined = [value for value in values if value is not None]
    assert score.undefined_resamples == len(values) - len(defined)
    if defined:
        assert score.interval == pytest.approx(np.percentile(defined, [2.5, 97.5]), abs=1e-10)
    else:
        assert score.interval is None
    return score


def noisy(rng, samples: int, *, tokens=60, rho=0.5, spread=0.0):
    """Pairs with correlation `rho` within a sample, and samples that differ by `spread`."""
    pairs = []
    for _ in range(samples):
        x = rng.normal(size=tokens)
        y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=tokens)
        pairs.append((x + spread * rng.normal(), y + spread * rng.normal()))
    return pairs


LEVELS = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
SAMPLES = st.lists(
    st.lists(st.tuples(LEVELS, st.sampled_from([0.0, 1.0, NAN])), min_size=0, max_size=5),
    min_size=2,
    max_size=5,
)


def arrays(sample) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(sample, float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@settings(max_examples=60, deadline=None)
@given(visual=SAMPLES, text=SAMPLES, both=st.booleans(), seed=st.integers(0, 3))
def test_the_interval_is_that_of_resamples_really_put_together(visual, text, both, seed):
    # Few levels: constant predictions, constant truths and empty samples are frequent.
    samples = min(len(visual), len(text))
    sides = {"visual": [arrays(sample) for sample in visual[:samples]]}
    if both:
        sides["text"] = [arrays(sample) for sample in text[:samples]]
    score = neuron_score(sides, resamples=0)
    counting = [pairs for pairs in sides.values() if modality_score(pairs).counted is not None]
    spoken = sum(any((~np.isnan(pairs[i][1])).any() for pairs in counting) for i in range(samples))
    if spoken < 2:
        assert neuron_score(sides, resamples=40, seed=seed) == score
    else:
        check_interval(sides, seed=seed)


@pytest.mark.parametrize("offset", [0, 1e6, -1e8])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_far_from_zero_the_interval_loses_nothing_to_cancellation(offset, scale):
    rng = np.random.default_rng(0)
    pairs = [
        (offset + scale * rng.integers(0, 50, 40), offset - scale * rng.integers(0, 50, 40))
        for _ in range(4)
    ]
    check_interval({"text": pairs})


def test_one_sample_far_from_the_others_loses_nothing_to_cancellation():
    # A resample of the far one alone has a spread of 1e-3 at a distance of 1e6.
    rng = np.random.default_rng(1)
    near, far = noisy(rng, 1)[0], noisy(rng, 1)[0]
    far = (1e6 + 1e-3 * far[0], 1e6 + 1e-3 * far[1])
    score = check_interval({"visual": [near, far]}, resamples=60)
    assert 0.2 < score.interval[0] < 0.8 < score.interval[1]


def test_a_neuron_with_both_modalities_is_resampled_once():
    # Samples agree in both modalities or in neither; drawn apart, the extremes would be rarer.
    rng = np.random.default_rng(2)
    good, bad = noisy(rng, 2, rho=0.99), noisy(rng, 2, rho=-0.99)
    sides = {"visual": [good[0], bad[0]], "text": [good[1], bad[1]]}
    score = check_interval(sides, resamples=400)
    assert score.interval == pytest.approx((-0.99, 0.99), abs=0.02)


def test_a_neuron_score_is_the_score_of_its_sides():
    rng = np.random.default_rng(3)
    visual, text = noisy(rng, 3), noisy(rng, 3)
    active = [true > 1 for true, _ in visual]
    score = neuron_score({"text": text, "visual": visual}, active=active)
    assert score.visual == modality_score(visual, active=active)
    assert score.text == modality_score(text)
    assert score.visual.iou is not None
    assert score.text.iou is None
    assert neuron_score({"text": text}).visual is None
    assert neuron_score({}) == Score()


def test_a_constant_prediction_resampled_is_0():
    pairs = [(np.array([0.0, 1, 2]), np.zeros(3)), (np.array([1.0, 3, 0]), np.zeros(3))]
    score = neuron_score({"visual": pairs}, resamples=50)
    assert (score.value, score.interval, score.undefined_resamples) == (0, (0, 0), 0)


def test_resamples_with_constant_truth_are_left_out_and_counted():
    varied = (np.array([0.0, 1, 2]), np.array([0.0, 1, 2]))
    silent = (np.zeros(3), np.array([0.0, 1, 2]))
    rows = np.random.default_rng(5).integers(2, size=(2, 500))
    only_silent = int((rows == 1).all(0).sum())
    score = neuron_score({"visual": [varied, silent]}, resamples=500, seed=5)
    assert 80 < only_silent < 170
    assert score.undefined_resamples == only_silent


def test_a_resample_whose_truth_differs_by_rounding_only_is_left_out():
    varied = (np.array([0.0, 1, 2]), np.array([0.0, 1, 2]))
    rounded = (np.array([0.1 + 0.2, 0.3, 0.3]), np.array([0.0, 1, 2]))
    assert check_interval({"visual": [varied, rounded]}, resamples=100).undefined_resamples > 10


def test_a_side_that_is_not_finite_is_in_no_resample():
    rng = np.random.default_rng(8)
    text, visual = noisy(rng, 4), noisy(rng, 4)
    visual[2][0][5] = math.inf
    score = neuron_score({"visual": visual, "text": text}, seed=3)
    assert score.visual.undefined == "not finite"
    assert score.interval == neuron_score({"text": text}, seed=3).interval


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.sampled_from([-3.0, 0.1, 7.0]))
def test_the_interval_stays_within_minus_1_and_1(seed, factor):
    x = np.random.default_rng(seed).normal(size=(3, 7))
    low, high = neuron_score({"text": [(row, factor * row) for row in x]}, resamples=50).interval
    assert -1 <= low <= high <= 1
    assert low == pytest.approx(math.copysign(1, factor))


def test_a_side_that_is_undefined_in_a_resample_leaves_the_other_one():
    perfect = (np.array([0.0, 1, 2]), np.array([0.0, 1, 2]))
    silent = (np.zeros(3), np.array([0.0, 1, 2]))
    opposite = (perfect[0], -perfect[1])
    sides = {"visual": [perfect, silent], "text": [opposite, opposite]}
    # Drawn: twice the first (1 - 1) / 2, twice the second -1 alone, or one of each.
    score = check_interval(sides, resamples=400)
    assert score.interval == pytest.approx((-1, 0))
    assert score.undefined_resamples == 0


@pytest.mark.parametrize(
    "sides",
    [
        {"visual": []},
        {"visual": [(np.arange(4.0), np.arange(4.0))]},  # one sample
        {"visual": [(np.arange(4.0), np.arange(4.0)), (np.zeros(2), np.full(2, NAN))]},  # one heard
        {"visual": [(np.zeros(3), np.arange(3.0))] * 3},  # constant truth
        {  # the second sample tells of a modality without a score only
            "visual": [(np.arange(3.0), np.arange(3.0)), (np.zeros(0), np.zeros(0))],
            "text": [(np.zeros(0), np.zeros(0)), (np.zeros(3), np.arange(3.0))],
        },
        {"visual": [(np.arange(3.0), np.array([0, math.inf, 1])), (np.arange(3.0),) * 2]},
    ],
)
def test_without_two_samples_or_a_score_there_is_no_interval(sides):
    score = neuron_score(sides)
    assert (score.interval, score.undefined_resamples) == (None, 0)


def test_the_seed_alone_decides_the_interval():
    sides = {"visual": noisy(np.random.default_rng(4), 5, spread=1)}
    first = neuron_score(sides, seed=1)
    assert neuron_score(sides, seed=1) == first
    assert neuron_score(sides, seed=2).interval != first.interval
    assert neuron_score(sides, resamples=0) == first.model_copy(update={"interval": None})


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rho=st.sampled_from([0.0, 0.4, 0.9]))
def test_the_interval_of_similar_samples_holds_the_score(seed, rho):
    score = neuron_score({"text": noisy(np.random.default_rng(seed), 8, rho=rho)})
    low, high = score.interval
    assert low <= score.value <= high


def test_the_interval_shrinks_with_the_root_of_the_samples():
    def width(samples: int) -> float:
        found = []
        for seed in range(20):
            sides = {"text": noisy(np.random.default_rng(seed), samples)}
            low, high = neuron_score(sides, resamples=300).interval
            found.append(high - low)
        return float(np.mean(found))

    assert width(10) / width(40) == pytest.approx(2, rel=0.15)


def coverage(samples: int, repetitions: int = 200) -> float:
    """How often the interval holds the correlation the samples were drawn with."""
    hits = 0
    for seed in range(repetitions):
        pairs = noisy(np.random.default_rng([samples, seed]), samples)
        low, high = neuron_score({"text": pairs}, resamples=300, seed=seed).interval
        hits += low <= 0.5 <= high
    return hits / repetitions


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    # Three standard errors of 200 repetitions are 0.05.
    assert 0.87 <= coverage(30) <= 0.99


def test_five_samples_make_the_interval_too_narrow():
    assert 0.72 <= coverage(5) <= 0.9


def test_sides_that_do_not_belong_together_are_refused():
    pair = (np.arange(3.0), np.arange(3.0))
    with pytest.raises(ValueError, match="1 visual and 2 text samples"):
        neuron_score({"visual": [pair], "text": [pair, pair]})
    with pytest.raises(UnknownNameError, match="No modality 'audio'"):
        neuron_score({"audio": [pair]})
    with pytest.raises(ValueError, match="for visual masks"):
        neuron_score({"text": [pair]}, active=[np.ones(3, bool)])


# Several neurons beside their null.


def of(value: float | None) -> Score:
    return Score(visual=SILENT if value is None else side(value))


def slow_interval(values, resamples: int, seed: int):
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = [values[i] for i in rng.integers(len(values), size=len(values))]
        means.append(sum(drawn) / len(drawn))
    return pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-10)


def test_a_summary_beside_its_null_by_hand():
    scores = [of(0.6), of(0.2), of(None), Score(visual=FLAT), of(0.9)]
    nulls = [[0.1, 0.3], [0.2, 0.0], [0.5], [-0.2, -0.4, -0.3], []]
    found = summarise(scores, nulls, resamples=200, seed=4)
    assert found.mean == pytest.approx((0.6 + 0.2 + 0.0 + 0.9) / 4)
    assert (found.neurons, found.undefined, found.constant_predictions) == (4, 1, 1)
    assert found.null == pytest.approx((0.2 + 0.1 + 0.5 - 0.3) / 4)
    assert found.null_neurons == 4
    assert found.gap == pytest.approx((0.4 + 0.1 + 0.3) / 3)
    assert found.gap_neurons == 3
    assert found.above_null == pytest.approx(2 / 3)  # 0.2 does not exceed its equal
    assert found.interval == slow_interval([0.6, 0.2, 0.0, 0.9], 200, 4)
    assert found.null_interval == slow_interval([0.2, 0.1, 0.5, -0.3], 200, 4)
    assert found.gap_interval == slow_interval([0.4, 0.1, 0.3], 200, 4)


def test_a_summary_without_nulls_is_the_one_with_empty_nulls():
    scores = [of(0.6), of(0.2), of(None)]
    found = summarise(scores)
    assert found == summarise(scores, [[], [], []]) == summarise(scores, [[NAN], [], []])
    assert (found.null, found.null_interval, found.gap, found.gap_interval, found.above_null) == (
        (None,) * 5
    )
    assert (found.null_neurons, found.gap_neurons) == (0, 0)
    assert found.interval is not None


def test_one_neuron_has_no_interval():
    found = summarise([of(0.6)], [[0.1]])
    assert (found.mean, found.null, found.above_null) == (0.6, 0.1, 1)
    assert found.gap == pytest.approx(0.5)
    assert (found.interval, found.null_interval, found.gap_interval) == (None, None, None)
    assert summarise([of(0.6), of(0.5)], resamples=0).interval is None


def test_the_gap_is_paired():
    # Each score is its null plus a little: paired, the gap hardly varies.
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.3, 40)
    scores = [of(float(value + 0.1)) for value in base]
    nulls = [[float(value)] for value in base]
    paired = summarise(scores, nulls)
    mixed = summarise(scores, [nulls[i] for i in rng.permutation(40)])
    assert paired.gap == pytest.approx(mixed.gap) == pytest.approx(0.1)
    assert paired.null_interval != paired.gap_interval
    assert paired.gap_interval == pytest.approx((0.1, 0.1))
    assert mixed.gap_interval[1] - mixed.gap_interval[0] > 0.1
    assert paired.above_null == 1 > mixed.above_null


def test_a_gap_is_of_the_neurons_that_have_both():
    found = summarise([of(0.5), of(None), of(0.9)], [[0.4], [0.0], []])
    assert found.gap == pytest.approx(0.1)
    assert found.gap != pytest.approx(found.mean - found.null)


def test_neurons_weigh_the_same_however_many_null_draws_they_have():
    found = summarise([of(0.5), of(0.5)], [[0.0] * 9, [0.4]])
    assert found.null == pytest.approx(0.2)


def test_by_chance_a_score_exceeds_its_draws_once_in_draws_plus_one():
    rng = np.random.default_rng(0)
    table = rng.uniform(-1, 1, size=(4000, 6))
    found = summarise(
        [of(float(row[0])) for row in table], [row[1:].tolist() for row in table], resamples=0
    )
    assert found.above_null == pytest.approx(1 / 6, abs=0.02)


def test_the_interval_of_a_mean_holds_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        values = np.random.default_rng([7, seed]).uniform(-0.5, 0.9, 30)
        low, high = summarise([of(float(v)) for v in values], resamples=200, seed=seed).interval
        hits += low <= 0.2 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_as_many_nulls_as_scores_are_needed():
    with pytest.raises(ValueError, match="1 nulls for 2 scores"):
        summarise([of(0.1), of(0.2)], [[0.1]])


# What goes to disk.


def test_scores_and_summaries_survive_json():
    rng = np.random.default_rng(6)
    pairs = noisy(rng, 4)
    score = neuron_score({"visual": pairs, "text": pairs}, active=[x > 0 for x, _ in pairs])
    assert score.interval is not None
    assert Score.model_validate_json(score.model_dump_json()) == score
    summary = summarise([score, of(0.1), of(None)], [[0.1], [0.0], []])
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


def test_a_score_written_before_there_were_intervals_is_still_read():
    old = '{"visual": {"r": 0.5, "undefined": null, "mean_per_sample": 0.4, "tokens": 7}}'
    assert Score.model_validate_json(old).value == 0.5


@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES)
def test_no_json_holds_a_number_that_is_none(samples):
    pairs = [arrays(sample) for sample in samples]
    score = neuron_score({"visual": pairs}, active=[x > 0 for x, _ in pairs], resamples=20)
    for model in (score, summarise([score, of(0.2)], [[0.1], [NAN]], resamples=20)):
        text = model.model_dump_json()
        assert type(model).model_validate_json(text) == model
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_nan_is_refused_wherever_json_would_hold_it():
    with pytest.raises(ValueError, match="finite"):
        side(NAN)
    with pytest.raises(ValueError, match="finite"):
        Score(interval=(NAN, 0.5))
    with pytest.raises(ValueError, match="finite"):
        Summary(mean=NAN, neurons=1, constant_predictions=0, undefined=0)

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neuronlens.score import ModalityScore, Score, correlation, modality_score, summarise

NAN = math.nan
NUMBERS = st.integers(-1000, 1000).map(lambda k: k / 8)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30)


def columns(pairs) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array(side, float) for side in zip(*pairs, strict=True))


# One correlation.


@settings(max_examples=200)
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


@settings(max_examples=100)
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


@settings(max_examples=100)
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


@settings(max_examples=50)
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

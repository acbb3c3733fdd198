"""Scores of several neurons together, beside those of other neurons' explanations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from neuronlens.score.bootstrap import Interval, mean_interval
from neuronlens.score.neuron import RESAMPLES, Score


class Summary(BaseModel):
    """Scores of several neurons together, beside their null.

    A neuron's null are the scores that explanations of other neurons reach on its samples.
    The intervals are of 95 %, by bootstrap over neurons; None for fewer than two. They take
    neurons for independent. Neurons scored on the same samples, or with each other's
    explanations as null, are not: then the intervals are too narrow.

    Attributes:
        mean: Of the defined scores, constant predictions counted as 0; None without any.
        neurons: How many are in the mean.
        constant_predictions: How many sides were counted as 0.
        undefined: How many neurons were left out: constant truth, no tokens, or not finite.
        interval: Of `mean`.
        null: Mean over neurons with a null of each one's mean null; None without any.
        null_neurons: How many are in `null`.
        null_interval: Of `null`.
        gap: Mean over neurons with a score and a null of their difference; None without any.
            Not always `mean` - `null`, which may be of other neurons.
        gap_neurons: How many are in `gap` and `above_null`.
        gap_interval: Of `gap`; a neuron is drawn with its null.
        above_null: Share of neurons whose score exceeds every one of its null draws. By
            chance alone it would be at most 1 / (draws + 1).
    """

    model_config = ConfigDict(defer_build=True, allow_inf_nan=False)

    mean: float | None
    neurons: int
    constant_predictions: int
    undefined: int
    interval: Interval | None = None
    null: float | None = None
    null_neurons: int = 0
    null_interval: Interval | None = None
    gap: float | None = None
    gap_neurons: int = 0
    gap_interval: Interval | None = None
    above_null: float | None = None


class Difference(BaseModel):
    """How much better the same neurons score in one study than in another.

    Attributes:
        mean: Mean over neurons of the difference of their scores; None without any.
        interval: Of 95 %, by bootstrap over neurons; None for fewer than two.
        neurons: How many have a score in both.
    """

    model_config = ConfigDict(defer_build=True, allow_inf_nan=False)

    mean: float | None
    interval: Interval | None
    neurons: int


def difference(
    scores: Sequence[Score],
    others: Sequence[Score],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The mean difference of paired scores; pairs with an undefined one are left out.

    Args:
        scores: One of each neuron.
        others: Of the same neurons, in their order.
        resamples: How often neurons are drawn for the interval.
        seed: Of the draws.

    Raises:
        ValueError: If there are not as many of both.
    """
    values = [
        one.value - other.value
        for one, other in zip(scores, others, strict=True)
        if one.value is not None and other.value is not None
    ]
    return Difference(
        mean=_mean(values) if values else None,
        interval=mean_interval(values, resamples=resamples, seed=seed),
        neurons=len(values),
    )


def summarise(
    scores: Sequence[Score],
    nulls: Sequence[Sequence[float]] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Summary:
    """The mean score beside its null, with what both count and leave out.

    Args:
        scores: One of each neuron.
        nulls: Of each neuron, the scores of other neurons' explanations on its samples; may
            be empty, and NaN draws are left out. None if there are none at all.
        resamples: How often neurons are drawn for the intervals; 0 for no intervals.
        seed: Of the draws.

    Raises:
        ValueError: If there are not as many nulls as scores.
    """
    if nulls is None:
        nulls = [[] for _ in scores]
    if len(nulls) != len(scores):
        raise ValueError(
            f"{len(nulls)} nulls for {len(scores)} scores: give one list per neuron, empty "
            "where a neuron has no null."
        )
    draws = [[draw for draw in each if not math.isnan(draw)] for each in nulls]
    values = [score.value for score in scores]
    defined = [value for value in values if value is not None]
    null = [_mean(each) for each in draws if each]
    both = [(v, each) for v, each in zip(values, draws, strict=True) if v is not None and each]
    gaps = [value - _mean(each) for value, each in both]
    sides = [side for score in scores for side in (score.visual, score.text) if side is not None]

    def interval(of: Sequence[float]) -> Interval | None:
        return mean_interval(of, resamples=resamples, seed=seed)

    return Summary(
        mean=_mean(defined) if defined else None,
        neurons=len(defined),
        constant_predictions=sum(side.undefined == "constant prediction" for side in sides),
        undefined=len(values) - len(defined),
        interval=interval(defined),
        null=_mean(null) if null else None,
        null_neurons=len(null),
        null_interval=interval(null),
        gap=_mean(gaps) if gaps else None,
        gap_neurons=len(gaps),
        gap_interval=interval(gaps),
        above_null=_mean([value > max(each) for value, each in both]) if both else None,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

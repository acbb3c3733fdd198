"""How far scores would move with other samples, or with other neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float, Int

from neuronlens.score.agreement import ROUNDING, Values

Interval = tuple[float, float]

PERCENTILES: Final = (2.5, 97.5)


def percentile_interval(values: Float[np.ndarray, " resample"]) -> Interval:
    """Between which values 95 % of the resamples lie."""
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, resamples: int, seed: int) -> Interval | None:
    """Bootstrap interval of a mean; None for fewer than two values or no resamples."""
    if len(values) < 2 or resamples < 1:
        return None
    rng, array = np.random.default_rng(seed), np.asarray(values, float)
    # One resample at a time: an array of all of them would not fit for a whole model's neurons.
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(resamples)]
    return percentile_interval(np.array(means))


def resampled_correlations(
    pairs: Sequence[tuple[Values, Values]], rows: Int[np.ndarray, "draw resample"]
) -> Float[np.ndarray, " resample"]:
    """Pooled correlation of every resample of the samples; NaN where it is undefined.

    A constant prediction counts 0, as in `ModalityScore.counted`. No resample is put
    together: each sample's moments about its own mean are enough. They are added with the
    distances between the means, and all means are kept relative to one of them, so nothing
    large cancels, as it would in raw sums of squares.

    Args:
        pairs: True and simulated activations of each sample, finite but for NaN where nothing
            was predicted.
        rows: Which sample each draw of each resample took.
    """
    of = _Moments(pairs)
    count = of.count.take(rows)
    total = count.sum(0)
    centre = of.total.take(rows, 1).sum(1) / np.maximum(total, 1)
    off_x, off_y = of.mean.take(rows, 1) - centre[:, None]
    xx, yy, xy = of.spread.take(rows, 1).sum(1)
    xx += (count * off_x * off_x).sum(0)
    yy += (count * off_y * off_y).sum(0)
    xy += (count * off_x * off_y).sum(0)
    low, high = of.low.take(rows, 1).min(1), of.high.take(rows, 1).max(1)
    # Without tokens low is inf and high is -inf: that does not vary either.
    varies = high - low > ROUNDING * np.maximum(1, np.maximum(np.abs(low), np.abs(high)))
    r = np.where(varies[0], 0.0, np.nan)
    at = varies.all(0)
    r[at] = np.clip(xy[at] / (np.sqrt(xx[at]) * np.sqrt(yy[at])), -1, 1)
    return r


class _Moments:
    """What pooled correlations need to know of each sample; the first axis is true, simulated."""

    def __init__(self, pairs: Sequence[tuple[Values, Values]]) -> None:
        self.count = np.zeros(len(pairs))
        self.total, self.mean = np.zeros((2, 2, len(pairs)))
        self.spread = np.zeros((3, len(pairs)))
        self.low, self.high = np.full((2, len(pairs)), np.inf), np.full((2, len(pairs)), -np.inf)
        origin: np.ndarray | None = None
        for i, (true, simulated) in enumerate(pairs):
            both = np.array((true, simulated), float)
            both = both[:, ~np.isnan(both[1])]
            self.count[i] = both.shape[1]
            if not self.count[i]:
                continue
            self.low[:, i], self.high[:, i] = both.min(1), both.max(1)
            if origin is None:
                origin = both.mean(1, keepdims=True)
            both -= origin
            self.total[:, i] = both.sum(1)
            self.mean[:, i] = self.total[:, i] / self.count[i]
            x, y = both - self.mean[:, [i]]
            self.spread[:, i] = x @ x, y @ y, x @ y

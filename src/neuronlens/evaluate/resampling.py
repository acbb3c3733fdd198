"""How far means and differences would move with other images, and with other controls."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int

from neuronlens.score.bootstrap import Interval, percentile_interval

RESAMPLES: Final = 2000

_AT_ONCE: Final = 64

Values = Float[np.ndarray, "member row"]
Rows = Bool[np.ndarray, " row"]


@dataclass(frozen=True)
class Estimated:
    """A mean, or a difference of means, with its interval.

    Attributes:
        value: NaN if there is nothing to take a mean of.
        interval: Where 95 % of the resamples lie; None for fewer than two units, or without
            resamples.
        rows: How many questions or samples are in it.
        units: How many units these are, which are resampled whole.
        resamples: How many resamples the interval rests on; those in which a group did not
            occur are left out.
    """

    value: float
    interval: Interval | None
    rows: int
    units: int
    resamples: int = 0

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        if self.interval is None:
            return f"{self.value:.3f}"
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f})"


class Measured:
    """Numbers of conditions on the same rows: means, paired differences, and their intervals.

    A condition has one member, or several that stand for one another, such as random controls of
    several seeds. Its mean is over all numbers of all members. Two conditions are compared row by
    row, every member of one with every member of the other, where both have a number.

    Intervals are percentile bootstraps of both: rows are drawn with replacement in whole units
    (all questions on one image are one unit), the same ones for every condition, and members of
    each condition by themselves. With few members this is too narrow by about the factor
    sqrt((members - 1) / members) in that part.

    Args:
        values: By condition, the number of each member on each row; NaN where there is none.
        units: Which unit each row belongs to, from 0.
        resamples: How often to draw; 0 for no intervals.
        seed: Of the draws.
    """

    def __init__(
        self, values: Mapping[str, Values], units: Sequence[int], *, resamples: int, seed: int
    ) -> None:
        self.values = dict(values)
        self.units: Int[np.ndarray, " row"] = np.asarray(units, dtype=int)
        self.resamples = resamples
        self.seed = seed

    def mean(self, condition: str, rows: Rows | None = None) -> Estimated:
        """The mean of one condition over some rows, by default all."""
        values = self.values[condition]
        rows = np.ones(values.shape[1], dtype=bool) if rows is None else rows
        sums, counts = _sums(values[:, rows])
        members = self._members(condition)
        used: Rows = np.asarray(counts.any(0))
        value = float(sums.sum() / counts.sum()) if counts.any() else np.nan
        drawn = [
            (_weighted(members[part], sums, w), _weighted(members[part], counts, w))
            for part, w in self._drawn(rows)
        ]
        ratios = _ratios(*(np.concatenate(each) for each in zip(*drawn, strict=True)))
        return self._estimate(value, ratios, rows, used)

    def difference(self, one: str, other: str, rows: Rows, versus: Rows | None = None) -> Estimated:
        """How much more one condition has than another on the same rows.

        Args:
            one: A condition.
            other: What is taken away from it.
            rows: Where.
            versus: Other rows, whose difference is taken away from that of the first ones.
        """
        value, ratios, used = self._paired(one, other, rows)
        if versus is not None:
            away, resampled, there = self._paired(one, other, versus)
            both = rows | versus
            present = np.zeros(len(both), dtype=bool)
            present[rows] |= used
            present[versus] |= there
            return self._estimate(value - away, ratios - resampled, both, present[both])
        return self._estimate(value, ratios, rows, used)

    def _paired(
        self, one: str, other: str, rows: Rows
    ) -> tuple[float, Float[np.ndarray, " resample"], Rows]:
        """Difference, resampled differences, and which of the rows have one."""
        sums_a, counts_a = _sums(self.values[one][:, rows])
        sums_b, counts_b = _sums(self.values[other][:, rows])
        # Over all pairs of members: sum (a - b), and how many pairs there are.
        each = sums_a.sum(0) * counts_b.sum(0) - counts_a.sum(0) * sums_b.sum(0)
        pairs = counts_a.sum(0) * counts_b.sum(0)
        value = float(each.sum() / pairs.sum()) if pairs.any() else np.nan
        members_a, members_b = self._members(one), self._members(other)
        upper, lower = [], []
        for part, w in self._drawn(rows):
            a, b = members_a[part], members_b[part]
            of_a, of_b = a @ counts_a, b @ counts_b
            upper.append(((a @ sums_a * of_b - of_a * (b @ sums_b)) * w).sum(1))
            lower.append((of_a * of_b * w).sum(1))
        return value, _ratios(np.concatenate(upper), np.concatenate(lower)), pairs > 0

    def _estimate(
        self, value: float, ratios: Float[np.ndarray, " resample"], rows: Rows, used: Rows
    ) -> Estimated:
        units = len(np.unique(self.units[rows][used]))
        kept = ratios[~np.isnan(ratios)]
        interval = percentile_interval(kept) if units > 1 and len(kept) > 1 else None
        return Estimated(value, interval, int(used.sum()), units, len(kept) if interval else 0)

    def _members(self, condition: str) -> Float[np.ndarray, "resample member"]:
        """How often each member is drawn; the same draws whatever it is compared with."""
        count = len(self.values[condition])
        rng = np.random.default_rng([self.seed, 1, zlib.crc32(condition.encode())])
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=self.resamples)
        return np.asarray(drawn, dtype=float)

    def _drawn(self, rows: Rows) -> Iterator[tuple[slice, Float[np.ndarray, "part row"]]]:
        """How often each of the rows is drawn, part by part; the same draws every time.

        A whole table of draws would not fit for large sets of questions.
        """
        rng = np.random.default_rng([self.seed, 0])
        count = int(self.units.max()) + 1 if len(self.units) else 0
        at = self.units[rows]
        if not self.resamples:
            yield slice(0, 0), np.zeros((0, len(at)))
        for start in range(0, self.resamples, _AT_ONCE):
            size = min(_AT_ONCE, self.resamples - start)
            drawn = rng.multinomial(count, np.full(count, 1 / count), size=size)
            yield slice(start, start + size), drawn[:, at].astype(float)


def _sums(values: Values) -> tuple[Values, Values]:
    """Numbers with 0 where there is none, and how many there are: 1 or 0."""
    there = ~np.isnan(values)
    return np.where(there, values, 0.0), there.astype(float)


def _weighted(
    members: Float[np.ndarray, "part member"], values: Values, rows: Float[np.ndarray, "part row"]
) -> Float[np.ndarray, " part"]:
    total: Float[np.ndarray, " part"] = ((members @ values) * rows).sum(1)
    return total


def _ratios(
    upper: Float[np.ndarray, " resample"], lower: Float[np.ndarray, " resample"]
) -> Float[np.ndarray, " resample"]:
    """NaN for a resample in which nothing occurs."""
    ratios = np.full(len(upper), np.nan)
    np.divide(upper, lower, out=ratios, where=lower > 0)
    return ratios

"""How measured numbers are summed up and written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median of some numbers, and where nine tenths of them begin and end.

    Attributes:
        median: Of them.
        low, high: 10th and 90th percentile; the smallest and largest of fewer than ten.
        count: How many there were.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread:
        """The spread of some numbers."""
        rising = sorted(numbers)
        low, high = rising[0], rising[-1]
        if len(rising) >= 10:
            tenths = statistics.quantiles(rising, n=10, method="inclusive")
            low, high = tenths[0], tenths[-1]
        return cls(statistics.median(rising), low, high, len(rising))

    def __str__(self) -> str:
        return f"**{self.median:.2f}** ({self.low:.2f} to {self.high:.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def amount(size: float) -> str:
    """Bytes for people."""
    for unit, of_unit in (("GB", 1e9), ("MB", 1e6)):
        if size >= of_unit:
            return f"{size / of_unit:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"

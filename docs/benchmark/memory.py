"""Peak memory of a scan beside the number of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import neuronlens as nl
from benchmark.apart import apart, peak
from benchmark.spread import amount, table


@dataclass(frozen=True)
class Peak:
    """Of one scan.

    Attributes:
        samples: How many there were.
        model: Peak memory before the scan, in bytes.
        scan: Peak memory after it.
    """

    samples: int
    model: int
    scan: int


@dataclass(frozen=True)
class Memory:
    """Of a short and a long scan.

    Attributes:
        flat: Whether the long one needs at most 5 % more.
    """

    few: Peak
    many: Peak
    flat: bool


def measure(few: int, many: int) -> Memory:
    """Both scans, each in a process of its own."""
    first, second = (Peak(**apart("memory:scanned", samples=count)) for count in (few, many))
    return Memory(first, second, second.scan <= 1.05 * first.scan)


def drawn(samples: int) -> Iterator[nl.Sample]:
    """Scenes that are drawn when they are asked for, so that the data takes no memory."""
    for seed in range(samples):
        yield from nl.testbed.scenes(1, seed)


def scanned(samples: int) -> Peak:
    """A scan of the testbed."""
    bed = nl.testbed.load()
    adapter = nl.adapt(bed.model, bed.processor)
    with TemporaryDirectory() as folder:
        before = peak()
        nl.scan(adapter, drawn(samples), out=f"{folder}/atlas")
        return Peak(samples, before, peak())


def told(found: Memory) -> str:
    """The section of the page."""
    rows = [
        (f"{each.samples:,}", amount(each.scan), amount(each.model))
        for each in (found.few, found.many)
    ]
    more = found.many.scan / found.few.scan - 1
    return "\n\n".join(
        [
            table(["samples", "peak of the process", "of it before the scan"], rows),
            f"The longer scan takes {more:+.1%}: it is {'' if found.flat else 'not '}flat within "
            "5 %. The call is `nl.scan(vlm, samples, out=...)`, on the testbed.",
        ]
    )

"""The scan of all modules, each batch beside a bare forward of the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import neuronlens as nl
from benchmark.models import MIDDLE, Shape, photographs, random_llava
from benchmark.spread import Spread, table


@dataclass(frozen=True)
class Pair:
    """A batch of a scan beside its bare forward.

    Attributes:
        done: Samples that had been scanned when it began.
        scan: Seconds of wall-clock time of the scan, from when it asked for the batch's samples
            to when it asked for the next ones.
        bare: Seconds of `model(**inputs, use_cache=False)`.
        last: Likewise with `logits_to_keep=1`.
    """

    done: int
    scan: float
    bare: float
    last: float


class Beside:
    """Samples for a scan; between its batches, forwards of the last batch without the scan.

    A scan whose window is a batch asks for the samples of one batch after the other, so the time
    between two questions is everything it does for a batch.

    Attributes:
        pairs: What was measured.
        apart: Seconds spent on bare forwards.
    """

    def __init__(
        self,
        adapter: nl.ModelAdapter,
        samples: Sequence[nl.Sample],
        batch_size: int,
        is_paired: Callable[[int], bool] = lambda number: True,
    ) -> None:
        self.pairs: list[Pair] = []
        self.apart = 0.0
        self._adapter, self._samples, self._size = adapter, samples, batch_size
        self._is_paired = is_paired
        self._inputs: Mapping[str, Any] = {}
        run = adapter.forward

        def forward(inputs: Mapping[str, Any], *, logits: bool = True) -> Any:
            self._inputs = inputs
            return run(inputs, logits=logits)

        adapter.forward = forward  # type: ignore[method-assign]

    def __iter__(self) -> Iterator[nl.Sample]:
        since = time.perf_counter()
        for start in range(0, len(self._samples), self._size):
            yield from self._samples[start : start + self._size]
            took = time.perf_counter() - since
            if self._is_paired(start // self._size):
                self._run_bare(start, took)
            since = time.perf_counter()

    def _run_bare(self, done: int, took: float) -> None:
        start = time.perf_counter()
        bare = seconds_of_forward(self._adapter.model, self._inputs)
        last = seconds_of_forward(self._adapter.model, self._inputs, logits_to_keep=1)
        self.pairs.append(Pair(done, took, bare, last))
        self.apart += time.perf_counter() - start


def seconds_of_forward(
    model: torch.nn.Module, inputs: Mapping[str, Any], **arguments: Any
) -> float:
    """How long the bare model takes."""
    start = time.perf_counter()
    with torch.inference_mode():
        model(**inputs, use_cache=False, **arguments)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Phase:
    """Ratios over a stretch of a scan.

    Attributes:
        first, last: Samples it begins and ends with, from 1.
        ratio: Scan over bare forward, by batch.
        ratio_last: Scan over a forward that computes the last token's logits alone.
        total: Scan over bare forward, all batches together: rare and slow things, such as
            checkpoints, weigh as they do.
        scan, bare: Median seconds of a batch.
    """

    first: int
    last: int
    ratio: Spread
    ratio_last: Spread
    total: float
    scan: float
    bare: float

    @classmethod
    def of(cls, pairs: Sequence[Pair], batch_size: int) -> Phase:
        """The phase of some consecutive pairs."""
        return cls(
            pairs[0].done + 1,
            pairs[-1].done + batch_size,
            Spread.of(pair.scan / pair.bare for pair in pairs),
            Spread.of(pair.scan / pair.last for pair in pairs),
            sum(pair.scan for pair in pairs) / sum(pair.bare for pair in pairs),
            Spread.of(pair.scan for pair in pairs).median,
            Spread.of(pair.bare for pair in pairs).median,
        )


@dataclass(frozen=True)
class Scanning:
    """What a scan costs beside the bare forward.

    Attributes:
        shape: Of the model and its samples.
        samples, batch_size, n: As given to the scan.
        threads: Of torch.
        cold, steady: The scan's beginning, and what follows `settled` samples.
        settled: Samples after which it is called steady.
        ends: Seconds before the first and after the last batch: fingerprint and atlas.
        saved: Share of the time spent on checkpoints.
    """

    shape: Shape
    samples: int
    batch_size: int
    n: int
    threads: int
    cold: Phase
    steady: Phase
    settled: int
    ends: float
    saved: float


def measure(samples: int, cold: int, settled: int, n: int, batch_size: int = 4) -> Scanning:
    """Scan the mid-size model; only the batches of the two phases are paired."""
    adapter = random_llava(MIDDLE)
    with TemporaryDirectory() as folder:
        given = photographs(Path(folder), samples)
        warm = nl.encode(adapter, given[:batch_size]).inputs
        seconds_of_forward(adapter.model, warm)

        def is_paired(number: int) -> bool:
            return not cold <= number * batch_size < settled

        beside = Beside(adapter, given, batch_size, is_paired)
        since = time.perf_counter()
        atlas = nl.scan(
            adapter,
            beside,
            out=Path(folder) / "atlas",
            n=n,
            batch_size=batch_size,
            window=batch_size,
            workers=0,
        )
        whole = time.perf_counter() - since
        (session,) = atlas.runs
        pairs = beside.pairs
        return Scanning(
            Shape.of(adapter, given[0]),
            samples,
            batch_size,
            n,
            torch.get_num_threads(),
            Phase.of([pair for pair in pairs if pair.done < cold], batch_size),
            Phase.of([pair for pair in pairs if pair.done >= settled], batch_size),
            settled,
            whole - session.seconds,
            session.saving / (session.seconds - beside.apart),
        )


def told(found: Scanning) -> str:
    """The section of the page."""
    rows = [
        (
            name,
            f"{phase.first:,} to {phase.last:,}",
            phase.ratio,
            phase.ratio_last,
            phase.ratio.count,
            f"{phase.scan:.2f} s",
            f"{phase.bare:.2f} s",
        )
        for name, phase in (("cold start", found.cold), ("steady", found.steady))
    ]
    head = [
        "", "samples", "scan / bare forward", "scan / forward with last logits", "pairs",
        "scan, a batch", "bare, a batch",
    ]  # fmt: skip
    call = f"nl.scan(vlm, samples, out=..., n={found.n}, batch_size={found.batch_size}, "
    call += f"window={found.batch_size}, workers=0)"
    return "\n\n".join(
        [
            f"LLaVA of medium size, random weights: {found.shape}. {found.samples:,} JPEG "
            f"photographs from disk, {found.threads} threads. The call is `{call}`, with every "
            "other argument left as it is.",
            table(head, rows),
            f"What follows {found.settled:,} samples is called steady here. All pairs together, "
            f"sum over sum, give {found.cold.total:.2f} in the cold start and "
            f"{found.steady.total:.2f} in the steady state. Beside the batches, "
            f"the scan took {found.ends:.1f} s for reading the weights' fingerprint and putting "
            f"the atlas together; {found.saved:.1%} of its time went into checkpoints.",
        ]
    )

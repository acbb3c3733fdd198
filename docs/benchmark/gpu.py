"""The scan of LLaVA-1.5-7B's shape on a GPU, beside the bare forward."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest import mock

import torch

import neuronlens as nl
from benchmark.models import SEVEN_BILLION, Shape, photographs, random_llava
from benchmark.spread import Spread, table
from neuronlens.scan import state

WHOLE = 23_000
"""Samples of the scan that is extrapolated to."""

WARM = 4
"""Batches at a scan's beginning in which workers start and kernels are chosen."""


@dataclass(frozen=True)
class Synchronisations:
    """How often the program waits for the GPU, as torch's debug mode counts.

    Attributes:
        bare: In a bare forward.
        scan: In a forward of the scan, its hooks included.
        strict: Reductions that ran in the mode in which waiting raises; none did.
    """

    bare: int
    scan: int
    strict: int


@dataclass(frozen=True)
class Gpu:
    """What was measured.

    Attributes:
        device: Name of the GPU.
        shape: Of the model and its samples.
        samples, batch_size: Of each scan.
        workers: What the default came to.
        ratio: A batch of the scan over the bare forward, by batch; the bare one is the median
            of those run just before.
        ratio_last: Over the forward that computes the last token's logits alone.
        bare: Median seconds of the bare forward.
        speed: Samples per second, by batch.
        waited: Share of the time in which the model waited for data.
        minutes: For 23,000 samples, extrapolated.
        memory: Most memory of the GPU above the model's and the bare forward's, in bytes.
        synchronisations: None where that was not counted.
    """

    device: str
    shape: Shape
    samples: int
    batch_size: int
    workers: int
    ratio: Spread
    ratio_last: Spread
    bare: float
    speed: Spread
    waited: float
    minutes: float
    memory: int
    synchronisations: Synchronisations | None


def measure(
    samples: int,
    rounds: int,
    batch_size: int = 8,
    device: str = "cuda",
    size: dict[str, Any] = SEVEN_BILLION,
) -> Gpu:
    """Bare forwards and a scan in turn, several times over."""
    adapter = random_llava(size, torch.bfloat16, device)
    is_gpu = device == "cuda"
    bare, ratio, ratio_last, periods, ends, memory = [], [], [], [], [], 0
    with TemporaryDirectory() as folder:
        given = photographs(Path(folder), samples)
        batch = nl.encode(adapter, given[:batch_size]).on(adapter.device)
        _seconds(adapter, batch)
        for number in range(rounds):
            whole = [_seconds(adapter, batch) for _ in range(8)]
            last = [_seconds(adapter, batch, logits_to_keep=1) for _ in range(8)]
            before = torch.cuda.max_memory_allocated() if is_gpu else 0
            begun: list[float] = []
            with mock.patch.object(adapter, "forward", _noting(adapter.forward, begun)):
                since = perf_counter()
                out = Path(folder) / f"atlas-{number}"
                atlas = nl.scan(adapter, given, out=out, batch_size=batch_size)
                took = perf_counter() - since
            after = torch.cuda.max_memory_allocated() if is_gpu else 0
            memory = max(memory, after - before)
            mine = [second - first for first, second in pairwise(begun)][WARM:]
            bare += whole
            periods += mine
            ends.append(took - sum(mine))
            ratio += [each / statistics.median(whole) for each in mine]
            ratio_last += [each / statistics.median(last) for each in mine]
        (session,) = atlas.runs
        shape = Shape.of(adapter, given[0])
        counted = _synchronisations(adapter, given[: 4 * batch_size], batch) if is_gpu else None
    return Gpu(
        torch.cuda.get_device_name() if is_gpu else device,
        shape,
        samples,
        batch_size,
        session.workers,
        Spread.of(ratio),
        Spread.of(ratio_last),
        statistics.median(bare),
        Spread.of(batch_size / each for each in periods),
        session.waited / session.seconds,
        (statistics.mean(periods) * WHOLE / batch_size + statistics.median(ends)) / 60,
        memory,
        counted,
    )


def _seconds(adapter: nl.ModelAdapter, inputs: Mapping[str, Any], **arguments: Any) -> float:
    """How long the bare model takes, until the device has done it."""
    _wait(adapter)
    start = perf_counter()
    with torch.inference_mode():
        adapter.model(**inputs, use_cache=False, **arguments)
    _wait(adapter)
    return perf_counter() - start


def _wait(adapter: nl.ModelAdapter) -> None:
    if adapter.device.type == "cuda":
        torch.cuda.synchronize()


def _noting(run: Callable[..., Any], begun: list[float]) -> Callable[..., Any]:
    def forward(inputs: Mapping[str, Any], *, logits: bool = True) -> Any:
        begun.append(perf_counter())
        return run(inputs, logits=logits)

    return forward


def _synchronisations(
    adapter: nl.ModelAdapter, samples: list[nl.Sample], inputs: Mapping[str, Any]
) -> Synchronisations:
    """Count in forwards with and without hooks; in the scan's reductions, waiting raises."""
    run, reduce = adapter.forward, state.reduce_everything
    counts: list[int] = []
    strict = 0

    def counted(inputs: Mapping[str, Any], *, logits: bool = True) -> Any:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return run(inputs, logits=logits)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                counts.append(sum("synchronizing" in str(each.message) for each in said))

    def strictly(*given: Any) -> Any:
        nonlocal strict
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            strict += 1
            return reduce(*given)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    with torch.inference_mode():
        counted(inputs, logits=False)
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(adapter, "forward", counted),
        mock.patch.object(state, "reduce_everything", strictly),
    ):
        nl.scan(adapter, samples, out=f"{folder}/atlas", batch_size=len(samples) // 4)
    return Synchronisations(counts[0], max(counts[1:]), strict)


def told(found: Gpu) -> str:
    """The section of the page."""
    rows = [
        ("scan / bare forward", found.ratio),
        ("scan / forward with last logits", found.ratio_last),
        ("bare forward, a batch", f"{found.bare * 1000:,.0f} ms"),
        ("samples a second", found.speed),
        (f"{WHOLE:,} samples, extrapolated", f"{found.minutes:.0f} min"),
        ("waits for data", f"{found.waited:.1%} of the time"),
        ("memory above model and forward", f"{found.memory / 1e9:.2f} GB"),
    ]
    said = [
        f"{found.device}. LLaVA-1.5-7B's shape, random weights: {found.shape}. "
        f"{found.samples:,} JPEG photographs from disk. The call is `nl.scan(vlm, samples, "
        f"out=..., batch_size={found.batch_size})`; the default came to {found.workers} workers.",
        table(["", f"over {found.ratio.count} batches"], rows),
    ]
    if found.synchronisations is not None:
        counted = found.synchronisations
        said.append(
            f"A bare forward waits for the GPU {counted.bare} times, one of the scan "
            f"{counted.scan} times. {counted.strict} reductions ran with "
            '`torch.cuda.set_sync_debug_mode("error")`, in which waiting raises; none did.'
        )
    return "\n\n".join(said)

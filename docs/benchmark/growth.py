"""What a scan's time grows with, how processes share it, and how long it waits for data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

import neuronlens as nl
from benchmark.apart import apart
from benchmark.scanning import seconds_of_forward
from benchmark.spread import Spread, table
from neuronlens.scan import batch_plan

BATCH = 8


@dataclass(frozen=True)
class Case:
    """One way to scan the testbed.

    Attributes:
        name: For the page.
        samples: How many, as parts of the plain number of them.
        said: How often each response is repeated.
        images: Of each sample, all the same.
        more: Arguments of the scan that differ from the plain call.
    """

    name: str
    samples: float = 1
    said: int = 1
    images: int = 1
    more: tuple[tuple[str, Any], ...] = ()


PLAIN = Case("plain: all sites, N = 50")
CASES = (
    PLAIN,
    Case("half the samples", samples=0.5),
    Case("twice the samples", samples=2),
    Case("the four language sites", more=(("sites", "language"),)),
    Case("one language site", more=(("sites", ("language.2",)),)),
    Case("responses said three times", said=3),
    Case("two images in each sample", images=2),
    Case("N = 10", more=(("n", 10),)),
    Case("N = 200", more=(("n", 200),)),
    Case("1 worker", more=(("workers", 1),)),
    Case("2 workers", more=(("workers", 2),)),
)


@dataclass(frozen=True)
class Grown:
    """One case.

    Attributes:
        name: Of the case.
        samples: How many there were.
        neurons: How many were scanned.
        tokens: Of a sample in the language stream, on average.
        bare: Time over that of the bare forwards of the same batches, by round.
        plain: Time of a sample over that of the plain call, by round.
        milliseconds: Of a sample.
        waited: Share of the time in which the model waited for data.
    """

    name: str
    samples: int
    neurons: int
    tokens: float
    bare: Spread
    plain: Spread
    milliseconds: float
    waited: float


@dataclass(frozen=True)
class Growth:
    """All cases, and several processes.

    Attributes:
        cases: In turn, round after round.
        shared: Time of two processes over that of one, each with one thread, by round.
        shared_samples: How many samples they scanned.
        rounds: How often everything was measured.
    """

    cases: list[Grown]
    shared: Spread
    shared_samples: int
    rounds: int


@dataclass(frozen=True)
class _Time:
    scan: float
    bare: float
    waited: float


def measure(samples: int, shared: int, rounds: int) -> Growth:
    """Every case in turn, several times over; then one and two processes in turn."""
    torch.set_num_threads(1)  # the fastest for a model this small
    bed = nl.testbed.load()
    adapter = nl.adapt(bed.model, bed.processor)
    scenes = nl.testbed.scenes(round(samples * max(case.samples for case in CASES)))
    given = {case.name: _samples(case, scenes, samples) for case in CASES}
    _timed(adapter, given[PLAIN.name][: 4 * BATCH], PLAIN)
    times: dict[str, list[_Time]] = {case.name: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            times[case.name].append(_timed(adapter, given[case.name], case))
    cases = [_grown(adapter, case, given[case.name], times) for case in CASES]
    ratios = []
    for _ in range(rounds):
        one, two = (_shared(processes, shared) for processes in (1, 2))
        ratios.append(two / one)
    return Growth(cases, Spread.of(ratios), shared, rounds)


def _shared(processes: int, samples: int) -> float:
    with TemporaryDirectory() as folder:
        out = f"{folder}/atlas"
        seconds: float = apart("growth:scanned", processes=processes, samples=samples, out=out)
        return seconds


def _samples(case: Case, scenes: list[nl.Sample], samples: int) -> list[nl.Sample]:
    return [
        replace(
            scene,
            images=scene.images * case.images,
            response=" ".join([scene.response or ""] * case.said),
        )
        for scene in scenes[: round(samples * case.samples)]
    ]


def _timed(adapter: nl.ModelAdapter, samples: list[nl.Sample], case: Case) -> _Time:
    """One scan, then the bare forwards of its batches."""
    with TemporaryDirectory() as folder:
        atlas = nl.scan(
            adapter, samples, out=f"{folder}/atlas", **{"batch_size": BATCH, **dict(case.more)}
        )
        (session,) = atlas.runs
    bare = 0.0
    for placed in batch_plan(samples, BATCH, 16 * BATCH):
        inputs = nl.encode(adapter, [sample for _, sample in placed]).inputs
        bare += seconds_of_forward(adapter.model, inputs)
    return _Time(session.seconds, bare, session.waited)


def _grown(
    adapter: nl.ModelAdapter,
    case: Case,
    samples: list[nl.Sample],
    times: dict[str, list[_Time]],
) -> Grown:
    mine, count = times[case.name], len(samples)
    plain = [each.scan / (count / case.samples) for each in times[PLAIN.name]]
    tokens = nl.encode(adapter, samples[:64]).tokens["language"].role
    return Grown(
        case.name,
        count,
        sum(site.neurons for site in adapter.select(dict(case.more).get("sites"))),
        float((tokens != nl.Role.PAD).sum()) / len(samples[:64]),
        Spread.of(each.scan / each.bare for each in mine),
        Spread.of(each.scan / count / first for each, first in zip(mine, plain, strict=True)),
        Spread.of(each.scan / count * 1000 for each in mine).median,
        Spread.of(each.waited / each.scan for each in mine).median,
    )


def scanned(samples: int, out: str) -> float:
    """Seconds of a scan of the testbed, which this process may share with others."""
    bed = nl.testbed.load()
    adapter = nl.adapt(bed.model, bed.processor)
    atlas = nl.scan(adapter, nl.testbed.scenes(samples), out=out, batch_size=BATCH)
    return max(session.seconds for session in atlas.runs)


def told(found: Growth) -> str:
    """The section of the page."""
    rows = [
        (
            each.name,
            f"{each.samples:,}",
            f"{each.neurons:,}",
            f"{each.tokens:.0f}",
            each.plain,
            each.bare,
            f"{each.milliseconds:.1f} ms",
            f"{each.waited:.0%}",
        )
        for each in found.cases
    ]
    head = [
        "call", "samples", "neurons", "tokens", "a sample / plain", "scan / bare forwards",
        "a sample", "waits for data",
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"The testbed, 1 thread, batches of {BATCH}; {found.rounds} times all calls in turn. "
            "Time is that of a whole scan, with its checkpoints and without putting the atlas "
            "together; without workers, encoding is in *waits for data*.",
            table(head, rows),
            f"**Processes.** Two processes under torchrun, each with one thread, take "
            f"{found.shared} of the time of one, over {found.shared_samples:,} samples.",
        ]
    )

"""Reading activations without a scan: every language neuron's maximum, beside the bare forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor

import neuronlens as nl
from benchmark.models import MIDDLE, photographs, random_llava
from benchmark.scanning import seconds_of_forward
from benchmark.spread import Spread, table


class Maxima:
    """A sink that keeps each neuron's largest activation over all tokens but padding."""

    def __init__(self, tokens: nl.TokenMap) -> None:
        real = (tokens.role != nl.Role.PAD).flatten()
        self.at = None if real.all() else real.nonzero().squeeze(1)
        self.largest: dict[str, Tensor] = {}

    def take(self, site: nl.NeuronSite, activation: Tensor, tokens: nl.TokenMap) -> None:
        rows = activation.flatten(0, -2)
        now = (rows if self.at is None else rows[self.at]).amax(0)
        before = self.largest.get(site.name)
        self.largest[site.name] = now if before is None else torch.maximum(before, now)


@dataclass(frozen=True)
class Recorded:
    """One model.

    Attributes:
        neurons: Of its language model.
        samples: In the batch.
        padding: Whether the batch has any.
        threads: Of torch.
        ratio: Recorded over bare forward, by pair.
        bare: Median seconds of the bare forward.
    """

    neurons: int
    samples: int
    padding: bool
    threads: int
    ratio: Spread
    bare: float


@dataclass(frozen=True)
class Recording:
    """Both models."""

    middle: Recorded
    testbed: Recorded


def measure(middle_pairs: int, testbed_pairs: int) -> Recording:
    """Bare and recorded forwards in turn, in one process."""
    with TemporaryDirectory() as folder:
        adapter = random_llava(MIDDLE)
        middle = _recorded(adapter, photographs(Path(folder), 4), middle_pairs)
    torch.set_num_threads(1)  # the fastest for a model this small
    bed = nl.testbed.load()
    adapter = nl.adapt(bed.model, bed.processor)
    return Recording(middle, _recorded(adapter, nl.testbed.scenes(8), testbed_pairs))


def _recorded(adapter: nl.ModelAdapter, samples: list[nl.Sample], pairs: int) -> Recorded:
    batch = nl.encode(adapter, samples)
    tokens = batch.tokens["language"]
    sink = Maxima(tokens)

    def recorded() -> float:
        start = perf_counter()
        with nl.record(adapter, "language", sink, batch.tokens):
            seconds_of_forward(adapter.model, batch.inputs)
        return perf_counter() - start

    def bare() -> float:
        return seconds_of_forward(adapter.model, batch.inputs)

    bare(), recorded()
    seconds = [(bare(), recorded()) for _ in range(pairs)]
    return Recorded(
        sum(site.neurons for site in adapter.select("language")),
        len(samples),
        bool((tokens.role == nl.Role.PAD).any()),
        torch.get_num_threads(),
        Spread.of(second / first for first, second in seconds),
        Spread.of(first for first, _ in seconds).median,
    )


def told(found: Recording) -> str:
    """The section of the page."""
    rows = [
        (
            name,
            f"{each.neurons:,}",
            f"{each.samples} samples, {'some' if each.padding else 'no'} padding",
            each.threads,
            each.ratio,
            each.ratio.count,
            f"{each.bare * 1000:,.0f} ms",
        )
        for name, each in (
            ("LLaVA of medium size, random weights", found.middle),
            ("the testbed", found.testbed),
        )
    ]
    head = ["model", "language neurons", "batch", "threads", "recorded / bare", "pairs", "bare"]
    return table(head, rows)

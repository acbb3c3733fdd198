"""Changed neurons: a forward in which 1 % of the neurons are changed, beside the bare forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

import neuronlens as nl
from benchmark.models import MIDDLE, photographs, random_llava
from benchmark.scanning import seconds_of_forward
from benchmark.spread import Spread, table


@dataclass(frozen=True)
class Changed:
    """One intervention.

    Attributes:
        call: How it is made.
        ratio: Changed over bare forward, by pair; entering and leaving the block is in it.
        bare: Median seconds of the bare forward.
    """

    call: str
    ratio: Spread
    bare: float


@dataclass(frozen=True)
class Intervening:
    """All of them.

    Attributes:
        neurons: How many are changed, by module.
        samples: In the batch.
        threads: Of torch.
        changed: One by one.
    """

    neurons: dict[str, int]
    samples: int
    threads: int
    changed: list[Changed]


def measure(pairs: int, share: int) -> Intervening:
    """Bare and changed forwards in turn, in one process.

    Args:
        pairs: How many of each intervention.
        share: One of so many neurons of every site is changed.
    """
    with TemporaryDirectory() as folder:
        adapter = random_llava(MIDDLE)
        batch = nl.encode(adapter, photographs(Path(folder), 4))
    neurons = [
        site.neuron(index)
        for site in adapter.sites.values()
        for index in range(0, site.width, share)
    ]
    means = dict.fromkeys(neurons, 0.1)
    every: Mapping[str, nl.Intervention] = {
        "deactivate(vlm, neurons)": nl.deactivate(adapter, neurons),
        "amplify(vlm, neurons, 2)": nl.amplify(adapter, neurons, 2),
        "set_to(vlm, neurons, means)": nl.set_to(adapter, neurons, means),
        'deactivate(vlm, neurons, roles="visual")': nl.deactivate(adapter, neurons, roles="visual"),
        "by_sample(vlm, four of them)": nl.by_sample(
            adapter, [nl.deactivate(adapter, neurons[at::4]) for at in range(4)]
        ),
    }
    counted = {
        module: sum(adapter.site(neuron.site).module == module for neuron in neurons)
        for module in ("vision", "projector", "language")
    }
    changed = []
    for call, intervention in every.items():

        def within(intervention: nl.Intervention = intervention) -> float:
            start = perf_counter()
            with intervention:
                seconds_of_forward(adapter.model, batch.inputs)
            return perf_counter() - start

        def bare() -> float:
            return seconds_of_forward(adapter.model, batch.inputs)

        bare(), within()
        # The second of a pair may be slower or faster for being the second: each is so in turn.
        seconds = []
        for number in range(pairs):
            if number % 2:
                changed_first = within()
                seconds.append((bare(), changed_first))
            else:
                seconds.append((bare(), within()))
        changed.append(
            Changed(
                f"nl.{call}",
                Spread.of(second / first for first, second in seconds),
                Spread.of(first for first, _ in seconds).median,
            )
        )
    return Intervening(counted, len(batch.samples), torch.get_num_threads(), changed)


def told(found: Intervening) -> str:
    """The section of the page."""
    counted = ", ".join(f"{module} {count:,}" for module, count in found.neurons.items())
    rows = [
        (f"`{each.call}`", each.ratio, each.ratio.count, f"{each.bare * 1000:,.0f} ms")
        for each in found.changed
    ]
    head = ["intervention", "changed / bare", "pairs", "bare"]
    whole = sum(found.neurons.values())
    return (
        f"LLaVA of medium size, random weights; {whole:,} neurons ({counted}) are changed in a "
        f"batch of {found.samples} samples, {found.threads} threads.\n\n"
        f"{table(head, rows)}"
    )

"""What an atlas of the size of a 7B model costs to open and to read."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

import neuronlens as nl
from benchmark.apart import apart
from benchmark.spread import amount
from neuronlens.atlas import Choices, ModelInfo, SampleRecord, write
from neuronlens.running import BLOCKS, COUNTED, SiteStatistics

N = 50
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Reading:
    """Of one atlas, by a process that has just started, none of its files in memory.

    Attributes:
        neurons, sites, samples: Of the atlas.
        disk: Its bytes.
        opened: Seconds of `Atlas.open`.
        reads: How many random neurons were read.
        median, slow: Milliseconds of `atlas.neuron`: the median, and the 99th percentile.
        table: Seconds of `atlas.table` of one site.
    """

    neurons: int
    sites: int
    samples: int
    disk: int
    opened: float
    reads: int
    median: float
    slow: float
    table: float


def measure(sites: int, width: int, samples: int, reads: int) -> Reading:
    """Write an atlas of random numbers, forget it, and read it in a process of its own."""
    with TemporaryDirectory() as folder:
        rows = [
            nl.NeuronSite(f"language.{layer}", "language", layer, width, "", "language")
            for layer in range(sites)
        ]
        write(
            Path(folder),
            model=ModelInfo(name="random", model_type="llava", fingerprint="", dtype="bfloat16"),
            choices=Choices(
                n=N,
                keep_visual=5,
                keep_text=3,
                text_roles=(nl.Role.RESPONSE,),
                template=True,
                batch_size=8,
                window=128,
            ),
            sites=rows,
            statistics=lambda site: _random(site, samples),
            samples=_records(samples),
            skipped=(),
            versions={},
        )
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        disk = sum(path.stat().st_size for path in files)
        for path in files:
            _forget(path)
        taken = apart("reading:read", folder=folder, reads=reads)
    return Reading(sites * width, sites, samples, disk, **taken)


def _random(site: nl.NeuronSite, samples: int) -> SiteStatistics:
    random = torch.Generator().manual_seed(site.layer)
    shape, roles = (site.neurons, N), len(COUNTED)
    # Positions of random order that differ within each neuron.
    ids = (
        torch.randint(samples, (site.neurons, 1), generator=random) + torch.randperm(samples)[:N]
    ) % samples
    kept = {
        name: torch.rand((*shape, count), generator=random).to(DTYPE).sort(2, descending=True)[0]
        for name, count in (("visual", 5), ("text", 3))
    }
    whole = {"generator": random, "dtype": torch.int64}
    return SiteStatistics.from_state_dict(
        {
            "top.ids": ids.int(),
            "top.visual": kept["visual"],
            "top.text": kept["text"],
            "role.maximum": torch.rand((site.neurons, roles), generator=random).to(DTYPE),
            "role.total": torch.randint(2**40, (site.neurons, roles), **whole),
            "fired": torch.randint(10**5, (site.neurons, 1, BLOCKS, roles), **whole),
            "tokens": torch.full((1, BLOCKS, roles), 10**5),
            "routed": torch.zeros((0, 1, BLOCKS, roles), dtype=torch.int64),
        },
        [""],
    )


def _records(samples: int) -> Iterator[SampleRecord]:
    for position in range(samples):
        yield SampleRecord(
            id=f"sample-{position}",
            image=[f"/data/{position:012}.jpg"],
            prompt="What is in the image?",
            response=" ".join(["word"] * 80),
            position=position,
            digests=["0" * 64],
        )


def _forget(path: Path) -> None:
    """Let the system drop what it holds of a file that is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def read(folder: str, reads: int) -> dict[str, float]:
    """Open, read random neurons one after the other, then a site as a table."""
    start = perf_counter()
    atlas = nl.Atlas.open(folder)
    opened = perf_counter() - start
    random, sites = Random(0), list(atlas.sites.values())
    milliseconds = []
    for _ in range(reads):
        site = random.choice(sites)
        neuron = site.neuron(random.randrange(site.width))
        start = perf_counter()
        atlas.neuron(neuron)
        milliseconds.append((perf_counter() - start) * 1000)
    start = perf_counter()
    atlas.table(sites[0].name)
    return {
        "opened": opened,
        "reads": reads,
        "median": statistics.median(milliseconds),
        "slow": statistics.quantiles(milliseconds, n=100, method="inclusive")[-1],
        "table": perf_counter() - start,
    }


def told(found: Reading) -> str:
    """The section of the page."""
    return (
        f"An atlas of {found.neurons:,} neurons ({found.sites} sites) and {found.samples:,} "
        f"samples, N = {N}, one domain, in {str(DTYPE).removeprefix('torch.')}, of random "
        f"numbers: {amount(found.disk)} on disk. In a process that has just started, with none of "
        f"the files in memory: `Atlas.open` takes {found.opened:.2f} s; `atlas.neuron(...)` "
        f"takes **{found.median:.2f} ms** (median over {found.reads} random neurons; 99th "
        f'percentile {found.slow:.2f} ms); `atlas.table("language.0")` takes '
        f"{found.table:.2f} s, with the import of pandas."
    )

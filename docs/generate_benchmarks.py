"""Write docs/benchmarks.md: what things cost, measured in one run.

`nox -s bench`, or `python docs/generate_benchmarks.py`. Measurements are in docs/benchmark/, one
module for each; docs/benchmarks.template has the prose. Each runs in a process of its own, and
wants an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import torch
from pydantic import TypeAdapter

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from benchmark import (  # noqa: E402 - it is in docs
    alternatives,
    asking,
    gpu,
    growth,
    intervening,
    killing,
    memory,
    reading,
    recording,
    scanning,
    simulating,
)
from benchmark.apart import apart  # noqa: E402

PACKAGES = ("neuronlens-vlm", "torch", "transformers")


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        found: What its `measure` finds.
        told: How the page says it.
        threads: Of its process.
        full, quick: Arguments of `measure`.
    """

    found: type
    told: Callable[[Any], str]
    threads: int
    full: dict[str, int]
    quick: dict[str, int]


PARTS = {
    "scanning": Part(
        scanning.Scanning,
        scanning.told,
        2,
        {"samples": 700, "cold": 50, "settled": 500, "n": 50},
        {"samples": 4, "cold": 2, "settled": 2, "n": 50, "batch_size": 2},
    ),
    "gpu": Part(gpu.Gpu, gpu.told, 8, {"samples": 480, "rounds": 3}, {"samples": 120, "rounds": 1}),
    "alternatives": Part(
        alternatives.Alternatives,
        alternatives.told,
        2,
        {"samples": 16, "n": 6},
        {"samples": 2, "n": 1},
    ),
    "memory": Part(
        memory.Memory, memory.told, 1, {"few": 500, "many": 5000}, {"few": 16, "many": 64}
    ),
    "growth": Part(
        growth.Growth,
        growth.told,
        1,
        {"samples": 500, "shared": 1000, "rounds": 2},
        {"samples": 16, "shared": 32, "rounds": 1},
    ),
    "reading": Part(
        reading.Reading,
        reading.told,
        1,
        {"sites": 32, "width": 11008, "samples": 23_000, "reads": 200},
        {"sites": 2, "width": 11008, "samples": 500, "reads": 20},
    ),
    "killing": Part(
        killing.Killing, killing.told, 1, {"kills": 20, "samples": 48}, {"kills": 2, "samples": 18}
    ),
    "recording": Part(
        recording.Recording,
        recording.told,
        2,
        {"middle_pairs": 12, "testbed_pairs": 50},
        {"middle_pairs": 2, "testbed_pairs": 4},
    ),
    "intervening": Part(
        intervening.Intervening,
        intervening.told,
        2,
        {"pairs": 30, "share": 100},
        {"pairs": 2, "share": 100},
    ),
    "asking": Part(
        asking.Asking,
        asking.told,
        1,
        {"neurons": 2000, "kills": 2},
        {"neurons": 40, "kills": 1},
    ),
    "simulating": Part(
        simulating.Simulating,
        simulating.told,
        2,
        {"texts": 16, "tokens": 50, "rounds": 1},
        {"texts": 4, "tokens": 20, "rounds": 1},
    ),
}
"""Measurements by name, in the order of the page."""


def measured(names: Sequence[str], quick: bool) -> dict[str, Any]:
    """Every number of the page."""
    found = {}
    for name in names:
        if name == "gpu" and not torch.cuda.is_available():
            continue
        part, since = PARTS[name], time.perf_counter()
        given = part.quick if quick else part.full
        found[name] = apart(f"{name}:measure", threads=part.threads, **given)
        sys.stderr.write(f"{name}: {time.perf_counter() - since:.0f} s\n")
    return {
        "command": shlex.join(["python", "docs/generate_benchmarks.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "quick": quick,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {package: version(package) for package in PACKAGES},
        "parts": found,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "unknown")


def page(numbers: dict[str, Any]) -> str:
    """The page that says these numbers."""
    texts = {}
    for name, part in PARTS.items():
        if name in numbers["parts"]:
            found = TypeAdapter(part.found).validate_python(numbers["parts"][name])
            texts[name] = part.told(found)
        elif name == "gpu" and numbers["gpu"] is None:
            texts[name] = "Not measured: no GPU was at hand."
        else:
            texts[name] = "Not measured in this run."
    texts["gpu_part"] = texts.pop("gpu")
    template = Template((DOCS / "benchmarks.template").read_text(encoding="utf-8"))
    return template.substitute(
        quick="**This was a quick run: too short for its figures to mean anything.**\n\n"
        if numbers["quick"]
        else "",
        command=numbers["command"],
        date=numbers["date"],
        cpu=numbers["cpu"],
        cores=numbers["cores"],
        gpu=numbers["gpu"] or "none",
        versions=", ".join(f"{name} {number}" for name, number in numbers["versions"].items()),
        **texts,
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", nargs="+", choices=PARTS, help="measure these alone")
    arguments.add_argument("--quick", action="store_true", help="does it work? Means nothing")
    arguments.add_argument("--out", type=Path, default=DOCS / "benchmarks.md", help="the page")
    arguments.add_argument("--json", type=Path, help="where to write the numbers")
    arguments.add_argument("--numbers", type=Path, help="write the page of numbers from --json")
    given = arguments.parse_args()
    if given.numbers:
        numbers = json.loads(given.numbers.read_text(encoding="utf-8"))
    else:
        numbers = measured(given.only or list(PARTS), given.quick)
    if given.json:
        given.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    given.out.write_text(page(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Scans that are killed at random moments and called again, beside one that was not disturbed."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from benchmark.apart import DOCS

sys.path.insert(0, str(DOCS.parent / "tests" / "programs"))

from kill_scan import READINGS, Job, kill, serving


@dataclass(frozen=True)
class Killing:
    """What came of it.

    Attributes:
        kills: Scans that were killed.
        batches: Of a scan that is not disturbed.
        running: How many were killed before their end.
        resumed: How many of those went on from a checkpoint: they ran fewer batches than a whole
            scan.
        equal: How many left the same atlas, bit for bit.
    """

    kills: int
    batches: int
    running: int
    resumed: int
    equal: int


def measure(kills: int, samples: int) -> Killing:
    """Kill, go on, compare."""
    moments = Random(0)
    readings = READINGS | {"sites": None, "n": 50}
    with TemporaryDirectory() as folder, serving() as server:
        job = Job(Path(folder) / "whole", samples=samples, readings=readings)
        since = time.perf_counter()
        batches = server.run(job).forwards()
        pace = (time.perf_counter() - since) / batches
        found = [
            kill(
                server,
                replace(job, out=Path(folder) / str(number)),
                moments.uniform(0, batches),
                pace,
                job.out,
            )
            for number in range(kills)
        ]
    running = [each for each in found if each.was_running]
    return Killing(
        kills,
        batches,
        len(running),
        sum(each.again < batches for each in running),
        sum(not each.problems for each in found),
    )


def told(found: Killing) -> str:
    """The section of the page."""
    return (
        f"Scans of the testbed ({found.batches} batches, a checkpoint after each) were killed with "
        f"SIGKILL at {found.kills} random moments and called again. {found.running} were killed "
        f"before their end; {found.resumed} of these went on from a checkpoint, so that fewer "
        f"batches had to be run again. **{found.equal} of {found.kills}** atlases are those of "
        "the undisturbed scan, every file but `runs.jsonl` bit for bit."
    )

"""Scans of two ranks, for `torchrun --max-restarts=1 rank_scans.py FOLDER`.

The first time, rank 1 is killed in the last of them; then all begin again.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

import neuronlens as nl
from neuronlens import testbed
from neuronlens.scan import run

READINGS = {"sites": ("vision.1", "language.2"), "n": 4, "batch_size": 2, "window": 8}
SAMPLES = 17
KILLED_IN = 3


def main() -> None:
    from kill_scan import until  # its neighbour, where this is the program

    folder = Path(sys.argv[1])
    rank, attempt = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    bed = testbed.load()
    adapter = nl.adapt(bed.model, bed.processor)
    samples = testbed.scenes(SAMPLES, seed=5)
    counted = [0]
    dies = False

    def count(*_: object) -> None:
        counted[0] += 1
        with (folder / f"{name}-{attempt}-{rank}.forwards").open("a") as file:
            file.write(".")
        if dies and counted[0] == KILLED_IN:
            # The other rank must have something to go on with, too.
            theirs = folder / f"{name}-{attempt}-0.forwards"
            until(lambda: theirs.exists() and theirs.stat().st_size >= 2, "the other rank")
            os.kill(os.getpid(), signal.SIGKILL)

    first = adapter.model.get_submodule(adapter.site("vision.0").path)
    first.register_forward_pre_hook(count)
    name = "alone"
    opened = nl.scan(adapter, samples, out=folder / name, state="cpu", **READINGS)
    again = nl.scan(adapter, samples, out=folder / name, **READINGS)  # ranks meet once more
    assert again.manifest == opened.manifest
    assert not dist.is_initialized()
    assert opened.manifest.samples == SAMPLES

    if attempt == 0:
        # Ranks that were started again find the addresses of the first ones there.
        dist.init_process_group("gloo")
        name = "group"
        nl.scan(adapter, samples, out=folder / name, **READINGS)
        assert dist.is_initialized()

    name, counted[0] = "killed", 0
    dies = attempt == 0 and rank == "1"
    run._WORTH = 0
    nl.scan(adapter, samples, out=folder / name, checkpoint_seconds=0, **READINGS)
    if attempt == 0:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

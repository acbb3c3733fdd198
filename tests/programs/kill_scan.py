"""Scans in processes of their own that can be killed at any moment.

A process that has loaded torch and the testbed forks one child per scan, so that a scan does not
cost the start of a program. As a program: `python tests/programs/kill_scan.py --kills 20` kills
that many scans at random moments, goes on with each, and compares with one that was not disturbed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DEADLINE = 60
"""Seconds after which what is waited for will not come."""

READINGS: dict[str, Any] = {
    "sites": ["vision.1", "projector.0", "language.2"],
    "n": 5,
    "batch_size": 3,
    "window": 6,
    "workers": 0,
    "checkpoint_seconds": 0,
}
"""Batches are in windows, so that a checkpoint has records that are not in the table yet."""


# What is compared.


def content(atlas: Path) -> dict[str, bytes]:
    """Every file of an atlas but the one that says how the scan went."""
    return {
        str(path.relative_to(atlas)): path.read_bytes()
        for path in sorted(atlas.rglob("*"))
        if path.is_file() and path.name != "runs.jsonl"
    }


def processes_of(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(words[3]) == session and words[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def until(holds: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.002)


# The side that asks.


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a scan.

    Attributes:
        point: A function: `forward`, `save_tensors`, `durable`, `rename`, `rmtree`.
        number: In which of its calls, from 1, of those whose path has `part` in it.
        part: See `number`.
        when: `before` it, `half` way through writing, or `after` it.
        act: `kill`, `stall`, or `limit`: no file may grow further than 10,000 bytes.
    """

    point: str
    number: int = 1
    part: str = ""
    when: str = "before"
    act: str = "kill"


@dataclass
class Job:
    """A scan in a process of its own.

    Attributes:
        out: Folder of the atlas.
        samples: How many scenes; one of them has no image.
        readings: Arguments of `scan`.
        fault: What goes wrong.
        worth: In place of the scan's own bound on what checkpoints may cost.
    """

    out: Path
    samples: int = 18
    readings: dict[str, Any] = field(default_factory=lambda: dict(READINGS))
    fault: Fault | None = None
    worth: float = 0
    number: int = 0
    pid: int = 0

    @property
    def log(self) -> Path:
        return self.out.with_name(f"{self.out.name}-{self.number}.log")

    @property
    def _forwards(self) -> Path:
        return self.out.with_name(f"{self.out.name}-{self.number}.forwards")

    def forwards(self) -> int:
        """How many forwards were begun."""
        return self._forwards.stat().st_size if self._forwards.exists() else 0

    def order(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "log": str(self.log),
            "forwards": str(self._forwards),
            "samples": self.samples,
            "readings": self.readings,
            "fault": None if self.fault is None else vars(self.fault),
            "worth": self.worth,
        }


class Server:
    """A process that forks scans."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._started = 0
        self._running: set[int] = set()

    def start(self, job: Job) -> Job:
        """The same job, which runs."""
        self._started += 1
        job = replace(job, number=self._started)
        job.pid = self._ask(job.order())
        self._running.add(job.pid)
        return job

    def wait(self, job: Job) -> int:
        """Its exit status; minus the signal that ended it."""
        self._running.discard(job.pid)
        return self._ask({"wait": job.pid})

    def run(self, job: Job) -> Job:
        """A job that has ended well."""
        job = self.start(job)
        status = self.wait(job)
        if status != 0:
            raise RuntimeError(f"exit status {status}:\n{job.log.read_text()}")
        return job

    def fail(self, job: Job, status: int) -> str:
        """What a job that ended with a status wrote."""
        job = self.start(job)
        found = self.wait(job)
        said = job.log.read_text()
        if found != status:
            raise RuntimeError(f"exit status {found}, not {status}:\n{said}")
        return said

    def close(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)

    def _ask(self, order: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def serving() -> Iterator[Server]:
    """A server, which ends with the block."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A forked process cannot use threads that its parent had.
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    with process:
        server = Server(process)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield server
        finally:
            server.close()
            process.kill()


@dataclass(frozen=True)
class Killed:
    """What came of a scan that was killed, and then called again.

    Attributes:
        begun: Forwards that had been begun when it was killed.
        again: Forwards of the second call.
        was_running: Whether it was killed before its end.
        problems: Files that are not those of the undisturbed scan.
    """

    begun: int
    again: int
    was_running: bool
    problems: list[str]


def kill(server: Server, job: Job, after: float, pace: float, expected: Path) -> Killed:
    """Kill a scan, run it again, and compare.

    Args:
        server: Where it runs.
        job: The scan.
        after: When: so many forwards after its start.
        pace: Seconds that a forward takes.
        expected: The atlas of the undisturbed scan.
    """
    first = server.start(job)
    until(lambda: first.forwards() >= int(after), f"forward {int(after)}; see {first.log}")
    time.sleep((after % 1) * pace)
    os.kill(first.pid, signal.SIGKILL)
    status = server.wait(first)
    second = server.run(job)
    found, wanted = content(job.out), content(expected)
    return Killed(
        first.forwards(),
        second.forwards(),
        status == -signal.SIGKILL,
        [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)],
    )


# The side that scans.


def _child(adapter: Any, order: Mapping[str, Any]) -> None:
    """Scan, in this process, whose output goes into a log."""
    import neuronlens as nl
    from neuronlens import testbed
    from neuronlens.scan import run

    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run._WORTH = order["worth"]
    counted = os.open(order["forwards"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    first = adapter.model.get_submodule(adapter.site("vision.0").path)
    first.register_forward_pre_hook(lambda *_: os.write(counted, b".") and None)
    if order["fault"]:
        arm(Fault(**order["fault"]), first)
    scenes = testbed.scenes(order["samples"], seed=5)
    scenes[4] = replace(scenes[4], images=())
    nl.scan(adapter, scenes, out=order["out"], **order["readings"])


def arm(fault: Fault, first: Any) -> None:
    """Let it go wrong.

    Args:
        fault: What.
        first: A module that runs once per forward.
    """
    # Names of functions hide those of their modules.
    write = importlib.import_module("neuronlens.atlas.write")
    checkpoint = importlib.import_module("neuronlens.scan.checkpoint")

    def halve(path: Path) -> None:
        if path.exists():
            os.truncate(path, path.stat().st_size // 2)

    if fault.point == "forward":
        reached = _Counting(fault)
        first.register_forward_pre_hook(lambda *_: reached.act(".") and None)
    elif fault.point == "save_tensors":
        plain = write.save_tensors
        write.save_tensors = _Counting(fault, plain, lambda path, *_: (path, halve))
    elif fault.point == "durable":
        # A file is half written where the block that writes it ends.
        for module in (write, checkpoint):
            module.durable = _Durable(fault, module.durable, halve)
    elif fault.point == "rename":
        renamed = _Counting(fault, Path.rename, lambda old, new: (f"{old} {new}", None))
        pathlib.Path.rename = lambda old, new: renamed(old, new)
    else:
        shutil.rmtree = _Counting(fault, shutil.rmtree, lambda path, **_: (path, None))


class _Counting:
    """A function that goes wrong in one of its calls."""

    def __init__(self, fault: Fault, plain: Any = None, look: Any = None) -> None:
        self.fault, self._plain, self._look = fault, plain, look
        self.calls = 0

    def act(self, path: object) -> None:
        self.calls += self.fault.part in str(path)
        if self.fault.part in str(path) and self.calls == self.fault.number:
            if self.fault.act == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault.act == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            else:
                end = time.monotonic() + DEADLINE
                while time.monotonic() < end:
                    time.sleep(0.01)

    def __call__(self, *args: Any, **more: Any) -> Any:
        path, halve = self._look(*args, **more)
        if self.fault.when == "before":
            self.act(path)
        result = self._plain(*args, **more)
        if self.fault.when == "half" and self.fault.part in str(path):
            if self.calls + 1 == self.fault.number:
                halve(path)
            self.act(path)
        elif self.fault.when == "after":
            self.act(path)
        return result


class _Durable(_Counting):
    """A file that is half there when it goes wrong."""

    def __init__(self, fault: Fault, plain: Any, halve: Callable[[Path], None]) -> None:
        super().__init__(fault, plain)
        self._halve = halve

    @contextmanager
    def __call__(self, path: Path, mode: str = "w") -> Iterator[Any]:
        if self.fault.when == "before":
            self.act(path)
        with self._plain(path, mode) as file:
            yield file
        last = self.calls + 1 == self.fault.number and self.fault.part in str(path)
        if self.fault.when == "half" and last:
            self._halve(path)
        if self.fault.when != "before":
            self.act(path)


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def serve() -> None:
    """Fork a process for each order; wait for one when told to."""
    import neuronlens as nl
    from neuronlens import testbed

    bed = testbed.load()
    adapter = nl.adapt(bed.model, bed.processor)
    _say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            status = os.waitpid(order["wait"], 0)[1]
            _say(os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if pid == 0:
            _child(adapter, order)
            sys.exit(0)
        _say(pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="fork scans, as told on stdin")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    moments = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder, serving() as server:
        job = Job(
            Path(folder) / "whole",
            samples=given.samples,
            readings=READINGS | {"workers": given.workers},
        )
        start = time.perf_counter()
        batches = server.run(job).forwards()
        pace = (time.perf_counter() - start) / batches
        for number in range(given.kills):
            one = replace(job, out=Path(folder) / str(number))
            after = moments.uniform(0, batches)
            killed = kill(server, one, after, pace, job.out)
            _say(f"{after:.3f} of {batches}: {killed}")
            if killed.problems:
                sys.exit("not the atlas of the undisturbed scan")


if __name__ == "__main__":
    main()

"""Studies in processes of their own that can be killed at any moment.

A process that has loaded torch and the testbed forks one child per run of a study, so that a run
does not cost the start of a program. `study_at_size.py` and tests/test_study_runs.py use it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LINES = ("records.jsonl", "explanations.jsonl", "samples.jsonl", "activations.jsonl")


@dataclass(frozen=True)
class Fault:
    """Where a run kills itself.

    Attributes:
        point: `forward`, `answer` (when one is stored), or the name of a file of lines.
        number: In which forward, answer or line, from 1; answers that are stored together are
            kept, or not, together.
        when: `before`, `half` way through a line, or `after`.
    """

    point: str
    number: int = 1
    when: str = "before"


@dataclass(frozen=True)
class Job:
    """A run of a study over text neurons that a chat server explains and simulates.

    Attributes:
        out: Folder of the study.
        atlas: Folder of the scan.
        neurons: Their names.
        base_url: Of the chat server.
        readings: Of the classification.
        settings: Further arguments of `explain_neurons`.
        concurrency: Most requests in flight.
        own: Whether each explanation says its neuron's name, so that none are the same.
        fault: Where it kills itself.
        trace: File that gets a line for all that is done: what, when, how much memory there is.
    """

    out: str
    atlas: str
    neurons: list[str]
    base_url: str
    readings: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    own: bool = False
    fault: Fault | None = None
    trace: str | None = None


class Forks:
    """A process that forks runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._running: set[int] = set()

    def start(self, job: Job) -> int:
        """Begin a run; gives its process id."""
        pid = self._ask(asdict(job))
        self._running.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """Its exit status; minus the signal that ended it."""
        self._running.discard(pid)
        return self._ask({"wait": pid})

    def run(self, job: Job) -> None:
        """A run that ends well."""
        status = self.wait(self.start(job))
        if status != 0:
            raise RuntimeError(f"exit status {status}:\n{Path(f'{job.out}.log').read_text()}")

    def run_until_killed(self, job: Job) -> None:
        """A run that meets its fault."""
        status = self.wait(self.start(job))
        if status != -signal.SIGKILL:
            raise RuntimeError(f"exit status {status}:\n{Path(f'{job.out}.log').read_text()}")

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
def forking(width: int = 0) -> Iterator[Forks]:
    """A process that forks runs, which ends with the block; of a wider model if one is wanted."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(width)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A forked process cannot use threads that its parent had.
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    with process:
        forks = Forks(process)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield forks
        finally:
            forks.close()
            process.kill()


def content(out: str | Path) -> dict[str, dict[str, str]]:
    """By file, the lines that count: the last one of each neuron, or of each sample."""
    found: dict[str, dict[str, str]] = {}
    for name in LINES:
        lines = (Path(out) / name).read_text("utf-8").splitlines(keepends=True)
        found[name] = {_subject(line): line for line in lines}
    return found


def _subject(line: str) -> str:
    said = json.loads(line)
    return str(said["neuron"] if "neuron" in said else (said["position"], said["stream"]))


# The side that runs a study.


def _child(adapter: Any, job: Job) -> None:
    """Run a study in this process, whose output goes into a log."""
    import neuronlens as nl
    from neuronlens.study import run
    from neuronlens.study.journal import Journal

    log = os.open(f"{job.out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    atlas = nl.Atlas.open(job.atlas)
    chat = nl.chat.OpenAIChat("m", base_url=job.base_url, concurrency=job.concurrency)
    explainer: Any = Named(nl.ChatExplainer(chat)) if job.own else nl.ChatExplainer(chat)
    if job.fault is not None:
        arm(job.fault, adapter)
    if job.trace is not None:
        note = _Noting(Path(job.trace))
        note("start", 0)
        say, finish = Journal.say, Journal.finish

        def said(self: Any, said: Any) -> None:
            say(self, said)
            note("explained", len(said))

        def finished(self: Any, *args: Any) -> None:
            finish(self, *args)
            note("scored", 1)

        Journal.say, Journal.finish = said, finished  # type: ignore[method-assign]
        plain = run._Run.explain_all

        def explain_all(self: Any, neurons: Any) -> None:
            note("recorded", 0)
            plain(self, neurons)

        run._Run.explain_all = explain_all  # type: ignore[method-assign]
    nl.explain_neurons(
        adapter,
        atlas,
        [nl.NeuronId.parse(name) for name in job.neurons],
        explainer=explainer,
        kinds=nl.NeuronClassifier(**job.readings).classify(atlas),
        out=job.out,
        **job.settings,
    )
    if job.trace is not None:
        note("end", 0)


class Named:
    """Another explainer's words, and the neuron's name: no two neurons are said to be the same."""

    def __init__(self, explainer: Any) -> None:
        self.chat, self.settings, self._explainer = explainer.chat, explainer.settings, explainer

    def explain(self, jobs: Any) -> list[Any]:
        answers = self._explainer.explain(jobs)
        return [
            answer.model_copy(update={"sentence": f"{answer.sentence} of {job.neuron}"})
            if hasattr(answer, "sentence")
            else answer
            for job, answer in zip(jobs, answers, strict=True)
        ]


class _Noting:
    """Writes down when something was done, and how much memory the process has."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def __call__(self, what: str, neurons: int) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self._file.write(
            json.dumps(
                {
                    "what": what,
                    "neurons": neurons,
                    "time": time.time(),
                    "cpu": used.ru_utime + used.ru_stime,
                    "rss": pages * resource.getpagesize(),
                    "peak": used.ru_maxrss * 1024,
                }
            )
            + "\n"
        )
        self._file.flush()


def arm(fault: Fault, adapter: Any) -> None:
    """Let a run kill itself."""
    from neuronlens.chat import ReplyStore
    from neuronlens.study.journal import Journal

    count = 0

    def reached() -> bool:
        nonlocal count
        count += 1
        return count == fault.number

    if fault.point == "forward":
        first = adapter.model.get_submodule(adapter.site("language.0").path)
        first.register_forward_pre_hook(lambda *_: _die() if reached() else None)
    elif fault.point == "answer":
        plain_put = ReplyStore.put

        def put(self: Any, answered: Any) -> None:
            nonlocal count
            # Answers that came together are stored together: it dies before or after all of them.
            before, count = count, count + len(answered)
            now = before < fault.number <= count
            if now and fault.when == "before":
                _die()
            plain_put(self, answered)
            if now:
                _die()

        ReplyStore.put = put  # type: ignore[method-assign]
    else:
        plain_write = Journal._write

        def write(self: Any, name: str, line: Any) -> None:
            now = name == fault.point and reached()
            if now and fault.when != "after":
                if fault.when == "half":
                    said = line.model_dump_json()
                    with (self.folder / name).open("a", encoding="utf-8") as file:
                        self._flush()
                        file.write(said[: len(said) // 2])
                _die()
            plain_write(self, name, line)
            if now:
                self._flush()
                _die()

        Journal._write = write  # type: ignore[method-assign]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def model(width: int = 0) -> Any:
    """The testbed; or one with random weights whose language layers have so many neurons."""
    import torch
    from transformers import LlavaForConditionalGeneration

    import neuronlens as nl
    from neuronlens import testbed

    bed = testbed.load()
    if not width:
        return nl.adapt(bed.model, bed.processor)
    config = bed.model.config
    config.text_config.intermediate_size = width
    torch.manual_seed(0)
    return nl.adapt(LlavaForConditionalGeneration(config).eval(), bed.processor)


def serve(width: int) -> None:
    """Fork a process for each order; wait for one when told to."""
    import openai  # noqa: F401 - once, not in every run

    adapter = model(width)
    _say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            status = os.waitpid(order["wait"], 0)[1]
            _say(os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if pid == 0:
            fault = order.pop("fault")
            _child(adapter, Job(**order, fault=None if fault is None else Fault(**fault)))
            sys.exit(0)
        _say(pid)


if __name__ == "__main__":
    serve(int(sys.argv[1]))

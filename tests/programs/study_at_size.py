"""A study of many text neurons over a chat server: how long, how much CPU, memory and disk.

`python tests/programs/study_at_size.py --neurons 2000` explains neurons with one request each and
simulates each on five samples, against a local server that waits 50 ms before it answers. The
model is the testbed's with more neurons and random weights. All neurons are classified as text, by
thresholds that every text token exceeds; each explanation carries its neuron's name, since the
server knows only a few sentences. `--kill 2` runs the study once more into another folder, kills it
that many times at random moments, goes on, and compares.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from kill_study import Forks, Job, content, forking, model

sys.path.insert(0, str(Path(__file__).parent.parent))
from servers import ChatServer, chat_server

READINGS: dict[str, Any] = {"scale": "raw", "quantise": None, "t_v": 1e9, "t_t": -1e9, "n_t": 0}
"""Every sample is text-activated, and none visual-activated."""


def say(what: object = "") -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def width(neurons: int) -> int:
    """Of each of the four language layers."""
    return -(-neurons // 4)


def prepare(folder: Path, scenes: int, neurons: int, concurrency: int) -> Job:
    """A scan of the model, and the study of all its language neurons."""
    import neuronlens as nl
    from neuronlens import testbed

    adapter = model(width(neurons))
    samples = nl.read_samples(testbed.write(folder / "scenes", scenes, seed=1))
    atlas = nl.scan(adapter, samples, out=folder / "atlas", n=20)
    kinds = nl.NeuronClassifier(**READINGS).classify(atlas)
    chosen = kinds.select("text", n=neurons)
    return Job(
        out=str(folder / "study"),
        atlas=str(folder / "atlas"),
        neurons=[str(neuron) for neuron in chosen],
        base_url="",
        readings=READINGS,
        settings={"null_draws": 0},
        concurrency=concurrency,
        own=True,
        trace=str(folder / "trace.jsonl"),
    )


def measure(forks: Forks, job: Job, server: ChatServer, latency: float) -> None:
    """Run the study, and say what it took."""
    forks.run(job)
    lines = [json.loads(line) for line in Path(job.trace or "").read_text().splitlines()]
    log = server.events("received")
    requests, bound = len(log), len(log) / job.concurrency * latency
    first, start, end = log[0]["time"], lines[0], lines[-1]
    explained = [line for line in lines if line["what"] == "explained"]
    seconds = end["time"] - first
    say(f"requests               {requests} ({requests / len(job.neurons):.3f} per neuron)")
    say(f"recording              {first - start['time']:.2f} s")
    say(f"explaining             {explained[-1]['time'] - first:.2f} s")
    say(f"simulating and scoring {end['time'] - explained[-1]['time']:.2f} s")
    say(f"bound by latency       {bound:.2f} s; explaining to scoring took {seconds / bound:.2f}x")
    cpu = end["cpu"] - next(line["cpu"] for line in lines if line["what"] == "recorded")
    say(f"CPU of this client     {1e3 * cpu / requests:.2f} ms per request")
    say(f"most in flight         {server.stats()['max_in_flight']}")
    steps, done = lines[1:-1], 0
    whole = 2 * len(job.neurons)  # explained, then scored
    marks = [25, 50, 75, 100]
    for line in steps:
        done += line["neurons"]
        while marks and 100 * done >= marks[0] * whole:
            now, peak = line["rss"] / 2**20, line["peak"] / 2**20
            say(f"memory at {marks.pop(0):>3} %        {now:.0f} MiB, peak {peak:.0f} MiB")
    for path in sorted(Path(job.out).iterdir()):
        say(f"  {path.name:<20} {path.stat().st_size / 2**20:.2f} MiB")


def kill(forks: Forks, job: Job, server: ChatServer, kills: int, seed: int) -> None:
    """Run the study again with kills at random moments, and compare."""
    whole = server.stats()["requests"]
    before = len(server.events("received"))
    mine = replace(job, out=f"{job.out}-killed", trace=None)
    moments = random.Random(seed)
    done = 0
    for after in sorted(moments.uniform(0, whole) for _ in range(kills)):
        pid = forks.start(mine)
        while server.stats()["requests"] - before < after:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        done += forks.wait(pid) == -signal.SIGKILL
        say(f"killed at request {server.stats()['requests'] - before} of {whole}")
    forks.run(mine)
    seen = Counter(event["sha256"] for event in server.events("received")[before:])
    again = seen.total() - len(seen)
    say(f"sent again             {again}, at most {done * job.concurrency} were in flight")
    if content(mine.out) != content(job.out):
        sys.exit("The records are not those of the undisturbed study.")
    if again > done * job.concurrency or len(seen) != whole:
        sys.exit("A stored answer was requested again.")
    say("records                the same")


def profile(job: Job) -> None:
    """Run the study in this process, and say where the time goes, in each thread."""
    import asyncio

    from kill_study import Named

    import neuronlens as nl

    adapter = model(width(len(job.neurons)))

    chat = nl.chat.OpenAIChat("m", base_url=job.base_url, concurrency=job.concurrency)
    atlas = nl.Atlas.open(job.atlas)
    asked, here = cProfile.Profile(), cProfile.Profile()
    plain = asyncio.run

    def run(*args: Any, **more: Any) -> Any:
        asked.enable()
        try:
            return plain(*args, **more)
        finally:
            asked.disable()

    asyncio.run = run
    here.enable()
    nl.explain_neurons(
        adapter,
        atlas,
        [nl.NeuronId.parse(name) for name in job.neurons],
        explainer=Named(nl.ChatExplainer(chat)),
        kinds=nl.NeuronClassifier(**job.readings).classify(atlas),
        out=f"{job.out}-profiled",
        **job.settings,
    )
    here.disable()
    for name, each in (("here", here), ("asking", asked)):
        say(f"--- {name}")
        pstats.Stats(each, stream=sys.stdout).sort_stats("tottime").print_stats(28)
    pstats.Stats(asked, stream=sys.stdout).sort_stats("cumtime").print_stats("neuronlens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neurons", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.05, help="of the server, in seconds")
    parser.add_argument("--kill", type=int, default=0, help="how often")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        job = prepare(folder, given.scenes, given.neurons, given.concurrency)
        say(f"{given.neurons} neurons, concurrency {given.concurrency}, {given.latency} s")
        with chat_server(folder, latency=given.latency) as server:
            job = replace(job, base_url=server.base_url)
            if given.profile:
                profile(job)
                return
            with forking(width(given.neurons)) as forks:
                measure(forks, job, server, given.latency)
                if given.kill:
                    kill(forks, job, server, given.kill, given.seed)


if __name__ == "__main__":
    main()

"""Runs of a chat client in processes of their own that are killed or interrupted at any moment.

A process that has loaded neuronlens forks one child per run, so that a run does not cost the start
of a program. As a program: `python tests/programs/kill_chat.py FOLDER --kills 20 --seed 3` kills
that many runs at random moments, goes on with each, and writes what came of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from neuronlens.chat import Message, OpenAIChat, Picture, Reply, ReplyStore, Request

PROGRAM = Path(__file__).with_name("chat_server.py")
CONCURRENCY = 8
LATENCY = 0.03
DEADLINE = 60
"""Seconds after which what is waited for will not come."""


@dataclass(frozen=True)
class Server:
    """Where a server is, and what it writes."""

    base_url: str
    log: Path


class Guess(BaseModel):
    """A form, so that some answers are JSON."""

    sentence: str
    confidence: float


def requests(count: int) -> Iterator[Request]:
    """The same questions in every process, some with a picture, some with a form."""
    colour = Picture.of(Image.new("RGB", (16, 16), "red"))
    system = Message("system", ("Be brief.", colour))
    for n in range(count):
        yield Request(
            (system, Message("user", (f"Question {n}.",))),
            answer=Guess if n % 2 else None,
            temperature=n % 3,
            draw=n % 5,
        )


def keys(count: int) -> list[str]:
    return [request.key("tiny") for request in requests(count)]


def start(base_url: str, path: Path, count: int, out: Path) -> int:
    """A child that asks everything and writes the texts to `out`."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        chat = OpenAIChat("tiny", base_url=base_url, replies=path, concurrency=CONCURRENCY)
        answers = chat.ask(requests(count))
        out.write_text(json.dumps([a.text if isinstance(a, Reply) else None for a in answers]))
        code = 0
    except KeyboardInterrupt:
        code = 2
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """How a child ended: its code, or minus the signal."""
    last = time.monotonic() + DEADLINE
    while time.monotonic() < last:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise RuntimeError(f"A run did not end within {DEADLINE} s.")


def answered(path: Path, count: int) -> list[int]:
    """Which questions have a stored answer."""
    if not path.exists():
        return []
    store = ReplyStore(path)
    kept = set(store.keys())
    store.close()
    return [n for n, key in enumerate(keys(count)) if key in kept]


@contextmanager
def chat_server(folder: Path) -> Iterator[Server]:
    """The tests' chat server, started without what their module imports."""
    log = folder / "chat.jsonl"
    command = [sys.executable, str(PROGRAM), "--with-parent", "--keep-bodies"]
    command += [f"--latency={LATENCY}", f"--log={log}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log)
        finally:
            process.kill()


def received(server: Server) -> list[tuple[float, int]]:
    """When each question came."""
    events = map(json.loads, server.log.read_text().splitlines())
    return [
        (event["time"], int(event["body"]["messages"][1]["content"].split()[1].rstrip(".")))
        for event in events
        if event["event"] == "received"
    ]


def several(
    folder: Path, count: int, kills: int, moments: random.Random, how: signal.Signals
) -> dict[str, Any]:
    """Stop runs at random moments, then let one end; what was sent and what was answered."""
    folder.mkdir(parents=True)
    path, out = folder / "replies.sqlite", folder / "answers.json"
    stops: list[tuple[float, list[int]]] = []
    seconds: list[float] = []
    codes: list[int] = []
    length = count * LATENCY / CONCURRENCY / max(1, kills) * 1.5
    with chat_server(folder) as server:
        while len(stops) < kills:
            before = server.log.stat().st_size
            child = start(server.base_url, path, count, out)
            last = time.monotonic() + DEADLINE
            while server.log.stat().st_size == before and time.monotonic() < last:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, length))
            os.kill(child, how)
            began = time.monotonic()
            codes.append(wait(child))
            seconds.append(time.monotonic() - began)
            if codes[-1] == 0:
                break
            stops.append((time.time(), answered(path, count)))
        while (code := wait(start(server.base_url, path, count, out))) != 0:
            raise RuntimeError(f"The last run ended with {code}.")
        came = received(server)
    times = Counter(n for _, n in came)
    return {
        "answers": json.loads(out.read_text()),
        "stops": len(stops),
        "codes": codes,
        "seconds": seconds,
        "stored at the stops": [len(kept) for _, kept in stops],
        "sent": len(came),
        "sent again": sum(times.values()) - len(times),
        "sent though stored": sum(
            n in kept for stop, kept in stops for when, n in came if when > stop
        ),
    }


def together(folder: Path, count: int, processes: int) -> dict[str, Any]:
    """Several processes ask the same questions and keep the answers in the same file."""
    folder.mkdir(parents=True)
    path = folder / "replies.sqlite"
    outs = [folder / f"answers{n}.json" for n in range(processes)]
    with chat_server(folder) as server:
        children = [start(server.base_url, path, count, out) for out in outs]
        codes = [wait(child) for child in children]
        sent = len(received(server))
        wait(start(server.base_url, path, count, outs[0]))
        later = len(received(server)) - sent
    return {
        "codes": codes,
        "answers": [json.loads(out.read_text()) for out in outs],
        "sent": sent,
        "sent later": later,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Kill chat clients and go on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    moments = random.Random(given.seed)
    whole = several(given.folder / "whole", given.requests, 0, moments, signal.SIGKILL)
    found = {
        "concurrency": CONCURRENCY,
        "keys": keys(12),
        "whole": whole,
        "killed": several(
            given.folder / "killed", given.requests, given.kills, moments, signal.SIGKILL
        ),
        "interrupted": several(
            given.folder / "interrupted", given.requests, 1, moments, signal.SIGINT
        ),
        "together": together(given.folder / "together", given.requests // 4, 3),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()

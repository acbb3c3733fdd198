"""A chat server that speaks OpenAI's protocol, for the tests: quick, repeatable, faulty on demand.

As a program: `python tests/programs/chat_server.py --latency 0.05 --log log.jsonl` prints its port
and answers `POST /v1/chat/completions` until it is killed. `GET /stats` counts.

`--script` names a JSON file with a list of steps, which are used up in order of arrival; after
them all answers are ordinary. `{"match": "text", "steps": [...]}` in that list is a list of its own
for requests that contain the text, in the body as sent or in what its messages say. Keys of a step:

- `status`, with `headers` and `body` if wanted; 401 quotes the key that was given, as OpenAI does;
- `hang`: seconds until the answer; `drop`: the connection is closed without one;
- `raw`: the whole body, JSON or not; `choices`: that list instead of the one choice;
- `content`, `refusal`, `finish_reason`, `usage`: what they say, instead of the ordinary;
- `truncate`: half the content, finished by `length`; `echo`: the last text of the user;
- `levels`: how maps of token levels are wrong, one of `chat_answers.WRONG_LEVELS`;
- `ignore_schema`: `response_format` is not obeyed;
- `times`: how often the step is used, 1 unless given, or "always".

The log has one JSON line for each request that came and one for each that was answered, both with
the hash of the body. The value of an Authorization header is never written.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from typing import Any

from chat_answers import WRONG_LEVELS, last_user_text, reply, whole_text

KEYS = {
    *("status", "headers", "body", "hang", "drop", "raw", "choices", "content", "refusal"),
    *("finish_reason", "usage", "truncate", "echo", "levels", "ignore_schema", "times"),
}

Step = dict[str, Any]


class Script:
    """The steps that are left.

    Raises:
        ValueError: If a step has a key that is not known: a fault that never happens would
            leave a test that tests nothing.
    """

    def __init__(self, steps: list[Any]) -> None:
        self._rules: list[tuple[str, list[Step]]] = []
        for step in steps:
            match, own = (step["match"], step["steps"]) if "steps" in step else ("", [step])
            for one in own:
                if unknown := one.keys() - KEYS:
                    raise ValueError(f"A step has {sorted(unknown)}. Known: {sorted(KEYS)}")
                if one.get("levels", "beyond") not in WRONG_LEVELS:
                    raise ValueError(f"levels is {one['levels']!r}. Known: {WRONG_LEVELS}")
            self._rules.append((match, [dict(one) for one in own]))

    def next(self, sent: bytes, body: dict[str, Any]) -> Step:
        for match, steps in self._rules:
            if steps and (match in whole_text(body) or match.encode() in sent):
                step = steps[0]
                times = step.get("times", 1)
                if times != "always":
                    step["times"] = times - 1
                    if times <= 1:
                        del steps[0]
                return step
        return {}


def completion(body: dict[str, Any], digest: str, step: Step) -> dict[str, Any]:
    """The body of an answer with status 200."""
    content = reply(
        body,
        int(digest[:16], 16),
        structured=not step.get("ignore_schema"),
        levels=step.get("levels"),
    )
    finish = "stop"
    if step.get("echo"):
        content = last_user_text(body)
    if step.get("truncate"):
        content, finish = content[: len(content) // 2], "length"
    refusal = step.get("refusal")
    said = step.get("content", None if refusal else content)
    asked, told = len(whole_text(body)) // 4, len(said or "") // 4
    usage = {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said, "refusal": refusal},
        "finish_reason": step.get("finish_reason", finish),
        "logprobs": None,
    }
    return {
        "id": f"chatcmpl-{digest[:24]}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": body.get("model"),
        "choices": step.get("choices", [choice]),
        "usage": step.get("usage", usage),
    }


def problem(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Chat:
    """What all connections share: the script, the log, the counts."""

    def __init__(self, latency: float, script: Script, log: Path | None, keep: bool) -> None:
        self.latency = latency
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0
        self._script = script
        # Without a buffer: what was logged stays, however this process ends.
        self._log = log.open("ab", buffering=0) if log else None
        self._keep = keep

    def receive(self, number: int, sent: bytes, key: str | None) -> tuple[str, Step, int, bytes]:
        """Log a request and decide what is answered: hash, step, status, body."""
        try:
            body = json.loads(sent)
            if body.get("stream") or not isinstance(body.get("messages"), list):
                raise ValueError("Needed: messages, and no stream.")
        except (ValueError, AttributeError) as error:
            return "", {}, 400, json.dumps(problem(400, str(error))).encode()
        canonical = json.dumps(body, sort_keys=True).encode()
        digest = hashlib.sha256(canonical).hexdigest()
        whole = {"body": body} if self._keep else {}
        self.log("received", number, digest, authorization=key is not None, **whole)
        step = self._script.next(sent, body)
        status = step.get("status", 200)
        if "raw" in step:
            return digest, step, status, step["raw"].encode()
        if status == 200:
            answer = completion(body, digest, step)
        else:
            said = f"{status} {HTTPStatus(status).phrase}, as the script says."
            if status == 401:
                said = f"Incorrect API key provided: {key}. Take one from your account page."
            answer = step.get("body", problem(status, said))
        return digest, step, status, json.dumps(answer).encode()

    def log(self, event: str, number: int, digest: str, **more: object) -> None:
        if self._log:
            line = {"event": event, "number": number, "sha256": digest, "time": time.time(), **more}
            self._log.write(json.dumps(line).encode() + b"\n")

    def stats(self) -> dict[str, Any]:
        return {
            "requests": self.counts["requests"],
            "in_flight": self.in_flight,
            "max_in_flight": self.most_in_flight,
            "statuses": {name: n for name, n in self.counts.items() if name != "requests"},
        }


class Connection(asyncio.Protocol):
    """One kept-alive connection, which has at most one request at a time."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._buffer = bytearray()
        self._head: tuple[str, dict[str, str]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._open: tuple[int, str] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._open is None:
            self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._finish("abandoned")

    def _read(self) -> None:
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            del self._buffer[: end + 4]
            pairs = (line.partition(":") for line in lines)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            self._head = first.rpartition(" ")[0], headers
        request, headers = self._head
        if "transfer-encoding" in headers:
            self._write(411, json.dumps(problem(411, "Only bodies with a length.")).encode())
            self._transport.close()
            return
        length = int(headers.get("content-length", 0))
        if len(self._buffer) < length:
            return
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._head = None
        self._handle(request, headers, body)

    def _handle(self, request: str, headers: dict[str, str], sent: bytes) -> None:
        chat = self._chat
        if request == "GET /health":
            return self._write(200, b'{"status": "ok"}')
        if request == "GET /stats":
            return self._write(200, json.dumps(chat.stats()).encode())
        if request != "POST /v1/chat/completions":
            return self._write(404, json.dumps(problem(404, f"Unknown: {request}")).encode())
        loop = asyncio.get_running_loop()
        due = loop.time() + chat.latency
        chat.counts["requests"] += 1
        chat.in_flight += 1
        chat.most_in_flight = max(chat.most_in_flight, chat.in_flight)
        key = headers.get("authorization")
        digest, step, status, answer = chat.receive(
            chat.counts["requests"], sent, key and key.removeprefix("Bearer ")
        )
        self._open = chat.counts["requests"], digest
        due += step.get("hang", 0)
        if due > loop.time():
            self._timer = loop.call_at(due, self._answer, step, status, answer)
        else:
            self._answer(step, status, answer)
        return None

    def _answer(self, step: Step, status: int, answer: bytes) -> None:
        self._timer = None
        if step.get("drop"):
            self._finish("dropped")
            return self._transport.abort()
        if self._transport.is_closing():
            return None
        # Logged first: whatever a client has kept, even one that was killed, is in the log.
        self._finish("answered", status)
        self._write(status, answer, step.get("headers", {}))
        if self._buffer:
            self._read()
        return None

    def _write(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{more}\r\n"
        )
        self._transport.write(head.encode("latin-1") + body)

    def _finish(self, event: str, status: int | None = None) -> None:
        if self._open is not None:
            number, digest = self._open
            self._open = None
            self._chat.in_flight -= 1
            self._chat.counts[str(status or event)] += 1
            self._chat.log(event, number, digest, status=status)


async def serve(chat: Chat, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(chat), "127.0.0.1", port, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat server for tests.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--keep-bodies", action="store_true", help="log what was asked in full")
    parser.add_argument("--script", type=Path)
    parser.add_argument("--with-parent", action="store_true", help="end when stdin is closed")
    given = parser.parse_args()
    steps = json.loads(given.script.read_text()) if given.script else []
    chat = Chat(given.latency, Script(steps), given.log, given.keep_bodies)
    if given.with_parent:
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    asyncio.run(serve(chat, given.port))


if __name__ == "__main__":
    main()

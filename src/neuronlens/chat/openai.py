"""Asking any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from neuronlens.chat.budget import Budget, Prices
from neuronlens.chat.model import ChatModel, Reply, again
from neuronlens.chat.replies import ReplyStore, StoredReply
from neuronlens.chat.request import Message, Request, is_closed, schema
from neuronlens.errors import ChatError, MissingExtraError
from neuronlens.explanation import Failure

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

Structured = Literal["auto", "always", "never"]
_WAITS_FOR = {408, 409, 425, 429}


class _PassingError(Exception):
    """A failure that may be gone in a moment."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _LastingError(Exception):
    """A failure of one request that asking again will not cure; `received` was paid for."""

    def __init__(self, reason: str, received: StoredReply | None = None) -> None:
        super().__init__(reason)
        self.received = received


class OpenAIChat(ChatModel):
    """A model behind OpenAI's API, or behind any server that offers the same.

    The key is read from the environment when it is needed and kept nowhere. Requests run
    concurrently; 408, 409, 425, 429, 5xx, timeouts and broken connections are tried again with
    growing pauses, as the server's Retry-After says if it says so. A reply of the wrong form is
    told what was wrong, and asked again.

    Args:
        model: The model's name on the server.
        base_url: Of the server, such as `http://localhost:8000/v1`; OpenAI's own by default,
            or what `OPENAI_BASE_URL` says.
        key_env: Name of the environment variable with the key. A server of your own that
            needs no key needs no variable.
        replies: Store of answers, or where it is to lie; None keeps them in memory.
        concurrency: Most requests in flight.
        structured: Whether the form is sent as a JSON schema for the server to keep to:
            `"auto"` does without from the first time the server refuses it. The form is
            always checked.
        attempts: Replies of the wrong form before a request fails.
        retries: Passing failures of one reply before its request fails.
        timeout: Of one reply, in seconds.
        slowest_retry: Longest pause between two tries, in seconds.
        prices: For estimates and a budget.
        budget: The most that may be spent.
        image_tokens: About how many tokens an image counts as, for estimates.
        detail: How closely images are looked at, where the server knows the word.
        options: Further fields of every request, such as `{"reasoning_effort": "low"}`; None
            leaves a field out. They are not part of the keys of stored answers.

    Raises:
        MissingExtraError: If the package openai is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_env: str = "OPENAI_API_KEY",
        replies: str | Path | ReplyStore | None = None,
        concurrency: int = 16,
        structured: Structured = "auto",
        attempts: int = 3,
        retries: int = 6,
        timeout: float = 120.0,
        slowest_retry: float = 30.0,
        prices: Prices | None = None,
        budget: Budget | None = None,
        image_tokens: int = 255,
        detail: Literal["low", "high", "auto"] = "auto",
        options: dict[str, object] | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401 - missing packages are told at the door
        except ImportError:
            raise MissingExtraError("openai", "chat", "Asking a chat server") from None
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency} was given; at least 1 is needed.")
        super().__init__(
            model,
            replies=replies,
            attempts=attempts,
            prices=prices,
            budget=budget,
            image_tokens=image_tokens,
        )
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self.key_env = key_env
        self.concurrency = concurrency
        self.structured = structured
        self.retries = retries
        self.timeout = timeout
        self.slowest_retry = slowest_retry
        self.detail = detail
        self.options = dict(options or {})
        self._takes_schema: bool | None = None if structured == "auto" else structured == "always"
        self._refused_fields: set[str] = set()
        self._running: set[_Run] = set()

    def ask(self, requests: Iterable[Request]) -> list[Reply | Failure]:
        """Answer every request, in their order; see `ChatModel.ask`."""
        run = _Run(self, iter(requests))
        self._running.add(run)
        try:
            return run.result()
        finally:
            self._running.discard(run)

    def cancel(self) -> None:
        """Make running calls of `ask` end soon; what was answered is stored."""
        for run in list(self._running):
            run.cancel()

    @property
    def address(self) -> str:
        """The server's address without what might be a secret in it."""
        if self.base_url is None:
            return "api.openai.com"
        parts = urlsplit(self.base_url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        key = os.environ.get(self.key_env)
        if not key and self.base_url is None:
            raise ChatError(
                f"No key for {self.address}: set the environment variable {self.key_env}, or give "
                "the base_url of a server of your own."
            )
        return AsyncOpenAI(
            api_key=key or "none",
            base_url=self.base_url,
            max_retries=0,  # our own retries look at the reply as well
            timeout=self.timeout,
        )

    def _body(
        self, request: Request, messages: tuple[Message, ...], max_tokens: int
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [self._wire(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": request.temperature,
            "seed": request.draw,
        }
        if request.answer is not None and self._takes_schema is not False:
            form = schema(request.answer)
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": request.answer.__name__,
                    "strict": is_closed(form),
                    "schema": form,
                },
            }
        if "max_tokens" in self._refused_fields:
            body["max_completion_tokens"] = max_tokens
        body |= self.options
        return {
            name: value
            for name, value in body.items()
            if value is not None and name not in self._refused_fields
        }

    def _adapts(self, body: dict[str, Any], said: str) -> bool:
        """Whether there is a field the server may not know; it is not sent again."""
        for name in ("max_tokens", "temperature", "seed"):
            if name in body and name in said:
                self._refused_fields.add(name)
                return True
        if "response_format" in body and self._takes_schema is None:
            # The form is in the prompt's words as well.
            self._takes_schema = False
            return True
        return False

    def _wire(self, message: Message) -> dict[str, Any]:
        if not message.pictures:
            return {"role": message.role, "content": message.text}
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": part.url, "detail": self.detail}}
            for part in message.parts
        ]
        return {"role": message.role, "content": parts}


@dataclass(frozen=True)
class _Asked:
    """One attempt at a request: the conversation so far, and about how many tokens it has."""

    request: Request
    messages: tuple[Message, ...]
    max_tokens: int
    about: int
    attempt: int


class _Run:
    """One call of `ask`: its own event loop in its own thread, so that it works in a notebook."""

    def __init__(self, chat: OpenAIChat, requests: Iterator[Request]) -> None:
        self._chat = chat
        self._requests = enumerate(requests)
        self._answers: dict[int, Reply | Failure] = {}
        self._asked: dict[str, asyncio.Future[Reply | Failure]] = {}
        self._lost = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._cancelled = False

    def result(self) -> list[Reply | Failure]:
        thread = threading.Thread(target=self._drive, name="neuronlens-chat", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.5)
        except BaseException:
            self.cancel()
            thread.join(10)
            raise
        if self._cancelled:
            raise ChatError("Asking was stopped. What was answered is stored: call again to go on.")
        if self._error is not None:
            raise self._error
        return [self._answers[i] for i in range(len(self._answers))]

    def cancel(self) -> None:
        self._cancelled = True
        if self._loop is not None and self._task is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _drive(self) -> None:
        try:
            asyncio.run(self._all())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error

    async def _all(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        if self._cancelled:
            return
        async with self._chat._client() as client:
            workers = [
                asyncio.create_task(self._work(client)) for _ in range(self._chat.concurrency)
            ]
            try:
                done, waiting = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            except asyncio.CancelledError:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                raise
            failed = [e for e in (w.exception() for w in done) if e is not None]
            if failed:
                # What is in flight was paid for: its answers are awaited and stored.
                self._requests = enumerate(iter(()))
                await asyncio.gather(*waiting, return_exceptions=True)
                raise failed[0]

    async def _work(self, client: AsyncOpenAI) -> None:
        for number, request in self._requests:
            key = request.key(self._chat.name)
            twin = self._asked.get(key)
            if twin is not None:
                self._answers[number] = await asyncio.shield(twin)
                continue
            stored = self._chat._stored(request, key)
            if stored is not None:
                self._answers[number] = stored
                continue
            mine = asyncio.get_running_loop().create_future()
            self._asked[key] = mine
            try:
                answer = await self._one(client, request, key)
            except BaseException as error:
                if not isinstance(error, asyncio.CancelledError):
                    mine.set_exception(error)
                    mine.exception()  # a twin may be waiting for it, or none
                else:
                    mine.cancel()
                raise
            mine.set_result(answer)
            del self._asked[key]
            self._answers[number] = answer

    async def _one(self, client: AsyncOpenAI, request: Request, key: str) -> Reply | Failure:
        """Ask until a reply is an answer, or the attempts are used up."""
        chat = self._chat
        messages, max_tokens = request.messages, request.max_tokens
        problem: object = ""
        for attempt in range(1, chat.attempts + 1):
            asked = _Asked(request, messages, max_tokens, chat._prompt_tokens(messages), attempt)
            held = (asked.about, max_tokens)
            chat.purse.hold(*held)
            received: StoredReply | None = None
            try:
                received = await self._received(client, asked)
            except _PassingError as error:
                return self._given_up(str(error))
            except _LastingError as error:
                self._lost, received = 0, error.received
                return Failure(str(error))
            finally:
                spent = (received.prompt_tokens, received.completion_tokens) if received else (0, 0)
                chat.purse.settle(held, *spent, requests=int(received is not None))
            self._lost = 0
            judged = chat._judge(request, key, received, chat._words(messages))
            if isinstance(judged, Reply):
                return judged
            problem = judged
            messages = again(request.messages, received.text, judged)
            if received.cut_short:
                max_tokens = 2 * max_tokens
        return Failure(f"no valid reply after {chat.attempts} attempts: {problem}")

    def _given_up(self, reason: str) -> Failure:
        """A request that failed for good in passing; many in a row mean the server is gone."""
        self._lost += 1
        if self._lost >= max(8, self._chat.concurrency):
            raise ChatError(
                f"The last {self._lost} requests to {self._chat.address} failed, the last one "
                f"with: {reason}. Is the server up? What was answered is stored: call again to "
                "go on."
            )
        return Failure(reason)

    async def _received(self, client: AsyncOpenAI, asked: _Asked) -> StoredReply:
        """One reply, tried again while what goes wrong may pass."""
        from tenacity import (
            AsyncRetrying,
            RetryCallState,
            retry_if_exception_type,
            stop_after_attempt,
            wait_exponential_jitter,
        )

        longest = self._chat.slowest_retry
        growing = wait_exponential_jitter(initial=0.5, max=longest, jitter=0.5)

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            said = error.wait if isinstance(error, _PassingError) else None
            return growing(state) if said is None else min(said, longest)

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._chat.retries + 1),
            wait=pause,
            retry=retry_if_exception_type(_PassingError),
            reraise=True,
        )
        return await retrying(self._once, client, asked)

    async def _once(self, client: AsyncOpenAI, asked: _Asked) -> StoredReply:
        import openai

        chat = self._chat
        body = chat._body(asked.request, asked.messages, asked.max_tokens)
        try:
            # Half the time of chat.completions.create, which rebuilds every message and reply.
            raw = await client.post("/chat/completions", body=body, cast_to=bytes)
            value = json.loads(raw)
        except openai.APITimeoutError:
            raise _PassingError(f"no reply within {chat.timeout:g} s") from None
        except openai.APIConnectionError as error:
            why = type(error.__cause__).__name__ if error.__cause__ else "no connection"
            raise _PassingError(f"the connection to {chat.address} broke ({why})") from None
        except openai.APIStatusError as error:
            if error.status_code in (400, 422) and chat._adapts(body, self._said(error)):
                return await self._once(client, asked)
            raise self._refusal(error) from None
        except ValueError:
            raise _PassingError("the server's reply is no JSON") from None
        if "response_format" in body:
            chat._takes_schema = True
        return _read(value, asked)

    def _refusal(self, error: APIStatusError) -> Exception:
        """What a status other than 200 means."""
        chat, status = self._chat, error.status_code
        if status in _WAITS_FOR or status >= 500:
            return _PassingError(
                f"the server answered {status}: {self._said(error)}",
                _seconds(error.response.headers.get("retry-after")),
            )
        if status in (401, 403):
            # Servers quote the key in such a message, so it is not repeated.
            return ChatError(
                f"{chat.address} refused the key in {chat.key_env} ({status}). Set the variable to "
                f"a key that may use {chat.name!r}."
            )
        if status == 404:
            return ChatError(
                f"{chat.address} knows no model {chat.name!r} or no chat completions (404): "
                f"{self._said(error)}"
            )
        return _LastingError(f"the server refused the request ({status}): {self._said(error)}")

    def _said(self, error: APIStatusError) -> str:
        """What the server wrote, without the key."""
        said = " ".join(str(error.message).split())
        key = os.environ.get(self._chat.key_env)
        if key:
            said = said.replace(key, "[key]")
        return said[:300]


def _read(value: Any, asked: _Asked) -> StoredReply:
    """A reply from the server's JSON; its text is empty if there is none.

    Raises:
        _LastingError: If the model refused, or its answer was withheld.
    """
    try:
        choice = value["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
        finished = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        text, refusal, finished = "", None, None
    if isinstance(text, list):
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    whole = value if isinstance(value, dict) else {}
    reply = StoredReply(
        text=str(text),
        model=str(whole.get("model", "")),
        attempts=asked.attempt,
        prompt_tokens=_count(whole.get("usage"), "prompt_tokens", asked.about),
        completion_tokens=_count(whole.get("usage"), "completion_tokens", len(str(text)) // 4 + 1),
        cut_short=finished == "length",
    )
    if refusal:
        raise _LastingError(f"the model refused: {str(refusal)[:200]}", reply)
    if finished == "content_filter":
        raise _LastingError("the server withheld the answer (content_filter)", reply)
    return reply


def _count(usage: Any, name: str, otherwise: int) -> int:
    """A number of tokens as the server counts, or our own if it does not."""
    said = usage.get(name) if isinstance(usage, dict) else None
    return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else otherwise


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None

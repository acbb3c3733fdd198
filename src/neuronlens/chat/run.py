"""One call of `ask`: requests in flight, tries, and what the server's faults mean."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from neuronlens.chat.garbage import young_garbage
from neuronlens.chat.model import Reply, again
from neuronlens.chat.replies import Answered, StoredReply
from neuronlens.chat.request import Message, Request, sendable
from neuronlens.chat.wire import LastingError, PassingError, read, seconds
from neuronlens.errors import ChatError
from neuronlens.explanation import Failure

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

    from neuronlens.chat.openai import OpenAIChat

_WAITS_FOR = {408, 409, 425, 429}
_FIRST_PAUSE = 0.5


@dataclass(frozen=True)
class Asked:
    """One attempt at a request: the conversation so far, and about how many tokens it has.

    `longest` is the most tokens that the answer may have.
    """

    request: Request
    messages: tuple[Message, ...]
    max_tokens: int
    longest: int
    about: int
    attempt: int


class Run:
    """One call of `ask`: its own event loop in its own thread, so that it works in a notebook."""

    def __init__(self, chat: OpenAIChat, requests: Iterator[Request]) -> None:
        self._chat = chat
        self._requests = enumerate(requests)
        self._answers: dict[int, Reply | Failure] = {}
        self._asked: dict[str, asyncio.Future[Reply | Failure]] = {}
        self._lost = 0
        self._why = "nothing was sent"
        self._reached = False
        self._keeping: list[tuple[Answered, asyncio.Future[None]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._ending = asyncio.Event()

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
        if self._loop is not None and self._task is not None:
            with suppress(RuntimeError):  # the loop is closed: there is nothing left to cancel
                self._loop.call_soon_threadsafe(self._task.cancel)

    def _drive(self) -> None:
        try:
            with young_garbage():
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
                await asyncio.gather(*waiting, return_exceptions=True)
                raise failed[0]
        if self._lost and not self._reached:
            raise ChatError(
                f"None of {self._lost} requests was answered: {self._why}. Is the server up, and "
                "the base_url that of its API, such as http://localhost:8000/v1?"
            )

    async def _work(self, client: AsyncOpenAI) -> None:
        try:
            await self._answer(client)
        except BaseException:
            self._ending.set()
            raise

    async def _answer(self, client: AsyncOpenAI) -> None:
        for number, request in self._requests:
            if self._ending.is_set() or self._cancelled:
                return
            key = request.key(self._chat.identity)
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
            if isinstance(answer, Reply):  # found in the store from now on; a failure is not
                del self._asked[key]
            self._answers[number] = answer

    async def _one(self, client: AsyncOpenAI, request: Request, key: str) -> Reply | Failure:
        """Ask until a reply is an answer, or the attempts are used up."""
        chat = self._chat
        messages, max_tokens = request.messages, request.max_tokens
        problem: object = ""
        for attempt in range(1, chat.attempts + 1):
            if self._ending.is_set():
                break
            words = chat._words(messages)
            about = chat._prompt_tokens(words, len(messages))
            asked = Asked(request, messages, max_tokens, chat._longest(max_tokens), about, attempt)
            held = chat.purse.hold(about, asked.longest)
            received: StoredReply | None = None
            try:
                received = await self._received(client, asked)
            except PassingError as error:
                self._why = str(error)
                return self._given_up(self._why)
            except LastingError as error:
                self._lost, received = 0, error.received
                if received is None:
                    return Failure(str(error))
                chat.replies.reject(key, request, chat.identity, received, words, error)
                return Failure(str(error), asked=key)
            finally:
                if received is None:
                    chat.purse.give_back(held)
                else:
                    chat.purse.settle(held, received.prompt_tokens, received.completion_tokens)
            self._lost = 0
            judged = chat._judge(request, key, received, words)
            if isinstance(judged, Reply):
                await self._keep(Answered(key, request, chat.identity, received, words))
                return judged
            problem = judged
            messages = again(request.messages, received.text, judged)
            if received.cut_short:
                max_tokens = 2 * max_tokens
        return Failure(f"no valid reply after {chat.attempts} attempts: {problem}", asked=key)

    async def _keep(self, answered: Answered) -> None:
        """Have an answer stored, together with those that came at the same time."""
        kept = asyncio.get_running_loop().create_future()
        self._keeping.append((answered, kept))
        if len(self._keeping) == 1:
            asyncio.get_running_loop().call_soon(self._store)
        await kept

    def _store(self) -> None:
        keeping, self._keeping = self._keeping, []
        try:
            self._chat.replies.put([answered for answered, _ in keeping])
        except BaseException as error:  # noqa: BLE001 - raised where each is waited for
            for _, kept in keeping:
                if not kept.done():
                    kept.set_exception(error)
        else:
            for _, kept in keeping:
                if not kept.done():
                    kept.set_result(None)

    def _given_up(self, reason: str) -> Failure:
        """A request that failed for good in passing; many in a row mean the server is gone."""
        self._lost += 1
        if self._lost >= max(8, self._chat.concurrency):
            raise ChatError(
                f"The last {self._lost} requests to {self._chat.address} failed, the last one "
                f"with: {reason}. Is the server up? What was answered is stored: call again to "
                "go on."
            )
        return Failure(reason, passing=True)

    async def _received(self, client: AsyncOpenAI, asked: Asked) -> StoredReply:
        """One reply, tried again while what goes wrong may pass."""
        from tenacity import (
            AsyncRetrying,
            RetryCallState,
            retry_if_exception_type,
            stop_after_attempt,
            wait_exponential,
            wait_random,
        )

        # All that failed together should not come back together.
        growing = wait_exponential(multiplier=_FIRST_PAUSE) + wait_random(0, _FIRST_PAUSE)

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            self._why = str(error)
            said = error.wait if isinstance(error, PassingError) else None
            return min(growing(state) if said is None else said, self._chat.slowest_retry)

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._chat.retries + 1),
            wait=pause,
            sleep=self._sleep,
            retry=retry_if_exception_type(PassingError),
            reraise=True,
        )
        return await retrying(self._once, client, asked)

    async def _sleep(self, seconds: float) -> None:
        """A pause between two tries.

        Raises:
            PassingError: If the run has failed meanwhile; nothing is sent any more.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        if self._ending.is_set():
            raise PassingError(self._why)

    async def _once(
        self, client: AsyncOpenAI, asked: Asked, without: frozenset[str] = frozenset()
    ) -> StoredReply:
        import openai

        chat = self._chat
        body = chat._body(asked, without)
        try:
            # The client's own limit is for each part of a reply, not for the whole.
            async with asyncio.timeout(chat.timeout):
                # Half the time of chat.completions.create, which rebuilds every message and reply.
                raw = await client.post("/chat/completions", body=body, cast_to=bytes)
        except (openai.APIConnectionError, TimeoutError) as error:
            cause = type(error.__cause__).__name__
            if cause in ("ConnectError", "ConnectTimeout"):
                raise PassingError(f"no connection to {chat.address}") from None
            self._reached = True
            if isinstance(error, (openai.APITimeoutError, TimeoutError)):
                raise PassingError(f"no reply within {chat.timeout:g} s") from None
            raise PassingError(f"the connection to {chat.address} broke ({cause})") from None
        except openai.APIStatusError as error:
            self._reached = True
            if error.status_code in (400, 422):
                suspect = chat._suspect(asked, body, self._said(error))
                if suspect is not None:
                    return await self._once(client, asked, without | {suspect})
            raise self._refusal(error) from None
        self._reached = True
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            raise PassingError("the server's reply is no JSON") from None
        chat._learn(asked, body, without)
        return read(value, asked.attempt, asked.about, asked.longest)

    def _refusal(self, error: APIStatusError) -> Exception:
        """What a status other than 200 means."""
        chat, status = self._chat, error.status_code
        if status in _WAITS_FOR or status >= 500:
            return PassingError(
                f"the server answered {status}: {self._said(error)}",
                seconds(error.response.headers.get("retry-after")),
            )
        if status in (401, 402, 403) and chat.key_env is None:
            return ChatError(
                f"{chat.address} refused a request without a key ({status} "
                f"{HTTPStatus(status).phrase}). Give key_env, the name of the environment variable "
                "with its key; the one of OPENAI_API_KEY is not sent to a base_url that was given, "
                "unless key_env names it."
            )
        if status in (401, 402, 403):
            # Servers quote the key in such a message, so it is not repeated.
            return ChatError(
                f"{chat.address} refused the key in {chat.key_env} ({status} "
                f"{HTTPStatus(status).phrase}). Set the variable to a key that may use "
                f"{chat.name!r}."
            )
        if status == 404:
            return ChatError(
                f"{chat.address} knows no model {chat.name!r} or no chat completions (404; a "
                "base_url usually ends in /v1): "
                f"{self._said(error)}"
            )
        return LastingError(f"the server refused the request ({status}): {self._said(error)}")

    def _said(self, error: APIStatusError) -> str:
        """What the server wrote, without the key."""
        # The client's own message has the words of errors in OpenAI's form only.
        said = " ".join(error.response.text.split())
        key = self._chat._key()
        if key:
            said = said.replace(key, "[key]")
        return sendable(said[:300])

"""Asking any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel

from neuronlens.chat.budget import Budget, Prices
from neuronlens.chat.model import ChatModel, Reply
from neuronlens.chat.replies import ReplyStore
from neuronlens.chat.request import Request
from neuronlens.chat.run import Asked, Run
from neuronlens.chat.wire import Detail, response_format, turn
from neuronlens.errors import ChatError, MissingExtraError
from neuronlens.explanation import Failure

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_log = logging.getLogger("neuronlens.chat")

Structured = Literal["auto", "always", "never"]
_OWN_FIELDS = ("model", "messages", "n", "stream")
"""What a request says itself, or would get another kind of reply."""
_LIMITS = ("max_tokens", "max_completion_tokens")
_OF_THE_FORM = re.compile(r"response_format|schema|json|structured|grammar|guided", re.IGNORECASE)
_OF_THE_PROMPT = re.compile(
    r"context|too (long|large|many)|exceed|image|picture|content policy|safety", re.IGNORECASE
)


class OpenAIChat(ChatModel):
    """A model behind OpenAI's API, or behind any server that offers the same.

    The key is read from the environment when it is needed and kept nowhere. Requests run
    concurrently; 408, 409, 425, 429, 5xx, timeouts and broken connections are tried again, after
    as long as the server's Retry-After says in seconds, or else with growing pauses; neither is
    longer than `slowest_retry`. A reply of the wrong form is told what was wrong, and asked again.

    Args:
        model: The model's name on the server.
        base_url: Of the server, such as `http://localhost:8000/v1`; OpenAI's own by default,
            or what `OPENAI_BASE_URL` says.
        key_env: Name of the environment variable with the key. By default `OPENAI_API_KEY`, but
            no key at all where `base_url` is given: OpenAI's key is for OpenAI, or for the server
            that `OPENAI_BASE_URL` names beside it. For a server of your own that needs a key,
            name its variable.
        replies: Store of answers, or where it is to lie; None keeps them in memory.
        concurrency: Most requests in flight.
        structured: Whether the form is sent as a JSON schema for the server to keep to:
            `"auto"` does without where the server refuses it and answers without it. The form
            is always checked.
        attempts: Replies of the wrong form before a request fails.
        retries: Passing failures of one reply before its request fails.
        timeout: Of one reply, in seconds.
        slowest_retry: Longest pause between two tries, in seconds, whatever the server says.
        prices: For estimates and a budget.
        budget: The most that may be spent.
        image_tokens: About how many tokens an image counts as, for estimates.
        detail: How closely images are looked at, where the server knows the word. Another than
            `"auto"` is part of the keys of stored answers.
        options: Further fields of every request, such as `{"reasoning_effort": "low"}`; None
            leaves a field out. They are not part of the keys of stored answers. A budget goes by
            the longest answer that they allow.

    Raises:
        MissingExtraError: If the package openai is not installed.
        ValueError: If a setting cannot be, or options name `model`, `messages`, `n` or `stream`,
            or allow answers of any length beside a budget of tokens or money.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_env: str | None = None,
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
        detail: Detail = "auto",
        options: dict[str, object] | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401 - missing packages are told at the door
        except ImportError:
            raise MissingExtraError("openai", "chat", "Asking a chat server") from None
        for setting, given, least in (
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("slowest_retry", slowest_retry, 0),
        ):
            if not given >= least:
                raise ValueError(f"{setting}={given} was given; at least {least} is needed.")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} was given; it must be above 0 seconds.")
        _one_of("structured", structured, get_args(Structured))
        _one_of("detail", detail, get_args(Detail))
        self.options = dict(options or {})
        self._check_options(budget)
        if base_url is not None and urlsplit(base_url).scheme not in ("http", "https"):
            raise ValueError(
                f"base_url={base_url!r} was given; it begins with http:// or https://, such as "
                "http://localhost:8000/v1."
            )
        super().__init__(
            model,
            replies=replies,
            attempts=attempts,
            prices=prices,
            budget=budget,
            image_tokens=image_tokens,
            identity=model if detail == "auto" else f"{model}|{detail}",
        )
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self.key_env = key_env or (None if base_url else "OPENAI_API_KEY")
        self.concurrency = concurrency
        self.structured = structured
        self.retries = retries
        self.timeout = timeout
        self.slowest_retry = slowest_retry
        self.detail = detail
        self._refused_fields: set[str] = set()
        self._refused_forms: set[type[BaseModel]] = set()
        self._taken_forms: set[type[BaseModel]] = set()
        self._running: set[Run] = set()

    def _check_options(self, budget: Budget | None) -> None:
        wrong = [name for name in _OWN_FIELDS if name in self.options]
        if wrong:
            raise ValueError(
                f"options has {', '.join(wrong)}, which every request says itself. Leave it out; "
                "the model is the first argument."
            )
        limits = [self.options[name] for name in _LIMITS if name in self.options]
        for limit in limits:
            if limit is not None and (not isinstance(limit, int) or limit < 1):
                raise ValueError(f"options limits answers to {limit!r} tokens: give 1 or more.")
        endless = "max_tokens" in self.options and not any(limits)
        if endless and budget and (budget.tokens is not None or budget.price is not None):
            raise ValueError(
                f"options={self.options} allows answers of any length, so no budget of tokens or "
                "money can be kept to. Give max_completion_tokens."
            )

    def ask(self, requests: Iterable[Request]) -> list[Reply | Failure]:
        """Answer every request, in their order; see `ChatModel.ask`."""
        run = Run(self, iter(requests))
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
        from openai import AsyncOpenAI, DefaultAioHttpClient

        key = self._key()
        if not key and self.base_url is None:
            raise ChatError(
                f"No key for {self.address}: set the environment variable {self.key_env}, or give "
                "the base_url of a server of your own."
            )
        if not (key.isascii() and key.isprintable()):
            raise ChatError(
                f"The key in {self.key_env} has a character that no key has. Was it copied whole, "
                "and alone?"
            )
        # The client's usual transport looks at every connection for every request; the other one
        # takes no address with a name in it beside a key.
        quick = find_spec("aiohttp") and "@" not in urlsplit(self.base_url or "").netloc
        return AsyncOpenAI(
            api_key=key or "none",
            base_url=self.base_url,
            max_retries=0,  # our own retries look at the reply as well
            timeout=self.timeout,
            http_client=DefaultAioHttpClient() if quick else None,
        )

    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    def _longest(self, max_tokens: int) -> int:
        """The longest answer that a request allows, after the options."""
        limits = {"max_tokens": max_tokens} | {
            name: self.options[name] for name in _LIMITS if name in self.options
        }
        return max((each for each in limits.values() if isinstance(each, int)), default=max_tokens)

    def _body(self, asked: Asked, without: frozenset[str]) -> dict[str, Any]:
        request = asked.request
        left_out = without | self._refused_fields
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [turn(message, self.detail) for message in asked.messages],
            "max_tokens": asked.max_tokens,
            "temperature": request.temperature,
            "seed": request.draw,
        }
        if (
            request.answer is not None
            and self.structured != "never"
            and request.answer not in self._refused_forms
        ):
            body["response_format"] = response_format(request.answer)
        body |= self.options
        if "max_tokens" in left_out:
            body.setdefault("max_completion_tokens", body["max_tokens"])
        return {
            name: value
            for name, value in body.items()
            if value is not None and name not in left_out
        }

    def _suspect(self, asked: Asked, body: dict[str, Any], said: str) -> str | None:
        """The field that a server that refuses this body may not know."""
        for name in ("max_tokens", "temperature", "seed"):
            if name in body and re.search(rf"\b{name}\b", said):
                return name
        if (
            "response_format" in body
            and self.structured == "auto"
            and asked.request.answer not in self._taken_forms
            and (_OF_THE_FORM.search(said) or not _OF_THE_PROMPT.search(said))
        ):
            # The form is in the prompt's words as well.
            _log.info(
                "%s refused a request, perhaps for its JSON schema, and is asked without it: %s",
                self.address,
                said,
            )
            return "response_format"
        return None

    def _learn(self, asked: Asked, body: dict[str, Any], without: frozenset[str]) -> None:
        """Remember what an answered request went without, or with."""
        form = asked.request.answer
        self._refused_fields |= without - {"response_format"}
        if form is not None and "response_format" in body:
            self._taken_forms.add(form)
        elif form is not None and "response_format" in without:
            self._refused_forms.add(form)


def _one_of(setting: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{setting}={given!r} was given; there are {', '.join(map(repr, known))}.")

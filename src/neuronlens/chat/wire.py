"""Requests and replies in the form of OpenAI's chat completions."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel

from neuronlens.chat.replies import StoredReply
from neuronlens.chat.request import Message, is_closed, schema, sendable

Detail = Literal["low", "high", "auto"]

_FAR_OFF = 50
"""A count of tokens that is so many times above or below our own is no count."""
_SHORT = 100
"""Tokens; of less, a server's own additions may be a large multiple."""


class PassingError(Exception):
    """A failure that may be gone in a moment."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class LastingError(Exception):
    """A failure of one request that asking again will not cure; `received` was paid for."""

    def __init__(self, reason: str, received: StoredReply | None = None) -> None:
        super().__init__(reason)
        self.received = received


def turn(message: Message, detail: Detail) -> dict[str, Any]:
    """A message; pictures are data URLs where they stand in the text."""
    if not message.pictures:
        return {"role": message.role, "content": message.text}
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": part.url, "detail": detail}}
        for part in message.parts
    ]
    return {"role": message.role, "content": parts}


def response_format(answer: type[BaseModel]) -> dict[str, Any]:
    """The field that asks for an answer of this form."""
    form = schema(answer)
    return {
        "type": "json_schema",
        "json_schema": {
            "name": re.sub(r"[^\w-]", "_", answer.__name__, flags=re.ASCII)[:64],
            "strict": is_closed(form),
            "schema": form,
        },
    }


def read(value: Any, attempt: int, about: int, longest: int) -> StoredReply:
    """A reply from the server's JSON; its text is empty if there is none.

    Args:
        value: The JSON.
        attempt: Which reply to the request this is.
        about: Tokens of the prompt, for servers that do not count them, or wrongly.
        longest: Tokens that the answer may have.

    Raises:
        LastingError: If the model refused, or its answer was withheld.
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
    usage = whole.get("usage")
    written = min(len(str(text)) // 4 + 1, longest)
    reply = StoredReply(
        text=sendable(str(text)),
        model=sendable(str(whole.get("model", ""))),
        attempts=attempt,
        prompt_tokens=_count(usage, "prompt_tokens", about, about),
        # What a model thinks without saying it is in the count, up to the longest answer.
        completion_tokens=_count(usage, "completion_tokens", written if text else 0, longest),
        cut_short=finished == "length",
    )
    if refusal:
        raise LastingError(f"the model refused: {sendable(str(refusal)[:200])}", reply)
    if finished == "content_filter":
        raise LastingError("the server withheld the answer (content_filter)", reply)
    return reply


def _count(usage: Any, name: str, about: int, most: int) -> int:
    """A number of tokens as the server counts, or our own if it does not, or absurdly."""
    said = usage.get(name) if isinstance(usage, dict) else None
    if (
        isinstance(said, int)
        and not isinstance(said, bool)
        and about / _FAR_OFF <= said <= _FAR_OFF * max(most, _SHORT)
    ):
        return said
    return about


def seconds(header: str | None) -> float | None:
    """What a Retry-After says, if it says it in seconds."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None

"""What is asked of a chat model, and what identifies it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel

ChatRole = Literal["system", "user", "assistant"]
_PIECE = re.compile(r"\w+|[^\w\s]|[\n\t]")


@dataclass(frozen=True)
class Picture:
    """An image of a message, as the bytes of a JPEG file."""

    jpeg: bytes = field(repr=False)

    @classmethod
    def of(cls, image: Image.Image, quality: int = 90) -> Picture:
        """A picture of an image; what is transparent becomes black."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=quality)
        return cls(buffer.getvalue())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.jpeg).hexdigest()

    @cached_property
    def url(self) -> str:
        """The file as a data URL."""
        return "data:image/jpeg;base64," + base64.b64encode(self.jpeg).decode()

    def open(self) -> Image.Image:
        """The image."""
        return Image.open(io.BytesIO(self.jpeg))


Part = str | Picture


def sendable(text: str) -> str:
    """The text without lone surrogates, which neither a server nor a file would take."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: who speaks, and texts and pictures in their order.

    What no UTF-8 text can hold, half a surrogate pair, becomes a question mark.
    """

    role: ChatRole
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        parts = tuple(sendable(p) if isinstance(p, str) else p for p in self.parts)
        object.__setattr__(self, "parts", parts)

    @cached_property
    def canonical(self) -> str:
        """The message as JSON, pictures by their digest."""
        parts = [{"text": p} if isinstance(p, str) else {"picture": p.digest} for p in self.parts]
        return json.dumps({"role": self.role, "parts": parts}, ensure_ascii=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `canonical`."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        """Its pictures."""
        return tuple(part for part in self.parts if isinstance(part, Picture))

    @cached_property
    def text(self) -> str:
        """Its texts, with an empty line between them."""
        return "\n\n".join(part for part in self.parts if isinstance(part, str))

    @cached_property
    def words(self) -> int:
        """About as many as tokens, counted as the words, marks and line breaks of its texts."""
        return len(_PIECE.findall(self.text))


@dataclass(frozen=True, eq=False)
class Request:
    """One question to a chat model.

    Attributes:
        messages: The conversation so far.
        answer: Form of the answer, which is validated; None takes any text.
        check: What the form cannot say, such as which indices there are: raises ValueError.
        max_tokens: Longest answer.
        expected_tokens: Length of a usual answer, for estimates.
        temperature: 0 for the likeliest answer.
        draw: Tells several answers to the same question apart; also the seed.
    """

    messages: tuple[Message, ...]
    answer: type[BaseModel] | None = None
    check: Callable[[Any], None] | None = None
    max_tokens: int = 400
    expected_tokens: int = 80
    temperature: float = 0.0
    draw: int = 0

    def canonical(self, model: str) -> str:
        """The request as JSON, messages by their digest: what its key is the hash of."""
        return json.dumps(
            {
                "model": model,
                "messages": [message.digest for message in self.messages],
                "answer": None if self.answer is None else schema_digest(self.answer),
                "max_tokens": self.max_tokens,
                "temperature": float(self.temperature),
                "draw": self.draw,
            },
            sort_keys=True,
        )

    def key(self, model: str) -> str:
        """SHA-256 of `canonical`: what a stored answer is found by."""
        return hashlib.sha256(self.canonical(model).encode()).hexdigest()


@lru_cache(maxsize=256)
def schema(answer: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of an answer, with nothing in it that servers commonly refuse.

    Bounds and lengths are left to the validation that follows every reply.
    """
    plain: dict[str, Any] = _plain(answer.model_json_schema())
    return plain


@lru_cache(maxsize=256)
def schema_digest(answer: type[BaseModel]) -> str:
    """SHA-256 of the schema."""
    return hashlib.sha256(json.dumps(schema(answer), sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=256)
def instruction(answer: type[BaseModel]) -> str:
    """Words that ask for an answer of this form, for models that are given no schema apart."""
    said = json.dumps(schema(answer), ensure_ascii=False)
    return f"Answer with one JSON object and nothing else.\nJSON schema: {said}"


_KEPT = frozenset(
    {
        *("type", "properties", "items", "required", "additionalProperties"),
        *("enum", "anyOf", "description", "$defs", "$ref"),
    }
)


def _plain(node: Any) -> Any:
    """A schema without titles, defaults, bounds; every object closed and all of it required."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: {name: _plain(each) for name, each in value.items()}
        if key in ("properties", "$defs")
        else _plain(value)
        for key, value in node.items()
        if key in _KEPT
    }
    if "properties" in kept:
        kept["required"] = list(kept["properties"])
        kept["additionalProperties"] = False
    return kept


def is_closed(node: Any) -> bool:
    """Whether a schema names every key there may be, as strict structured output wants."""
    if isinstance(node, list):
        return all(map(is_closed, node))
    if not isinstance(node, dict):
        return True
    if node.get("type") == "object" and node.get("additionalProperties") is not False:
        return False
    return all(map(is_closed, node.values()))

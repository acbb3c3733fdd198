"""What the chat server of the tests says: an instance of the schema asked for, from a seed.

The same request gets the same answer, today and after a restart. Nothing here is sensible, all of
it is valid, unless a step of the server's script asks for what is not.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Any

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "striped", "dotted")
THINGS = ("square", "circle", "triangle", "star", "cross", "wooden chair", "street sign", "dog")

INDEX = re.compile(r"^(\d+)\t", re.MULTILINE)
SCHEMA = re.compile(r"^JSON schema: (\{.*\})\s*$", re.MULTILINE)

WRONG_LEVELS = ("beyond", "floats", "high", "negative", "strings", "words")
"""Ways in which a map from token index to level can be wrong."""


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a string or a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""


def last_user_text(body: Mapping[str, Any]) -> str:
    said = [text_of(m) for m in body.get("messages", ()) if m.get("role") == "user"]
    return said[-1] if said else ""


def whole_text(body: Mapping[str, Any]) -> str:
    return "\n".join(text_of(message) for message in body.get("messages", ()))


def reply(body: Mapping[str, Any], seed: int, *, structured: bool, levels: str | None) -> str:
    """The content of an answer.

    Args:
        body: The request.
        seed: Says which of the many valid answers.
        structured: Whether `response_format` is obeyed. Otherwise, and without it, the schema
            is looked for in the text, and the JSON comes inside prose.
        levels: One of `WRONG_LEVELS`, or None for a right answer.
    """
    form = body.get("response_format") or {}
    schema = (form.get("json_schema") or {}).get("schema") if structured else None
    indices = INDEX.findall(last_user_text(body))
    if schema is not None:
        return json.dumps(Instance(schema, seed, indices, levels).make())
    found = SCHEMA.search(whole_text(body))
    if found is None:
        return Instance({"type": "string"}, seed, indices, levels).make()
    made = json.dumps(Instance(json.loads(found[1]), seed, indices, levels).make(), indent=2)
    return f"Here is what I see.\n\n```json\n{made}\n```\n\nTell me if you need {{more}}."


class Instance:
    """A random instance of a JSON schema, as far as the tests' schemas go."""

    def __init__(
        self, schema: Mapping[str, Any], seed: int, indices: list[str], levels: str | None
    ):
        self._root = schema
        self._random = random.Random(seed)
        self._indices = indices
        self._levels = levels

    def make(self) -> Any:
        return self._value(self._root)

    def _value(self, schema: Mapping[str, Any], name: str = "") -> Any:
        for name_of_choices in ("anyOf", "oneOf", "allOf"):
            if name_of_choices in schema:
                schema = next(s for s in schema[name_of_choices] if s.get("type") != "null")
        if "$ref" in schema:
            return self._value(self._root["$defs"][schema["$ref"].rpartition("/")[2]], name)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._random.choice(schema["enum"])
        kind = schema.get("type", "string")
        if isinstance(kind, list):
            kind = next(k for k in kind if k != "null")
        made = {
            "object": self._object,
            "array": self._array,
            "integer": self._integer,
            "number": self._number,
            "string": self._string,
            "boolean": lambda _: self._random.random() < 0.5,
            "null": lambda _: None,
        }[kind](schema)
        if name == "index" and kind == "integer" and self._indices:
            return int(self._random.choice(self._indices))
        return made

    def _object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        made = {n: self._value(s, n) for n, s in schema.get("properties", {}).items()}
        other = schema.get("additionalProperties")
        return made | self._map(other) if isinstance(other, dict) else made

    def _map(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A few of the listed tokens, each with a value; in order, as a model would write them."""
        keys = self._indices or ["0", "1", "2"]
        few = sorted(self._random.sample(range(len(keys)), min(len(keys), 3)))
        made = {keys[place]: self._value(values) for place in few}
        last = max(map(int, keys))
        wrong: dict[str, dict[str, Any]] = {
            "beyond": made | {str(last + 1): 5, str(last + 1000): 7},
            "floats": {key: value + 0.5 for key, value in made.items()},
            "high": {key: 11 + value for key, value in made.items()},
            "negative": {key: -1 - value for key, value in made.items()},
            "strings": {key: str(value) for key, value in made.items()},
            "words": {f"token {key}": value for key, value in made.items()},
        }
        return made if self._levels is None else wrong[self._levels]

    def _array(self, schema: Mapping[str, Any]) -> list[Any]:
        least = schema.get("minItems", 1)
        count = self._random.randint(least, max(least, schema.get("maxItems", 3)))
        items = schema.get("items", {"type": "string"})
        if items.get("type") == "string" and "enum" not in items:
            phrases = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
            return self._random.sample(phrases, count)
        return [self._value(items) for _ in range(count)]

    def _integer(self, schema: Mapping[str, Any]) -> int:
        return self._random.randint(schema.get("minimum", 0), schema.get("maximum", 10))

    def _number(self, schema: Mapping[str, Any]) -> float:
        low, high = schema.get("minimum", 0), schema.get("maximum", 1)
        return round(self._random.uniform(low, high), 3)

    def _string(self, schema: Mapping[str, Any]) -> str:
        colour, thing = self._random.choice(COLOURS), self._random.choice(THINGS)
        said = f"A {colour} {thing}, seen from near."
        return said[: schema.get("maxLength", len(said))]

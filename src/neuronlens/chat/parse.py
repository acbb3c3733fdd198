"""From what a chat model wrote to the answer that was asked for, or why it is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, Never

from pydantic import BaseModel, ValidationError

from neuronlens.chat.request import Request, sendable

_SHOWN = 160
_MOST_OBJECTS = 64
_OPENING = re.compile(r'\{(?=\s*["}])')
_STRING_OR_BRACE = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}]', re.DOTALL)


class InvalidReplyError(ValueError):
    """A reply is not of the form that was asked for; the message says why."""

    def __init__(self, problem: str) -> None:
        super().__init__(sendable(problem))


def parse(request: Request, text: str) -> BaseModel | None:
    """The answer in a reply; None where any text will do.

    The object may stand alone, in a code fence, or among prose. Prose may quote the data, and
    data may hold an object that would do. So the last object of the reply has to be the answer,
    and two different ones that would both do are none. NaN, infinite numbers, and a name that
    is twice in one object are not JSON here.

    Raises:
        InvalidReplyError: If there is none, or it breaks a rule.
    """
    if request.answer is None:
        if not text.strip():
            raise InvalidReplyError("the reply is empty")
        return None
    try:
        found = [_DECODER.decode(text)]
    except (ValueError, RecursionError):
        found = _objects(text)
    if not found:
        raise InvalidReplyError(f"no JSON object in the reply {_shown(text)}")
    answers: list[BaseModel] = []
    problem = ""
    for value in found:
        try:
            answer = _checked(request, request.answer, value)
        except InvalidReplyError as error:
            problem = str(error)
        else:
            problem = ""
            if answer not in answers:
                answers.append(answer)
    if problem:
        raise InvalidReplyError(problem)
    if len(answers) > 1:
        raise InvalidReplyError(f"the reply holds {len(answers)} different answers")
    return answers[0]


def _checked(request: Request, form: type[BaseModel], value: object) -> BaseModel:
    if isinstance(value, _Broken):
        raise InvalidReplyError(value.why)
    try:
        json.dumps(value, ensure_ascii=False).encode()
        answer = form.model_validate(value)
        if request.check is not None:
            request.check(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:_SHOWN] or "the object"
        raise InvalidReplyError(f"{where}: {first['msg'][:_SHOWN]}") from None
    except UnicodeEncodeError:
        raise InvalidReplyError("a text in it holds half a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise InvalidReplyError(str(error)) from None
    return answer


class _Broken:
    """What begins like a JSON object and is none."""

    def __init__(self, why: str) -> None:
        self.why = why


def _objects(text: str) -> list[object]:
    """Every JSON object that stands in a text by itself, whole or broken."""
    found: list[object] = []
    opening = _OPENING.search(text)
    while opening:
        if len(found) == _MOST_OBJECTS:
            raise InvalidReplyError(f"the reply holds more than {_MOST_OBJECTS} JSON objects")
        start = opening.start()
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            # What is inside a broken object is a part of it, and no answer.
            end = _closing(text, start)
            why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            value = _Broken(f"the JSON object {_shown(text[start:end])} is broken: {why}")
        found.append(value)
        opening = _OPENING.search(text, end)
    return found


def _closing(text: str, start: int) -> int:
    """Where the object that begins at `start` ends by its braces; the text's end if nowhere."""
    depth = 0
    for mark in _STRING_OR_BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0 and mark[0] == "}":
            return mark.end()
    return len(text)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name[:_SHOWN]!r} is there twice")
        made[name] = value
    return made


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _constant(digits)


def _constant(name: str) -> Never:
    raise ValueError(f"{name[:_SHOWN]} is no number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_constant=_constant
)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")

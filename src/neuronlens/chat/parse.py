"""From what a chat model wrote to the answer that was asked for, or why it is none."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from neuronlens.chat.request import Request

_SHOWN = 160


class InvalidReplyError(ValueError):
    """A reply is not of the form that was asked for; the message says why."""


def parse(request: Request, text: str) -> BaseModel | None:
    """The answer in a reply; None where any text will do.

    The object may stand alone, in a code fence, or among prose. Two different objects that
    would both do are no answer: one of them may be quoted from the data.

    Raises:
        InvalidReplyError: If there is none, or it breaks a rule.
    """
    if request.answer is None:
        if not text.strip():
            raise InvalidReplyError("the reply is empty")
        return None
    try:
        found: list[Any] = [json.loads(text)]
    except (json.JSONDecodeError, RecursionError):
        found = _objects(text)
    if not found:
        raise InvalidReplyError(f"no JSON object in the reply {_short(text)}")
    answers: list[BaseModel] = []
    problems = []
    for value in found:
        try:
            answer = request.answer.model_validate(value)
            if request.check is not None:
                request.check(answer)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the object"
            problems.append(f"{where}: {first['msg']}")
        except ValueError as error:
            problems.append(str(error))
        else:
            if answer not in answers:
                answers.append(answer)
    if len(answers) == 1:
        return answers[0]
    if answers:
        raise InvalidReplyError(f"the reply holds {len(answers)} different answers")
    raise InvalidReplyError(problems[0])


def _objects(text: str) -> list[dict[str, Any]]:
    """Every JSON object that stands in a text by itself, not inside another one."""
    decoder = json.JSONDecoder()
    found = []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            end = at + 1
        else:
            found.append(value)
        at = text.find("{", end)
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")

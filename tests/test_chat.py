"""Asking a chat server over HTTP: what is sent, what is made of faults, what is never repeated."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import logging
import math
import socket
import threading
import time
import traceback
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, Field

from neuronlens.chat import (
    Budget,
    Message,
    OpenAIChat,
    Picture,
    Prices,
    Reply,
    ReplyStore,
    Request,
    instruction,
)
from neuronlens.errors import BudgetError, ChatError, DataError
from neuronlens.explanation import Failure
from servers import chat_server

KEY = "sk-unmistakable-7c1f9e"


class Sketch(BaseModel, extra="forbid"):
    explanation: str
    phrases: list[str] = Field(max_length=3)
    confidence: float = Field(ge=0, le=1)


class Levels(BaseModel, extra="forbid"):
    levels: dict[str, int]


def listed(answer: Levels) -> None:
    """Only the tokens 3, 4 and 8 were shown, and levels are from 0 to 10."""
    for index, level in answer.levels.items():
        if index not in {"3", "4", "8"} or not 0 <= level <= 10:
            raise ValueError(f"there is no token {index} or no level {level}")


def question(text: object, answer: type[BaseModel] | None = Sketch, **more) -> Request:
    rules = "Be brief." + ("" if answer is None else f"\n{instruction(answer)}")
    messages = (Message("system", (rules,)), Message("user", (str(text),)))
    return Request(messages, answer=answer, **more)


def tokens(text: object = "Rate these.", **more) -> Request:
    shown = f'{text}\n3\t"a"\n4\t" dog"\n8\t"7"'
    return question(shown, Levels, check=listed, **more)


def red(side=24) -> Picture:
    return Picture.of(Image.new("RGB", (side, side), "red"))


def chat_for(server, **more) -> OpenAIChat:
    return OpenAIChat("tiny", **{"base_url": server.base_url, "slowest_retry": 0.05} | more)


def sent(server, text="") -> list[dict]:
    bodies = [event["body"] for event in server.events("received")]
    return [body for body in bodies if text in json.dumps(body)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def serve(tmp_path):
    """Start a server with these steps; the bodies are in its log."""
    with ExitStack() as stack:

        def start(*steps, latency=0.0):
            return stack.enter_context(
                chat_server(tmp_path, script=steps, latency=latency, keep_bodies=True)
            )

        yield start


# Faults.

WRONG = {
    "truncated": ({"truncate": True}, "broken"),
    "other object": ({"content": '{"a": 1}'}, "levels: Field required"),
    "no token": ({"levels": "beyond"}, "no token"),
    "no level": ({"levels": "high"}, "no level"),
    "negative": ({"levels": "negative"}, "no level"),
    "half a level": ({"levels": "floats"}, "levels"),
    "words": ({"levels": "words"}, "no token"),
    "no choices": ({"choices": []}, "no JSON object"),
    "choices of nothing": ({"choices": [None]}, "no JSON object"),
    "null": ({"content": None}, "no JSON object"),
    "a number": ({"raw": '{"choices": [{"message": {"content": 7}}]}'}, "the object"),
    "empty": ({"content": ""}, "no JSON object"),
    "surrogate": ({"content": '{"levels": {"\\ud800": 3}, "\ud83d": 1}'}, "half a surrogate pair"),
    "endless": ({"content": '{"levels": ' * 3000}, "broken"),
    "long number": ({"content": '{"levels": {"3": ' + "1" * 5000 + "}}"}, "broken"),
    "no choices at all": ({"raw": '{"error": {"message": "odd"}}'}, "no JSON object"),
    "a list": ({"raw": "[]"}, "no JSON object"),
}

PASSING = {
    "429": {"status": 429},
    "429, soon": {"status": 429, "headers": {"retry-after": "0.01"}},
    "429, some day": {"status": 429, "headers": {"retry-after": "Fri, 31 Dec 2027 23:59:59 GMT"}},
    "500": {"status": 500},
    "503": {"status": 503, "body": "busy"},
    "dropped": {"drop": True},
    "hangs": {"hang": 5},
    "no JSON": {"raw": "<html>not today</html>"},
    "half of it": {"raw": '{"choices": [{"mess'},
    "no text": {"raw": "[" * 100_000},
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """One server with every fault, each for the requests that name it."""
    script = []
    for name, (step, _) in WRONG.items():
        well = {"content": '{"levels": {"3": 7}}'}
        script.append({"match": f"wrong once: {name}.", "steps": [step, well]})
        script.append({"match": f"wrong always: {name}.", "steps": [step | {"times": "always"}]})
    for name, step in PASSING.items():
        script.append({"match": f"passes: {name}.", "steps": [step | {"times": 2}]})
        script.append({"match": f"stays: {name}.", "steps": [step | {"times": "always"}]})
    folder = tmp_path_factory.mktemp("faulty")
    with chat_server(folder, script=script, keep_bodies=True) as server:
        yield server


# Ordinary answers.


def test_answers_come_in_the_order_of_the_requests_and_in_their_form(serve):
    server = serve({"match": "Question 0.", "steps": [{"hang": 0.3}]})
    chat = chat_for(server)
    requests = [question(f"Question {n}.") for n in range(12)]
    answers = chat.ask(iter(requests))
    assert [answer.key for answer in answers] == [r.key("tiny") for r in requests]
    assert all(isinstance(answer.value, Sketch) for answer in answers)
    assert not any(answer.stored for answer in answers)
    texts = [answer.text for answer in answers]
    for n, request in enumerate(requests[:3]):
        alone = chat_for(server).ask([request])
        assert alone[0].text == texts[n]
    assert chat.ask([]) == []


def test_pictures_arrive_byte_for_byte_where_they_stand_in_the_text(serve):
    server = serve()
    picture = red()
    shown = Message("user", ("Before", picture, "after"))
    assert isinstance(chat_for(server, detail="low").ask([Request((shown,))])[0], Reply)
    (body,) = sent(server)
    before, image, after = body["messages"][0]["content"]
    assert before == {"type": "text", "text": "Before"}
    assert after == {"type": "text", "text": "after"}
    assert image["image_url"]["detail"] == "low"
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(data) == picture.jpeg
    assert Image.open(io.BytesIO(picture.jpeg)).size == (24, 24)


def test_the_form_is_sent_as_a_closed_schema_with_the_limits_left_out(serve):
    server = serve()
    chat_for(server).ask([question("What?", max_tokens=77, temperature=0.5, draw=3)])
    (body,) = sent(server)
    form = body["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["name"] == "Sketch"
    assert form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"]["required"] == ["explanation", "phrases", "confidence"]
    assert "maximum" not in json.dumps(form)
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (77, 0.5, 3)
    assert body["messages"][0]["content"].startswith("Be brief.")


def test_a_map_from_tokens_is_sent_as_a_schema_that_is_not_strict(serve):
    server = serve()
    (answer,) = chat_for(server).ask([tokens()])
    assert set(answer.value.levels) <= {"3", "4", "8"}
    assert sent(server)[0]["response_format"]["json_schema"]["strict"] is False


def test_the_schema_of_a_generic_form_has_a_name_that_servers_take(serve):
    from typing import Generic, TypeVar

    value = TypeVar("value")

    class Of(BaseModel, Generic[value]):
        one: value

    server = serve()
    (answer,) = chat_for(server).ask([question("What?", Of[int])])
    assert isinstance(answer.value.one, int)
    assert sent(server)[0]["response_format"]["json_schema"]["name"] == "Of_int_"


def test_options_are_sent_and_none_leaves_a_field_out(serve):
    server = serve()
    options = {"reasoning_effort": "low", "seed": None}
    chat_for(server, options=options).ask([question("What?")])
    (body,) = sent(server)
    assert body["reasoning_effort"] == "low"
    assert "seed" not in body


@pytest.mark.parametrize("concurrency", [1, 5])
def test_as_many_requests_are_in_flight_as_allowed_and_never_more(serve, concurrency):
    server = serve(latency=0.05)
    chat = chat_for(server, concurrency=concurrency)
    answers = chat.ask(question(n) for n in range(4 * concurrency))
    assert all(isinstance(answer, Reply) for answer in answers)
    assert server.stats()["max_in_flight"] == concurrency


# Structured output where there is none.


def refusal_of_the_form(times) -> dict:
    said = {"error": {"message": "response_format is not supported", "type": "invalid"}}
    return {"match": '"response_format"', "steps": [{"status": 400, "body": said, "times": times}]}


def test_a_server_that_refuses_the_schema_is_asked_without_and_never_with_it_again(serve):
    server = serve(refusal_of_the_form("always"), latency=0.05)
    chat = chat_for(server, concurrency=4)
    answers = chat.ask(question(n) for n in range(4))
    assert all(isinstance(answer, Reply) for answer in answers)
    assert sum("response_format" in body for body in sent(server)) == 4  # those in flight together
    more = chat.ask(question(n) for n in range(10, 20))
    assert all(isinstance(answer, Reply) for answer in more)
    assert sum("response_format" in body for body in sent(server)) == 4


def test_a_request_that_is_refused_with_and_without_its_schema_changes_nothing_for_others(serve):
    server = serve({"match": "Bad", "steps": [{"status": 400, "times": "always"}]})
    chat = chat_for(server, concurrency=1)
    bad, good = chat.ask([question("Bad"), question("Good")])
    assert isinstance(bad, Failure)
    assert "400" in bad.reason
    assert isinstance(good, Reply)
    assert ["response_format" in body for body in sent(server)] == [True, False, True]


def test_a_server_that_took_the_schema_once_is_not_doubted_later(serve):
    server = serve({"match": "Bad", "steps": [{"status": 400, "times": "always"}]})
    chat = chat_for(server, concurrency=1)
    good, bad = chat.ask([question("Good"), question("Bad")])
    assert isinstance(good, Reply)
    assert isinstance(bad, Failure)
    assert len(sent(server)) == 2


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("This model's maximum context length is 8192 tokens.", False),
        ("The image is too large.", False),
        ("json_schema exceeds what is allowed.", True),
        ("Bad request.", True),
    ],
)
def test_a_refused_request_is_sent_without_its_schema_unless_the_server_blames_something_else(
    serve, caplog, said, again
):
    body = {"error": {"message": said, "type": "invalid"}}
    server = serve({"status": 400, "body": body, "times": "always"})
    with caplog.at_level(logging.INFO, logger="neuronlens.chat"):
        (failed,) = chat_for(server).ask([question("What?")])
    assert said in failed.reason
    assert len(sent(server)) == 1 + again
    assert (said in caplog.text) == again


def test_the_schema_is_never_or_always_sent_if_that_is_asked_for(serve):
    server = serve(refusal_of_the_form("always"))
    (answer,) = chat_for(server, structured="never").ask([question("What?")])
    assert isinstance(answer, Reply)
    (failed,) = chat_for(server, structured="always").ask([question("What?")])
    assert isinstance(failed, Failure)
    assert ["response_format" in body for body in sent(server)] == [False, True]


def test_a_server_that_ignores_the_schema_answers_in_prose_and_is_understood(serve):
    server = serve({"ignore_schema": True, "times": "always"})
    (answer,) = chat_for(server).ask([question("What?")])
    assert isinstance(answer.value, Sketch)
    assert answer.text.startswith("Here is")


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "seed"])
def test_a_field_that_the_server_refuses_by_name_is_not_sent_again(serve, name):
    said = {"error": {"message": f"Unsupported parameter: '{name}'.", "type": "invalid"}}
    step = {"match": f'"{name}"', "steps": [{"status": 400, "body": said, "times": "always"}]}
    server = serve(step)
    chat = chat_for(server, concurrency=1)
    answers = chat.ask([question(1, max_tokens=55), question(2, max_tokens=55)])
    assert all(isinstance(answer, Reply) for answer in answers)
    bodies = sent(server)
    assert [name in body for body in bodies] == [True, False, False]
    if name == "max_tokens":
        assert [body.get("max_completion_tokens") for body in bodies] == [None, 55, 55]
    assert all("response_format" in body for body in bodies)


# Replies of the wrong form.


@pytest.mark.parametrize("name", WRONG)
def test_a_reply_of_the_wrong_form_is_told_why_and_asked_again(faulty, name):
    _, why = WRONG[name]
    chat = chat_for(faulty)
    request = tokens(f"wrong once: {name}.")
    (answer,) = chat.ask([request])
    assert isinstance(answer, Reply)
    assert answer.key == request.key("tiny")
    assert answer.value == Levels(levels={"3": 7})
    first, second = sent(faulty, f"wrong once: {name}.")
    assert second["messages"][:2] == first["messages"]
    said, told = second["messages"][2:]
    assert said["role"] == "assistant"
    assert said["content"]
    assert why in told["content"]
    usage = chat.replies.usage()
    assert (usage.requests, usage.invalid) == (2, 1)
    assert chat.replies.get(answer.key).attempts == 2


@pytest.mark.parametrize("name", WRONG)
def test_replies_that_stay_wrong_are_a_failure_that_says_why_and_nothing_is_stored(faulty, name):
    _, why = WRONG[name]
    chat = chat_for(faulty, attempts=2)
    failed, good = chat.ask([tokens(f"wrong always: {name}."), question("What?")])
    assert isinstance(failed, Failure)
    assert "after 2 attempts" in failed.reason
    assert why in failed.reason
    assert isinstance(good, Reply)
    assert len(chat.replies) == 1
    assert chat.purse.requests == 3


def test_an_answer_that_was_cut_short_may_be_twice_as_long_the_next_time(serve):
    server = serve({"truncate": True, "times": 2}, {"content": "{}"})
    (answer,) = chat_for(server, attempts=4).ask([question("What?", max_tokens=50)])
    assert isinstance(answer, Reply)
    assert [body["max_tokens"] for body in sent(server)] == [50, 100, 200, 200]


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ({"refusal": "I cannot do that."}, "I cannot"),
        ({"finish_reason": "content_filter"}, "filter"),
    ],
    ids=["refusal", "filter"],
)
def test_a_refusal_is_final_at_once_and_counts_as_paid_for(serve, step, why):
    server = serve(step | {"times": "always"})
    chat = chat_for(server)
    (failed,) = chat.ask([question("What?")])
    assert isinstance(failed, Failure)
    assert why in failed.reason
    assert len(sent(server)) == 1
    assert chat.purse.requests == 1
    assert chat.purse.prompt_tokens > 0


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "many",
        {},
        {"prompt_tokens": -1, "completion_tokens": "x"},
        {"prompt_tokens": 10**30, "completion_tokens": True},
        {"prompt_tokens": 1.5, "completion_tokens": None},
    ],
    ids=str,
)
def test_a_usage_that_is_none_is_estimated(serve, usage):
    server = serve({"usage": usage, "times": "always"})
    chat = chat_for(server)
    (answer,) = chat.ask([question("one two three four five")])
    assert isinstance(answer, Reply)
    assert 10 < chat.purse.prompt_tokens < 1000
    assert 0 < chat.purse.completion_tokens < 1000


# Faults that pass, and faults that do not.


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_not_seen(faulty, name):
    chat = chat_for(faulty, retries=2, timeout=0.4)
    (answer,) = chat.ask([question(f"passes: {name}.")])
    assert isinstance(answer, Reply)
    bodies = sent(faulty, f"passes: {name}.")
    assert len(bodies) == 3
    assert len({json.dumps(body) for body in bodies}) == 1
    assert chat.purse.requests == 1  # what was not answered is not paid for


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_stays_is_a_failure_of_its_request_after_the_retries(faulty, name):
    chat = chat_for(faulty, retries=2, timeout=0.4)
    failed, good = chat.ask([question(f"stays: {name}."), question("Good")])
    assert isinstance(failed, Failure)
    assert failed.reason
    assert isinstance(good, Reply)
    assert len(sent(faulty, f"stays: {name}.")) == 3
    assert chat.purse.requests == 1


def test_a_server_that_says_how_long_to_wait_is_given_that_long_but_no_longer_than_allowed(serve):
    soon, later = ({"status": 429, "headers": {"retry-after": wait}} for wait in ("0.01", "1.2"))
    server = serve(soon, soon, later)
    began = time.monotonic()
    chat_for(server, slowest_retry=5).ask([question("What?")])
    received = [event["time"] for event in server.events("received")]
    assert received[2] - received[0] < 1.4  # without being told it would be 1.5 at least
    assert received[3] - received[2] >= 1.2
    assert time.monotonic() - began < 5

    again = serve({"status": 429, "headers": {"retry-after": "3600"}})
    began = time.monotonic()
    chat_for(again, slowest_retry=0.2).ask([question("What?")])
    assert 0.2 <= time.monotonic() - began < 3


def test_pauses_grow_and_differ(serve):
    server = serve({"status": 500, "times": "always"})
    chat = chat_for(server, slowest_retry=0.9, retries=2)
    chat.ask([question("What?")])
    first, second, third = (event["time"] for event in server.events("received"))
    assert 0.5 <= second - first < third - second + 0.4
    assert 0.8 <= third - second < 2


def test_a_reply_that_trickles_in_has_no_more_time_than_one_that_hangs():
    """The http client's own limit starts anew with every byte."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
                try:
                    for _ in range(100):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass

        threading.Thread(target=trickle, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        began = time.monotonic()
        (failed,) = OpenAIChat("tiny", base_url=url, timeout=0.4, retries=0).ask([question("?")])
    assert "no reply within 0.4 s" in failed.reason
    assert time.monotonic() - began < 3


def test_a_server_that_is_gone_ends_the_run_and_what_was_answered_is_stored(serve):
    server = serve(latency=0.02)
    chat = chat_for(server, concurrency=8, retries=1)

    def asked():
        for n in range(1000):
            if n == 30:
                server.stop()
            yield question(n)

    with pytest.raises(ChatError, match="Is the server up") as caught:
        chat.ask(asked())
    assert "127.0.0.1" in str(caught.value)
    answered = len(chat.replies)
    assert 15 <= answered <= 30
    assert len(server.events("answered")) <= answered + 8


def test_few_failures_among_many_answers_do_not_end_the_run(serve):
    server = serve({"match": "Bad", "steps": [{"status": 500, "times": "always"}]})
    chat = chat_for(server, concurrency=1, retries=0)
    answers = chat.ask(question(f"{'Bad' if n % 2 else 'Good'} {n}") for n in range(40))
    assert sum(isinstance(answer, Failure) for answer in answers) == 20


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_key_ends_the_run_and_is_quoted_nowhere(serve, status):
    said = {"error": {"message": f"Bad key {KEY}", "type": "no"}}
    server = serve({"status": status, "body": said, "times": "always"})
    with pytest.raises(ChatError, match=f"OPENAI_API_KEY.*{status}") as caught:
        chat_for(server, concurrency=3, key_env="OPENAI_API_KEY").ask(
            question(n) for n in range(50)
        )
    assert KEY not in str(caught.value)
    assert "Bad key" not in str(caught.value)
    assert len(sent(server)) <= 3


def test_a_model_that_is_not_there_ends_the_run(serve):
    server = serve({"status": 404, "times": "always"})
    with pytest.raises(ChatError, match="no model 'tiny'"):
        chat_for(server).ask([question("What?")])


def test_no_key_for_openai_itself_is_said_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ChatError, match=r"api\.openai\.com.*OPENAI_API_KEY"):
        OpenAIChat("gpt").ask([question("What?")])


def test_a_server_without_keys_needs_none_and_another_variable_may_hold_one(serve, monkeypatch):
    server = serve()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert isinstance(chat_for(server).ask([question(1)])[0], Reply)
    monkeypatch.setenv("OTHER_KEY", f"{KEY}\n")
    assert isinstance(chat_for(server, key_env="OTHER_KEY").ask([question(2)])[0], Reply)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-é")  # is not even looked at
    assert isinstance(chat_for(server).ask([question(3)])[0], Reply)


@pytest.fixture
def keys_seen():
    """The address of a server that answers nothing, and the keys that it was sent."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def listen():
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        seen.append(connection.recv(65536))
                        connection.sendall(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n")

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", seen
        listening.shutdown(socket.SHUT_RDWR)


def test_the_key_of_openai_goes_to_no_other_server_unless_it_is_named(keys_seen, monkeypatch):
    url, seen = keys_seen

    def sends_the_key(**more) -> bool:
        seen.clear()
        with pytest.raises(ChatError) as caught:
            OpenAIChat("tiny", **more).ask([question("What?")])
        assert ("without a key" in str(caught.value)) == (KEY.encode() not in seen[0])
        assert b"uthorization" in seen[0]
        return KEY.encode() in seen[0]

    assert not sends_the_key(base_url=url)
    assert sends_the_key(base_url=url, key_env="OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert sends_the_key()
    assert not sends_the_key(base_url=url)


@pytest.mark.parametrize("odd", ["sk-é", "sk-one\nsk-two"])
def test_a_key_that_no_header_can_hold_is_said_and_not_shown(serve, monkeypatch, odd):
    monkeypatch.setenv("OPENAI_API_KEY", odd)
    with pytest.raises(ChatError, match="OPENAI_API_KEY") as caught:
        chat_for(serve(), key_env="OPENAI_API_KEY").ask([question("What?")])
    assert "sk-" not in str(caught.value)


def test_a_refused_request_fails_alone(serve):
    server = serve({"match": "Bad", "steps": [{"status": 413, "times": "always"}]})
    failed, good = chat_for(server, structured="never").ask([question("Bad"), question("Good")])
    assert "413" in failed.reason
    assert isinstance(good, Reply)


def test_impossible_settings_are_refused_when_they_are_made():
    for name, value in (
        *(("attempts", 0), ("concurrency", 0), ("retries", -1), ("image_tokens", -1)),
        *(("timeout", -1), ("timeout", 0), ("timeout", math.nan), ("slowest_retry", -0.1)),
        *(("structured", "sometimes"), ("detail", "close")),
    ):
        with pytest.raises(ValueError, match=f"{name}={value!r} was given"):
            OpenAIChat("tiny", **{name: value})
    for name in ("price", "requests", "tokens"):
        with pytest.raises(ValueError, match=f"{name}=-1 was given"):
            Budget(**{name: -1})
    with pytest.raises(ValueError, match="completion=-2"):
        Prices(prompt=1, completion=-2)
    with pytest.raises(ValueError, match="needs prices"):
        OpenAIChat("tiny", budget=Budget(price=1.0))


@pytest.mark.parametrize("name", ["model", "messages", "n", "stream"])
def test_options_that_a_request_says_itself_are_refused(name):
    with pytest.raises(ValueError, match=f"options has {name}"):
        OpenAIChat("tiny", options={name: 2})


# The key.


def chain(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("status", [400, 401, 429])
def test_the_key_is_in_no_error_record_log_or_file(serve, tmp_path, caplog, status):
    said = {"error": {"message": f"Bearer {KEY} and\n{KEY} again", "type": "no"}}
    server = serve(
        {"match": "Bad", "steps": [{"status": status, "body": said, "times": "always"}]},
        {"drop": True},
        {"content": "no JSON"},
    )
    path = tmp_path / "replies.sqlite"
    chat = chat_for(server, replies=path, retries=1, concurrency=1, key_env="OPENAI_API_KEY")
    with caplog.at_level(logging.DEBUG):
        for name in list(logging.root.manager.loggerDict):
            caplog.set_level(logging.DEBUG, logger=name)
        shown = [repr(chat), repr(vars(chat))]
        chat.ask([question("Good")])
        try:
            shown.append(repr(chat.ask([question("Bad")])))
        except ChatError as error:
            shown += [chain(error), repr(error)]
    assert len(shown) == (4 if status == 401 else 3)
    assert "POST" in caplog.text
    for text in [caplog.text, *(str(vars(record)) for record in caplog.records), *shown]:
        assert KEY not in text
    chat.replies.close()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert path in files
    for file in files:
        if file.name != "script.json":
            assert KEY.encode() not in file.read_bytes()


def test_secrets_in_the_address_are_not_shown():
    chat = OpenAIChat("tiny", base_url="http://me:hidden@127.0.0.1:9/v1?token=hidden", retries=0)
    assert "hidden" not in repr(chat)
    with pytest.raises(ChatError, match=r"127\.0\.0\.1:9/v1") as raised:
        chat.ask([question("What?")])
    assert "hidden" not in "".join(traceback.format_exception(raised.value))


# Asked once.


def test_twins_in_flight_together_and_later_ones_are_asked_once(serve):
    server = serve(latency=0.05)
    chat = chat_for(server, concurrency=6)
    answers = chat.ask(question(n % 4) for n in range(24))
    assert len({answer.text for answer in answers}) == 4
    assert [answer.text for answer in answers] == 6 * [answer.text for answer in answers[:4]]
    assert len(sent(server)) == 4
    again = chat.ask([question(2)])
    assert again[0].stored
    assert again[0].text == answers[2].text
    assert chat.purse.requests == 4


def test_twins_of_a_request_that_fails_fail_with_it(serve):
    server = serve({"match": "Bad", "steps": [{"status": 413, "times": "always"}]}, latency=0.05)
    answers = chat_for(server).ask([question("Bad"), question("Bad"), question("Good")])
    assert [type(answer) for answer in answers] == [Failure, Failure, Reply]
    assert len(sent(server)) == 2


def test_later_twins_of_a_request_that_failed_are_not_asked_again_in_the_same_call(serve):
    server = serve({"match": "Bad", "steps": [{"status": 413, "times": "always"}]})
    chat = chat_for(server, concurrency=1, structured="never")
    answers = chat.ask([question("Bad"), question("Good"), question("Bad")])
    assert [type(answer) for answer in answers] == [Failure, Reply, Failure]
    assert len(sent(server, "Bad")) == 1
    chat.ask([question("Bad")])
    assert len(sent(server, "Bad")) == 2


def test_pictures_looked_at_with_another_detail_are_another_question(serve):
    server, replies = serve(), ReplyStore()
    shown = Request((Message("user", (red(),)),))
    chats = [chat_for(server, replies=replies, detail=detail) for detail in ("auto", "low", "high")]
    keys = [chat.ask([shown])[0].key for chat in chats]
    assert keys[0] == shown.key("tiny")
    assert len(set(keys)) == 3
    assert {body["model"] for body in sent(server)} == {"tiny"}
    assert [chat.estimate([shown]).stored for chat in chats] == [1, 1, 1]


def test_a_stored_answer_that_breaks_a_rule_of_today_is_asked_again(serve):
    server = serve({"content": '{"levels": {"9": 3}}'})
    loose = question('Rate.\n3\t"a"', Levels)
    chat = chat_for(server)
    assert chat.ask([loose])[0].value.levels == {"9": 3}
    strict = Request(loose.messages, answer=Levels, check=listed)
    assert chat.ask([strict])[0].value.levels != {"9": 3}
    assert len(sent(server)) == 2
    assert chat.ask([strict])[0].stored


# Budget and estimate.


def test_the_number_of_replies_is_kept_to_exactly_and_going_on_asks_only_the_rest(serve, tmp_path):
    server = serve(latency=0.02)
    path = tmp_path / "replies.sqlite"
    chat = chat_for(server, replies=path, budget=Budget(requests=10), concurrency=8)
    with pytest.raises(BudgetError, match="requests to 11"):
        chat.ask(question(n) for n in range(40))
    assert len(sent(server)) == len(chat.replies) == chat.purse.requests == 10
    chat.replies.close()

    same = chat_for(server, replies=path, budget=Budget(requests=10))
    assert same.purse.requests == 10
    kept = same.replies.keys()
    known = [question(n) for n in range(40) if question(n).key("tiny") in kept]
    assert all(answer.stored for answer in same.ask(known))
    with pytest.raises(BudgetError):
        same.ask(question(n) for n in range(40))
    assert len(sent(server)) == 10
    same.replies.close()

    larger = chat_for(server, replies=path, budget=Budget(requests=40))
    assert len(larger.ask(question(n) for n in range(40))) == 40
    assert len(sent(server)) == 40
    assert not server.repeated()
    larger.replies.close()


def test_requests_in_flight_count_with_the_longest_answer_they_may_get(serve):
    usage = {"prompt_tokens": 3, "completion_tokens": 1000}
    server = serve({"usage": usage, "times": "always"}, latency=0.1)
    chat = chat_for(server, budget=Budget(tokens=2500), concurrency=8)
    with pytest.raises(BudgetError, match="tokens"):
        chat.ask(question(n, None, max_tokens=1000) for n in range(8))
    assert len(sent(server)) == chat.purse.requests == 2


def test_a_request_without_a_reply_leaves_its_place_in_the_budget_to_another(serve):
    server = serve({"match": "Bad", "steps": [{"status": 413, "times": "always"}]})
    chat = chat_for(server, budget=Budget(requests=1), concurrency=1, structured="never")
    answers = chat.ask([question("Bad 1"), question("Bad 2"), question("Good")])
    assert [type(answer) for answer in answers] == [Failure, Failure, Reply]
    assert chat.purse.requests == 1


def test_replies_of_the_wrong_form_count_against_the_budget(serve):
    server = serve({"content": "no", "times": "always"})
    with pytest.raises(BudgetError):
        chat_for(server, budget=Budget(requests=2), attempts=5).ask([question("What?")])
    assert len(sent(server)) == 2


def test_models_that_share_a_store_have_their_own_budget(serve, tmp_path):
    server, path = serve(), tmp_path / "replies.sqlite"
    one, other = (
        OpenAIChat(
            name, base_url=server.base_url, replies=path, budget=Budget(requests=2), concurrency=1
        )
        for name in ("one", "other")
    )
    one.ask([question(1), question(2)])
    other.keep_in(ReplyStore(path))
    assert other.purse.requests == 0
    other.ask([question(1), question(2)])
    again = OpenAIChat("one", base_url=server.base_url, replies=path, budget=Budget(requests=2))
    assert again.purse.requests == 2
    for chat in (again, other):
        with pytest.raises(BudgetError):
            chat.ask([question(3)])


def test_moving_to_another_store_does_not_make_prompts_seem_longer(serve, tmp_path):
    usage = {"prompt_tokens": 15, "completion_tokens": 5}
    server = serve({"usage": usage, "times": "always"})
    chat = chat_for(server, budget=Budget(tokens=100_000))
    chat.ask(question(n, None, max_tokens=20) for n in range(40))
    other = ReplyStore(tmp_path / "other.sqlite")
    chat_for(server, replies=other).ask([question("a", None)])
    chat.keep_in(other)
    assert 1 <= chat.purse.excess < 3
    assert len(chat.ask(question(n, None, max_tokens=20) for n in range(40, 60))) == 20


@pytest.mark.parametrize(
    ("said", "counted"),
    [((0, 0), None), ((10**9, 5), (None, 5)), ((10, 10**9), (10, None)), ((12, 5), (12, 5))],
    ids=str,
)
def test_token_counts_that_cannot_be_are_not_believed(serve, said, counted):
    usage = dict(zip(("prompt_tokens", "completion_tokens"), said, strict=True))
    server = serve({"usage": usage, "content": "So it is, they say.", "times": "always"})
    chat = chat_for(server)
    asked = question("one", None, max_tokens=30)
    chat.ask([asked])
    about = chat._prompt_tokens(chat._words(asked.messages), len(asked.messages))
    prompt, completion = counted or (None, None)
    assert chat.purse.prompt_tokens == (prompt or about)
    assert chat.purse.completion_tokens == (completion or 5)
    assert chat.purse.excess < 2


def test_an_empty_reply_may_have_no_tokens(serve):
    usage = {"prompt_tokens": 20, "completion_tokens": 0}
    server = serve({"usage": usage, "content": "", "times": "always"})
    chat = chat_for(server, attempts=1)
    chat.ask([question("What?", None)])
    assert (chat.purse.prompt_tokens, chat.purse.completion_tokens) == (20, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1000},
        {"max_completion_tokens": 1000},
        {"max_tokens": None, "max_completion_tokens": 1000},
    ],
    ids=str,
)
def test_the_budget_goes_by_the_longest_answer_that_options_allow(serve, options):
    usage = {"prompt_tokens": 3, "completion_tokens": 1000}
    server = serve({"usage": usage, "times": "always"}, latency=0.1)
    chat = chat_for(server, budget=Budget(tokens=2500), concurrency=8, options=options)
    with pytest.raises(BudgetError, match="tokens"):
        chat.ask(question(n, None, max_tokens=10) for n in range(8))
    assert len(sent(server)) == chat.purse.requests == 2
    if "max_tokens" in options:
        assert all(body.get("max_tokens") == options["max_tokens"] for body in sent(server))


def test_answers_of_any_length_are_refused_beside_a_budget_of_tokens():
    endless = {"max_tokens": None}
    OpenAIChat("tiny", options=endless, budget=Budget(requests=5))
    for budget in (Budget(tokens=5), Budget(price=5.0)):
        with pytest.raises(ValueError, match="any length"):
            OpenAIChat("tiny", options=endless, budget=budget, prices=Prices(1, 1))
    with pytest.raises(ValueError, match="'5' tokens"):
        OpenAIChat("tiny", options={"max_tokens": "5"})


COSTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50)), min_size=1, max_size=24)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(COSTS, st.integers(0, 3000), st.integers(1, 9))
def test_the_price_and_the_tokens_are_never_above_the_budget(tmp_path, costs, most, concurrency):
    asked = [question(f"{n} of {most}", None, max_tokens=50) for n in range(len(costs))]
    chat = chat_for_nobody()
    about = chat._prompt_tokens(chat._words(asked[0].messages), len(asked[0].messages))
    usages = [
        {"usage": {"prompt_tokens": about if long else 3, "completion_tokens": written}}
        for long, written in costs
    ]
    with chat_server(tmp_path, script=usages) as server:
        prices = Prices(prompt=1e6, completion=2e6)
        for budget in (Budget(price=2 * most), Budget(tokens=most)):
            chat = chat_for(server, prices=prices, budget=budget, concurrency=concurrency)
            try:
                answers = chat.ask(asked)
                assert all(isinstance(answer, Reply) for answer in answers)
            except BudgetError:
                assert (chat.purse.requests + concurrency) * (about + 100) * 2 > most
            if budget.price is not None:
                assert chat.purse.price <= budget.price
            else:
                assert chat.purse.prompt_tokens + chat.purse.completion_tokens <= most
            assert len(chat.replies) == chat.purse.requests


def chat_for_nobody() -> OpenAIChat:
    return OpenAIChat("tiny", base_url="http://127.0.0.1:9/v1")


def test_prompts_that_were_longer_than_thought_are_thought_longer_from_then_on(serve):
    server = serve({"usage": {"prompt_tokens": 500, "completion_tokens": 1}, "times": "always"})
    chat = chat_for(server, budget=Budget(tokens=3000), concurrency=1)
    with pytest.raises(BudgetError):
        chat.ask(question(n, None, max_tokens=10) for n in range(20))
    assert 2004 <= chat.purse.prompt_tokens + chat.purse.completion_tokens <= 3000


def test_an_estimate_counts_what_is_new_and_is_near_what_the_server_counts(serve):
    server = serve()
    chat = chat_for(server, prices=Prices(prompt=2.0, completion=8.0))
    words = "A neuron was shown these texts; say what they have in common, in one sentence. "
    requests = [question(f"{n}. {words * (1 + n % 5)}", expected_tokens=25) for n in range(40)]
    first = chat.estimate([*requests, *requests])
    assert (first.requests, first.stored) == (40, 40)
    chat.ask(requests[:10])
    spent = chat.purse.prompt_tokens
    estimate = chat.estimate(requests)
    assert (estimate.requests, estimate.stored) == (30, 10)
    chat.ask(requests)
    really = chat.purse.prompt_tokens - spent
    assert estimate.prompt_tokens == pytest.approx(really, rel=0.1)
    assert first.prompt_tokens == pytest.approx(really * 4 / 3, rel=1)
    assert estimate.completion_tokens == 30 * 25
    price = (2 * estimate.prompt_tokens + 8 * estimate.completion_tokens) / 1e6
    assert math.isclose(estimate.price, price)
    done = chat.estimate(requests)
    assert (done.requests, done.prompt_tokens, done.price) == (0, 0, 0)
    assert len(sent(server)) == 40
    assert "40" in done._repr_html_()


# Interrupts, threads, loops.


def test_cancelling_from_another_thread_ends_the_call_and_keeps_what_was_answered(serve):
    server = serve(latency=0.1)
    chat = chat_for(server, concurrency=4)
    timer = threading.Timer(0.6, chat.cancel)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ChatError, match="stopped"):
        chat.ask(question(n) for n in range(10_000))
    assert time.monotonic() - began < 3
    timer.join()
    assert 4 <= len(chat.replies) <= len(server.events("answered")) <= len(chat.replies) + 4
    assert isinstance(chat.ask([question("later")])[0], Reply)


def test_cancelling_does_not_wait_for_replies_that_hang_or_pauses(serve):
    server = serve({"match": "0", "steps": [{"hang": 60}]}, {"status": 500, "times": "always"})
    chat = chat_for(server, slowest_retry=60, timeout=60)
    threading.Timer(0.8, chat.cancel).start()
    began = time.monotonic()
    with pytest.raises(ChatError, match="stopped"):
        chat.ask([question(0), question(1)])
    assert time.monotonic() - began < 3


def test_a_fatal_answer_does_not_wait_for_the_pauses_of_others(serve):
    server = serve(
        {"match": "slow", "steps": [{"status": 500, "times": "always"}]},
        {"match": "fatal", "steps": [{"status": 401, "hang": 0.5}]},
    )
    chat = chat_for(server, slowest_retry=60, concurrency=4)
    began = time.monotonic()
    with pytest.raises(ChatError, match="refused a request without a key"):
        chat.ask([question("slow 1"), question("slow 2"), question("fatal"), question("x")])
    assert time.monotonic() - began < 4
    assert len(chat.replies) == 1


def test_a_fatal_answer_ends_the_run_at_once_and_keeps_what_is_in_flight(serve):
    server = serve(
        {"match": "fatal", "steps": [{"status": 401, "hang": 0.2}]},
        {"hang": 0.5, "times": "always"},
    )
    chat = chat_for(server, concurrency=4)

    def asked():
        yield question("fatal")
        for n in range(100):
            yield question(n)

    with pytest.raises(ChatError, match="refused a request without a key"):
        chat.ask(asked())
    assert len(sent(server)) == 4
    assert len(chat.replies) == 3


def test_an_error_of_the_questions_themselves_comes_out_as_it_is(serve):
    def asked():
        yield question(1)
        raise LookupError("no such sample")

    chat = chat_for(serve(latency=0.1), concurrency=4)
    with pytest.raises(LookupError, match="no such sample"):
        chat.ask(asked())
    assert len(chat.replies) == 1


def test_asking_works_inside_a_running_event_loop(serve):
    chat = chat_for(serve())

    async def cell():
        return chat.ask([question(n) for n in range(3)])

    assert all(isinstance(answer, Reply) for answer in asyncio.run(cell()))


def test_several_threads_may_ask_one_chat_at_once(serve):
    server = serve(latency=0.02)
    chat = chat_for(server, concurrency=4)
    answers: dict[int, list] = {}

    def work(thread: int) -> None:
        answers[thread] = chat.ask(question(f"{thread} {n}") for n in range(12))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(answers[n]) for n in range(4)] == [12] * 4
    assert chat.purse.requests == len(chat.replies) == 48
    assert chat.purse._held_requests == chat.purse._held_prompt == 0
    assert not server.repeated()


def test_objects_that_the_caller_froze_stay_frozen_and_others_are_collected_again(serve):
    chat = chat_for(serve(latency=0.05), concurrency=1)
    assert gc.get_freeze_count() == 0

    def asked():
        yield question(1)
        assert gc.get_freeze_count() > 0
        chat.ask([question(2)])
        assert gc.get_freeze_count() > 0  # the outer call goes on
        yield question(3)

    chat.ask(asked())
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        chat.ask([question(4)])
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_messages_that_were_sent_are_not_kept_in_memory(serve):
    message = Message("user", ("What is this?", red()))
    gone = weakref.ref(message)
    chat_for(serve()).ask([Request((message,))])
    del message
    gc.collect()
    assert gone() is None


def test_text_that_no_file_can_hold_is_sent_with_marks_instead(serve):
    server = serve({"echo": True})
    (answer,) = chat_for(server).ask([question("half \ud800 a pair", None)])
    assert answer.text == "half ? a pair"
    assert Path(server.log).read_text().count("\\ud800") == 0


# Where answers are kept.


def test_a_chat_that_moves_to_another_store_finds_its_answers_and_counts_its_spending(
    serve, tmp_path
):
    server = serve()
    chat = chat_for(server, budget=Budget(requests=4))
    asked = [question(number) for number in range(3)]
    first = chat.ask(asked)
    chat.keep_in(tmp_path / "one.sqlite")
    chat.keep_in(tmp_path / "two.sqlite")
    assert chat.purse.requests == 3
    again = chat.ask([*asked, question("new")])
    assert [each.text for each in again[:3]] == [each.text for each in first]
    assert [each.stored for each in again] == [True, True, True, False]
    assert server.stats()["requests"] == 4
    with pytest.raises(BudgetError):
        chat.ask([question("too many")])
    chat.keep_in(tmp_path / "one.sqlite")
    assert chat.purse.requests == 4
    # What was found elsewhere now lies where answers are kept.
    chat.keep_in(tmp_path / "deep" / ".." / "two.sqlite")
    assert chat.purse.requests == 4
    assert len(ReplyStore(tmp_path / "two.sqlite")) == 4


@pytest.mark.parametrize("step", [{"content": "no"}, {"refusal": "I will not."}])
def test_a_reply_that_is_no_answer_can_be_looked_at_and_is_asked_again(serve, tmp_path, step):
    server = serve({**step, "times": 2})
    chat = chat_for(server, attempts=2, replies=tmp_path / "replies.sqlite")
    pictured = Request((Message("user", ("What is this?", red())),), Sketch)
    (lost,) = chat.ask([pictured])
    kept = chat.replies.exchange(lost.asked)
    assert kept.messages == pictured.messages
    assert kept.reply.text == step.get("content", "")
    assert len(chat.replies) == 0
    other = ReplyStore()
    chat.replies.copy_to(other, [lost.asked])
    assert other.exchange(lost.asked) == kept
    answers = [chat.ask([pictured])[0] for _ in range(2)]
    assert isinstance(answers[-1], Reply)
    assert chat.replies.exchange(lost.asked).reply.text == answers[-1].text


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no.such.host.invalid/v1"])
def test_where_nobody_listens_the_run_ends_with_that(url):
    chat = OpenAIChat("m", base_url=url, retries=1, slowest_retry=0.01)
    with pytest.raises(ChatError, match=r"None of 3 requests was answered: no connection to http"):
        chat.ask([question(number) for number in range(3)])


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "host/v1"])
def test_an_address_of_another_kind_is_refused_at_once(url):
    with pytest.raises(ValueError, match="begins with http"):
        OpenAIChat("m", base_url=url)


@pytest.mark.parametrize("content", [b"x", b"mine\n" * 1000])
def test_a_file_of_another_kind_is_never_written_over(tmp_path, content):
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(DataError, match="cannot serve as a store of replies"):
        OpenAIChat("m", base_url="http://localhost/v1", replies=tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_bytes() == content

"""The servers that the chat clients are tested against do what they say."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Annotated, Literal

import openai
import pytest
import torch
from PIL import Image
from pydantic import BaseModel, Field
from transformers import AutoModelForImageTextToText, AutoProcessor

from servers import PROGRAM, chat_server, served_vlm, tiny_chat_vlm  # noqa: F401

KEY = "sk-test-4f1d9"


class Answer(BaseModel, extra="forbid"):
    """Every kind of value that a chat client may ask for."""

    explanation: str = Field(max_length=20)
    phrases: list[str] = Field(min_length=1, max_length=3)
    confidence: float = Field(ge=0, le=1)
    certain: bool
    levels: dict[str, Annotated[int, Field(ge=0, le=10)]]
    other: Other | None


class Other(BaseModel, extra="forbid"):
    kind: Literal["text", "image"]
    rank: int = Field(ge=2, le=3)


SCHEMA = Answer.model_json_schema()
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
TOKENS = 'Rate these.\n3\t"a"\n4\t" dog"\n8\t"7\\t"\n11\t"é"'


def client(server, **more) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0, **more)


def ask(server, text=TOKENS, *, model="tiny", timeout=10, **more):
    """The completion, from a client that is closed again."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    with client(server, timeout=timeout) as c:
        return c.chat.completions.create(model=model, messages=messages, **more)


def said(server, *args, **more) -> str:
    return ask(server, *args, **more).choices[0].message.content


def picture(side=40) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "JPEG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


# The scripted server.


def test_an_answer_is_an_instance_of_the_schema_about_the_listed_tokens(tmp_path):
    with chat_server(tmp_path) as server:
        for turn in range(5):
            answer = ask(server, f"{turn}. {TOKENS}", response_format=FORM)
            made = Answer.model_validate_json(answer.choices[0].message.content, strict=True)
            assert len(made.levels) == 3
            assert set(made.levels) < {"3", "4", "8", "11"}
            assert len(set(made.phrases)) == len(made.phrases)
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage.prompt_tokens > 10
            total = answer.usage.prompt_tokens + answer.usage.completion_tokens
            assert answer.usage.total_tokens == total


def test_the_same_request_has_the_same_answer_after_a_restart_and_another_another(tmp_path):
    answers = []
    for _ in range(2):
        with chat_server(tmp_path) as server:
            answers.append(said(server, response_format=FORM))
            other = said(server, TOKENS + " ", response_format=FORM)
    assert answers[0] == answers[1] != other


def test_without_a_response_format_the_schema_in_the_text_is_answered_in_a_fence(tmp_path):
    with chat_server(tmp_path) as server:
        prose = said(server, f"{TOKENS}\nJSON schema: {json.dumps(SCHEMA)}")
        with pytest.raises(json.JSONDecodeError):
            json.loads(prose)
        made = prose.partition("```json\n")[2].partition("\n```")[0]
        Answer.model_validate_json(made, strict=True)
        assert "{" not in said(server, "What is this?")


def test_images_and_bodies_of_megabytes_arrive_whole(tmp_path):
    text = "x" * 20_000_000
    with chat_server(tmp_path, keep_bodies=True) as server:
        assert said(server, [picture(), {"type": "text", "text": TOKENS}], response_format=FORM)
        assert said(server, text)
        small, large = (
            event["body"]["messages"][1]["content"] for event in server.events("received")
        )
    data = small[0]["image_url"]["url"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 40)
    assert large == text


def test_the_log_tells_which_bodies_came_twice_and_never_the_key(tmp_path):
    with chat_server(tmp_path, script=[{"status": 401}]) as server:
        with pytest.raises(openai.AuthenticationError, match=KEY):
            ask(server, "a")
        for text in ("a", "b"):
            ask(server, text)
        stats, received = server.stats(), server.events("received")
        assert [e["status"] for e in server.events("answered")] == [401, 200, 200]
        assert list(server.repeated().values()) == [2]
        assert KEY not in server.log.read_text()
    assert stats == {
        "requests": 3,
        "in_flight": 0,
        "max_in_flight": 1,
        "statuses": {"401": 1, "200": 2},
    }
    assert all(event["authorization"] for event in received)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}]
    body = json.dumps({"messages": messages, "model": "tiny"}, sort_keys=True)
    assert received[2]["sha256"] == hashlib.sha256(body.encode()).hexdigest()


def test_requests_wait_for_the_latency_at_the_same_time(tmp_path):
    with chat_server(tmp_path, latency=1) as server, client(server) as c:

        def one(number: int) -> None:
            messages = [{"role": "user", "content": str(number)}]
            c.chat.completions.create(model="tiny", messages=messages)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - start
        assert server.stats()["max_in_flight"] == 4
    assert 1 <= took < 4


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ({"status": 429, "headers": {"retry-after": "0.05"}}, openai.RateLimitError),
        ({"status": 500}, openai.InternalServerError),
        ({"status": 503}, openai.InternalServerError),
        ({"status": 400, "body": {"error": {"message": "No."}}}, openai.BadRequestError),
        ({"hang": 5}, openai.APITimeoutError),
        ({"drop": True}, openai.APIConnectionError),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_fault_is_the_error_it_names_and_then_gone(tmp_path, step, error):
    with chat_server(tmp_path, script=[step]) as server:
        with pytest.raises(error) as raised:
            ask(server, timeout=1 if "hang" in step else 10)
        assert said(server)
        first = server.events()[1]
    assert first["number"] == 1
    if "status" in step:
        assert raised.value.status_code == step["status"] == first["status"]
        for name, value in step.get("headers", {}).items():
            assert raised.value.response.headers[name] == value
        assert "body" not in step or raised.value.body == step["body"]["error"]
    else:
        assert first["event"] == ("dropped" if "drop" in step else "abandoned")


@pytest.mark.parametrize(
    ("step", "found"),
    [
        ({"content": "I would rather not say."}, {"content": "I would rather not say."}),
        ({"content": None}, {"content": None, "refusal": None}),
        ({"refusal": "I cannot."}, {"content": None, "refusal": "I cannot."}),
        ({"echo": True}, {"content": TOKENS}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_step_puts_its_words_into_the_message(tmp_path, step, found):
    with chat_server(tmp_path, script=[step]) as server:
        message = ask(server, response_format=FORM).choices[0].message.model_dump()
    assert {name: message[name] for name in found} == found


def test_a_reply_can_be_cut_empty_filtered_uncounted_or_no_json(tmp_path):
    script = [
        {"truncate": True},
        {"choices": []},
        {"finish_reason": "content_filter"},
        {"usage": None},
        {"usage": {"prompt_tokens": -5, "completion_tokens": 2, "total_tokens": 1}},
        {"raw": "<html>not json"},
    ]
    with chat_server(tmp_path, script=script) as server:
        cut, empty, filtered, uncounted, wrong = (
            ask(server, response_format=FORM) for _ in range(5)
        )
        with pytest.raises(json.JSONDecodeError), client(server) as c:
            json.loads(
                c.chat.completions.with_raw_response.create(
                    model="tiny", messages=[{"role": "user", "content": "a"}]
                ).http_response.content
            )
        whole = said(server, response_format=FORM)
    half = cut.choices[0]
    assert half.finish_reason == "length"
    assert whole.startswith(half.message.content)
    assert 0 < len(half.message.content) < len(whole)
    assert empty.choices == []
    assert filtered.choices[0].finish_reason == "content_filter"
    assert uncounted.usage is None
    assert wrong.usage.prompt_tokens == -5


@pytest.mark.parametrize("levels", ["beyond", "floats", "high", "negative", "strings", "words"])
def test_levels_are_wrong_in_the_way_that_is_asked_for(tmp_path, levels):
    with chat_server(tmp_path, script=[{"levels": levels}]) as server:
        wrong = json.loads(said(server, response_format=FORM))["levels"]
        right = json.loads(said(server, response_format=FORM))["levels"]
    if levels == "beyond":
        assert set(wrong) - set(right) == {"12", "1011"}
    elif levels == "words":
        assert set(wrong) == {f"token {index}" for index in right}
    else:
        change = {
            "floats": lambda level: level + 0.5,
            "high": lambda level: level + 11,
            "negative": lambda level: -1 - level,
            "strings": str,
        }[levels]
        assert wrong == {index: change(level) for index, level in right.items()}


def test_a_rule_is_for_requests_with_its_text_and_lasts_as_long_as_it_says(tmp_path):
    script = [
        {"match": '"a dog"', "steps": [{"content": "dog", "times": 2}]},
        {"match": "response_format", "steps": [{"ignore_schema": True, "times": "always"}]},
        {"content": "first come"},
    ]
    with chat_server(tmp_path, script=script) as server:
        assert [said(server, t) for t in ("x", 'not "a dog"', 'or "a dog"')] == [
            "first come",
            "dog",
            "dog",
        ]
        assert said(server, 'now "a dog"') not in ("dog", "first come")
        for _ in range(3):
            assert "{" not in said(server, response_format=FORM)


def test_a_step_that_is_not_known_stops_the_server_from_starting(tmp_path):
    with (
        pytest.raises(RuntimeError, match="statsu"),
        chat_server(tmp_path, script=[{"statsu": 500}]),
    ):
        pass


def test_what_is_no_chat_request_is_refused_and_the_connection_goes_on(tmp_path):
    with chat_server(tmp_path) as server:
        host, port = server.base_url.split("/")[2].split(":")
        bad = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 4\r\n\r\n{no}"
        with socket.create_connection((host, int(port)), timeout=5) as line:
            for sent, status in [
                (b"GET /nowhere HTTP/1.1\r\n\r\n", b"404"),
                (bad, b"400"),
                (b"GET /health HTTP/1.1\r\n\r\n", b"200"),
                (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"411"),
            ]:
                line.sendall(sent)
                assert line.recv(4096).startswith(b"HTTP/1.1 " + status)


def test_the_server_ends_with_its_block_and_with_its_parent(tmp_path):
    with chat_server(tmp_path) as server:
        pass
    assert server.process.returncode is not None
    with subprocess.Popen(
        [sys.executable, PROGRAM, "--with-parent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert int(process.stdout.readline()) > 0
            assert process.poll() is None
            process.stdin.close()
            assert process.wait(10) == 0
        finally:
            process.kill()


# The real one.


def test_the_tiny_model_is_tiny_always_the_same_and_loads_with_the_auto_classes(tmp_path):
    first, second = (
        AutoModelForImageTextToText.from_pretrained(tiny_chat_vlm(tmp_path / name)).state_dict()
        for name in ("a", "b")
    )
    for name, values in first.items():
        torch.testing.assert_close(values, second[name], rtol=0, atol=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").eval()
    assert model.num_parameters() < 80_000
    processor = AutoProcessor.from_pretrained(tmp_path / "a")
    text = 'Hé → {x}\n1\t"a  b"'
    content = [
        {"type": "image", "image": Image.new("RGB", (50, 40), "red")},
        {"type": "text", "text": text},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    shown = "<bos>user: " + "<image>" * 16 + text + "\nassistant: "
    assert processor.decode(inputs["input_ids"][0]) == shown
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= inputs["input_ids"].shape[1] + 4


@pytest.mark.xdist_group("serve")
def test_the_real_server_ignores_response_format_and_never_writes_json(served_vlm):  # noqa: F811
    answers = [
        ask(served_vlm, model=served_vlm.model, max_tokens=8, temperature=0, timeout=60, **more)
        for more in ({}, {"response_format": FORM})
    ]
    plain, formed = (answer.choices[0] for answer in answers)
    assert plain.message.content == formed.message.content
    with pytest.raises(json.JSONDecodeError):
        json.loads(formed.message.content)
    assert formed.finish_reason == "length"
    assert answers[1].usage.completion_tokens == 8
    assert formed.message.refusal is None
    assert "response_format" in served_vlm.log.read_text()


@pytest.mark.xdist_group("serve")
def test_the_real_server_sees_images_and_counts_their_tokens(served_vlm):  # noqa: F811
    text = {"type": "text", "text": "Look."}
    counts = [
        ask(
            served_vlm,
            [picture()] * images + [text],
            model=served_vlm.model,
            max_tokens=2,
            temperature=0,
            timeout=60,
        ).usage.prompt_tokens
        for images in (0, 1, 2)
    ]
    assert [count - counts[0] for count in counts] == [0, 16, 32]


@pytest.mark.xdist_group("serve")
def test_the_real_server_says_which_model_it_has_and_breaks_on_a_bad_image(served_vlm):  # noqa: F811
    with pytest.raises(openai.BadRequestError):
        ask(served_vlm, "Hi.", model="another", max_tokens=2, timeout=60)
    bad = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}}
    with pytest.raises(openai.InternalServerError):
        ask(served_vlm, [bad], model=served_vlm.model, max_tokens=2, timeout=60)
    assert os.path.basename(served_vlm.model) in served_vlm.log.read_text()

"""The store of replies: what a request is found by, what survives, what is an answer at all."""

from __future__ import annotations

import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, Field, RootModel

from neuronlens.chat import Message, Picture, ReplyStore, Request
from neuronlens.chat.parse import InvalidReplyError, parse
from neuronlens.chat.replies import Answered, StoredReply
from neuronlens.chat.request import instruction, is_closed, schema
from neuronlens.errors import DataError, UnknownNameError

PROGRAM = Path(__file__).parent / "programs" / "kill_chat.py"
sys.path.insert(0, str(PROGRAM.parent))
import kill_chat  # noqa: E402 - a program of the tests


class Guess(BaseModel, extra="forbid"):
    sentence: str
    confidence: float = 0.5


class Loose(BaseModel):
    """Every object is one of these."""

    sentence: str = ""
    levels: dict[str, int] = {}


class Sparse(RootModel[dict[str, int]]):
    pass


def picture(colour="red", side=16, **more) -> Picture:
    return Picture.of(Image.new("RGB", (side, side), colour), **more)


def request(*parts, **more) -> Request:
    said = parts or ("What is it?", picture())
    return Request((Message("system", ("Be brief.",)), Message("user", said)), **more)


def keep(store, asked, text="a dog", model="tiny", **more) -> str:
    key = asked.key(model)
    reply = StoredReply(text=text, model=model, **more)
    store.put([Answered(key, asked, model, reply, words=10)])
    return key


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "deep" / "replies.sqlite"


@pytest.fixture
def store(path):
    store = ReplyStore(path)
    yield store
    store.close()


# Keys.


def test_requests_that_ask_the_same_have_one_key_however_they_were_made():
    assert request().key("tiny") == request().key("tiny")
    assert request(temperature=0).key("tiny") == request(temperature=0.0).key("tiny")
    assert request(expected_tokens=5, check=print).key("tiny") == request().key("tiny")


def test_requests_that_differ_in_anything_that_changes_the_answer_have_different_keys():
    asked = request(answer=Guess)
    others = [
        request("What is it", picture(), answer=Guess),
        request("What is it?", picture("blue"), answer=Guess),
        request("What is it?", picture(quality=80), answer=Guess),
        request(picture(), "What is it?", answer=Guess),
        request("What is", " it?", picture(), answer=Guess),
        request("What is it?", picture().digest, answer=Guess),
        request(answer=Loose),
        request(),
        replace(asked, temperature=0.5),
        replace(asked, draw=1),
        replace(asked, max_tokens=401),
        replace(asked, messages=asked.messages[::-1]),
        replace(asked, messages=asked.messages[1:]),
    ]
    keys = [asked.key("tiny"), asked.key("small"), *(each.key("tiny") for each in others)]
    assert len(set(keys)) == len(keys)


@pytest.mark.xdist_group("kill_chat")
def test_keys_are_the_same_in_another_process(runs):
    assert runs["keys"] == kill_chat.keys(12)


def test_a_picture_does_not_show_its_bytes_in_an_error():
    assert len(repr(picture(side=400))) < 50


# What is kept.


def test_an_answer_is_found_by_another_object_and_after_the_file_was_closed(path, store):
    key = keep(store, request(), "a cat", attempts=2, prompt_tokens=30, cut_short=True)
    other = ReplyStore(path)
    assert key in other
    assert other.get(key) == store.get(key)
    other.close()
    store.close()
    again = ReplyStore(path)
    assert again.get(key).text == "a cat"
    assert again.get(key).attempts == 2
    assert again.get("0" * 64) is None
    assert again.keys() == [key]
    assert len(again) == 1
    again.close()


def test_an_exchange_gives_back_what_was_asked_byte_for_byte(path, store):
    odd = 'quotes " and \\ and \x00 and \u2028 and \U0001f9e0, half a pair \ud800'
    messages = (
        Message("system", ("Be brief.", picture("green"))),
        Message("user", (odd, picture(), "", "\n\t end ", picture("blue"), picture())),
        Message("assistant", ("So?",)),
        Message("user", ("Yes.",)),
    )
    key = keep(store, Request(messages), odd.replace("\ud800", ""))
    store.close()
    again = ReplyStore(path)
    exchange = again.exchange(key)
    assert exchange.messages == messages
    assert exchange.messages[1].parts[0] == odd.replace("\ud800", "?")
    assert exchange.reply.text == odd.replace("\ud800", "")
    assert Request(exchange.messages).key("tiny") == key
    with pytest.raises(UnknownNameError):
        again.exchange("0" * 64)
    again.close()


def test_hostile_text_is_escaped_where_it_is_shown(store):
    evil = '</span><script>alert(1)</script><img src=x onerror="alert(2)">'
    key = keep(store, request(evil, picture()), evil)
    shown = store.exchange(key)._repr_html_()
    assert "<script" not in shown
    assert "<img src=x" not in shown
    assert shown.count("&lt;script&gt;") == 2
    assert shown.count("<img") == 1


def test_a_picture_and_a_message_that_many_requests_share_are_kept_once(path, store):
    opening = Message("system", ("Look at these.", picture("green", 200)))
    for n in range(50):
        keep(store, Request((opening, Message("user", (f"{n}", picture())))))
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT COUNT(*) FROM pictures").fetchone() == (2,)
        assert database.execute("SELECT COUNT(*) FROM messages").fetchone() == (51,)
    database.close()


def test_usage_adds_up_valid_and_invalid_replies_and_survives(path, store):
    keep(store, request(), prompt_tokens=7, completion_tokens=2)
    keep(store, request("other"), prompt_tokens=5, completion_tokens=1)
    bad = StoredReply(text="?", prompt_tokens=100)
    store.reject("0" * 64, request("bad"), "m", bad, 3, "no JSON")
    store.close()
    again = ReplyStore(path)
    usage = again.usage()
    assert (usage.requests, usage.invalid) == (3, 1)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.words) == (112, 3, 23)
    assert usage.tokens_per_word == 112 / 23
    assert len(again) == 2
    again.close()
    assert ReplyStore().usage().tokens_per_word == 0


def test_copies_take_what_was_asked_with_them_and_leave_what_is_there(store, tmp_path):
    shared, own = request("shared"), request("own", picture("blue"))
    other = ReplyStore(tmp_path / "other.sqlite")
    keys = [keep(store, shared, "ours"), keep(store, own, "mine")]
    keep(other, shared, "theirs")
    store.copy_to(other, [*keys, "0" * 64])
    assert [other.get(key).text for key in keys] == ["theirs", "mine"]
    assert other.exchange(keys[1]).messages == own.messages
    assert other.usage().requests == 1
    store.copy_to(store, keys)
    assert len(store) == 2
    other.close()


def test_what_each_model_was_sent_is_counted_apart(store):
    for model, tokens in (("one", 3), ("one", 4), ("other", 50)):
        keep(store, request(str(tokens)), model=model, prompt_tokens=tokens)
    bad = StoredReply(text="?", prompt_tokens=100)
    store.reject("0" * 64, request("bad"), "other", bad, 3, "no JSON")
    one, other = store.usage("one"), store.usage("other")
    assert (one.requests, one.invalid, one.prompt_tokens, one.words) == (2, 0, 7, 20)
    assert (other.requests, other.invalid, other.prompt_tokens, other.words) == (2, 1, 150, 13)
    assert one + other == store.usage()
    assert store.usage("nobody").requests == 0


# Only looking.


def test_a_store_that_is_only_read_has_the_answers_of_one_that_is_written(path, store):
    first = keep(store, request("first", picture()))
    looking = ReplyStore(path, read_only=True)
    second = keep(store, request("second"))
    assert first in looking
    assert second in looking
    assert looking.exchange(first) == store.exchange(first)
    before = looking.usage()
    with pytest.raises(DataError, match="readonly"):
        keep(looking, request("third"))
    looking.close()
    assert store.usage() == before


@contextmanager
def as_somebody_else():
    """For the length of the block, permissions hold for the superuser too."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


def test_a_store_in_a_folder_that_cannot_be_written_to_can_be_read():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "50% of the replies?.sqlite"
        store = ReplyStore(path)
        key = keep(store, request())
        store.close()
        path.chmod(0o444)
        folder.chmod(0o555)
        try:
            with as_somebody_else():
                with pytest.raises(DataError):
                    ReplyStore(path)
                looking = ReplyStore(path, read_only=True)
                assert looking.get(key).text == "a dog"
                assert looking.keys() == [key]
                looking.close()
            assert [each.name for each in folder.iterdir()] == [path.name]
        finally:
            folder.chmod(0o755)


def test_only_looking_makes_no_file_and_takes_no_other(tmp_path):
    with pytest.raises(DataError, match=r"none\.sqlite cannot serve"):
        ReplyStore(tmp_path / "deep" / "none.sqlite", read_only=True)
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(DataError, match="it is empty"):
        ReplyStore(tmp_path / "empty.sqlite", read_only=True)
    with sqlite3.connect(tmp_path / "foreign.sqlite") as database:
        database.execute("CREATE TABLE replies (name TEXT)")
    database.close()
    with pytest.raises(DataError, match="another kind"):
        ReplyStore(tmp_path / "foreign.sqlite", read_only=True)
    with pytest.raises(ValueError, match="needs a path"):
        ReplyStore(read_only=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.sqlite", "foreign.sqlite"]


def test_a_store_without_a_path_keeps_nothing_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = ReplyStore()
    assert keep(store, request()) in store
    assert "in memory, 1 answers" in repr(store)
    assert list(tmp_path.iterdir()) == []


# What is not a store, or no longer one.


def test_files_of_another_kind_are_refused_and_left_as_they_are(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("These are notes, and there are more than a few of them. " * 100)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE replies (name TEXT)")
    database.close()
    for path in (text, foreign):
        before = path.read_bytes()
        with pytest.raises(DataError, match=f"{path.name} cannot serve.*another path"):
            ReplyStore(path)
        assert path.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.sqlite", "notes.txt"]


def test_places_where_no_file_can_be_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "replies.sqlite", Path("/proc/none/replies.sqlite")):
        with pytest.raises(DataError, match="cannot serve as a store of replies"):
            ReplyStore(path)


def test_a_damaged_file_is_an_error_that_names_it(path, store):
    keys = [keep(store, request(f"{n} {'x' * 500}"), "y" * 500) for n in range(100)]
    store.close()
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"replies\.sqlite"):
        [ReplyStore(path).get(key) for key in keys]


def test_a_closed_store_says_so(store):
    store.close()
    assert "closed" in repr(store)
    with pytest.raises(DataError, match="closed"):
        store.get("0" * 64)
    store.close()


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_was_stored(path):
    """The limit on a file's size is the nearest to a full disk that needs no disk."""
    store = ReplyStore(path)
    first = keep(store, request())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"replies\.sqlite failed.*is kept"):
            [keep(store, request(f"{n} {'x' * 3000}")) for n in range(200)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.get(first).text == "a dog"
    assert keep(store, request("and now?")) in store
    store.close()


# Threads, processes, kills.


def test_threads_share_a_store_object_and_files(path):
    stores = [ReplyStore(path) for _ in range(3)]
    failures = []

    def work(number: int) -> None:
        try:
            for n in range(40):
                asked = request(f"{n % 30} {number % 2}")
                key = keep(stores[number % 3], asked, f"{n % 30}")
                assert stores[(number + 1) % 3].get(key).text == f"{n % 30}"
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {len(store) for store in stores} == {60}
    assert stores[0].usage().requests == 240
    for store in stores:
        store.close()


def test_many_may_open_a_new_file_at_the_same_moment(tmp_path):
    for turn in range(5):
        opened: list[ReplyStore] = []
        together = threading.Barrier(6)

        def work(path=tmp_path / f"{turn}.sqlite", together=together, opened=opened) -> None:
            together.wait()
            opened.append(ReplyStore(path))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 6
        for store in opened:
            store.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What became of runs that were killed, interrupted, and started together."""
    folder = tmp_path_factory.mktemp("kills")
    done = subprocess.run(
        [sys.executable, PROGRAM, folder, "--kills=4", "--seed=11", "--requests=200"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "5"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.xdist_group("kill_chat")
def test_runs_that_are_killed_and_go_on_give_the_answers_of_one_that_was_not(runs):
    whole, killed = runs["whole"], runs["killed"]
    assert None not in whole["answers"]
    assert len(set(whole["answers"])) > 100
    assert killed["answers"] == whole["answers"]
    assert whole["sent"] == 200
    assert killed["stops"] >= 3
    assert set(killed["codes"]) <= {-9, 0}


@pytest.mark.xdist_group("kill_chat")
def test_a_kill_costs_no_more_than_what_was_in_flight(runs):
    killed = runs["killed"]
    assert killed["sent though stored"] == 0
    assert 0 < killed["sent again"] <= killed["stops"] * runs["concurrency"]
    assert killed["stored at the stops"] == sorted(killed["stored at the stops"])
    assert killed["stored at the stops"][-1] > killed["stored at the stops"][0]


@pytest.mark.xdist_group("kill_chat")
def test_an_interrupt_from_the_keyboard_ends_a_run_soon_and_loses_no_stored_answer(runs):
    stopped = runs["interrupted"]
    assert stopped["codes"] == [2]
    assert stopped["seconds"][0] < 5
    assert 0 < stopped["stored at the stops"][0] < 200
    assert stopped["sent though stored"] == 0
    assert stopped["sent again"] <= runs["concurrency"]
    assert stopped["answers"] == runs["whole"]["answers"]


@pytest.mark.xdist_group("kill_chat")
def test_processes_that_share_a_file_all_have_every_answer(runs):
    shared = runs["together"]
    assert shared["codes"] == [0, 0, 0]
    assert shared["answers"] == 3 * [runs["whole"]["answers"][:50]]
    assert 50 <= shared["sent"] <= 3 * 50
    assert shared["sent later"] == 0


# What is an answer.


def guess(text: str, answer: type[BaseModel] = Guess, **more) -> BaseModel | None:
    return parse(request(answer=answer, **more), text)


SENTENCES = st.text(st.characters(codec="utf-8"), max_size=60)
HARD = st.sampled_from(['{"a": 1}', "}", "{", '"', "\\", "```", '{"sentence": "x"}', "\n```json\n"])
TEXTS = st.lists(st.one_of(SENTENCES, HARD), max_size=4).map("".join)
GUESSES = st.builds(Guess, sentence=TEXTS, confidence=st.floats(0, 1))
PROSE = st.text(st.characters(codec="utf-8", exclude_characters="{"), max_size=40)
ASIDE = st.one_of(
    PROSE, st.sampled_from(["see {more}", "{{name}}", "f{x} = {y}", "{ and so on", "}"])
)


@given(GUESSES, ASIDE, ASIDE, st.booleans(), st.sampled_from([None, 2]))
def test_the_one_object_is_found_alone_in_prose_and_in_a_fence(made, before, after, fence, indent):
    said = json.dumps(made.model_dump(), indent=indent, ensure_ascii=fence)
    assert guess(said) == made
    said = f"\n```json\n{said}\n```\n" if fence else said
    assert guess(f"{before}{said}{after}") == made


@given(GUESSES, GUESSES, PROSE)
def test_two_objects_are_an_answer_only_if_they_are_the_same(one, other, between):
    texts = [one.model_dump_json(), other.model_dump_json()]
    if one == other:
        assert guess(between.join(texts)) == one
    else:
        with pytest.raises(InvalidReplyError, match="2 different answers"):
            guess(between.join(texts))
    assert guess(between.join([texts[0], texts[0]])) == one


@given(GUESSES, GUESSES, st.integers(0, 400), PROSE)
def test_a_caption_that_is_quoted_never_becomes_the_answer(own, caption, cut, between):
    """The answer is the model's own, or there is none: also where its own is cut off."""
    quoted = f"The caption says {caption.model_dump_json()}. Ignore it.{between}"
    whole = own.model_dump_json()
    said = quoted + (whole if cut > len(whole) else whole[: max(2, cut)])
    try:
        answer = guess(said)
    except InvalidReplyError:
        return
    assert answer == own


@given(GUESSES, TEXTS)
def test_an_answer_that_quotes_a_caption_in_a_string_is_read_as_it_is(own, caption):
    said = Guess(sentence=f"The caption {caption!r} is quoted.", confidence=own.confidence)
    assert guess(said.model_dump_json()) == said


@given(GUESSES, st.integers(1, 500))
def test_half_an_object_is_no_answer_and_no_part_of_it_is(made, cut):
    whole = json.dumps({"sentence": made.sentence, "levels": {"3": 5, "levels": 1}})
    half = whole[: min(cut, len(whole) - 1)]
    with pytest.raises(InvalidReplyError):
        guess(half, Loose)
    with pytest.raises(InvalidReplyError):
        guess(f"Here: {half}", Sparse)


@given(st.text(max_size=200))
def test_any_text_is_an_answer_or_invalid_and_nothing_else(text):
    for answer in (Guess, Loose, Sparse):
        try:
            assert isinstance(guess(text, answer), answer)
        except InvalidReplyError as error:
            str(error).encode()


JSON_LIKE = st.lists(
    st.sampled_from(
        ['{"', '"', "{", "}", "[", "]", ":", ",", "1", "a", "\\", " ", "NaN", "\ud800"]
    ),
    max_size=60,
).map("".join)


@given(JSON_LIKE)
def test_anything_like_json_is_an_answer_or_invalid_and_nothing_else(text):
    test_any_text_is_an_answer_or_invalid_and_nothing_else.hypothesis.inner_test(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON object"),
        ("none of it", "no JSON object"),
        ("[]", "the object"),
        ('[{"sentence": "a"}]', "the object"),
        ('"{}"', "the object"),
        ("null", "the object"),
        ('{"sentence": 5}', "sentence: Input should be a valid string"),
        ('{"sentence": "a", "more": 1}', "more: Extra inputs"),
        ('{"sentence": "a", "confidence": NaN}', "NaN is no number"),
        ('{"sentence": "a", "confidence": -Infinity}', "-Infinity is no number"),
        ('{"sentence": "a", "confidence": 1e999}', "1e999 is no number"),
        ('{"sentence": "a", "sentence": "b"}', "'sentence' is there twice"),
        ('{"sentence": "a", "sentence": "a"}', "'sentence' is there twice"),
        ('{"sentence": "a",}', "is broken"),
        ('{"sentence": "a"', "is broken"),
        ('{"sentence": "a"} {"sentence": ', "is broken"),
        ('{"sentence": "a"} and {"note": 1}', "Field required"),
        ('{"sentence": ' * 5000, "is broken"),
        ('{"sentence": ' + "[" * 100_000, "is broken"),
        ('{"sentence": "a", "confidence": ' + "9" * 5000 + "}", "is broken"),
        ('{"sentence": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_what_is_no_answer_says_why(text, why):
    with pytest.raises(InvalidReplyError) as caught:
        guess(text)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_last_object_counts_and_earlier_ones_of_other_forms_do_not():
    said = f'The form is {json.dumps(schema(Guess))}. So: {{"sentence": "a dog"}}'
    assert guess(said) == Guess(sentence="a dog")
    assert guess('I drafted {"sentence": 1}, then {"sentence": "a"}') == Guess(sentence="a")
    assert guess('A draft {"sentence": , then {"x"}} and {"sentence": "a"}').sentence == "a"


def test_a_long_reply_full_of_braces_is_read_in_time_that_grows_with_its_length():
    for part in ("{", '{"', '{"a" ', '{"a": ', '{"a"}', "}", '{"a": {"b": 1}, '):
        with pytest.raises(InvalidReplyError):
            guess(part * (300_000 // len(part)))


def test_the_check_of_a_request_decides_what_the_form_cannot_say():
    def only_dogs(answer: Guess) -> None:
        if "dog" not in answer.sentence:
            raise ValueError("it is about no dog")

    assert guess('{"sentence": "a dog"}', check=only_dogs)
    with pytest.raises(InvalidReplyError, match="no dog"):
        guess('{"sentence": "a cat"}', check=only_dogs)


def test_any_text_but_an_empty_one_will_do_where_no_form_is_asked_for():
    assert parse(request(), "a dog") is None
    with pytest.raises(InvalidReplyError, match="empty"):
        parse(request(), " \n")


# Schemas.


class Inner(BaseModel):
    title: str = Field(description="What it is called.")
    kind: Literal["text", "image"] | None = None


class Outer(BaseModel):
    """What is asked for."""

    inner: Inner
    several: list[Inner] = Field(default=[], max_length=3)
    level: int = Field(ge=0, le=10)
    properties: str = ""


def test_a_schema_keeps_names_and_descriptions_and_drops_what_servers_refuse():
    form = schema(Outer)
    assert list(form["properties"]) == form["required"] == list(Outer.model_fields)
    inner = form["$defs"]["Inner"]
    assert inner["properties"]["title"] == {"type": "string", "description": "What it is called."}
    assert inner["required"] == ["title", "kind"]
    assert is_closed(form)
    said = json.dumps(form)
    for dropped in ("maximum", "minimum", "maxItems", "default"):
        assert dropped not in said
    assert not is_closed(schema(Loose))
    assert json.dumps(form) in instruction(Outer)

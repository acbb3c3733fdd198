"""Every answered request and its answer, in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from neuronlens.chat.request import Message, Picture, Request
from neuronlens.errors import DataError, UnknownNameError
from neuronlens.show import Html, escaped, picture

_OURS = 0x6E6C7232
"""SQLite's application id of a store of replies, so that no other program's file is written to."""

_PATIENCE = 60.0
"""Seconds to wait for others that write to the file."""

_TABLES = f"""
BEGIN IMMEDIATE;
PRAGMA application_id = {_OURS};
CREATE TABLE IF NOT EXISTS pictures (digest TEXT PRIMARY KEY, jpeg BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (digest TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rejected (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
    key TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, words INTEGER NOT NULL);
COMMIT;
"""


_Row = tuple[str, str, str]
"""Key, request and reply."""


class StoredReply(BaseModel, defer_build=True):
    """An answer as it is kept.

    Attributes:
        text: What the model wrote.
        model: What the server says answered.
        attempts: How many replies it took, this one included.
        prompt_tokens: Of this reply's request, as the server counts, or estimated.
        completion_tokens: Of this reply.
        cut_short: Whether it ended because it was as long as it may be.
    """

    text: str
    model: str = ""
    attempts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut_short: bool = False


@dataclass(frozen=True, eq=False)
class Answered:
    """A valid answer that is to be kept.

    Attributes:
        key: Of the request.
        request: What was asked.
        model: Who was asked: the `identity` of the chat model.
        reply: What was answered.
        words: Of the conversation that was sent.
    """

    key: str
    request: Request
    model: str
    reply: StoredReply
    words: int


@dataclass(frozen=True)
class Usage:
    """What was sent and answered.

    Attributes:
        requests: Replies received, invalid ones included.
        invalid: How many of them were not of the form that was asked for.
        prompt_tokens: Sum over replies.
        completion_tokens: Sum over replies.
        words: Words of the requests' texts, which estimates are corrected by.
    """

    requests: int = 0
    invalid: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    words: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.invalid + other.invalid,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.words + other.words,
        )

    @property
    def tokens_per_word(self) -> float:
        """Of the prompts; 0 before the first reply."""
        return self.prompt_tokens / self.words if self.words else 0.0


@dataclass(frozen=True)
class Exchange:
    """What was asked, and what was answered; shows itself in a notebook."""

    messages: tuple[Message, ...]
    reply: StoredReply

    def _repr_html_(self) -> Html:
        turns = [*self.messages, Message("assistant", (self.reply.text,))]
        return Html("".join(map(_turn, turns)))


def _turn(message: Message) -> Html:
    shown = "".join(
        f'<span style="white-space:pre-wrap">{escaped(part)}</span>'
        if isinstance(part, str)
        else picture(part.open(), 160)
        for part in message.parts
    )
    return Html(
        '<div style="font:13px system-ui,sans-serif;margin:6px 0;max-width:760px">'
        f'<b>{escaped(message.role)}</b><div style="margin-left:14px">{shown}</div></div>'
    )


def require_database(path: Path) -> None:
    """Refuse a file that is no database: SQLite would write over a short one.

    Raises:
        sqlite3.DatabaseError: If it is something else.
    """
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(16)
        if start and start != b"SQLite format 3\0":
            raise sqlite3.DatabaseError("the file is no database")


class ReplyStore:
    """Answers by the key of their request: what is in it is never asked again.

    Every answer is written before its place among the requests in flight is free again, so a
    killed process loses no more than those. Several threads and processes of one machine may
    share a file.

    Args:
        path: The file, made if there is none; None keeps the answers in memory.
        read_only: Whether answers are only looked up: the file must be there, and neither it nor
            its folder need be writable.

    Raises:
        DataError: If the file is no store of replies, is damaged, or cannot be written; the same
            holds for what is read and kept later.
    """

    def __init__(self, path: str | Path | None = None, *, read_only: bool = False) -> None:
        if read_only and path is None:
            raise ValueError("A store in memory starts empty: read_only=True needs a path.")
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._known: set[str] = set()
        try:
            if read_only and self.path is not None:
                self._look(self.path.absolute())
            else:
                self._open()
        except (OSError, sqlite3.Error) as error:
            raise DataError(
                f"{self.path} cannot serve as a store of replies: {error}. Choose another path."
            ) from error

    def _connect(self, database: str | Path, *, uri: bool = False) -> None:
        self._database = sqlite3.connect(
            database, timeout=_PATIENCE, check_same_thread=False, isolation_level=None, uri=uri
        )
        self._close = weakref.finalize(self, self._database.close)

    def _owned(self) -> bool:
        """Whether the database is ours; False for a new one.

        Raises:
            sqlite3.DatabaseError: If it is somebody else's.
        """
        (tables,) = self._database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        (owner,) = self._database.execute("PRAGMA application_id").fetchone()
        if tables and owner != _OURS:
            raise sqlite3.DatabaseError("it is a database of another kind, or of an older version")
        return bool(tables)

    def _look(self, place: Path) -> None:
        """Open the file for reading."""
        address = f"{place.as_uri()}?mode=ro"
        try:
            self._connect(address, uri=True)
            owned = self._owned()
        except sqlite3.OperationalError:
            # Readers and writers share a file beside the database, which cannot be made in a
            # folder that may not be written to. Where nobody is writing, it is not needed.
            if not place.exists() or place.with_name(f"{place.name}-wal").exists():
                raise
            self._close()
            self._connect(f"{address}&immutable=1", uri=True)
            owned = self._owned()
        if not owned:
            raise sqlite3.DatabaseError("it is empty")

    def _open(self) -> None:
        """Open the file for reading and writing, and make what is not there."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            require_database(self.path)
        self._connect(":memory:" if self.path is None else self.path)
        self._owned()
        # A killed process loses nothing that was committed in this mode, only a power cut may.
        # Its beginning does not wait for others that are opening the file, so we do.
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.01)
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_TABLES)

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """The database, for this thread alone; what goes wrong names the file."""
        try:
            with self._lock:
                yield self._database
        except (sqlite3.Error, ValidationError) as error:
            raise DataError(
                f"The store of replies {self.path or 'in memory'} failed: {error}. What was "
                "stored before is kept."
            ) from error

    def __repr__(self) -> str:
        where = str(self.path) if self.path else "in memory"
        return f"ReplyStore({where}, {f'{len(self)} answers' if self._close.alive else 'closed'})"

    def __len__(self) -> int:
        return int(self._one("SELECT COUNT(*) FROM replies")[0])

    def __contains__(self, key: str) -> bool:
        with self._using() as database:
            row = database.execute("SELECT 1 FROM replies WHERE key = ?", (key,)).fetchone()
            return row is not None

    def get(self, key: str) -> StoredReply | None:
        """The stored answer to a request."""
        with self._using() as database:
            row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            return None if row is None else StoredReply.model_validate_json(row[0])

    def put(self, answered: Sequence[Answered]) -> None:
        """Keep valid answers, with everything that was asked: all of them or none."""
        with self._using() as database, database:
            database.execute("BEGIN IMMEDIATE")
            for each in answered:
                row = (each.key, each.request.canonical(each.model), each.reply.model_dump_json())
                self._insert("replies", each.request.messages, row)
                self._attempt(each.key, each.model, "answered", each.reply, each.words)
        for each in answered:
            self._known.update(message.digest for message in each.request.messages)

    def _insert(
        self, table: Literal["replies", "rejected"], messages: Iterable[Message], row: _Row
    ) -> None:
        new = [message for message in messages if message.digest not in self._known]
        self._database.executemany(
            "INSERT OR IGNORE INTO pictures VALUES (?, ?)",
            [(p.digest, p.jpeg) for message in new for p in message.pictures],
        )
        self._database.executemany(
            "INSERT OR IGNORE INTO messages VALUES (?, ?)",
            [(message.digest, message.canonical) for message in new],
        )
        self._database.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", row)

    def reject(
        self, key: str, request: Request, model: str, reply: StoredReply, words: int, why: object
    ) -> None:
        """Keep a reply that was paid for and is no answer: it is counted, and can be looked at.

        The request is asked again whenever it comes.
        """
        with self._using() as database, database:
            database.execute("BEGIN IMMEDIATE")
            row = (key, request.canonical(model), reply.model_dump_json())
            self._insert("rejected", request.messages, row)
            self._attempt(key, model, f"invalid: {why}", reply, words)
        self._known.update(message.digest for message in request.messages)

    def _attempt(self, key: str, model: str, outcome: str, reply: StoredReply, words: int) -> None:
        self._database.execute(
            "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?)",
            (key, model, outcome, reply.prompt_tokens, reply.completion_tokens, words),
        )

    def usage(self, model: str | None = None) -> Usage:
        """Everything that was ever received into this store.

        Args:
            model: The `identity` of the chat model whose replies count; None counts all.
        """
        row = self._one(
            "SELECT COUNT(*), TOTAL(outcome != 'answered'), TOTAL(prompt_tokens), "
            "TOTAL(completion_tokens), TOTAL(words) FROM attempts "
            "WHERE ?1 IS NULL OR model = ?1",
            (model,),
        )
        return Usage(*map(int, row))

    def exchange(self, key: str) -> Exchange:
        """What was asked under a key, and what was answered, or the last reply that is no answer.

        Raises:
            UnknownNameError: If nothing was.
        """
        with self._using():
            row = self._row(key) or self._row(key, "rejected")
            if row is None:
                raise UnknownNameError("stored reply", key, [])
            messages = tuple(self._message(each) for each in json.loads(row[0])["messages"])
            return Exchange(messages, StoredReply.model_validate_json(row[1]))

    def _row(
        self, key: str, table: Literal["replies", "rejected"] = "replies"
    ) -> tuple[str, str] | None:
        row: tuple[str, str] | None = self._database.execute(
            f"SELECT request, reply FROM {table} WHERE key = ?", (key,)
        ).fetchone()
        return row

    def _message(self, digest: str) -> Message:
        (content,) = self._database.execute(
            "SELECT content FROM messages WHERE digest = ?", (digest,)
        ).fetchone()
        said = json.loads(content)
        parts: list[str | Picture] = []
        for part in said["parts"]:
            if "text" in part:
                parts.append(part["text"])
            else:
                (jpeg,) = self._database.execute(
                    "SELECT jpeg FROM pictures WHERE digest = ?", (part["picture"],)
                ).fetchone()
                parts.append(Picture(jpeg))
        return Message(said["role"], tuple(parts))

    def keys(self) -> list[str]:
        """Keys of all stored answers."""
        with self._using() as database:
            return [row[0] for row in database.execute("SELECT key FROM replies")]

    def copy_to(self, other: ReplyStore, keys: Iterable[str]) -> None:
        """Give another store these replies, with what was asked; those it has are left alone.

        What they cost stays with this store: the other's `usage` does not count it.
        """
        for key in keys:
            if key in other:
                continue
            with self._using():
                table: Literal["replies", "rejected"] = "replies"
                row = self._row(key)
                if row is None:
                    table, row = "rejected", self._row(key, "rejected")
                if row is None:
                    continue
                messages = [self._message(each) for each in json.loads(row[0])["messages"]]
            with other._using() as database, database:
                database.execute("BEGIN IMMEDIATE")
                other._insert(table, messages, (key, *row))

    def close(self) -> None:
        """Close the file; nothing can be read or kept afterwards."""
        with self._lock:
            self._close()

    def _one(self, query: str, given: tuple[str | None, ...] = ()) -> tuple[float, ...]:
        with self._using() as database:
            row: tuple[float, ...] = database.execute(query, given).fetchone()
        return row

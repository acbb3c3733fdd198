"""What every chat model has: stored answers, retries, a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from neuronlens.chat.budget import TOKENS_PER_WORD, Budget, Estimate, Prices, Purse
from neuronlens.chat.parse import InvalidReplyError, parse
from neuronlens.chat.replies import ReplyStore, StoredReply, Usage
from neuronlens.chat.request import Message, Request
from neuronlens.explanation import Failure


@dataclass(frozen=True)
class Reply:
    """An answer that has the form that was asked for.

    Attributes:
        key: Of the request, in the store of replies.
        text: What the model wrote.
        value: The answer in its form; None where any text would do.
        stored: Whether it was asked in an earlier run, and cost nothing now.
    """

    key: str
    text: str
    value: BaseModel | None
    stored: bool


class ChatModel(ABC):
    """A model that answers requests, each at most once.

    Attributes:
        name: The model's name.
        identity: What tells this model, looking at images as it does, from others: part of every
            key, and what its spending is counted under. The name, unless a class says more.
        replies: The stored answers.
        attempts: How many replies to one request may be of the wrong form before it fails.
        chosen: Whether the caller said where answers are kept; a study keeps them in its own
            folder otherwise.
        purse: What was spent.
        image_tokens: About how many tokens an image counts as.
    """

    def __init__(
        self,
        name: str,
        *,
        replies: str | Path | ReplyStore | None = None,
        attempts: int = 3,
        prices: Prices | None = None,
        budget: Budget | None = None,
        image_tokens: int = 255,
        identity: str | None = None,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts={attempts} was given; a request needs at least 1.")
        if image_tokens < 0:
            raise ValueError(f"image_tokens={image_tokens} was given; it must be 0 or more.")
        self.name = name
        self.identity = identity or name
        self.attempts = attempts
        self.image_tokens = image_tokens
        self._budget = budget or Budget()
        self._prices = prices
        self._earlier: list[ReplyStore] = []
        self._spent: list[tuple[Path | None, Usage]] = []
        self.replies = _store(replies)
        self.chosen = replies is not None
        usage = self.replies.usage(self.identity)
        self.purse = Purse(self._budget, self._prices, usage, _excess(usage))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.purse})"

    def keep_in(self, replies: str | Path | ReplyStore) -> None:
        """Keep answers in this store from now on.

        Those of the store before are still found, and what this object has spent still counts.
        """
        store = _store(replies)
        if store is self.replies:
            return
        self._earlier.append(self.replies)
        self._spent.append((_place(self.replies), self.purse.received))
        place = _place(store)
        if place is not None:  # what a file already counts, is counted by it
            self._earlier = [each for each in self._earlier if _place(each) != place]
            self._spent = [each for each in self._spent if each[0] != place]
        self.replies = store
        usage = store.usage(self.identity)
        spent = sum((each for _, each in self._spent), usage)
        excess = max(self.purse.excess, _excess(usage))
        self.purse = Purse(self._budget, self._prices, spent, excess)

    @abstractmethod
    def ask(self, requests: Iterable[Request]) -> list[Reply | Failure]:
        """Answer every request, in their order.

        A request whose answer is stored is not sent. What has no valid answer after all
        attempts comes back as a `Failure`.

        Raises:
            ChatError: If the model cannot be asked at all.
            BudgetError: If the budget is used up; what was answered is stored.
        """

    def cancel(self) -> None:  # noqa: B027 - nothing runs beside the caller's own thread
        """Make running calls of `ask` end soon; what was answered is stored."""

    def estimate(self, requests: Iterable[Request]) -> Estimate:
        """What asking these would cost, from the length of the texts and what was seen so far."""
        prompt = completion = missing = stored = 0
        seen: set[str] = set()
        factor = self.replies.usage(self.identity).tokens_per_word
        for request in requests:
            key = request.key(self.identity)
            if key in seen or any(key in store for store in (self.replies, *self._earlier)):
                stored += 1
                continue
            seen.add(key)
            missing += 1
            prompt += (
                round(factor * self._words(request.messages))
                if factor
                else self._prompt_tokens(self._words(request.messages), len(request.messages))
            )
            completion += request.expected_tokens
        price = None if self._prices is None else self._prices.of(prompt, completion)
        return Estimate(missing, stored, prompt, completion, price)

    @staticmethod
    def _prompt_tokens(words: int, messages: int) -> int:
        """About how many tokens are sent: words, marks and line breaks, images, and roles."""
        return round(TOKENS_PER_WORD * words) + 4 * messages

    def _words(self, messages: Sequence[Message]) -> int:
        """Words of the texts; an image counts as many words as make its tokens."""
        pictures = sum(len(message.pictures) for message in messages)
        return (
            sum(m.words for m in messages) + round(self.image_tokens / TOKENS_PER_WORD) * pictures
        )

    def _stored(self, request: Request, key: str) -> Reply | None:
        """The stored answer, if it has the form that is asked for today."""
        kept = self.replies.get(key)
        for store in self._earlier:
            if kept is None and key in store:
                store.copy_to(self.replies, [key])
                kept = self.replies.get(key)
        if kept is None:
            return None
        try:
            return Reply(key, kept.text, parse(request, kept.text), stored=True)
        except InvalidReplyError:
            return None

    def _judge(
        self, request: Request, key: str, reply: StoredReply, words: int
    ) -> Reply | InvalidReplyError:
        """The answer in a reply, which is still to be stored; what is none is rejected."""
        try:
            return Reply(key, reply.text, parse(request, reply.text), stored=False)
        except InvalidReplyError as error:
            self.replies.reject(key, request, self.identity, reply, words, error)
            return error


def _excess(usage: Usage) -> float:
    """By what factor prompts were longer than estimated."""
    return usage.tokens_per_word / TOKENS_PER_WORD


def _store(replies: str | Path | ReplyStore | None) -> ReplyStore:
    return replies if isinstance(replies, ReplyStore) else ReplyStore(replies)


def _place(store: ReplyStore) -> Path | None:
    """Where a store's file is, however its path was written."""
    return None if store.path is None else store.path.resolve()


def again(messages: tuple[Message, ...], said: str, problem: object) -> tuple[Message, ...]:
    """The conversation, once more, after a reply of the wrong form."""
    return (
        *messages,
        Message("assistant", (said[:2000] or "(nothing)",)),
        Message(
            "user",
            (f"That cannot be read: {problem}. Answer again, with the one JSON object only.",),
        ),
    )

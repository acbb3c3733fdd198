"""What asking costs: prices, a limit, and an estimate beforehand."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from neuronlens.chat.replies import Usage
from neuronlens.errors import BudgetError
from neuronlens.show import Html, table

TOKENS_PER_WORD = 1.3
"""Of a prompt, before a server has counted."""


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in any currency.

    Attributes:
        prompt: Of what is sent.
        completion: Of what is written.

    Raises:
        ValueError: If one is negative or no number.
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        _not_negative(prompt=self.prompt, completion=self.completion)

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The price of so many tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass(frozen=True)
class Budget:
    """The most that may be spent; None sets no limit.

    Everything that the chat model's store of replies ever received from this model counts, so a
    run that is started again does not get the same budget twice. A request is sent if the most
    that it may cost still fits: completions are at most as long as the request allows, prompts are
    estimated until the first replies tell. What other processes spend meanwhile is seen when the
    store is opened.

    Only replies count. A request that timed out, was cancelled, or whose connection broke may
    have been answered, and billed, by the server all the same.

    Attributes:
        price: In the currency of the prices.
        requests: Replies.
        tokens: Of prompts and completions together.

    Raises:
        ValueError: If one is negative or no number.
    """

    price: float | None = None
    requests: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        _not_negative(price=self.price, requests=self.requests, tokens=self.tokens)


def _not_negative(**amounts: float | None) -> None:
    for name, amount in amounts.items():
        if amount is not None and not amount >= 0:
            raise ValueError(f"{name}={amount} was given; it must be 0 or more.")


@dataclass(frozen=True)
class Estimate:
    """What is to be expected of requests that were not sent yet.

    Attributes:
        requests: How many have no stored answer.
        stored: How many have one, and cost nothing.
        prompt_tokens: About so many are sent.
        completion_tokens: About so many are written.
        price: At the given prices; None without any.
    """

    requests: int
    stored: int
    prompt_tokens: int
    completion_tokens: int
    price: float | None

    def __add__(self, other: Estimate) -> Estimate:
        prices = [each.price for each in (self, other) if each.price is not None]
        return Estimate(
            self.requests + other.requests,
            self.stored + other.stored,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            sum(prices) if prices else None,
        )

    def times(self, factor: float) -> Estimate:
        """The estimate of so many times as much."""
        return Estimate(
            round(self.requests * factor),
            round(self.stored * factor),
            round(self.prompt_tokens * factor),
            round(self.completion_tokens * factor),
            None if self.price is None else self.price * factor,
        )

    def _repr_html_(self) -> Html:
        price = "no prices given" if self.price is None else f"{self.price:,.2f}"
        return table(
            ["requests", "answers stored", "prompt tokens", "completion tokens", "price"],
            [
                [
                    f"{self.requests:,}",
                    f"{self.stored:,}",
                    f"{self.prompt_tokens:,}",
                    f"{self.completion_tokens:,}",
                    price,
                ]
            ],
        )


@dataclass(frozen=True)
class Held:
    """What is set aside for one request: the most it may cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    estimated: int


class Purse:
    """What was spent, what is in flight, and whether one more request fits the budget.

    How many tokens a prompt has is only known once it was answered. It is taken to exceed its
    estimate by the largest factor that was seen.

    Args:
        budget: The most that may be spent.
        prices: What tokens cost.
        spent: What was spent before.
        excess: By what factor prompts are longer than estimated, as far as is known.
    """

    def __init__(
        self, budget: Budget, prices: Prices | None, spent: Usage, excess: float = 1.0
    ) -> None:
        if budget.price is not None and prices is None:
            raise ValueError(
                f"A budget of {budget.price} needs prices to be compared with: "
                "prices=Prices(prompt=..., completion=...), per million tokens."
            )
        self.budget = budget
        self.prices = prices
        self._before = spent
        self.requests = spent.requests
        self.prompt_tokens = spent.prompt_tokens
        self.completion_tokens = spent.completion_tokens
        self.excess = max(1.0, excess)
        self._held_requests = self._held_prompt = self._held_completion = 0
        self._lock = threading.Lock()

    @property
    def received(self) -> Usage:
        """What came in since the purse was made; not how much of it was invalid."""
        return Usage(
            requests=self.requests - self._before.requests,
            prompt_tokens=self.prompt_tokens - self._before.prompt_tokens,
            completion_tokens=self.completion_tokens - self._before.completion_tokens,
        )

    @property
    def price(self) -> float | None:
        """What was spent so far."""
        if self.prices is None:
            return None
        return self.prices.of(self.prompt_tokens, self.completion_tokens)

    def hold(self, prompt_tokens: int, completion_tokens: int) -> Held:
        """Set the most that a request may cost aside, its prompt being about so long.

        Raises:
            BudgetError: If it does not fit, together with everything that is in flight.
        """
        with self._lock:
            held = Held(math.ceil(prompt_tokens * self.excess), completion_tokens, prompt_tokens)
            self._compare(
                self.requests + self._held_requests + 1,
                self.prompt_tokens + self._held_prompt + held.prompt_tokens,
                self.completion_tokens + self._held_completion + held.completion_tokens,
            )
            self._add(held, 1)
        return held

    def _compare(self, requests: int, prompt: int, completion: int) -> None:
        limits: list[tuple[str, float | None, float]] = [
            ("requests", self.budget.requests, requests),
            ("tokens", self.budget.tokens, prompt + completion),
        ]
        if self.prices is not None:
            limits.append(("price", self.budget.price, self.prices.of(prompt, completion)))
        for name, most, wanted in limits:
            if most is not None and wanted > most:
                raise BudgetError(
                    f"The next request could bring the {name} to {wanted:,.6g}, above the budget "
                    f"of {most:,.6g}. Spent so far: {self}. What was answered is kept: call again "
                    "with a larger budget to go on."
                )

    def settle(self, held: Held, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what a request really cost instead of what was set aside for it."""
        with self._lock:
            self._add(held, -1)
            self.requests += 1
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens
            self.excess = max(self.excess, prompt_tokens / max(1, held.estimated))

    def give_back(self, held: Held) -> None:
        """Count nothing for a request that got no reply."""
        with self._lock:
            self._add(held, -1)

    def _add(self, held: Held, sign: int) -> None:
        self._held_requests += sign
        self._held_prompt += sign * held.prompt_tokens
        self._held_completion += sign * held.completion_tokens

    def __str__(self) -> str:
        price = "" if self.price is None else f", price {self.price:.4g}"
        return (
            f"{self.requests:,} requests, {self.prompt_tokens:,} prompt tokens, "
            f"{self.completion_tokens:,} completion tokens{price}"
        )

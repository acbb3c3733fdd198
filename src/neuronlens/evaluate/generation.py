"""How answers are generated: greedily, with the beams of P2, or as the caller says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from neuronlens.errors import DataError

_OURS: Final = (
    "generation_config",
    "logits_processor",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "stopping_criteria",
    "streamer",
    "use_model_defaults",
)
"""Arguments of `generate()` that would change what it returns, or cannot be written down."""


@dataclass(frozen=True)
class Generation:
    """How a model writes its answers. There is one answer to each question.

    What is not said here is as in the model's own `generation_config`, but for sampling, which is
    off unless it is asked for.

    Attributes:
        max_new_tokens: Most tokens of an answer; None if only `max_length` limits it.
        max_length: Most tokens of prompt and answer together, for each question by itself:
            padding is not counted, so that answers do not depend on the batch. None for no limit
            but the model's own positions.
        num_beams: Hypotheses that are followed at once; 1 is greedy.
        length_penalty: Power of the length that a hypothesis' log probability is divided by. Log
            probabilities are negative: below 0, short answers are preferred.
        do_sample: Whether tokens are drawn at random, with the evaluation's seed. Answers then
            depend on the batch.
        others: More arguments of `generate()`.

    Raises:
        DataError: If a limit is no positive number, there is no limit at all, or `others` has
            something that `evaluate` sets by itself or that cannot be written as JSON.
    """

    max_new_tokens: int | None = 64
    max_length: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    do_sample: bool = False
    others: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Refuse settings that no answer can be generated with."""
        limits = [each for each in (self.max_new_tokens, self.max_length) if each is not None]
        numbers = {
            "max_new_tokens": self.max_new_tokens,
            "max_length": self.max_length,
            "num_beams": self.num_beams,
        }
        for name, value in numbers.items():
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not is_number:
                raise DataError(f"{name}={value!r} was given; it must be a whole number from 1 on.")
        if not limits:
            raise DataError(
                "An answer has no limit: give max_new_tokens, or max_length with the prompt."
            )
        known = {*_OURS, *(name for name in self.__dataclass_fields__ if name != "others")}
        taken = sorted(known & set(self.others))
        if taken:
            raise DataError(
                f"{', '.join(taken)} cannot be among the other arguments of generate(): evaluate "
                "sets it, or Generation has it as an attribute."
            )
        try:
            json.dumps(dict(self.others))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"Arguments of generate() are written into the manifest as JSON: {error}. Give "
                "numbers, texts and lists only."
            ) from error

    @property
    def settings(self) -> dict[str, object]:
        """What answers depend on, JSON-able and complete."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return own | {"others": dict(self.others)}

    def room(self, prompt: int, positions: int | None) -> int:
        """How many tokens an answer may have.

        Args:
            prompt: How many tokens stand before it.
            positions: How many the model has places for; None if that is not known.
        """
        total = [each for each in (self.max_length, positions) if each is not None]
        limits = [each - prompt for each in total]
        if self.max_new_tokens is not None:
            limits.append(self.max_new_tokens)
        return max(0, min(limits))

    def arguments(self, new_tokens: int) -> dict[str, Any]:
        """Arguments of `generate()` for answers of at most so many tokens."""
        beams: dict[str, Any] = {}
        if self.num_beams > 1:
            # Only then: alone they are flags without use, of which transformers warns.
            beams = {"length_penalty": float(self.length_penalty), "early_stopping": False}
        return {
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
            "max_new_tokens": new_tokens,
            **beams,
            **self.others,
        }


GREEDY: Final = Generation()
"""The most probable token each time, 64 at most."""

BEAMS: Final = Generation(max_new_tokens=512, num_beams=5, length_penalty=-1.0)
"""P2's five beams with a length penalty of -1, which prefers short answers.

Source: P2, section 4.1. Deviations: its temperature of 0.9 is left out, for it does nothing
without sampling (its code samples instead of following beams, which the text does not say). Its
maximum of 512 counts the prompt; here it is that of the answer, for an image alone has more than
512 tokens in LLaVA-NeXT today, where an image was one token at the time.
"""


def as_generation(given: Generation | Mapping[str, object]) -> Generation:
    """The settings themselves, or those of a mapping of `generate()`'s arguments.

    A mapping without any limit is given that of `GREEDY`.

    Raises:
        DataError: If they are no settings.
    """
    if isinstance(given, Generation):
        return given
    if not isinstance(given, Mapping):
        raise DataError(
            f"generation={given!r} was given: give nl.GREEDY, nl.BEAMS, a Generation, or a mapping "
            "of generate()'s arguments."
        )
    own = {name for name in Generation.__dataclass_fields__ if name != "others"}
    said: dict[str, Any] = {name: value for name, value in given.items() if name in own}
    if "max_length" in said and "max_new_tokens" not in said:
        said["max_new_tokens"] = None
    return Generation(**said, others={k: v for k, v in given.items() if k not in own})

"""What an explainer gives and a simulator takes."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class Explanation(BaseModel):
    """What a neuron is said to find.

    Attributes:
        sentence: Completes "the main thing this neuron does is find".
        phrases: Up to three short noun phrases a detector can look for.
        words: Words at which the neuron fires on text, for a simulator that needs no LLM.
        predicts: Whether it fires on the token before the words rather than on them.
        ties: Other concepts that fit the exemplars exactly as well, from which this one was
            chosen by name.
        confidence: What the explaining model says of its own certainty, from 0 to 1.
        asked: Key of the request that was answered, in the study's replies.
        explainer: What made the explanation.
    """

    model_config = ConfigDict(defer_build=True, frozen=True)

    sentence: str
    phrases: tuple[str, ...] = Field(default=(), max_length=3)
    words: tuple[str, ...] = ()
    predicts: bool = False
    ties: tuple[str, ...] = ()
    confidence: float | None = Field(default=None, ge=0, le=1)
    asked: str | None = None
    explainer: str = ""


@dataclass(frozen=True)
class Failure:
    """What could not be done for one neuron or sample, and why; counted, never scored as 0.

    Attributes:
        reason: Why.
        asked: Key of the request that a chat model did not answer in its form, if one was asked.
        passing: Whether it may be gone in a moment, such as a lost connection: a study that is
            called again tries once more.
    """

    reason: str
    asked: str | None = None
    passing: bool = False

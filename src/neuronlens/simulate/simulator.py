"""What a simulator takes and gives: an explanation, tokens, predicted activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float

from neuronlens.explanation import Explanation, Failure
from neuronlens.samples import Sample
from neuronlens.tokens import TEXT_ROLES, Role, TokenMap


@dataclass(frozen=True, eq=False)
class SimulationJob:
    """An explanation, and the tokens to predict activations for: no place for true ones.

    Attributes:
        explanation: What the neuron is said to find.
        sample: What was shown to the model.
        tokens: What each token is, on the stream of the neuron's site.
        text_roles: Roles of the text tokens that count.
    """

    explanation: Explanation
    sample: Sample
    tokens: TokenMap
    text_roles: tuple[Role, ...] = TEXT_ROLES

    @cached_property
    def text(self) -> Bool[np.ndarray, " token"]:
        """True at the text tokens that count."""
        roles = [int(role) for role in self.text_roles]
        return np.asarray(np.isin(self.tokens.role.numpy(), roles))


@dataclass(frozen=True, eq=False)
class Simulation:
    """Predicted activations, NaN at tokens the simulator says nothing about.

    Correlations ignore their scale.

    Attributes:
        values: One per token.
        asked: Key of the request that was answered, if a chat model was asked.
    """

    values: Float[np.ndarray, " token"]
    asked: str | None = None


class Simulator(Protocol):
    """Predicts activations from explanations."""

    def simulate(self, jobs: Sequence[SimulationJob]) -> list[Simulation | Failure]:
        """Predict one activation per token of each job, in the order of the jobs.

        What could not be simulated comes back as a `Failure`, never as zeros.
        """
        ...

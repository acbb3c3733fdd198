"""What a simulator takes and gives: an explanation, tokens, predicted activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from neuronlens.explanation import Explanation, Failure
from neuronlens.samples import Sample
from neuronlens.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class SimulationJob:
    """An explanation, and the tokens to predict activations for: no place for true ones."""

    explanation: Explanation
    sample: Sample
    tokens: TokenMap


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

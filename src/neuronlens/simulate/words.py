"""Text tokens simulated from where the explanation's words stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neuronlens.explanation import Failure
from neuronlens.simulate.simulator import Simulation, SimulationJob
from neuronlens.tokens import TEXT_ROLES


@dataclass(frozen=True)
class WordSimulator:
    """Text tokens: active where the explanation's words stand, or right before them."""

    def simulate(self, jobs: Sequence[SimulationJob]) -> list[Simulation | Failure]:
        """Predict text tokens."""
        return [self._one(job) for job in jobs]

    def _one(self, job: SimulationJob) -> Simulation | Failure:
        if not job.explanation.words:
            return Failure("the explanation has no words to look for")
        shift = -1 if job.explanation.predicts else 0
        values = job.tokens.words(job.explanation.words, shift).numpy().astype(float)
        values[~job.tokens.is_role(*TEXT_ROLES).numpy()] = np.nan
        return Simulation(values)

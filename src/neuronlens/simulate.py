"""Predicting a neuron's activations from its explanation alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from neuronlens.explanation import Explanation, Failure
from neuronlens.samples import Sample
from neuronlens.segment import Segmenter
from neuronlens.tokens import TEXT_ROLES, Role, TokenMap


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
    """

    values: Float[np.ndarray, " token"]


class Simulator(Protocol):
    """Predicts activations from explanations."""

    def simulate(self, jobs: Sequence[SimulationJob]) -> list[Simulation | Failure]:
        """Predict one activation per token of each job, in the order of the jobs.

        What could not be simulated comes back as a `Failure`, never as zeros.
        """
        ...


@dataclass(frozen=True)
class MaskSimulator:
    """Visual tokens: active where the segmenter finds the explanation's phrases.

    Source: P1, section 3.3. How a mask becomes a token's activation is a reading
    (docs/methods.md, row 15): 1 if at least half of the token's box is covered.

    Attributes:
        segmenter: Finds the phrases.
        soft: Predict the covered share instead of 0 or 1.
    """

    segmenter: Segmenter
    soft: bool = False

    def simulate(self, jobs: Sequence[SimulationJob]) -> list[Simulation | Failure]:
        """Predict visual tokens that have a box."""
        # Many neurons share a sample and a phrase; the jobs keep the keys' objects alive.
        known: dict[tuple[int, int, tuple[str, ...]], Simulation] = {}
        answers: list[Simulation | Failure] = []
        for job in jobs:
            if not job.explanation.phrases:
                answers.append(Failure("the explanation has no phrase to look for"))
                continue
            key = (id(job.sample), id(job.tokens), job.explanation.phrases)
            if key not in known:
                known[key] = self._covered(job)
            answers.append(known[key])
        return answers

    def _covered(self, job: SimulationJob) -> Simulation:
        visual = job.tokens.is_role(Role.VISUAL)
        masks = {
            image: np.asarray(
                self.segmenter.segment(job.sample, image, job.explanation.phrases).any(0)
            )
            for image in job.tokens.image[visual].unique().tolist()
        }
        cover = job.tokens.coverage(masks).numpy().astype(float)
        cover[~visual.numpy()] = np.nan
        if not self.soft:
            cover = np.where(np.isnan(cover), np.nan, (cover >= 0.5).astype(float))
        return Simulation(cover)


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

"""Visual tokens simulated from where a segmenter finds the explanation's phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neuronlens.explanation import Failure
from neuronlens.segment import Segmenter
from neuronlens.simulate.simulator import Simulation, SimulationJob
from neuronlens.tokens import Role


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

"""Visual tokens simulated from where a segmenter finds the explanation's phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from neuronlens.errors import DataError, SampleError, SegmenterError
from neuronlens.explanation import Failure
from neuronlens.samples import Sample
from neuronlens.segment import Segmenter
from neuronlens.simulate.simulator import Simulation, SimulationJob
from neuronlens.tokens import Role

_Asked = tuple[int, tuple[str, ...]]
"""A token map, by the id of its object, and phrases: jobs that agree in both are answered once."""


@dataclass(frozen=True)
class MaskSimulator:
    """Visual tokens: active where the segmenter finds the explanation's phrases.

    The segmenter is asked once per image of a sample, for the phrases of all jobs together, so
    that it can encode the image once. The masks of one image are gone before the next is asked
    for. A sample the segmenter cannot work on fails its own jobs only.

    Source: P1, section 3.3. How a mask becomes a token's activation is a reading
    (docs/methods.md, row 15): 1 if at least half of the token's box is covered.

    Attributes:
        segmenter: Finds the phrases.
        soft: Predict the covered share instead of 0 or 1.
    """

    segmenter: Segmenter
    soft: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot segment, at once."""
        if not hasattr(self.segmenter, "segment"):
            raise TypeError(
                "A segmenter is needed, such as nl.AnnotationSegmenter(), not "
                f"{self.segmenter!r:.80}."
            )

    @property
    def settings(self) -> dict[str, object]:
        """What its predictions depend on, for a study's manifest."""
        name = getattr(self.segmenter, "name", type(self.segmenter).__name__)
        return {"segmenter": name, "soft": self.soft}

    def simulate(self, jobs: Sequence[SimulationJob]) -> list[Simulation | Failure]:
        """Predict visual tokens that have a box."""
        answers: list[Simulation | Failure] = [
            Failure("the explanation has no phrase to look for")
        ] * len(jobs)
        by_sample: dict[Sample, list[int]] = {}
        for i, job in enumerate(jobs):
            if job.explanation.phrases:
                by_sample.setdefault(job.sample, []).append(i)
        for sample, mine in by_sample.items():
            for i, answer in zip(mine, self._of(sample, [jobs[i] for i in mine]), strict=True):
                answers[i] = answer
        return answers

    def _of(self, sample: Sample, jobs: Sequence[SimulationJob]) -> list[Simulation | Failure]:
        """Answers to jobs that have phrases, all on one sample."""
        distinct = {_asked(job): job for job in jobs}  # the jobs keep the keys' objects alive
        cover = {asked: np.full(len(job.tokens), np.nan) for asked, job in distinct.items()}
        images: dict[int, list[_Asked]] = {}
        for asked, job in distinct.items():
            for image in job.tokens.image[job.tokens.is_role(Role.VISUAL)].unique().tolist():
                images.setdefault(image, []).append(asked)
        try:
            for image, here in sorted(images.items()):
                self._cover(sample, image, {asked: distinct[asked] for asked in here}, cover)
        except (SampleError, DataError, SegmenterError, torch.OutOfMemoryError) as error:
            reason = f"{self.segmenter.name.partition('(')[0]} failed: {error}"
            return [Failure(reason)] * len(jobs)
        simulated = {asked: Simulation(self._activation(each)) for asked, each in cover.items()}
        return [simulated[_asked(job)] for job in jobs]

    def _cover(
        self,
        sample: Sample,
        image: int,
        jobs: dict[_Asked, SimulationJob],
        cover: dict[_Asked, Float[np.ndarray, " token"]],
    ) -> None:
        """Write what is covered of the tokens that see one image."""
        phrases = list(dict.fromkeys(p for job in jobs.values() for p in job.explanation.phrases))
        masks = self.segmenter.segment(sample, image, phrases)
        for asked, job in jobs.items():
            mine = [phrases.index(phrase) for phrase in job.explanation.phrases]
            share = job.tokens.coverage({image: np.asarray(masks[mine].any(0))}).numpy()
            seen = ((job.tokens.image == image) & job.tokens.is_role(Role.VISUAL)).cpu().numpy()
            cover[asked][seen] = share[seen]

    def _activation(self, cover: Float[np.ndarray, " token"]) -> Float[np.ndarray, " token"]:
        return cover if self.soft else np.where(np.isnan(cover), np.nan, cover >= 0.5)


def _asked(job: SimulationJob) -> _Asked:
    return id(job.tokens), job.explanation.phrases

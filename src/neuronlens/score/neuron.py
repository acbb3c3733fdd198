"""A neuron's score: of one modality, or the mean of both, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from neuronlens.errors import UnknownNameError
from neuronlens.score.agreement import Mask, ModalityScore, Values, modality_score
from neuronlens.score.bootstrap import Interval, percentile_interval, resampled_correlations

Modality = Literal["visual", "text"]

RESAMPLES: Final = 1000


class Score(BaseModel):
    """Agreement by modality; which ones count follows from the neuron's category.

    Attributes:
        visual: On visual tokens; None if they do not count.
        text: On text tokens; None if they do not count.
        interval: Bootstrap interval of `value` over the held-out samples, see `neuron_score`;
            None if there is none.
        undefined_resamples: How many resamples have no value, their truth being constant;
            the interval leaves them out.
    """

    model_config = ConfigDict(defer_build=True, allow_inf_nan=False)

    visual: ModalityScore | None = None
    text: ModalityScore | None = None
    interval: Interval | None = None
    undefined_resamples: int = 0

    @property
    def value(self) -> float | None:
        """The neuron's score, of its modality or the mean of both; None if undefined.

        Source: P1, section 3.3.
        """
        return self._mean("counted")

    @property
    def per_sample(self) -> float | None:
        """The same from the means over samples instead of pooled tokens."""
        return self._mean("mean_per_sample")

    def _mean(self, attribute: str) -> float | None:
        sides = [getattr(side, attribute) for side in (self.visual, self.text) if side is not None]
        defined = [value for value in sides if value is not None]
        return sum(defined) / len(defined) if defined else None


def neuron_score(
    sides: Mapping[Modality, Sequence[tuple[Values, Values]]],
    *,
    active: Sequence[Mask] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Score:
    """A neuron's score on its held-out samples, with a 95 % interval.

    The interval is a percentile bootstrap: samples are drawn with replacement, the same ones
    for both modalities, and `value` is computed anew from each draw. Whole samples are drawn,
    because tokens of one sample are not independent. A sample without any scored token is
    never drawn.

    With few samples it is coarse and too narrow: five can be drawn in only 126 ways, and none
    of them holds a sample that was not seen. In simulated populations of known correlation
    (masks of varying quality, equal samples, samples that differ in level, a wrong
    explanation; 256 tokens each) it held the truth in 82 to 90 % of cases with 5 samples, 88
    to 91 % with 10, 89 to 92 % with 20 and 93 to 95 % with 50. Samples chosen for their rank
    are no random draw, so it tells how much the score hangs on single samples, not where that
    of all images lies.

    Resamples without a score (the truth of all their samples is constant) are left out of the
    interval and counted in `Score.undefined_resamples`; many of them make it doubtful.

    Args:
        sides: For each modality that counts, true and simulated activations of each sample.
        active: Which visual tokens of each sample count as active, for `ModalityScore.iou`.
        resamples: How often to draw; 0 for no interval.
        seed: Of the draws.

    Source: P1, section 3.3; the interval is ours.

    Raises:
        UnknownNameError: If a modality is neither "visual" nor "text".
        ValueError: If the modalities differ in their number of samples, arrays that belong
            together differ in length, or active tokens are given without visual ones.
    """
    for name in sides:
        if name not in ("visual", "text"):
            raise UnknownNameError("modality", name, ("visual", "text"))
    if len({len(pairs) for pairs in sides.values()}) > 1:
        raise ValueError(
            "There are "
            + " and ".join(f"{len(pairs)} {name}" for name, pairs in sides.items())
            + " samples. Give both modalities of every sample; arrays may be empty."
        )
    if active is not None and "visual" not in sides:
        raise ValueError("Active tokens are for visual masks: give visual pairs, or no `active`.")
    found = {
        name: modality_score(pairs, active=active if name == "visual" else None)
        for name, pairs in sides.items()
    }
    score = Score(visual=found.get("visual"), text=found.get("text"))
    # A side that is undefined as a whole is in no resample either: one without its infinite
    # sample would be another score.
    counting = [pairs for name, pairs in sides.items() if found[name].counted is not None]
    spoken = [
        number
        for number, parts in enumerate(zip(*counting, strict=True))
        if not all(np.isnan(simulated).all() for _, simulated in parts)
    ]
    if len(spoken) < 2 or resamples < 1:
        return score
    rows = np.random.default_rng(seed).integers(len(spoken), size=(len(spoken), resamples))
    each = np.array(
        [resampled_correlations([pairs[i] for i in spoken], rows) for pairs in counting]
    )
    sums, counts = np.nansum(each, axis=0), (~np.isnan(each)).sum(0)
    values = sums[counts > 0] / counts[counts > 0]
    if len(values):
        score.interval = percentile_interval(values)
    score.undefined_resamples = resamples - len(values)
    return score

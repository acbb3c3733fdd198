"""How well simulated activations agree with true ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel

Undefined = Literal["constant prediction", "constant truth", "no tokens", "not finite"]
Values = Float[np.ndarray, " token"]


def correlation(true: Values, simulated: Values) -> tuple[float, Undefined | None]:
    """Pearson correlation, and why it is undefined if it is NaN.

    Args:
        true: True activations.
        simulated: Predicted ones; tokens at which they are NaN are left out.
    """
    said = ~np.isnan(simulated)
    x, y = np.asarray(true, float)[said], np.asarray(simulated, float)[said]
    if len(x) < 2:
        return float("nan"), "no tokens"
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan"), "not finite"
    # A spread at the level of rounding is none: dividing by it would correlate noise.
    if np.ptp(x) <= 1e-12 * max(1.0, float(np.abs(x).max())):
        return float("nan"), "constant truth"
    if np.ptp(y) <= 1e-12 * max(1.0, float(np.abs(y).max())):
        return float("nan"), "constant prediction"
    x, y = x - x.mean(), y - y.mean()
    r = float(x @ y / math.sqrt(float(x @ x) * float(y @ y)))
    return max(-1.0, min(1.0, r)), None


class ModalityScore(BaseModel):
    """Agreement on the tokens of one modality.

    Attributes:
        r: Pearson correlation over the pooled tokens of the held-out samples; None if
            undefined.
        undefined: Why `r` is undefined.
        mean_per_sample: Mean of the samples' own correlations, by the rule of `counted`.
        tokens: How many tokens were pooled.
    """

    r: float | None
    undefined: Undefined | None
    mean_per_sample: float | None
    tokens: int

    @property
    def counted(self) -> float | None:
        """What an aggregate counts, which is 0 for a constant prediction; None is left out.

        Source: docs/methods.md, row 14. Dropping constant predictions would reward empty
        masks; a constant truth can be predicted neither well nor badly.
        """
        return 0.0 if self.undefined == "constant prediction" else self.r


def modality_score(pairs: Sequence[tuple[Values, Values]]) -> ModalityScore:
    """Agreement over several samples.

    Args:
        pairs: True and simulated activations of each sample, of one modality's tokens.

    Source: P1, section 3.3; pooling is a reading (docs/methods.md, row 12).
    """
    each = [correlation(true, simulated) for true, simulated in pairs]
    counted = [0.0 if why == "constant prediction" else r for r, why in each]
    defined = [r for r in counted if not math.isnan(r)]
    if pairs:
        r, why = correlation(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    else:
        r, why = float("nan"), "no tokens"
    return ModalityScore(
        r=None if math.isnan(r) else r,
        undefined=why,
        mean_per_sample=float(np.mean(defined)) if defined else None,
        tokens=sum(int((~np.isnan(simulated)).sum()) for _, simulated in pairs),
    )


class Score(BaseModel):
    """Agreement by modality; which ones count follows from the neuron's category.

    Attributes:
        visual: On visual tokens; None if they do not count.
        text: On text tokens; None if they do not count.
    """

    visual: ModalityScore | None = None
    text: ModalityScore | None = None

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


class Summary(BaseModel):
    """Scores of several neurons together.

    Attributes:
        mean: Of the defined scores, constant predictions counted as 0; None without any.
        neurons: How many are in the mean.
        constant_predictions: How many sides were counted as 0.
        undefined: How many neurons were left out, their truth being constant.
    """

    mean: float | None
    neurons: int
    constant_predictions: int
    undefined: int


def summarise(scores: Sequence[Score]) -> Summary:
    """The mean score, with what it counts and what it leaves out."""
    values = [score.value for score in scores]
    defined = [value for value in values if value is not None]
    sides = [side for score in scores for side in (score.visual, score.text) if side is not None]
    return Summary(
        mean=float(np.mean(defined)) if defined else None,
        neurons=len(defined),
        constant_predictions=sum(side.undefined == "constant prediction" for side in sides),
        undefined=len(values) - len(defined),
    )

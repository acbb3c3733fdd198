"""Agreement of simulated and true activations on the tokens of one modality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict

Undefined = Literal["constant prediction", "constant truth", "no tokens", "not finite"]
Values = Float[np.ndarray, " token"]
Mask = Bool[np.ndarray, " token"]

ROUNDING: Final = 1e-12
"""A spread at the level of rounding is none: dividing by it would correlate noise."""

PREDICTED: Final = 0.5
"""From this simulated value on, a token counts as predicted to be active."""


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
    if np.ptp(x) <= ROUNDING * max(1.0, float(np.abs(x).max())):
        return float("nan"), "constant truth"
    if np.ptp(y) <= ROUNDING * max(1.0, float(np.abs(y).max())):
        return float("nan"), "constant prediction"
    x, y = x - x.mean(), y - y.mean()
    r = x @ y / (math.sqrt(x @ x) * math.sqrt(y @ y))
    return float(np.clip(r, -1, 1)), None


class ModalityScore(BaseModel):
    """Agreement on the tokens of one modality, those of the held-out samples pooled.

    Tokens nothing was predicted for are in none of the numbers.

    Attributes:
        r: Pearson correlation; None if undefined.
        undefined: Why `r` is undefined.
        mean_per_sample: Mean of the samples' own correlations, by the rule of `counted`.
        tokens: How many tokens were pooled.
        spearman: Correlation of the ranks, ties sharing their mean rank; None if `r` is
            undefined.
        auroc: Chance that a token on which the neuron fires (true activation above 0) got a
            larger prediction than one on which it does not, an equal one counting half.
            None if it fires on all tokens or on none; 0.5 for a constant prediction.
        iou: Tokens that are predicted (0.5 or more) and active, as a share of those that are
            either; None if nobody said which are active, or if there are none of either.
    """

    model_config = ConfigDict(defer_build=True, allow_inf_nan=False)

    r: float | None
    undefined: Undefined | None
    mean_per_sample: float | None
    tokens: int
    spearman: float | None = None
    auroc: float | None = None
    iou: float | None = None

    @property
    def counted(self) -> float | None:
        """What an aggregate counts, which is 0 for a constant prediction; None is left out.

        Source: docs/methods.md, row 14. Dropping constant predictions would reward empty
        masks; a constant truth can be predicted neither well nor badly.
        """
        return 0.0 if self.undefined == "constant prediction" else self.r


def modality_score(
    pairs: Sequence[tuple[Values, Values]], *, active: Sequence[Mask] | None = None
) -> ModalityScore:
    """Agreement over several samples.

    Args:
        pairs: True and simulated activations of each sample, of one modality's tokens.
        active: Which of each sample's tokens count as active, for the overlap with a
            simulation that is a mask. None leaves the overlap out.

    Source: P1, section 3.3, for the correlation; pooling is a reading (docs/methods.md, row
    12). The other measures are ours: they show what a correlation hides, an agreement in
    order only, or one in place but not in degree.

    Raises:
        ValueError: If arrays that belong together differ in length, or `active` is not
            boolean.
    """
    require_alike(pairs, active)
    each = [correlation(true, simulated) for true, simulated in pairs]
    counted = [0.0 if why == "constant prediction" else r for r, why in each]
    defined = [r for r in counted if not math.isnan(r)]
    true, simulated = (_pooled([pair[i] for pair in pairs]) for i in (0, 1))
    said = ~np.isnan(simulated)
    true, simulated = true[said], simulated[said]
    r, why = correlation(true, simulated)
    finite = bool(np.isfinite(true).all() and np.isfinite(simulated).all())
    overlap = None
    if active is not None and finite:
        overlap = _overlap(simulated >= PREDICTED, _pooled(active).astype(bool)[said])
    return ModalityScore(
        r=None if math.isnan(r) else r,
        undefined=why,
        mean_per_sample=float(np.mean(defined)) if defined else None,
        tokens=len(true),
        spearman=correlation(_ranks(true), _ranks(simulated))[0] if why is None else None,
        auroc=_auroc(true > 0, simulated) if finite else None,
        iou=overlap,
    )


def require_alike(
    pairs: Sequence[tuple[Values, Values]], active: Sequence[Mask] | None = None
) -> None:
    """Refuse samples whose arrays do not tell of the same tokens.

    Raises:
        ValueError: If arrays that belong together differ in length, or `active` is not
            boolean.
    """
    if active is not None and len(active) != len(pairs):
        raise ValueError(
            f"{len(active)} arrays of active tokens for {len(pairs)} samples: give one for each."
        )
    for number, (true, simulated) in enumerate(pairs):
        shapes = [np.shape(true), np.shape(simulated)]
        if active is not None:
            if np.asarray(active[number]).dtype != bool:
                raise ValueError(
                    f"Active tokens of sample {number} are {np.asarray(active[number]).dtype}, "
                    "not boolean. Compare activations with a threshold first."
                )
            shapes.append(np.shape(active[number]))
        if len(shapes[0]) != 1 or len(set(shapes)) > 1:
            raise ValueError(
                f"Arrays of sample {number} have the shapes {', '.join(map(str, shapes))}: give "
                "one value per token in each."
            )


def _pooled(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _ranks(values: Values) -> Values:
    """Rank of each value, from 1; equal values share the mean of their ranks."""
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Values = (np.cumsum(count) - (count - 1) / 2)[which]
    return ranks


def _auroc(positive: Mask, value: Values) -> float | None:
    """Area under the ROC curve, from the rank sum of the positives."""
    yes = int(positive.sum())
    no = len(positive) - yes
    if yes == 0 or no == 0:
        return None
    return (float(_ranks(value)[positive].sum()) - yes * (yes + 1) / 2) / (yes * no)


def _overlap(predicted: Mask, active: Mask) -> float | None:
    union = int((predicted | active).sum())
    return int((predicted & active).sum()) / union if union else None

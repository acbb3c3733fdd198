"""Numbers that a model's forward did not give as finite ones: counted, and warned of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from neuronlens.evaluate.resampling import Values


def not_finite(values: Mapping[str, Values]) -> int:
    """How many numbers of all conditions are none."""
    return sum(int((~np.isfinite(each)).sum()) for each in values.values())


def note_of(values: Mapping[str, Values]) -> str:
    """What a result says of them; empty if there is nothing to say."""
    count = not_finite(values)
    return f"{count:,} numbers are not finite, and in no mean." if count else ""


def warn_of_not_finite(values: Mapping[str, Values], samples: Sequence[str], what: str) -> None:
    """Warn once, for the caller of the function that calls this.

    Args:
        values: By condition, the number of each member on each row.
        samples: Id of each row's sample.
        what: The numbers' name.
    """
    count = not_finite(values)
    if not count:
        return
    rows = np.any([(~np.isfinite(each)).any(0) for each in values.values()], axis=0)
    ids = list(dict.fromkeys(id for id, is_lost in zip(samples, rows, strict=True) if is_lost))
    told = ", ".join(repr(id) for id in ids[:5]) + (", ..." if len(ids) > 5 else "")
    where = ", ".join(name for name, each in values.items() if not np.isfinite(each).all())
    warnings.warn(
        f"{count} {what} are not finite, and in no mean. They are of {len(ids)} samples ({told}), "
        f"under {where}. In float16 states overflow: bfloat16 or float32 may help.",
        UserWarning,
        stacklevel=3,
    )

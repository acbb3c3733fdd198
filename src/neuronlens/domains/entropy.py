"""How evenly a neuron fires over domains: DAPE."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def dape(rates: Float[np.ndarray, "*neurons domain"]) -> Float[np.ndarray, "*neurons"]:
    """Entropy of a neuron's activation probabilities over domains: low means specific.

    Source: P2, eq. (5) to (7), natural logarithm, over the normalised probabilities (eq. (7)
    prints those before normalising; its code normalises). 0 ln 0 is 0.

    Args:
        rates: Activation probability of each neuron in each domain, 0 or more.

    Returns:
        Entropy in nats, from 0 (fires in one domain only) to ln(domains) (in all alike). NaN
        where the neuron never fired: a silent neuron is not a specific one. NaN where a rate is.

    Raises:
        ValueError: If there are fewer than two domains, or a rate is below 0.

    Example:
        >>> dape(np.array([[0.5, 0.0], [0.25, 0.25], [0.0, 0.0]])).round(3)
        array([0.   , 0.693,   nan])
    """
    given = np.asarray(rates, float)
    if given.ndim == 0 or given.shape[-1] < 2:
        raise ValueError(
            f"Rates of shape {given.shape} are of fewer than two domains, and entropy compares "
            "domains. Give [neuron, domain]."
        )
    if (given < 0).any():
        raise ValueError(f"A rate is {np.nanmin(given):g}; probabilities are 0 or more.")
    with np.errstate(invalid="ignore"):
        share = given / given.sum(-1, keepdims=True)  # 0/0 is NaN for silent neurons, as wanted
    terms = -share * np.log(np.where(share > 0, share, 1))
    # Rounding may lead a little beyond the ends; adding 0 makes -0 into 0.
    return np.asarray(np.clip(terms.sum(-1), 0, np.log(given.shape[-1])) + 0.0)

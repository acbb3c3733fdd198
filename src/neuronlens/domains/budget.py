"""Which blocks of samples count, so that domains are compared over about as many tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int


def equal_blocks(
    size: Int[np.ndarray, "domain block"], domains: Sequence[str], seed: int
) -> Bool[np.ndarray, "domain block"]:
    """Blocks of each domain that come closest to the tokens of the smallest one.

    Each domain's blocks are put in a random order, the same for every module, and as many of
    the first are taken as come closest: one at least, all of them where the domains are about
    as large. A domain that is much larger than the smallest cannot be had in smaller parts than
    a block, a 16th of it.
    """
    used = np.zeros(size.shape, bool)
    target = size.sum(1).min()
    for row, domain in enumerate(domains):
        # By its name: another domain more or less does not change which samples are used.
        order = np.random.default_rng([seed, zlib.crc32(domain.encode())]).permutation(
            size.shape[1]
        )
        order = order[size[row, order] > 0]
        distance = np.abs(size[row, order].cumsum() - target)
        # Of two numbers that are as close, the larger: more is known then.
        taken = len(distance) - int(np.argmin(distance[::-1]))
        used[row, order[:taken]] = True
    return used

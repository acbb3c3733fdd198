"""Mergeable running statistics of one site: the contract that makes one pass exact.

Three steps: `reduce` (or `reduce_everything`, where looking at a number would stop the device)
turns a batch's activations into a `Reduction` while the model runs; `SiteStatistics.update`
takes it in once the forward has ended and was finite; `merge` joins what was found on different
samples. Merging is associative and commutative, bit for bit.
"""

from neuronlens.running.layout import BLOCKS, COUNTED, Layout, block_of
from neuronlens.running.reduce import (
    FIXED_POINT,
    LARGEST_SUM,
    Reduction,
    reduce,
    reduce_everything,
)
from neuronlens.running.statistics import FiringCounts, Incoming, RoleSummary, SiteStatistics
from neuronlens.running.top import ABSENT, Gate, TopSamples

__all__ = [
    "ABSENT",
    "BLOCKS",
    "COUNTED",
    "FIXED_POINT",
    "LARGEST_SUM",
    "FiringCounts",
    "Gate",
    "Incoming",
    "Layout",
    "Reduction",
    "RoleSummary",
    "SiteStatistics",
    "TopSamples",
    "block_of",
    "reduce",
    "reduce_everything",
]

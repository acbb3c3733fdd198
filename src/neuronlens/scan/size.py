"""How large a scan's state will be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from neuronlens.adapters import ModelAdapter, SiteSelection
from neuronlens.neurons import NeuronSite
from neuronlens.running import BLOCKS, COUNTED


@dataclass(frozen=True)
class ScanSize:
    """What a scan takes.

    Attributes:
        neurons: How many neurons are scanned.
        state: Bytes of running statistics, in memory.
        atlas: Bytes of the atlas, without its table of samples.
    """

    neurons: int
    state: int
    atlas: int

    @property
    def disk(self) -> int:
        """Bytes on the disk while it runs: two checkpoints, of which one is being written."""
        return 2 * self.atlas

    def __str__(self) -> str:
        return (
            f"{self.neurons:,} neurons: {_bytes(self.state)} of statistics in memory, an atlas of "
            f"{_bytes(self.atlas)}, {_bytes(self.disk)} on the disk while it runs"
        )


def scan_size(
    adapter: ModelAdapter,
    sites: SiteSelection = None,
    *,
    n: int = 50,
    keep_visual: int = 5,
    keep_text: int = 3,
    domains: int = 1,
) -> ScanSize:
    """How much memory and disk `scan` will take; no forward is run.

    Args:
        adapter: Of the model; on the meta device will do.
        sites: As for `scan`; so are the next three.
        n: Top samples per neuron.
        keep_visual: Visual activations kept of each.
        keep_text: Text activations kept of each.
        domains: How many domains the samples have; firing is counted for each.
    """
    return size_of(adapter.select(sites), adapter.dtype, n, keep_visual, keep_text, max(1, domains))


def size_of(
    sites: Iterable[NeuronSite],
    dtype: torch.dtype,
    n: int,
    keep_visual: int,
    keep_text: int,
    domains: int,
) -> ScanSize:
    """See `scan_size`."""
    neurons = experts = 0
    for site in sites:
        neurons += site.neurons
        experts += site.experts
    number, roles, count = dtype.itemsize, len(COUNTED), 8
    of_neuron = (
        n * (4 + (keep_visual + keep_text) * number)
        + roles * (number + count)
        + domains * BLOCKS * roles * count
    )
    atlas = neurons * of_neuron + experts * domains * BLOCKS * roles * count
    # In memory, each entry's rank value and each neuron's gate stand beside it.
    return ScanSize(neurons, atlas + neurons * (n * number + number + 12), atlas)


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"

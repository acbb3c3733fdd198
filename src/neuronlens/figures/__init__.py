"""Figures of the two papers, from finished results; matplotlib draws, nothing is computed.

Every function returns a matplotlib `Figure`, to be shown, changed, or saved with `savefig`.
"""

from neuronlens.figures.categories import category_histograms, category_layers, category_shares
from neuronlens.figures.domains import domain_layers, silent_neurons
from neuronlens.figures.embeddings import embedding_plane
from neuronlens.figures.lens import entropy_curves, lens_heat_map
from neuronlens.figures.look import COLOURS, NAMES, domain_colours
from neuronlens.figures.pruning import ValueAndInterval, pruning_curves

__all__ = [
    "COLOURS",
    "NAMES",
    "ValueAndInterval",
    "category_histograms",
    "category_layers",
    "category_shares",
    "domain_colours",
    "domain_layers",
    "embedding_plane",
    "entropy_curves",
    "lens_heat_map",
    "pruning_curves",
    "silent_neurons",
]

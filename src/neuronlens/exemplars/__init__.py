"""Chosen neurons' samples, re-recorded token by token; one neuron on one sample."""

from neuronlens.exemplars.choose import EXPLAIN_RANKS, HELD_OUT_RANKS, VALIDATE_RANKS
from neuronlens.exemplars.exemplar import Exemplar, ExemplarSet, NeuronExemplars, Painted
from neuronlens.exemplars.look import look
from neuronlens.exemplars.run import exemplars

__all__ = [
    "EXPLAIN_RANKS",
    "HELD_OUT_RANKS",
    "VALIDATE_RANKS",
    "Exemplar",
    "ExemplarSet",
    "NeuronExemplars",
    "Painted",
    "exemplars",
    "look",
]

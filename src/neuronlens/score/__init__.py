"""How well simulated activations agree with true ones: arithmetic only."""

from neuronlens.score.agreement import (
    ModalityScore,
    Undefined,
    Values,
    correlation,
    modality_score,
)
from neuronlens.score.neuron import Modality, Score, neuron_score
from neuronlens.score.summary import Difference, Summary, difference, summarise

__all__ = [
    "Difference",
    "Modality",
    "ModalityScore",
    "Score",
    "Summary",
    "Undefined",
    "Values",
    "correlation",
    "difference",
    "modality_score",
    "neuron_score",
    "summarise",
]

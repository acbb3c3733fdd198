"""Explain, simulate, score chosen neurons; the records of what came of it."""

from neuronlens.study.records import NeuronRecord, SampleTokens, Study, StudyManifest, TokenRecord
from neuronlens.study.run import explain_neurons

__all__ = [
    "NeuronRecord",
    "SampleTokens",
    "Study",
    "StudyManifest",
    "TokenRecord",
    "explain_neurons",
]

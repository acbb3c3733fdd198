"""Explain, simulate, score: what chosen neurons find, and whether that can be believed."""

from neuronlens.study.estimate import estimate_study
from neuronlens.study.records import (
    Candidate,
    NeuronRecord,
    SampleTokens,
    StudyManifest,
    TokenRecord,
)
from neuronlens.study.run import explain_neurons
from neuronlens.study.study import Study

__all__ = [
    "Candidate",
    "NeuronRecord",
    "SampleTokens",
    "Study",
    "StudyManifest",
    "TokenRecord",
    "estimate_study",
    "explain_neurons",
]

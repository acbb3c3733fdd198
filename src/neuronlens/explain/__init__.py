"""Saying what a neuron finds, from the exemplars set aside for that."""

from neuronlens.explain.chat import ChatExplainer
from neuronlens.explain.dissection import DissectionExplainer, Match
from neuronlens.explain.explainer import Explainer, ExplanationJob, Modality, modalities

__all__ = [
    "ChatExplainer",
    "DissectionExplainer",
    "Explainer",
    "ExplanationJob",
    "Match",
    "Modality",
    "modalities",
]

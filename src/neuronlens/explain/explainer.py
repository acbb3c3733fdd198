"""What an explainer takes and gives, and which tokens of a neuron count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from neuronlens.classify import Category
from neuronlens.exemplars import Exemplar
from neuronlens.explanation import Explanation, Failure
from neuronlens.neurons import NeuronId

Modality = Literal["visual", "text"]


@dataclass(frozen=True, eq=False)
class ExplanationJob:
    """A neuron, its category, and the exemplars to explain it from: no held-out ones.

    Attributes:
        neuron: Which.
        category: What it was classified as; decides which modalities are shown.
        exemplars: To explain it from, strongest first.
        contrast: Samples on which it is quiet, for explainers that compare.
        draw: Which of several explanations of the same neuron is asked for, from 0.
    """

    neuron: NeuronId
    category: Category
    exemplars: tuple[Exemplar, ...]
    contrast: tuple[Exemplar, ...] = ()
    draw: int = 0


class Explainer(Protocol):
    """Says what neurons find."""

    def explain(self, jobs: Sequence[ExplanationJob]) -> list[Explanation | Failure]:
        """Explain each job's neuron, in the order of the jobs."""
        ...


def modalities(category: Category, exemplars: Sequence[Exemplar]) -> tuple[Modality, ...]:
    """On which tokens a neuron is explained and scored: those of its category.

    For an unknown neuron, those that its stream has; visual tokens count if they see a region.
    """
    if category == "visual" or category == "text":
        return (category,)
    if category == "multimodal":
        return ("visual", "text")
    present: list[Modality] = []
    if any(each.regions.any() for each in exemplars):
        present.append("visual")
    if any(each.text.any() for each in exemplars):
        present.append("text")
    return tuple(present)

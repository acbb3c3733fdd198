"""How many known concepts a neuron's top samples need."""

from neuronlens.concepts.result import ConceptCount, CountedConcept
from neuronlens.concepts.run import count_concepts

__all__ = ["ConceptCount", "CountedConcept", "count_concepts"]

"""Neurons that are specific to domains of the data: DAPE, chance, intervals, stability."""

from neuronlens.domains.budget import equal_blocks
from neuronlens.domains.chance import Chance, ModuleChance, benjamini_hochberg
from neuronlens.domains.choose import Choice, Rule, choose
from neuronlens.domains.counts import ModuleCounts
from neuronlens.domains.entropy import dape
from neuronlens.domains.neurons import DomainNeurons, DomainReadings, ModuleNeurons, Overlap
from neuronlens.domains.resample import (
    Intervals,
    ModuleIntervals,
    ModuleStability,
    Stability,
)
from neuronlens.domains.run import TOKENS, domain_neurons

__all__ = [
    "TOKENS",
    "Chance",
    "Choice",
    "DomainNeurons",
    "DomainReadings",
    "Intervals",
    "ModuleChance",
    "ModuleCounts",
    "ModuleIntervals",
    "ModuleNeurons",
    "ModuleStability",
    "Overlap",
    "Rule",
    "Stability",
    "benjamini_hochberg",
    "choose",
    "dape",
    "domain_neurons",
    "equal_blocks",
]

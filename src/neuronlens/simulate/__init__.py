"""Predicting a neuron's activations from its explanation alone."""

from neuronlens.simulate.chat import ChatSimulator
from neuronlens.simulate.expected import ExpectedValueSimulator
from neuronlens.simulate.masks import MaskSimulator
from neuronlens.simulate.simulator import Simulation, SimulationJob, Simulator
from neuronlens.simulate.words import WordSimulator

__all__ = [
    "ChatSimulator",
    "ExpectedValueSimulator",
    "MaskSimulator",
    "Simulation",
    "SimulationJob",
    "Simulator",
    "WordSimulator",
]

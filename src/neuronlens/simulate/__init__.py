"""Predicting a neuron's activations from its explanation alone."""

from neuronlens.simulate.masks import MaskSimulator
from neuronlens.simulate.simulator import Simulation, SimulationJob, Simulator
from neuronlens.simulate.words import WordSimulator

__all__ = ["MaskSimulator", "Simulation", "SimulationJob", "Simulator", "WordSimulator"]

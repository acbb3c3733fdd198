"""The logit lens: states and neurons read as words."""

from neuronlens.lens.curves import EntropyCurves
from neuronlens.lens.lens import LogitLens
from neuronlens.lens.places import Place
from neuronlens.lens.reading import LensReading
from neuronlens.lens.writes import NeuronWrites

__all__ = ["EntropyCurves", "LensReading", "LogitLens", "NeuronWrites", "Place"]

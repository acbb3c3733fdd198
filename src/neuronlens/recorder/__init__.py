"""Reading activations from a running model."""

from neuronlens.recorder.record import Sink, record
from neuronlens.recorder.recorder import ActivationRecorder

__all__ = ["ActivationRecorder", "Sink", "record"]

"""Tables of facts, a file per kind of model; importing a file registers its adapters."""

from neuronlens.adapters.families import llava

__all__ = ["llava"]

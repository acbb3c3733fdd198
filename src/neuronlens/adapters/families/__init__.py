"""Tables of facts, a file per kind of model; importing a file registers its adapters."""

from neuronlens.adapters.families import dynamic, llava, native, odd, queries, qwen

__all__ = ["dynamic", "llava", "native", "odd", "queries", "qwen"]

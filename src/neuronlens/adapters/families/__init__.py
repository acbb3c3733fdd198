"""Tables of facts, a file per kind of model; importing a file registers its adapters."""

from neuronlens.adapters.families import (
    anyres,
    convolutional,
    cuts,
    dynamic,
    gemma,
    llava,
    native,
    odd,
    queries,
    qwen,
    tiles,
    views,
)

__all__ = [
    "anyres",
    "convolutional",
    "cuts",
    "dynamic",
    "gemma",
    "llava",
    "native",
    "odd",
    "queries",
    "qwen",
    "tiles",
    "views",
]

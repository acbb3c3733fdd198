"""Descriptions of model families, looked up by `config.model_type`.

What the adapter of another family is written with is here; see docs/adapters.md.
"""

from neuronlens.adapters import families as _families  # noqa: F401 - registers them
from neuronlens.adapters.base import (
    ModelAdapter,
    SiteSelection,
    adapt,
    get,
    register,
    require_adapter,
)
from neuronlens.adapters.change import Change, Edit, Rows
from neuronlens.adapters.decoding import Decoding
from neuronlens.adapters.discover import Block, feed_forward_blocks, special_block
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement, resized_and_cropped, stretched
from neuronlens.adapters.grids import (
    Grid,
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    in_blocks,
    nothing,
    pad,
    queries,
    raster,
    rows,
    special,
    text_rows,
)
from neuronlens.adapters.structural import StructuralAdapter
from neuronlens.adapters.taps import (
    ActOutput,
    DownInput,
    Experts,
    Functional,
    NeuronKind,
    Tap,
)

__all__ = [
    "ActOutput",
    "Block",
    "Change",
    "Decoding",
    "DownInput",
    "Edit",
    "Experts",
    "FamilyAdapter",
    "Functional",
    "Grid",
    "ImageSize",
    "ModelAdapter",
    "NeuronKind",
    "Piece",
    "Placement",
    "Rows",
    "Seen",
    "SiteSelection",
    "StructuralAdapter",
    "Tap",
    "adapt",
    "cells",
    "feed_forward_blocks",
    "flat",
    "get",
    "in_blocks",
    "nothing",
    "pad",
    "queries",
    "raster",
    "register",
    "require_adapter",
    "resized_and_cropped",
    "rows",
    "special",
    "special_block",
    "stretched",
    "text_rows",
]

"""Descriptions of model families, looked up by `config.model_type`."""

from neuronlens.adapters import families as _families  # noqa: F401 - registers them
from neuronlens.adapters.base import ModelAdapter, SiteSelection, adapt, get, register
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.grids import ImageSize
from neuronlens.adapters.structural import StructuralAdapter

__all__ = [
    "FamilyAdapter",
    "ImageSize",
    "ModelAdapter",
    "SiteSelection",
    "StructuralAdapter",
    "adapt",
    "get",
    "register",
]

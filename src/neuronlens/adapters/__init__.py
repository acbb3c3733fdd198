"""Descriptions of model families, looked up by `config.model_type`."""

from neuronlens.adapters import families as _families  # noqa: F401 - registers them
from neuronlens.adapters.base import ImageSize, ModelAdapter, SiteSelection, adapt, get, register

__all__ = ["ImageSize", "ModelAdapter", "SiteSelection", "adapt", "get", "register"]

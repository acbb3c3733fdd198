"""Descriptions of model families, looked up by `config.model_type`."""

from neuronlens.adapters import llava as _llava  # noqa: F401 - registers itself
from neuronlens.adapters.base import ImageSize, ModelAdapter, SiteSelection, adapt, get, register

__all__ = ["ImageSize", "ModelAdapter", "SiteSelection", "adapt", "get", "register"]

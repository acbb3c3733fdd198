"""Samples, how they are read from files, and how they become model inputs."""

from neuronlens.samples.encode import Batch, Prepared, collate, encode, prepare
from neuronlens.samples.read import LabelMap, SampleRow, read_samples
from neuronlens.samples.sample import Annotation, Picture, Sample, image_digest

__all__ = [
    "Annotation",
    "Batch",
    "LabelMap",
    "Picture",
    "Prepared",
    "Sample",
    "SampleRow",
    "collate",
    "encode",
    "image_digest",
    "prepare",
    "read_samples",
]

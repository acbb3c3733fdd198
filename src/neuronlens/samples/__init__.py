"""Samples, how they are read from files, and how they become model inputs."""

from neuronlens.samples.encode import Batch, Prepared, collate, encode, prepare
from neuronlens.samples.read import LabelMap, SampleRow, read_samples
from neuronlens.samples.rows import as_sample, in_order
from neuronlens.samples.sample import Annotation, Picture, Sample, image_digest

__all__ = [
    "Annotation",
    "Batch",
    "LabelMap",
    "Picture",
    "Prepared",
    "Sample",
    "SampleRow",
    "as_sample",
    "collate",
    "encode",
    "image_digest",
    "in_order",
    "prepare",
    "read_samples",
]

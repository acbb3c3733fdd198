"""Samples, how they are read from files, and how they become model inputs."""

from neuronlens.samples.annotate import annotate
from neuronlens.samples.encode import Batch, Prepared, collate, encode, prepare
from neuronlens.samples.outline import Outline
from neuronlens.samples.read import LabelMap, Region, SampleRow, read_samples
from neuronlens.samples.rows import as_sample, in_order
from neuronlens.samples.sample import Annotation, Picture, Sample, image_digest

__all__ = [
    "Annotation",
    "Batch",
    "LabelMap",
    "Outline",
    "Picture",
    "Prepared",
    "Region",
    "Sample",
    "SampleRow",
    "annotate",
    "as_sample",
    "collate",
    "encode",
    "image_digest",
    "in_order",
    "prepare",
    "read_samples",
]

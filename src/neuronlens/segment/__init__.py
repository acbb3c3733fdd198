"""Where in an image something named is: masks for phrases."""

from neuronlens.segment.annotations import AnnotationSegmenter
from neuronlens.segment.cache import CachedSegmenter
from neuronlens.segment.grounded import Detector, GroundedSegmenter, Masker
from neuronlens.segment.grounding_dino import GroundingDino
from neuronlens.segment.sam2 import Sam2
from neuronlens.segment.sam2_package import Sam2Package
from neuronlens.segment.sam3 import Sam3Segmenter
from neuronlens.segment.segmenter import Segmenter, clean

__all__ = [
    "AnnotationSegmenter",
    "CachedSegmenter",
    "Detector",
    "GroundedSegmenter",
    "GroundingDino",
    "Masker",
    "Sam2",
    "Sam2Package",
    "Sam3Segmenter",
    "Segmenter",
    "clean",
]

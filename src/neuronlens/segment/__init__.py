"""Where in an image something named is: masks for phrases."""

from neuronlens.segment.annotations import AnnotationSegmenter, Segmenter

__all__ = ["AnnotationSegmenter", "Segmenter"]

"""The layouts in which data sets of questions are published, one file for each."""

from neuronlens.questions.layouts import docvqa, lingoqa, ours, pmc_vqa, rsvqa, vqav2
from neuronlens.questions.layouts.source import Source

__all__ = ["Source", "docvqa", "lingoqa", "ours", "pmc_vqa", "rsvqa", "vqav2"]

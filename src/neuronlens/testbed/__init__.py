"""A small vision-language model that was really trained, its world, and planted neurons.

::

    bed = neuronlens.testbed.load()
    vlm = neuronlens.adapt(bed.model, bed.processor)
    samples = neuronlens.testbed.scenes(300, seed=1)

Everything found on it proves a pipeline; it says nothing about a 7B model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from neuronlens.testbed.asking import questions
from neuronlens.testbed.build import untrained
from neuronlens.testbed.crops import photographs, source_of
from neuronlens.testbed.files import scenes, shuffled, write
from neuronlens.testbed.planting import SHIPPED, PlantedNeuron, Spec, graft, plant
from neuronlens.testbed.world import COLOURS, CONCEPTS, SHAPES, SIZES, TEXTURES

FOLDER: Final = Path(__file__).parent / "trained"
"""Model and processor in the form `from_pretrained` reads."""

READINGS: Final = {"n_t": 1}
"""Constants of `NeuronClassifier` that fit this testbed.

A colour or shape is mostly said twice in a caption of 33 words, so P1's n_t = 2 ("at least three
tokens") calls neurons that fire on a single word unknown.
"""


@dataclass(frozen=True)
class Testbed:
    """Model, processor, and the truth about planted neurons (empty without any)."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    planted: tuple[PlantedNeuron, ...] = ()


def load(planted: bool = False) -> Testbed:
    """The trained model in float32, with its processor.

    Args:
        planted: Whether to graft the twelve shipped neurons of known function into it.
    """
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    # Products name their model; where this package lies on this machine says nothing.
    model.config.name_or_path = "neuronlens-testbed"
    processor = AutoProcessor.from_pretrained(FOLDER)
    if not planted:
        return Testbed(model, processor)
    rows = load_file(FOLDER / "planted.safetensors")["rows"].float()
    grafted, truth = graft(model, rows, SHIPPED)
    return Testbed(grafted, processor, truth)


def training() -> dict[str, object]:
    """How the shipped weights were trained, and their held-out accuracy."""
    read: dict[str, object] = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    return read


__all__ = [
    "COLOURS",
    "CONCEPTS",
    "FOLDER",
    "READINGS",
    "SHAPES",
    "SHIPPED",
    "SIZES",
    "TEXTURES",
    "PlantedNeuron",
    "Spec",
    "Testbed",
    "graft",
    "load",
    "photographs",
    "plant",
    "questions",
    "scenes",
    "shuffled",
    "source_of",
    "training",
    "untrained",
    "write",
]

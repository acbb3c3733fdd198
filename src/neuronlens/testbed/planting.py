"""Neurons of known function, added to a model without changing what it says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from neuronlens.adapters import adapt
from neuronlens.hooks import hooked
from neuronlens.neurons import NeuronId
from neuronlens.samples import encode
from neuronlens.testbed.files import scenes
from neuronlens.testbed.world import CONCEPTS, SIZE
from neuronlens.tokens import Role

Kind = Literal["visual", "text", "multimodal", "silent"]

SCENES: Final = 400
SCENE_SEED: Final = 20_260_000
PEAK: Final = 8.0
"""Activation aimed at where a planted neuron fires fully."""

SEEN_OVER_READ: Final = 1.3
"""A multi-modal neuron fires this much more strongly on patches than on words.

Its top samples are then those that show the concept large. Were words the stronger, samples in
which it covers too few patches to count as visual-activated would rank as high as any.
"""


@dataclass(frozen=True)
class Spec:
    """A function to plant: what kind of tokens, showing or spelling which concepts."""

    kind: Literal["visual", "text", "multimodal"]
    concepts: tuple[str, ...]


@dataclass(frozen=True)
class PlantedNeuron:
    """The truth about one planted neuron.

    `"silent"` neurons fill up the other layers, since a model has one width for all.
    """

    neuron: NeuronId
    kind: Kind
    concepts: tuple[str, ...]


SHIPPED: Final = (
    *(Spec("text", (word,)) for word in ("purple", "orange", "ring", "square")),
    *(Spec("visual", (word,)) for word in ("green", "yellow", "triangle", "diamond")),
    *(Spec("multimodal", (word,)) for word in ("red", "blue", "circle", "cross")),
)
"""What the twelve neurons that ship do."""


def fit(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    specs: Sequence[Spec],
    *,
    layer: int = 0,
    seed: int = 0,
) -> Tensor:
    """Gate rows `[planted, hidden]` whose SiLU is about 8 where the function holds, else about 0.

    Args:
        model: The trained testbed model.
        processor: Its processor.
        specs: What to plant.
        layer: In which language layer.
        seed: Of the start values.

    Raises:
        ValueError: If a concept is none of the testbed's.
    """
    unknown = {c for spec in specs for c in spec.concepts} - set(CONCEPTS)
    if unknown:
        raise ValueError(f"No scene shows {sorted(unknown)}. Concepts are {', '.join(CONCEPTS)}.")
    inputs, target = _examples(model, processor, specs, layer)
    generator = torch.Generator().manual_seed(seed)
    rows = nn.Parameter(torch.randn(len(specs), inputs.shape[1], generator=generator) * 0.01)
    # Positives are rare: half of the weight is theirs.
    on = target >= 0.5
    weight = torch.where(on, 0.5 / on.sum(0), 0.5 / (~on).sum(0))
    optimizer = torch.optim.Adam([rows], lr=0.05)
    for step in range(900):
        gate = inputs @ rows.T
        if step < 400:
            each = F.binary_cross_entropy_with_logits(gate, on.float(), reduction="none")
        else:
            each = (F.silu(gate) - PEAK * target).square() / PEAK
        for group in optimizer.param_groups:
            group["lr"] = 0.05 if step < 600 else 0.01
        optimizer.zero_grad()
        (each * weight).sum().backward()
        optimizer.step()
    return rows.detach()


def _examples(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    specs: Sequence[Spec],
    layer: int,
) -> tuple[Tensor, Tensor]:
    """What enters the MLP at every token of the scenes, and how strongly each spec holds there."""
    adapter = adapt(model, processor)
    norm = model.model.language_model.layers[layer].post_attention_layernorm
    inputs, targets = [], []
    samples = scenes(SCENES, SCENE_SEED)
    for start in range(0, len(samples), 50):
        batch = encode(adapter, samples[start : start + 50])
        seen: dict[str, Tensor] = {}
        with torch.inference_mode(), hooked({"mlp input": norm}, seen.__setitem__):
            model(**batch.inputs, use_cache=False)
        flat = seen["mlp input"].flatten(0, 1).clone()
        for row, sample in enumerate(batch.samples):
            tokens = batch.map_of(row)
            visual = tokens.is_role(Role.VISUAL)
            by_concept = {}
            for concept in {c for spec in specs for c in spec.concepts}:
                mask = np.any(
                    [a.mask() for a in sample.annotations if concept in a.names]
                    or [np.zeros((SIZE, SIZE), np.bool_)],
                    axis=0,
                )
                cover = tokens.coverage({0: mask}).nan_to_num(0.0)
                words = tokens.words([concept]).nan_to_num(0.0)
                by_concept[concept] = cover, words
            columns = []
            for spec in specs:
                cover = torch.stack([by_concept[c][0] for c in spec.concepts]).amax(0)
                words = torch.stack([by_concept[c][1] for c in spec.concepts]).amax(0)
                peak = SEEN_OVER_READ if spec.kind == "multimodal" else 1.0
                columns.append(
                    torch.where(visual, peak * cover, 0.0) * (spec.kind != "text")
                    + torch.where(visual, 0.0, words) * (spec.kind != "visual")
                )
            inputs.append(flat[batch.tokens["language"].where(row)])
            targets.append(torch.stack(columns, 1))
    return torch.cat(inputs), torch.cat(targets)


def graft(
    model: LlavaForConditionalGeneration,
    rows: Tensor,
    specs: Sequence[Spec],
    *,
    layer: int = 0,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, tuple[PlantedNeuron, ...]]:
    """A widened copy of the model with these gate rows among its neurons, in shuffled order.

    Up rows and down columns of the new neurons are zero, and a permuted MLP is the same
    function: the logits stay as they were.

    Returns:
        The copy, and the truth about each new neuron.
    """
    planted = len(specs)
    config: Any = copy.deepcopy(model.config)
    old = config.text_config.intermediate_size
    config.text_config.intermediate_size = old + planted
    wide = LlavaForConditionalGeneration(config).eval()
    state = model.state_dict()
    rng = np.random.default_rng([seed, 2])
    truth: list[PlantedNeuron] = []
    for number in range(config.text_config.num_hidden_layers):
        order = torch.from_numpy(rng.permutation(old + planted))
        name = f"model.language_model.layers.{number}.mlp"
        new = rows.to(state[f"{name}.gate_proj.weight"]) if number == layer else None
        gate = _widened(state[f"{name}.gate_proj.weight"], planted, new)
        up = _widened(state[f"{name}.up_proj.weight"], planted, None)
        down = _widened(state[f"{name}.down_proj.weight"].T, planted, None).T
        state[f"{name}.gate_proj.weight"] = gate[order]
        state[f"{name}.up_proj.weight"] = up[order]
        state[f"{name}.down_proj.weight"] = down[:, order]
        place = {int(before): after for after, before in enumerate(order.tolist())}
        for k, spec in enumerate(specs):
            neuron = NeuronId(f"language.{number}", place[old + k])
            if number == layer:
                truth.append(PlantedNeuron(neuron, spec.kind, spec.concepts))
            else:
                truth.append(PlantedNeuron(neuron, "silent", ()))
    wide.load_state_dict(state)
    return wide, tuple(truth)


def _widened(weight: Tensor, by: int, rows: Tensor | None) -> Tensor:
    new = weight.new_zeros(by, weight.shape[1]) if rows is None else rows
    return torch.cat([weight, new])


def plant(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    specs: Sequence[Spec],
    *,
    layer: int = 0,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, tuple[PlantedNeuron, ...]]:
    """Fit neurons with these functions and graft them into a copy of the model.

    Args:
        model: The trained testbed model; it is not changed.
        processor: Its processor.
        specs: Kind and concepts of each neuron.
        layer: In which language layer.
        seed: Of start values and of the order of neurons.

    Returns:
        The copy, whose logits are those of `model` up to rounding, and the truth.

    Raises:
        ValueError: If a concept is none of the testbed's.
    """
    rows = fit(model, processor, specs, layer=layer, seed=seed)
    return graft(model, rows, specs, layer=layer, seed=seed)

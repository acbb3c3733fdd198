"""The residual stream after every layer, shown while the model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import CaptureError
from neuronlens.hooks import Call, Point, attached, refuse_compiled, uncompiled

See = Callable[[int, Float[Tensor, "token *state"]], None]
"""Takes a layer's number and the states of the chosen tokens there."""


def show_states(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    shape: torch.Size,
    at: Int[Tensor, " token"],
    layers: Sequence[int],
    see: See,
) -> None:
    """Run one forward, and show the states of some tokens at some layers.

    Layer 0 is what the first decoder layer is given: the embeddings, images included, with
    whatever the model adds before that layer. Layer l is the output of the l-th decoder layer, of
    the last one too: the final norm has not been applied. They are shown as they are computed, on
    their layer's device, and nothing of them is kept.

    Args:
        adapter: Of the model.
        inputs: Of the forward, on the model's device.
        shape: Batch and tokens of the stream that the layers run on.
        at: Flat positions of the tokens on that stream.
        layers: Which layers are shown.
        see: Is shown them.

    Source: docs/methods.md, row 29.

    Raises:
        CaptureError: If a layer did not run, or ran on another number of tokens.
        AdapterError: If the model is in training mode.
    """
    decoding = adapter.decoding
    here: dict[torch.device, Tensor] = {}

    def show(layer: int, output: object) -> None:
        state = decoding.residual(output)
        lead = state.shape[: state.ndim - len(decoding.shape)]
        if math.prod(lead) != math.prod(shape):
            raise CaptureError(
                f"Layer {layer} ran on {tuple(lead)} tokens, but its stream has {tuple(shape)}. "
                "Are the token maps those of these inputs?"
            )
        if state.device not in here:
            here[state.device] = at.to(state.device)
        rows = state.detach().reshape(-1, *decoding.shape)
        see(layer, rows[here[state.device]])

    points: dict[str, list[Point]] = {}
    for layer in layers:
        path = decoding.layers[max(layer - 1, 0)]

        def hook(call: Call, layer: int = layer) -> None:
            show(layer, call.out if layer else _given(call))

        point = Point(adapter.model.get_submodule(path), hook, before=layer == 0)
        points.setdefault(f"layer {layer}", []).append(point)
    refuse_compiled(adapter.model)
    adapter.require_eval()
    with torch.inference_mode(), uncompiled(), attached(points):
        # With labels the model computes a loss, for which it needs the logits of every token.
        adapter.forward(inputs, logits="labels" in inputs)


def _given(call: Call) -> Tensor:
    """The states that a layer is given."""
    if call.args:
        first: Tensor = call.args[0]
        return first
    named: Tensor = call.kwargs.get("hidden_states", next(iter(call.kwargs.values())))
    return named

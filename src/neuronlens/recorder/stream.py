"""Activations as their hooks give them, put on the axes of their stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from neuronlens.activations import Activation, Routed
from neuronlens.adapters import ModelAdapter
from neuronlens.errors import CaptureError
from neuronlens.hooks import Point
from neuronlens.neurons import NeuronSite
from neuronlens.tokens import TokenMap


def reading(
    adapter: ModelAdapter, sites: Mapping[str, NeuronSite], see: Callable[[str, Activation], None]
) -> dict[str, list[Point]]:
    return {
        name: adapter.tap(site).reading(adapter.model, partial(see, name), adapter.neuron_kind)
        for name, site in sites.items()
    }


def conditional(sites: Mapping[str, NeuronSite]) -> set[str]:
    return {name for name, site in sites.items() if "conditional" in site.flags}


def detached(out: Activation) -> Activation:
    if isinstance(out, Routed):
        return Routed(out.values.detach(), out.expert, out.experts)
    return out.detach()


def copied(out: Activation, device: torch.device | str | None = None) -> Activation:
    if isinstance(out, Routed):
        return out.copy(device)
    return out.detach().to(device or out.device, copy=True)


def row_count(out: Activation) -> int:
    if isinstance(out, Routed):
        return out.expert.numel() // max(1, out.expert.shape[-1])
    return out.numel() // max(1, out.shape[-1])


def joined(parts: Sequence[Activation]) -> Activation:
    """Parts that ran one after the other, on one token axis; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Routed):
        return Routed.cat([part.flat() for part in parts if isinstance(part, Routed)])
    return torch.cat([part.flatten(0, -2) for part in parts if isinstance(part, Tensor)])


def on_stream(site: NeuronSite, parts: Sequence[Activation], tokens: TokenMap) -> Activation:
    """The activations on the axes of their stream.

    Raises:
        CaptureError: If they are not as many.
    """
    whole = joined(parts)
    check_shape(site, whole, tokens)
    if isinstance(whole, Routed):
        return whole.reshape(*tokens.role.shape)
    return whole.reshape(*tokens.role.shape, site.width)


def check_shape(site: NeuronSite, out: Activation, tokens: TokenMap) -> None:
    if row_count(out) != len(tokens) or out.shape[-1] != site.width:
        raise CaptureError(
            f"Site {site.name} gave activations of shape {tuple(out.shape)}, but its stream "
            f"{site.stream!r} has {tuple(tokens.role.shape)} tokens and the site {site.width} "
            "neurons. Are the token maps those of these inputs?"
        )

"""The sink that keeps a few neurons of a forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from neuronlens.activations import Activation, Routed
from neuronlens.neurons import NeuronSite
from neuronlens.tokens import TokenMap


class Columns:
    """A recorder's sink that keeps only the wanted neurons' columns.

    A token that was not routed to a neuron's expert has activation 0.
    """

    def __init__(self, rows: Mapping[str, Sequence[int]]) -> None:
        """Choose what to keep: by site, rows of neurons (see `NeuronSite.row`)."""
        self._rows = rows
        self._kept: dict[str, Float[Tensor, "token column"]] = {}

    def take(self, site: NeuronSite, activation: Activation, tokens: TokenMap) -> None:
        # Nothing here waits for the device: the columns stay there until the forward has ended.
        rows = torch.tensor(self._rows[site.name]).to(activation.device, non_blocking=True)
        if isinstance(activation, Routed):
            flat = activation.flat()
            sent = flat.expert[:, :, None] == rows // site.width
            columns = torch.where(sent, flat.values[:, :, rows % site.width], 0).sum(1)
        else:
            columns = rearrange(activation, "... neuron -> (...) neuron").index_select(1, rows)
        self._kept[site.name] = columns.float()

    def fetched(self) -> dict[str, Float[np.ndarray, "token column"]]:
        """By site, the columns in the order of its rows; one transfer from each device."""
        by_device: dict[torch.device, list[str]] = {}
        for name, columns in self._kept.items():
            by_device.setdefault(columns.device, []).append(name)
        found: dict[str, np.ndarray] = {}
        for names in by_device.values():
            shapes = [self._kept[name].shape for name in names]
            together = torch.cat([self._kept[name].flatten() for name in names]).cpu()
            parts = together.split([shape.numel() for shape in shapes])
            for name, part, shape in zip(names, parts, shapes, strict=True):
                found[name] = part.reshape(shape).numpy()
        return found

"""What a neuron adds to the residual stream: its column of the down projection."""

from __future__ import annotations

from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuronlens.adapters import DownInput, ModelAdapter
from neuronlens.adapters.taps import DenseExperts, weights_here
from neuronlens.errors import AdapterError
from neuronlens.lens.norm import LinearPart
from neuronlens.neurons import NeuronSite

_CHUNK: Final = 512
"""Neurons whose columns are computed at once, where each is."""

_NUMBERS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Columns:
    """The columns of a site's down projection, whatever form its weights have.

    A dense block's down module is run: on one neuron at a time (one-hot), less what it gives for
    zeros, its bias. So weights may be quantised, transposed, or wrapped by adapters. Of routed
    experts the weights are read. Where a norm of the layer takes what the block gives, before it
    is added to the stream (`post_feedforward_layernorm` of Gemma and others), its linear part is
    applied: see `LinearPart`.

    Raises:
        AdapterError: If the block has no down projection of its own, its experts are packed, or
            the columns are not as long as the residual stream's vectors.
    """

    def __init__(self, adapter: ModelAdapter, site: NeuronSite, hidden: int) -> None:
        self.site = site
        self._model = adapter.model
        self._device, self._dtype = adapter.device, adapter.dtype
        tap: Any = adapter.tap(site)
        self._block: Any = None
        self._down: nn.Module | None = None
        if site.experts:
            self._block = _experts(adapter.model, site, tap.path)
            flag = getattr(self._block, "is_transposed", False)
            self._transposed = bool(flag) or isinstance(tap, DenseExperts)
        else:
            path = getattr(tap, "down", None)
            if path is None and isinstance(tap, DownInput):
                path = tap.path
            if path is None:
                raise AdapterError(
                    f"The block of {site.name} has no down projection of its own, so what its "
                    "neurons write is not known. Choose other sites."
                )
            self._down = adapter.model.get_submodule(path)
        found = self._raw(torch.tensor([0])).shape[-1]
        if found != hidden:
            raise AdapterError(
                f"The down projection of {site.name} gives vectors of {found} numbers, and the "
                f"residual stream has {hidden}: something else stands between them. Choose other "
                "sites."
            )
        self._norms = [LinearPart(norm, hidden) for norm in _norms_behind(adapter, site)]

    def of(self, rows: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron hidden"]:
        """The columns of some neurons, by their row in the site, in the weights' type."""
        return self._behind(self._raw(rows))

    def along(self, direction: Float[Tensor, "hidden k"]) -> Float[Tensor, "neuron k"]:
        """Every neuron's column times some directions, in float32, on the CPU.

        A dense block is run backward once per direction, which is one product with its matrix.
        What cannot be run backward is run forward, neuron by neuron.
        """
        for norm in reversed(self._norms):
            direction = norm.back(direction)
        if self._down is not None:
            try:
                return self._pulled_back(self._down, direction)
            except RuntimeError:  # some quantised layers have no backward
                pass
        return torch.cat(
            [
                (self._raw(rows).to(direction) @ direction).cpu()
                for rows in torch.arange(self.site.neurons, device=direction.device).split(_CHUNK)
            ]
        )

    def _pulled_back(
        self, down: nn.Module, direction: Float[Tensor, "hidden k"]
    ) -> Float[Tensor, "neuron k"]:
        found = []
        with torch.enable_grad(), torch.inference_mode(False):
            for one in direction.T.clone():
                given = self._zeros(1).requires_grad_()
                # Not a call: hooks in use, such as those of a deactivation, are the model's.
                out = down.forward(given)
                (gradient,) = torch.autograd.grad(out, given, one.to(out)[None])
                found.append(gradient[0].float().cpu())
        return torch.stack(found, dim=1)

    def _zeros(self, rows: int) -> Tensor:
        assert self._down is not None
        weight = next((p for p in self._down.parameters() if p.dtype in _NUMBERS), None)
        if weight is None or weight.is_meta:
            return torch.zeros(rows, self.site.width, device=self._device, dtype=self._dtype)
        return torch.zeros(rows, self.site.width, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def _raw(self, rows: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron hidden"]:
        if self._block is None:
            assert self._down is not None
            given = self._zeros(len(rows) + 1)
            given[torch.arange(len(rows)), rows.to(given.device)] = 1
            out = self._down.forward(given)
            columns: Tensor = out[:-1] - out[-1]
            return columns
        block = self._block
        with weights_here(block):
            weight: Tensor = block.down_proj
            at = rows.to(weight.device)
            expert, index = at // self.site.width, at % self.site.width
            if self._transposed:
                return weight[expert, index].clone()
            return weight[expert, :, index].clone()

    def _behind(self, columns: Tensor) -> Tensor:
        for norm in self._norms:
            columns = norm(columns)
        return columns


def _experts(model: nn.Module, site: NeuronSite, path: str) -> nn.Module:
    block = model.get_submodule(path)
    weight = getattr(block, "down_proj", None)
    if not isinstance(weight, Tensor) or weight.ndim != 3 or weight.dtype not in _NUMBERS:
        raise AdapterError(
            f"The experts of {site.name} ({type(block).__name__}) hold no down projection of plain "
            "numbers, so what their neurons write is not known. Load the model dequantised."
        )
    return block


_BEHIND: Final = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Names of a layer's norm of what its feed-forward block gives."""


def _norms_behind(adapter: ModelAdapter, site: NeuronSite) -> list[nn.Module]:
    """The norms that the block's output goes through before it is added to the stream."""
    layer = next((p for p in adapter.decoding.layers if site.path.startswith(f"{p}.")), None)
    if layer is None:
        return []
    owner = adapter.model.get_submodule(layer)
    # Gemma 4 norms the sum of a dense and a routed block, and each of them before.
    own = f"{_BEHIND[0]}_{2 if site.experts else 1}"
    names = [own, *_BEHIND]
    return [each for name in names if isinstance(each := getattr(owner, name, None), nn.Module)]

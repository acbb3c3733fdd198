"""The arithmetic of fused routed experts: their weights, their gates, their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuronlens.errors import AdapterError

GateFunction = Callable[[nn.Module, Tensor], Tensor]
"""From a block of experts and its gate-and-up projections to the act_fn output."""


def _clamped_swish(block: Any, gate_up: Tensor) -> Tensor:
    gate = gate_up.chunk(2, dim=-1)[0].clamp(max=block.swiglu_limit)
    return gate * torch.sigmoid(gate * block.swiglu_alpha)


def _interleaved_swish(block: Any, gate_up: Tensor) -> Tensor:
    gate = gate_up[..., ::2].clamp(max=block.limit)
    return gate * torch.sigmoid(gate * block.alpha)


def _clamped_silu(block: Any, gate_up: Tensor) -> Tensor:
    return F.silu(gate_up.chunk(2, dim=-1)[0].clamp(max=block.swiglu_limit))


def _both_halves(block: Any, gate_up: Tensor) -> Tensor:
    # Its act_fn takes gate and up together: what it gives is already their capped product.
    out: Tensor = block.act_fn(*gate_up.chunk(2, dim=-1))
    return out


def _first_half(block: Any, gate_up: Tensor) -> Tensor:
    out: Tensor = block.act_fn(gate_up.chunk(2, dim=-1)[0])
    return out


def _whole_input(block: Any, up: Tensor) -> Tensor:
    out: Tensor = block.act_fn(up)
    return out


ProductFunction = Callable[[Any, Tensor, Tensor], Tensor]
"""From experts, their act_fn output and their projections to what the down projection takes."""


def _clamped_up(block: Any, gate_up: Tensor) -> Tensor:
    limit = block.swiglu_limit
    return gate_up.chunk(2, dim=-1)[1].clamp(min=-limit, max=limit)


def _interleaved_product(block: Any, act: Tensor, gate_up: Tensor) -> Tensor:
    return (gate_up[..., 1::2].clamp(min=-block.limit, max=block.limit) + 1) * act


def _capped_product(block: Any, act: Tensor, gate_up: Tensor) -> Tensor:
    up = gate_up.chunk(2, dim=-1)[1].clamp(min=-block.limit, max=block.limit)
    return act.clamp(max=block.limit) * up


GATES: dict[str, GateFunction] = {
    "GptOssExperts": _interleaved_swish,
    "MiniMaxM3VLExperts": _clamped_swish,
    "Glm5NextTextExperts": _clamped_silu,
    "Inkling2Experts": _both_halves,
    "Step3p7Experts": _first_half,  # clamps what its act_fn gives
}
"""Experts, by class name, whose gate is not `act_fn(first half) * second half`."""

PRODUCTS: dict[str, ProductFunction] = {
    "GptOssExperts": _interleaved_product,
    "MiniMaxM3VLExperts": lambda block, act, gate_up: (_clamped_up(block, gate_up) + 1) * act,
    "Glm5NextTextExperts": lambda block, act, gate_up: _clamped_up(block, gate_up) * act,
    "Inkling2Experts": lambda _block, act, _gate_up: act,
    "Step3p7Experts": _capped_product,
}
"""What the down projection takes from the act_fn output, for the experts of `GATES`.

An activation can be set only if it is known. One that is not in here can be multiplied.
"""


def gate_of(block: Any) -> GateFunction:
    """What gives the act_fn output of a block.

    Raises:
        AdapterError: If the block has a gate of its own that is not known.
    """
    name = type(block).__name__
    if name in GATES:
        return GATES[name]
    if not getattr(block, "has_gate", True):
        return _whole_input
    custom = getattr(type(block), "_apply_gate", None)
    if custom is not None and custom.__name__ != "_default_apply_gate":
        raise AdapterError(
            f"{name} gates its experts in a way of its own (_apply_gate), so its act_fn output "
            "cannot be told. Add a function to neuronlens.adapters.gates.GATES."
        )
    return _first_half


def product(block: Any, projected: Tensor) -> Tensor:
    """What the down projection takes."""
    if not getattr(block, "has_gate", True):
        out: Tensor = block.act_fn(projected)
    elif hasattr(block, "_apply_gate"):
        out = block._apply_gate(projected)
    else:
        gate, up = projected.chunk(2, dim=-1)
        out = block.act_fn(gate) * up
    return out


def product_of(block: Any, keeps_zero: bool) -> ProductFunction:
    """What the down projection takes, from the act_fn output and the projections.

    Args:
        block: Of experts.
        keeps_zero: Whether an activation that is 0 in the model will not be made another.

    Raises:
        AdapterError: If the gate is not known; if it is, but what multiplies an activation is
            not, and an activation of 0 may be made another.
    """
    gate_of(block)  # a gate that is not known is refused
    name = type(block).__name__
    if name in PRODUCTS:
        return PRODUCTS[name]
    if name not in GATES:
        return _gated if getattr(block, "has_gate", True) else lambda _block, act, _up: act
    if not keeps_zero:
        raise AdapterError(
            f"{name} gates its experts in a way of its own, and what multiplies an activation "
            "there is not known, so an activation of 0 cannot be set to something else. Multiply "
            "or deactivate, or add a function to neuronlens.adapters.gates.PRODUCTS."
        )
    gate = GATES[name]

    def in_proportion(block: Any, act: Tensor, projected: Tensor) -> Tensor:
        old = gate(block, projected)
        share = torch.where(old == 0, torch.zeros_like(old), act / old)
        return product(block, projected) * share

    return in_proportion


def _gated(_block: Any, act: Tensor, gate_up: Tensor) -> Tensor:
    return act * gate_up.chunk(2, dim=-1)[1]


def takes_columns(block: Any) -> bool:
    """Whether some neurons of an expert can be worked out without the others."""
    name = type(block).__name__
    is_known = name in PRODUCTS or name not in GATES
    return is_known and not hasattr(block, "post_expert_norm")


def expert_in(
    block: Any,
    x: Float[Tensor, "row hidden"],
    expert: int,
    neurons: Int[Tensor, " neuron"] | None = None,
) -> Tensor:
    """An expert's gate-and-up projections; of some neurons, arranged as those of all are."""
    if not getattr(block, "has_gate", True):
        return _projected(block, "up_proj", x, expert, neurons)
    if neurons is not None and type(block).__name__ == "GptOssExperts":
        neurons = torch.stack([2 * neurons, 2 * neurons + 1], -1).flatten()
    elif neurons is not None:
        neurons = torch.cat([neurons, neurons + expert_width(block)])
    return _projected(block, "gate_up_proj", x, expert, neurons)


def some_out(
    block: Any, product: Tensor, expert: int, neurons: Int[Tensor, " neuron"]
) -> Float[Tensor, "row hidden"]:
    """What some neurons of an expert write."""
    weight = block.down_proj[expert]
    if not getattr(block, "is_transposed", False):
        weight = weight.T
    out: Tensor = product @ weight.index_select(0, neurons)
    return out


def expert_out(block: Any, product: Tensor, expert: int) -> Tensor:
    """What an expert gives, before it is weighted."""
    out = _projected(block, "down_proj", product, expert)
    if hasattr(block, "post_expert_norm"):
        out = block.post_expert_norm(out)
    return out


def _projected(
    block: Any,
    name: str,
    x: Tensor,
    expert: int,
    some: Int[Tensor, " out"] | None = None,
) -> Tensor:
    weight = getattr(block, name)[expert]
    bias = getattr(block, f"{name}_bias", None)
    if not getattr(block, "is_transposed", False):
        weight = weight.T
    if some is not None:
        weight = weight.index_select(1, some)
    out: Tensor = x @ weight
    if bias is not None:
        out = out + (bias[expert] if some is None else bias[expert].index_select(0, some))
    return out


def expert_width(block: Any) -> int:
    """Neurons of each expert."""
    for name in ("intermediate_dim", "intermediate_size", "expert_dim"):
        if isinstance(getattr(block, name, None), int):  # quantised weights have other shapes
            return int(getattr(block, name))
    axis = 1 if getattr(block, "is_transposed", False) else 2
    return int(block.down_proj.shape[axis])

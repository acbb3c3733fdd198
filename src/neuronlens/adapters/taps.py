"""How a site's activations are read while the model runs, and written: the few mechanisms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuronlens.activations import Activation, Routed
from neuronlens.errors import AdapterError
from neuronlens.hooks import Call, Point

NeuronKind = Literal["act_fn", "down_input"]
"""What is called a neuron's activation: the act_fn output, or what the down projection takes."""

See = Callable[[Activation], None]


@dataclass(frozen=True)
class Change:
    """What to make of some neurons' act_fn outputs.

    Attributes:
        to: From the values `[*axes, changed neuron]` to the new ones.
        neurons: Which are changed, by expert; under None where the block is dense.
    """

    to: Callable[[Tensor], Tensor]
    neurons: Mapping[int | None, Int[Tensor, " neuron"]]

    def on(self, device: torch.device, expert: int | None = None) -> Int[Tensor, " neuron"]:
        """The changed neurons of a block, or of one expert, on a device; sent there once."""
        return self._sent((expert, device))

    @cached_property
    def _sent(self) -> Callable[[tuple[int | None, torch.device]], Tensor]:
        return cache(lambda key: self.neurons[key[0]].to(key[1]))


class Tap(Protocol):
    """A way to read and write the activations of one site."""

    @property
    def path(self) -> str:
        """Dotted path of the module that holds the activation, or its block."""
        ...

    def reading(self, model: nn.Module, see: See, kind: NeuronKind) -> list[Point]:
        """Where to attach so that `see` is given the activations, `[..., neuron]`."""
        ...

    def writing(self, model: nn.Module, change: Change) -> list[Point]:
        """Where to attach so that some act_fn outputs are changed before they are used."""
        ...


@dataclass(frozen=True)
class Layout:
    """How an activation lies in the tensor that holds it."""

    arrange: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor, torch.Size], Tensor]


LAST = Layout(lambda out: out, lambda new, shape: new)
"""`[..., neuron]`."""
CHANNELS_FIRST = Layout(lambda out: out.movedim(1, -1), lambda new, shape: new.movedim(-1, 1))
"""`[image, neuron, row, column]`, as convolutions have it."""
EXPERTS_FIRST = Layout(
    lambda out: out.transpose(0, 1).flatten(1),
    lambda new, shape: new.unflatten(1, (shape[0], shape[2])).transpose(0, 1),
)
"""`[expert, token, neuron]` of experts that all tokens run through: made `[token, neuron]`."""


def _changed(values: Tensor, change: Change) -> Tensor:
    index = change.on(values.device)
    new = values.clone()
    new[..., index] = change.to(values[..., index])
    return new


@dataclass(frozen=True)
class ActOutput:
    """The output of an activation module, between two projections.

    Attributes:
        path: Of the activation module.
        down: Of the module that takes the activation, or its product with an up projection.
        gated: Whether there is such a product.
        layout: How the activation lies in the output.
        call: Which of the module's calls in a forward; 0 where there is one.
        calls: How many calls there are in a forward.
    """

    path: str
    down: str | None = None
    gated: bool = False
    layout: Layout = LAST
    call: int = 0
    calls: int = 1

    def reading(self, model: nn.Module, see: See, kind: NeuronKind) -> list[Point]:
        """The module's output; its down projection's input for gated blocks, if asked for."""
        if kind == "down_input" and self.gated:
            if self.down is None:
                raise AdapterError(
                    f"The block at {self.path!r} has no projection of its own behind the product, "
                    "so down_input cannot be read. Use neuron='act_fn'."
                )
            return _input_of(model.get_submodule(self.down), self.layout, see)
        return [self._point(model, lambda call: see(self.layout.arrange(call.out)))]

    def writing(self, model: nn.Module, change: Change) -> list[Point]:
        """Replaces the module's output."""

        def write(call: Call) -> Tensor:
            new = _changed(self.layout.arrange(call.out), change)
            return self.layout.restore(new, call.out.shape)

        return [self._point(model, write)]

    def _point(self, model: nn.Module, hook: Callable[[Call], Any]) -> Point:
        return Point(model.get_submodule(self.path), hook, call=self.call, calls=self.calls)


def _input_of(module: nn.Module, layout: Layout, see: See) -> list[Point]:
    return [Point(module, lambda call: see(layout.arrange(_first(call))), before=True)]


def _first(call: Call) -> Any:
    return call.args[0] if call.args else next(iter(call.kwargs.values()))


@dataclass(frozen=True)
class DownInput:
    """The input of the projection that takes the activation as it is.

    For blocks without a gate whose activation is no module of their own: a function, or one
    object that the whole process shares.
    """

    path: str
    layout: Layout = LAST

    def reading(self, model: nn.Module, see: See, kind: NeuronKind) -> list[Point]:
        """The projection's input, which is both kinds of neuron."""
        return _input_of(model.get_submodule(self.path), self.layout, see)

    def writing(self, model: nn.Module, change: Change) -> list[Point]:
        """Replaces the projection's input."""

        def write(call: Call) -> Tensor:
            given: Tensor = _first(call)
            new = _changed(self.layout.arrange(given), change)
            return self.layout.restore(new, given.shape)

        return [Point(model.get_submodule(self.path), write, before=True)]


def _plain_product(act: Tensor, before: Tensor, up: Tensor | None) -> Tensor:
    return act if up is None else act * up


@dataclass(frozen=True)
class Functional:
    """A function applied to a projection's output, in a gated block.

    Attributes:
        path: Of the block.
        before: Path of the projection whose output is activated.
        act: From that output to the act_fn output `[..., neuron]`.
        down: Path of the down projection.
        up: Path of the up projection; None where `before` is both, or there is none.
        product: From act_fn output, `before`'s output and the up projection's to what the
            down projection takes.
    """

    path: str
    before: str
    act: Callable[[Tensor], Tensor]
    down: str
    up: str | None = None
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _plain_product

    def reading(self, model: nn.Module, see: See, kind: NeuronKind) -> list[Point]:
        """The projection's output, through the function."""
        if kind == "down_input":
            return _input_of(model.get_submodule(self.down), LAST, see)

        def look(call: Call) -> None:
            with torch.no_grad():
                see(self.act(call.out))

        return [
            Point(model.get_submodule(self.before), look),
            # Its input is not needed, but a kernel that bypassed it would be noticed.
            Point(model.get_submodule(self.down), lambda call: None, before=True),
        ]

    def writing(self, model: nn.Module, change: Change) -> list[Point]:
        """Replaces some columns of the down projection's input."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, call: Call) -> None:
            seen[name] = call.out

        def write(call: Call) -> Tensor:
            before, up = seen.pop("before"), seen.pop("up", None)
            act = _changed(self.act(before), change)
            index = change.on(act.device)
            new: Tensor = _first(call).clone()
            new[..., index] = self.product(act, before, up)[..., index].to(new.dtype)
            return new

        points = [Point(model.get_submodule(self.before), partial(keep, "before"))]
        if self.up is not None:
            points.append(Point(model.get_submodule(self.up), partial(keep, "up")))
        return [*points, Point(model.get_submodule(self.down), write, before=True)]


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


GATES: dict[str, GateFunction] = {
    "GptOssExperts": _interleaved_swish,
    "MiniMaxM3VLExperts": _clamped_swish,
    "Glm5NextTextExperts": _clamped_silu,
    "Inkling2Experts": _both_halves,
    "Step3p7Experts": _first_half,  # clamps what its act_fn gives
}
"""Experts, by class name, whose gate is not `act_fn(first half) * second half`."""


@dataclass(frozen=True)
class Experts:
    """Fused routed experts: recomputed from what came in and their 3-D weights.

    So it is the same whatever implementation runs them (eager, batched, grouped), in token
    order. It costs the first of their two multiplications again.

    Attributes:
        path: Of the module that holds the weights; its forward takes the tokens
            `[row, hidden]`, the chosen experts `[row, chosen]` and their weights.
    """

    path: str

    def reading(self, model: nn.Module, see: See, kind: NeuronKind) -> list[Point]:
        """Before the block runs."""
        block: Any = _readable(model, self.path)
        gate = _gate_of(block) if kind == "act_fn" else _product

        def look(call: Call) -> None:
            x, expert, _ = _routing(call)
            with torch.no_grad(), weights_here(block):
                see(_per_expert(block, x, expert, gate))

        return [Point(block, look, before=True)]

    def writing(self, model: nn.Module, change: Change) -> list[Point]:
        """Adds the difference that the change makes to the block's output."""
        block: Any = _readable(model, self.path)
        gate = _gate_of(block)

        def write(call: Call) -> Tensor:
            x, expert, weight = _routing(call)
            out: Tensor = call.out.clone()
            flat = out.reshape(-1, out.shape[-1])
            with weights_here(block):
                for number in change.neurons:
                    if number is None:
                        continue
                    token, chosen = (expert == number).nonzero(as_tuple=True)
                    if len(token) == 0:
                        continue
                    at = change.on(out.device, number)
                    projected = _in(block, x[token], number)
                    product, act = _product(block, projected), gate(block, projected)
                    old, new = act[:, at], change.to(act[:, at])
                    changed = product.clone()
                    # The product is linear in the activation. An activation of 0 stays 0: what
                    # it would be multiplied with is not known.
                    share = torch.where(old == 0, torch.zeros_like(old), new / old)
                    changed[:, at] = product[:, at] * share
                    difference = _out(block, changed, number) - _out(block, product, number)
                    flat.index_add_(
                        0, token, (difference * weight[token, chosen, None]).to(out.dtype)
                    )
            return flat.reshape(out.shape)

        return [Point(block, write)]


def _readable(model: nn.Module, path: str) -> nn.Module:
    """The block of experts at `path`, if its weights are numbers that can be multiplied with."""
    block = model.get_submodule(path)
    for name, weight in block.named_parameters(recurse=False):
        if weight.ndim > 2 and weight.dtype not in _NUMBERS:  # packed ones may have four axes
            raise AdapterError(
                f"The experts at {path!r} ({type(block).__name__}) are stored as {weight.dtype} "
                f"({name}), so their activations cannot be recomputed. Load the model dequantised "
                "(for example with Mxfp4Config(dequantize=True)), or choose other sites."
            )
    return block


_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _gate_of(block: Any) -> GateFunction:
    name = type(block).__name__
    if name in GATES:
        return GATES[name]
    if not getattr(block, "has_gate", True):
        return _whole_input
    custom = getattr(type(block), "_apply_gate", None)
    if custom is not None and custom.__name__ != "_default_apply_gate":
        raise AdapterError(
            f"{name} gates its experts in a way of its own (_apply_gate), so its act_fn output "
            "cannot be told. Add a function to neuronlens.adapters.taps.GATES."
        )
    return _first_half


def _product(block: Any, projected: Tensor) -> Tensor:
    """What the down projection takes."""
    if not getattr(block, "has_gate", True):
        out: Tensor = block.act_fn(projected)
    elif hasattr(block, "_apply_gate"):
        out = block._apply_gate(projected)
    else:
        gate, up = projected.chunk(2, dim=-1)
        out = block.act_fn(gate) * up
    return out


def _routing(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x, expert, weight = (*call.args, *call.kwargs.values())[:3]
    rows = x.reshape(-1, x.shape[-1])
    return rows, expert.reshape(-1, expert.shape[-1]), weight.reshape(-1, expert.shape[-1])


def _in(block: Any, x: Float[Tensor, "row hidden"], expert: int) -> Tensor:
    name = "gate_up_proj" if getattr(block, "has_gate", True) else "up_proj"
    return _projected(block, name, x, expert)


def _out(block: Any, product: Tensor, expert: int) -> Tensor:
    out = _projected(block, "down_proj", product, expert)
    if hasattr(block, "post_expert_norm"):
        out = block.post_expert_norm(out)
    return out


def _projected(block: Any, name: str, x: Tensor, expert: int) -> Tensor:
    weight = getattr(block, name)[expert]
    bias = getattr(block, f"{name}_bias", None)
    out: Tensor = x @ (weight if getattr(block, "is_transposed", False) else weight.T)
    return out if bias is None else out + bias[expert]


def _per_expert(
    block: Any,
    x: Float[Tensor, "row hidden"],
    expert: Int[Tensor, "row chosen"],
    gate: GateFunction,
) -> Routed:
    count = int(block.num_experts)
    # A number beyond the last expert stands for "none". One sort and one look at the counts: a
    # search per expert would wait for the device each time.
    flat = expert.flatten().clamp(max=count)
    sizes = torch.bincount(flat, minlength=count + 1).tolist()
    places = flat.argsort(stable=True).split(sizes)
    values: Tensor | None = None
    for number, at in enumerate(places[:count]):
        if len(at) == 0:
            continue
        act = gate(block, _in(block, x[at // expert.shape[1]], number))
        if values is None:
            values = act.new_full((expert.numel(), act.shape[-1]), float("nan"))
        values[at] = act
    if values is None:  # no token came in
        values = x.new_full((expert.numel(), expert_width(block)), float("nan"))
    known = torch.where(expert < count, expert, -1)
    return Routed(values.reshape(*expert.shape, -1), known, count)


def expert_width(block: Any) -> int:
    """Neurons of each expert."""
    for name in ("intermediate_dim", "intermediate_size", "expert_dim"):
        if isinstance(getattr(block, name, None), int):  # quantised weights have other shapes
            return int(getattr(block, name))
    axis = 1 if getattr(block, "is_transposed", False) else 2
    return int(block.down_proj.shape[axis])


@contextmanager
def weights_here(block: nn.Module) -> Iterator[None]:
    """Weights that accelerate keeps elsewhere are brought in for the length of the block."""
    if not hasattr(block, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(block):
        yield


@dataclass(frozen=True)
class DenseExperts:
    """Llama 4's experts: every token runs through each, multiplied by its routing score.

    An unrouted token comes in as zeros; here it counts as not routed.
    """

    path: str

    def reading(self, model: nn.Module, see: See, kind: NeuronKind) -> list[Point]:
        """The output of the experts' act_fn, expert by expert."""
        block: Any = _readable(model, self.path)

        def look(call: Call) -> None:
            with torch.no_grad(), weights_here(block):
                x, gate, up = self._parts(block, _first(call))
                act = block.act_fn.forward(gate)  # a call of the module would count as its own
                see(self._routed(x, act if kind == "act_fn" else up * act))

        return [Point(block, look, before=True)]

    def writing(self, model: nn.Module, change: Change) -> list[Point]:
        """Replaces the output of the experts' act_fn."""
        block: Any = _readable(model, self.path)

        def write(call: Call) -> Tensor:
            new: Tensor = call.out.clone()
            for expert in change.neurons:
                at = change.on(new.device, expert)
                new[expert, :, at] = change.to(new[expert, :, at])
            return new

        return [Point(block.act_fn, write)]

    @staticmethod
    def _parts(block: Any, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = given.view(block.num_experts, -1, block.hidden_size)
        gate, up = torch.bmm(x, block.gate_up_proj).chunk(2, dim=-1)
        return x, gate, up

    @staticmethod
    def _routed(x: Float[Tensor, "expert row hidden"], act: Tensor) -> Routed:
        sent = (x != 0).any(-1).T  # [row, expert]
        chosen = int(sent.sum(1).max()) if len(sent) else 0
        expert = sent.float().topk(chosen, dim=1).indices
        is_sent = sent.gather(1, expert)
        rows = torch.arange(len(sent), device=x.device)[:, None]
        values = act[expert, rows]
        values[~is_sent] = float("nan")
        return Routed(values, torch.where(is_sent, expert, -1), len(x))

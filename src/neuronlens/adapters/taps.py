"""How a site's activations are read while the model runs, and written: the few mechanisms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuronlens.activations import Activation, Routed
from neuronlens.adapters.change import Change
from neuronlens.adapters.gates import (
    GateFunction,
    ProductFunction,
    expert_in,
    expert_out,
    expert_width,
    gate_of,
    product,
    product_of,
    some_out,
    takes_columns,
)
from neuronlens.errors import AdapterError
from neuronlens.hooks import Call, Point, is_only_ours

NeuronKind = Literal["act_fn", "down_input"]
"""What is called a neuron's activation: the act_fn output, or what the down projection takes."""

See = Callable[[Activation], None]


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
        """Where to attach so that some act_fn outputs are changed before they are used.

        Raises:
            AdapterError: If they cannot be changed in that way.
        """
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
        """Replaces the module's output, or writes into it where nobody else has it."""

        def write(call: Call) -> Tensor:
            out: Tensor = call.out
            if not is_only_ours(call):
                out = out.clone()
            values = self.layout.arrange(out)
            change.begin(values.numel() // values.shape[-1])
            new = change.within(values)
            return self.layout.restore(new, out.shape)

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
            given: Tensor = _first(call).clone()
            change.begin(given.numel() // self.layout.arrange(given).shape[-1])
            return self.layout.restore(change.within(self.layout.arrange(given)), given.shape)

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
        whole = self.product is not _plain_product

        def keep(name: str, call: Call) -> None:
            seen[name] = call.out

        def write(call: Call) -> Tensor:
            before, up = seen.pop("before"), seen.pop("up", None)
            given: Tensor = _first(call)
            change.begin(given.numel() // given.shape[-1])
            at = change.columns(None, given.device)
            if not whole:  # the function and the product take each neuron by itself
                before = before.index_select(-1, at)
                up = None if up is None else up.index_select(-1, at)
            act = change.earlier(self.act(before), whole=whole)
            product = self.product(change.later(act, whole=whole), before, up)
            if whole:
                product = product.index_select(-1, at)
            return given.index_copy(-1, at, product.to(given.dtype))

        points = [Point(model.get_submodule(self.before), partial(keep, "before"))]
        if self.up is not None:
            points.append(Point(model.get_submodule(self.up), partial(keep, "up")))
        return [*points, Point(model.get_submodule(self.down), write, before=True)]


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
        gate = gate_of(block) if kind == "act_fn" else product

        def look(call: Call) -> None:
            x, expert, _ = _routing(call)
            with torch.no_grad(), weights_here(block):
                see(_per_expert(block, x, expert, gate))

        return [Point(block, look, before=True)]

    def writing(self, model: nn.Module, change: Change) -> list[Point]:
        """Adds the difference that the change makes to the block's output."""
        block: Any = _readable(model, self.path)
        product = product_of(block, change.keeps_zero)

        def write(call: Call) -> Tensor:
            x, expert, weight = _routing(call)
            out: Tensor = call.out if is_only_ours(call) else call.out.clone()
            flat = out.reshape(-1, out.shape[-1])
            change.begin(len(x))
            self.add_difference(block, change, product, (x, expert, weight), flat)
            return flat.reshape(out.shape)

        return [Point(block, write)]

    def product(self, model: nn.Module, change: Change) -> ProductFunction:
        """What a change needs to know of the block: what multiplies its activations.

        Raises:
            AdapterError: If that is not known, and the change may raise an activation of 0.
        """
        return product_of(_readable(model, self.path), change.keeps_zero)

    @staticmethod
    def add_difference(
        block: Any,
        change: Change,
        product: ProductFunction,
        routed: tuple[Tensor, Tensor, Tensor],
        out: Float[Tensor, "row hidden"],
        place: Int[Tensor, " row"] | None = None,
    ) -> None:
        """Add what a change makes of the block's output to `out`.

        Args:
            block: The module.
            change: That has begun.
            product: As `product` gives it.
            routed: What the block is given: tokens, their experts, their weights.
            out: What it is added to.
            place: Which of the site's rows the tokens are; all, in order, for None.
        """
        x, expert, weight = routed
        gate, chosen = gate_of(block), expert.shape[1]
        takes_some = takes_columns(block)
        with weights_here(block):
            places = _places(expert, int(block.num_experts))
            for number in change.experts:
                if number is None or len(places[number]) == 0:
                    continue
                token = places[number] // chosen
                row = token if place is None else place[token]
                at = change.columns(number, out.device)
                projected = expert_in(block, x[token], number, at if takes_some else None)
                how: dict[str, Any] = {"whole": not takes_some, "token": row}
                before = change.earlier(gate(block, projected), number, **how)
                after = change.later(before, number, **how)
                old, new = (product(block, each, projected) for each in (before, after))
                if takes_some:
                    difference = some_out(block, new - old, number, at)
                else:
                    difference = expert_out(block, new, number) - expert_out(block, old, number)
                share = difference * weight.flatten()[places[number], None]
                out.index_add_(0, token, share.to(out.dtype))


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


def _routing(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x, expert, weight = (*call.args, *call.kwargs.values())[:3]
    rows = x.reshape(-1, x.shape[-1])
    return rows, expert.reshape(-1, expert.shape[-1]), weight.reshape(-1, expert.shape[-1])


def _per_expert(
    block: Any,
    x: Float[Tensor, "row hidden"],
    expert: Int[Tensor, "row chosen"],
    gate: GateFunction,
) -> Routed:
    count = int(block.num_experts)
    values: Tensor | None = None
    for number, at in enumerate(_places(expert, count)):
        if len(at) == 0:
            continue
        act = gate(block, expert_in(block, x[at // expert.shape[1]], number))
        if values is None:
            values = act.new_full((expert.numel(), act.shape[-1]), float("nan"))
        values[at] = act
    if values is None:  # no token came in
        values = x.new_full((expert.numel(), expert_width(block)), float("nan"))
    known = torch.where(expert < count, expert, -1)
    return Routed(values.reshape(*expert.shape, -1), known, count)


def _places(expert: Int[Tensor, "row chosen"], count: int) -> tuple[Int[Tensor, " place"], ...]:
    """By expert, the flat positions at which it was chosen.

    A number beyond the last expert stands for "none". One sort and one look at the counts: a
    search per expert would wait for the device each time.
    """
    flat = expert.flatten().clamp(max=count)
    sizes = torch.bincount(flat, minlength=count + 1).tolist()
    places: tuple[Tensor, ...] = flat.argsort(stable=True).split(sizes)
    return places[:count]


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
            new: Tensor = call.out if is_only_ours(call) else call.out.clone()
            change.begin(new.shape[1])
            for expert in change.experts:
                if expert is not None:
                    change.within(new[expert], expert)
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

"""Finding feed-forward blocks by their structure, without family knowledge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from neuronlens.adapters.gates import expert_width
from neuronlens.adapters.taps import (
    CHANNELS_FIRST,
    LAST,
    ActOutput,
    DenseExperts,
    DownInput,
    Experts,
    Tap,
)

_GATES = (nn.Tanh, nn.Sigmoid, nn.Softmax, nn.LogSoftmax)
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")


_DOWN_NAMES = ("down", "out", "fc2", "w2", "c_proj", "wo", "linear_2", "lin2")
"""What tells a down projection from the others where sizes do not."""


@dataclass(frozen=True)
class Block:
    """One activation of one feed-forward block.

    Attributes:
        path: Dotted path of the block: the module that owns the activation.
        name: Of the activation within the block; "experts" for a routed one.
        tap: How its activations are read.
        width: Neurons (per expert, where routed).
        experts: Number of routed experts; 0 for a dense block.
    """

    path: str
    name: str
    tap: Tap
    width: int
    experts: int = 0


Special = Callable[[str, Any], Iterable[Block]]
"""From the path of a block and the block itself to its activations."""

_special: dict[str, Special] = {}


def special_block(*class_names: str) -> Callable[[Special], Special]:
    """Declare how blocks of these classes are read, where structure alone does not tell.

    For an activation that is a function, one that is called twice, and the like. The
    function is given the block's path and the block, and yields its activations; what is
    inside the block is not searched further.
    """

    def add(find: Special) -> Special:
        _special.update(dict.fromkeys(class_names, find))
        return find

    return add


def feed_forward_blocks(model: nn.Module, path: str = "") -> Iterator[Block]:
    """Every activation between two projections in the submodule at `path`, in module order.

    Paths are relative to `model`. Tanh and sigmoid modules are gates or poolers, not
    feed-forward activations.
    """
    inside: str | None = None
    for name, parent in model.get_submodule(path).named_modules(prefix=path):
        if inside is not None and name.startswith(inside):
            continue
        find = _special.get(type(parent).__name__)
        if find is not None:
            inside = f"{name}."
            yield from find(name, parent)
            continue
        if _is_experts(parent):
            yield _experts(name, parent)
            continue
        acts = [(key, child) for key, child in parent.named_children() if is_activation(child)]
        for key, child in acts:
            found = _between(model, name, parent, key)
            if found is None:
                continue
            down, gated = found
            width, _ = features(model.get_submodule(down)) or (0, 0)
            is_image = isinstance(_projection(model.get_submodule(down)), nn.Conv2d)
            layout = CHANNELS_FIRST if is_image else LAST
            tap: Tap = ActOutput(f"{name}.{key}".lstrip("."), down, gated, layout)
            if _is_shared(child) and not gated:
                tap = DownInput(down, layout)
            yield Block(name, key, tap, width)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an element-wise activation function, and no gate."""
    return type(module).__module__ in _ACTIVATION_MODULES and not isinstance(
        module, (*_GATES, nn.MultiheadAttention)
    )


def _is_shared(act: nn.Module) -> bool:
    """Whether the activation is an object of the library that every model shares."""
    from transformers import activations

    return any(value is act for value in vars(activations).values())


def features(module: nn.Module) -> tuple[int, int] | None:
    """How many features a projection takes and gives; None for what is no projection."""
    projection = _projection(module)
    if projection is None:
        return None
    if isinstance(projection, nn.Conv2d):
        return projection.in_channels, projection.out_channels
    if hasattr(projection, "nf"):  # GPT-2 keeps its projections transposed
        return int(projection.weight.shape[0]), int(projection.nf)
    return int(projection.in_features), int(projection.out_features)


def _projection(module: nn.Module) -> Any:
    """The linear map that a module is, or wraps and nothing more; None for another."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module  # quantised ones are subclasses, or of a class of their own
    if isinstance(module, nn.Conv2d):
        return module if set(module.kernel_size) == {1} and module.groups == 1 else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module
    children = list(module.children())
    if len(children) == 1 and isinstance(children[0], nn.Linear):
        return children[0] if not list(module.parameters(recurse=False)) else None
    return None


def _between(model: nn.Module, path: str, parent: nn.Module, key: str) -> tuple[str, bool] | None:
    """The down projection behind the activation `key`, and whether its product goes in."""
    children = [(name, features(child)) for name, child in parent.named_children()]
    projections = [(name, size) for name, size in children if size is not None]
    if isinstance(parent, nn.Sequential):
        at = next(i for i, (name, _) in enumerate(children) if name == key)
        before = [size for _, size in children[:at] if size is not None]
        after = [name for name, size in children[at + 1 :] if size is not None]
        return (f"{path}.{after[0]}", False) if before and after else None
    if len(projections) >= 2:
        best: tuple[int, int, str, bool] | None = None
        for order, (name, (takes, _)) in enumerate(projections):
            others = [gives for other, (_, gives) in projections if other != name]
            feeding = others.count(takes)
            is_fused = 2 * takes in others
            if feeding or is_fused:
                likely = 2 * max(feeding, int(is_fused)) + any(word in name for word in _DOWN_NAMES)
                found = (likely, order, f"{path}.{name}".lstrip("."), feeding != 1)
                best = found if best is None else max(best, found)
        return None if best is None else (best[2], best[3])
    if len(projections) == 1 and "." in path:
        return _in_sibling(model, path, projections[0][1][1])
    return None


def _in_sibling(model: nn.Module, path: str, width: int) -> tuple[str, bool] | None:
    """The down projection in the module beside the block, as BERT and its like have it."""
    owner, name = path.rsplit(".", 1)
    siblings = dict(model.get_submodule(owner).named_children())
    wanted = name.replace("intermediate", "output")
    for sibling in sorted(siblings, key=lambda other: other != wanted):
        if sibling == name:
            continue
        for child_name, child in siblings[sibling].named_children():
            size = features(child)
            if size is not None and size[0] == width and not isinstance(child, nn.Conv2d):
                return f"{owner}.{sibling}.{child_name}", False
    return None


def _is_experts(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    down = own.get("down_proj")
    return down is not None and down.ndim >= 3 and ("gate_up_proj" in own or "up_proj" in own)


def _experts(path: str, block: Any) -> Block:
    if "Llama4TextExperts" in type(block).__name__:
        return Block(path, "experts", DenseExperts(path), block.expert_dim, block.num_experts)
    count = int(block.down_proj.shape[0])
    return Block(path, "experts", Experts(path), expert_width(block), count)


def list_of(path: str) -> str | None:
    """The path of the list of layers a block is in; None if it is in none."""
    steps = path.split(".")
    numbered = [i for i, step in enumerate(steps) if step.isdigit() and i + 1 < len(steps)]
    return ".".join(steps[: numbered[0]]) if numbered else None

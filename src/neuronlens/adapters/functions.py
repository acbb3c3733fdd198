"""Blocks whose activation is a function, established by running a copy of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronlens.adapters.discover import Block, features, is_activation
from neuronlens.adapters.taps import DownInput, Functional, Tap
from neuronlens.errors import WRITE_ONE, AdapterError
from neuronlens.hooks import Call, Point, attached

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "gelu (quick)": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""Activation functions that a block is tried for."""


def functional_blocks(model: nn.Module, say: Callable[[str], None]) -> Iterator[Block]:
    """Blocks of two or three projections without an activation module, tried for a function."""
    found: dict[tuple[object, ...], tuple[str, str, str | None, str]] = {}
    for path, block in model.named_modules():
        projections = _candidate(block)
        if projections is None:
            continue
        key = (type(block), tuple(sorted(projections.items())))
        if key not in found:
            established = _tried(block, list(projections))
            if established is None:
                continue
            found[key] = established
            before, function, up, down = established
            product = f" * {up}" if up else ""
            say(
                f"{type(block).__name__}: {down} takes {function}({before}){product}, as a copy "
                "of the block with random weights showed"
            )
        before, function, up, down = found[key]
        width, _ = features(block.get_submodule(down)) or (0, 0)
        tap: Tap = DownInput(f"{path}.{down}")
        if up is not None:
            tap = Functional(
                path, f"{path}.{before}", FUNCTIONS[function], f"{path}.{down}", f"{path}.{up}"
            )
        yield Block(path, function, tap, width)


def _candidate(block: nn.Module) -> dict[str, tuple[int, int]] | None:
    """The projections of a block without activation module: into a width and out of it.

    None for what is no such block.
    """
    children = dict(block.named_children())
    if any(is_activation(child) for child in children.values()) or isinstance(
        block, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    ):
        return None
    sizes = {name: size for name, child in children.items() if (size := features(child))}
    if len(sizes) not in (2, 3):
        return None
    for down, (width, out) in sizes.items():
        rest = [size for name, size in sizes.items() if name != down]
        if all(size == (out, width) for size in rest) and width != out:
            return sizes
    return None


def is_feed_forward(block: nn.Module) -> bool:
    """Whether a block without an activation module is two or three projections and a function."""
    projections = _candidate(block)
    if projections is None:
        return False
    try:
        return _tried(block, list(projections)) is not None
    except AdapterError:  # gated by a function that is not known, or two maps in a row
        return len(projections) == 3


def _tried(block: nn.Module, names: Sequence[str]) -> tuple[str, str, str | None, str] | None:
    """Which projection goes through which function, and into which: by running a copy."""
    twin = copy.deepcopy(block).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            taken[name], given[name] = call.args[0], call.out

        return see

    points = {name: [Point(twin.get_submodule(name), keep(name))] for name in names}
    wide = features(twin.get_submodule(names[0])) or (1, 1)
    down = next(
        name
        for name in names
        if all(
            (features(twin.get_submodule(o)) or (0, 0))[1]
            == (features(twin.get_submodule(name)) or (0, 0))[0]
            for o in names
            if o != name
        )
    )
    first = next(name for name in names if name != down)
    wide = features(twin.get_submodule(first)) or wide
    try:
        with torch.no_grad(), attached(points):
            twin(torch.randn(1, 5, wide[0], generator=generator))
    except Exception:  # noqa: BLE001 - whatever it is, it is no block that takes one tensor
        return None
    others = [name for name in names if name != down]
    for before in others:
        up = next((name for name in others if name != before), None)
        for function, act in FUNCTIONS.items():
            value = act(given[before])
            value = value if up is None else value * given[up]
            if value.shape == taken[down].shape and torch.allclose(value, taken[down], atol=1e-5):
                return before, function, up, down
    raise AdapterError(
        f"{type(block).__name__} looks like a feed-forward block ({', '.join(names)}), but what "
        f"{down} takes is none of {', '.join(FUNCTIONS)} of the other projections. {WRITE_ONE} "
        "Declare it with special_block."
    )

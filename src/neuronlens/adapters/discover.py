"""Finding feed-forward blocks by their structure, without family knowledge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

_GATES = (nn.Tanh, nn.Sigmoid, nn.Softmax)
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")


@dataclass(frozen=True)
class Block:
    """An activation module between two projections.

    `layer` is the number in the last numbered step of the path, None without one; `width`
    is what the down-projection takes.
    """

    path: str
    layer: int | None
    width: int


def feed_forward_blocks(root: nn.Module, path: str) -> Iterator[Block]:
    """Every activation module under `root` whose parent owns two or more projections.

    Paths are relative to the model of which `root` is the submodule at `path`. Tanh and
    sigmoid modules are gates or poolers, not feed-forward activations.
    """
    for name, parent in root.named_modules(prefix=path):
        projections = [child for child in parent.children() if isinstance(child, nn.Linear)]
        if len(projections) < 2:
            continue
        for attribute, child in parent.named_children():
            if type(child).__module__ in _ACTIVATION_MODULES and not isinstance(child, _GATES):
                numbers = [int(step) for step in name.split(".") if step.isdigit()]
                layer = numbers[-1] if numbers else None
                yield Block(f"{name}.{attribute}", layer, projections[-1].in_features)

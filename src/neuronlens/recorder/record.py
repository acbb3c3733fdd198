"""Passing the activations of one forward on, site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from neuronlens.activations import Activation
from neuronlens.adapters import ModelAdapter, SiteSelection
from neuronlens.errors import CaptureError
from neuronlens.hooks import (
    Call,
    Point,
    attached,
    recomputing,
    refuse_compiled,
    uncompiled,
)
from neuronlens.neurons import NeuronSite
from neuronlens.recorder.stream import (
    conditional,
    copied,
    detached,
    on_stream,
    reading,
    row_count,
)
from neuronlens.tokens import TokenMap


class Sink(Protocol):
    """What takes activations while the model runs."""

    def take(self, site: NeuronSite, activation: Activation, tokens: TokenMap) -> None:
        """Take one site's act_fn output of one forward.

        Args:
            site: The site that has just run.
            activation: Its output, on the layer's device and in its dtype, detached:
                `[*token axes, neuron]`, or `Routed` for routed experts. It belongs to the
                model: reduce or copy it, keep no view of it.
            tokens: What the leading axes of `activation` are.
        """
        ...


class _Stopped(Exception):  # noqa: N818
    """Ends the forward of a block that needs no more of it; no user sees it."""


@contextmanager
def record(
    adapter: ModelAdapter,
    sites: SiteSelection,
    sink: Sink,
    tokens: Mapping[str, TokenMap],
    *,
    stop: bool = False,
) -> Iterator[None]:
    """Pass every chosen site's activations to `sink` during one forward in the block.

    Args:
        adapter: Of the model.
        sites: Sites, modules, names, or None for every site.
        sink: Takes the activations, site by site, as they are computed.
        tokens: The token map of each stream, from `encode` or `adapter.tokens`.
        stop: Whether to end the forward, and with it the block (what stands behind the forward
            is not run), when every chosen site has passed its activations.

    Raises:
        CaptureError: If a site did not run, ran twice, or its output is not shaped like
            its stream.
    """
    chosen = {site.name: site for site in adapter.select(sites)}
    waiting: dict[str, list[Activation]] = {name: [] for name in chosen}
    done: set[str] = set()

    def see(name: str, out: Activation) -> None:
        if recomputing():
            return
        site = chosen[name]
        if name in done:
            raise CaptureError(
                f"Site {name} ran twice in one block of record(). Run one forward per block; for "
                "generate() use ActivationRecorder."
            )
        if site.stream not in tokens:
            raise CaptureError(
                f"Site {name} runs on the stream {site.stream!r}, of which no token map was given "
                f"(given: {', '.join(tokens)})."
            )
        there = tokens[site.stream]
        # A block may run once per tile: its tokens are complete when the stream's are.
        before = waiting[name]
        rows = sum(map(row_count, before)) + row_count(out)
        if rows < len(there):
            before.append(copied(out))
            return
        whole = on_stream(site, [*before, detached(out)], there)
        done.add(name)
        waiting[name] = []
        sink.take(site, whole, there)

    refuse_compiled(adapter.model)
    points = reading(adapter, chosen, see)
    if stop:
        points = _stopping(points, lambda: len(done) == len(chosen), done)
    with uncompiled(), attached(points, conditional(chosen)):
        try:
            yield
        except _Stopped as stopped:
            if stopped.args[0] is not done:
                raise
            _put_away(adapter.model)
    for name, parts in waiting.items():
        if parts and name not in done:
            on_stream(chosen[name], parts, tokens[chosen[name].stream])


def _stopping(
    points: Mapping[str, Sequence[Point]], is_complete: Callable[[], bool], of: object
) -> dict[str, list[Point]]:
    """Points of which the last that is needed ends the forward.

    Every one of them has run by then: a point that a fused kernel went around is still missed.
    """
    ahead = {(name, i) for name, several in points.items() for i in range(len(several))}

    def then_stop(point: Point, key: tuple[str, int]) -> Point:
        def hook(call: Call) -> Any:
            new = point.hook(call)
            ahead.discard(key)
            if not ahead and is_complete():
                raise _Stopped(of)
            return new

        return replace(point, hook=hook)

    return {
        name: [then_stop(point, (name, i)) for i, point in enumerate(several)]
        for name, several in points.items()
    }


def _put_away(model: nn.Module) -> None:
    """Let accelerate take away the weights it had brought in for the modules that were left."""
    for module in model.modules():
        outer: Any = getattr(module, "_hf_hook", None)
        offloads = any(getattr(h, "offload", False) for h in getattr(outer, "hooks", (outer,)))
        if offloads and not all(p.is_meta for p in module.parameters(recurse=False)):
            outer.post_forward(module, None)

"""Changing neurons while a model runs: everything is as before when the block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.adapters.taps import Change
from neuronlens.hooks import attached, refuse_compiled, uncompiled
from neuronlens.neurons import NeuronId


@contextmanager
def deactivate(
    adapter: ModelAdapter, neurons: NeuronId | str | Iterable[NeuronId | str]
) -> Iterator[None]:
    """Set the act_fn outputs of some neurons to 0, at every token, for the length of the block.

    ::

        with nl.deactivate(vlm, vlm.neuron(layer=16, index=4347)):
            model.generate(**inputs)

    No weight is touched, so it works on offloaded and quantised models. What a neuron writes
    is gone: where nothing stands between activation and down projection, the output is that
    of the model with this column of the down projection zeroed. Where something does (a
    LayerNorm in Kosmos-2), the other neurons' values change as well. Recorded at the same time,
    everything behind a deactivated neuron is as it runs; the neuron itself reads 0 if the
    recorder was entered inside this block and its activation is a module's output, else what it
    would have been. With gradient checkpointing, run `backward()` inside the block too: behind
    it, the recomputation would be without the change.

    Args:
        adapter: Of the model.
        neurons: One or more, or how they are written (`"language.16/4347"`); those of routed
            blocks name their expert.

    Source: P2, section 4.3 (the neurons' activations are set to zero).

    Raises:
        UnknownNameError: If there is no such neuron in the model.
        CaptureError: If the model is compiled; when the block ends well, but a block of one
            of the neurons never ran.
    """
    with _changed(adapter, neurons, torch.zeros_like):
        yield


@contextmanager
def _changed(
    adapter: ModelAdapter,
    neurons: NeuronId | str | Iterable[NeuronId | str],
    to: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    several = [neurons] if isinstance(neurons, (NeuronId, str)) else neurons
    chosen = [NeuronId.parse(each) if isinstance(each, str) else each for each in several]
    for neuron in chosen:
        adapter.site(neuron.site).neuron(neuron.index, neuron.expert)
    refuse_compiled(adapter.model)
    # Blocks may be nested. A neuron that is off already stays so: routed experts are changed by a
    # difference, which must not be taken away twice.
    new = set(chosen) - adapter.changed
    by_site: dict[str, dict[int | None, list[int]]] = {}
    for neuron in sorted(new, key=str):
        by_site.setdefault(neuron.site, {}).setdefault(neuron.expert, []).append(neuron.index)
    points = {}
    for name, by_expert in by_site.items():
        index = {expert: torch.tensor(sorted(at)) for expert, at in by_expert.items()}
        tap = adapter.tap(adapter.site(name))
        points[name] = tap.writing(adapter.model, Change(to, index))
    conditional = {name for name in points if "conditional" in adapter.site(name).flags}
    with uncompiled(), attached(points, conditional):
        adapter.changed |= new
        try:
            yield
        finally:
            adapter.changed -= new

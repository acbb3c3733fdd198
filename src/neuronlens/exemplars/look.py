"""One neuron on one sample."""

from __future__ import annotations

import numpy as np
import torch

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import SampleError
from neuronlens.exemplars.columns import Columns
from neuronlens.exemplars.exemplar import Exemplar
from neuronlens.neurons import NeuronId
from neuronlens.recorder import record
from neuronlens.samples import Sample, encode
from neuronlens.tokens import TEXT_ROLES, Role


def look(
    adapter: ModelAdapter,
    neuron: NeuronId | str,
    sample: Sample,
    *,
    maximum: float | None = None,
    template: bool = True,
) -> Exemplar:
    """One neuron on one sample: shows itself in a notebook, `save` writes a PNG.

    Args:
        adapter: Of the model, with its processor.
        neuron: Which neuron, or how it is written (`"language.16/4347"`).
        sample: Any sample; the response is optional.
        maximum: What is 10 on the 0..10 scale, such as `atlas.maximum(neuron)`; by default
            the largest activation on this sample.
        template: Whether to use the processor's chat template.

    Source: P1, Figure 1.

    Raises:
        UnknownNameError: If the model has no such neuron.
        SampleError: If the sample cannot be used.
        AdapterError: If the model is in training mode.
    """
    adapter.require_eval()
    neuron = NeuronId.parse(neuron) if isinstance(neuron, str) else neuron
    site = adapter.site(neuron.site)
    row = site.row(neuron)
    batch = encode(adapter, [sample], template=template)
    sink = Columns({site.name: [row]})
    inputs = batch.on(adapter.device)
    with torch.inference_mode(), record(adapter, site, sink, batch.tokens, stop=True):
        adapter.forward(inputs, logits=False)
    tokens = batch.map_of(0, site.stream)
    values = sink.fetched()[site.name][batch.tokens[site.stream].where(0).numpy(), 0]
    roles = (Role.RESPONSE,) if sample.response else TEXT_ROLES
    if not np.isfinite(values).all():
        raise SampleError(sample.id, "non-finite activations", f"at {neuron}.")
    if maximum is None:
        maximum = float(values[tokens.is_role(Role.VISUAL, *roles).numpy()].max())
    return Exemplar(neuron, sample, tokens, values, maximum, roles)

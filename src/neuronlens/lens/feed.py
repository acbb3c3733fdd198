"""Samples in batches; what cannot be used is left out by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import NeuronLensError, SampleError
from neuronlens.samples import Batch, Sample, as_sample, encode

_REFUSALS = (ArithmeticError, LookupError, TypeError, ValueError)
"""What a processor raises at a sample that it cannot read."""


def batches(
    adapter: ModelAdapter,
    samples: Iterable[Sample | Any],
    size: int,
    template: bool,
    skipped: dict[str, SampleError],
) -> Iterator[Batch]:
    """Encoded batches of the samples; `skipped` takes, by id, why one was left out."""
    every = (as_sample(each, position) for position, each in enumerate(samples))
    while some := list(islice(every, size)):
        batch = _encoded(adapter, some, template, skipped)
        if batch is not None:
            yield batch


def _encoded(
    adapter: ModelAdapter, samples: list[Sample], template: bool, skipped: dict[str, SampleError]
) -> Batch | None:
    usable = list(samples)
    while usable:
        try:
            return encode(adapter, usable, template=template)
        except SampleError as error:
            at_fault = {each.id: error for each in usable if each.id == error.sample_id}
            if not at_fault:
                raise
        except NeuronLensError:
            raise
        except _REFUSALS:
            at_fault = _refused(adapter, usable, template)
            if not at_fault:  # each alone can be read
                raise
        skipped.update(at_fault)
        usable = [each for each in usable if each.id not in at_fault]
    return None


def _refused(
    adapter: ModelAdapter, samples: list[Sample], template: bool
) -> dict[str, SampleError]:
    refused = {}
    for sample in samples:
        try:
            encode(adapter, [sample], template=template)
        except SampleError as error:
            refused[sample.id] = error
        except NeuronLensError:
            raise
        except _REFUSALS as error:
            detail = f"{type(error).__name__}: {error}"
            refused[sample.id] = SampleError(sample.id, "refused by the processor", detail)
    return refused

"""Samples run through the model once more, for the neurons that need them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Atlas
from neuronlens.errors import CaptureError, NeuronLensError, SampleError, UnknownNameError
from neuronlens.exemplars.choose import Chosen
from neuronlens.exemplars.columns import Columns
from neuronlens.neurons import NeuronId
from neuronlens.recorder import record
from neuronlens.samples import Batch, Sample, as_sample, encode
from neuronlens.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class Seen:
    """A sample's tokens on one stream: one object for all neurons that ran on it.

    Attributes:
        sample: What was shown to the model.
        tokens: What each token is.
        eligible: True at tokens that rank samples.
        at: Their flat positions in the batch.
    """

    sample: Sample
    tokens: TokenMap
    eligible: Bool[np.ndarray, " token"]
    at: Int[np.ndarray, " token"]

    def largest(self, activation: Float[np.ndarray, " token"]) -> float:
        """A neuron's largest eligible activation; -inf if no token is eligible."""
        return float(activation[self.eligible].max(initial=-np.inf))


Recorded = dict[tuple[NeuronId, int], tuple[Seen, Float[np.ndarray, " token"]]]
"""By neuron and position, its act_fn outputs."""


class Recording:
    """Runs the samples that were chosen for some neurons.

    Attributes:
        skipped: By id, why a sample could not be used.
    """

    def __init__(
        self, adapter: ModelAdapter, atlas: Atlas, samples: Sequence[Sample] | None
    ) -> None:
        """Prepare for samples of a scan; those given stand for those the atlas cannot find."""
        self.skipped: dict[str, SampleError] = {}
        self._adapter = adapter
        self._atlas = atlas
        self._samples = samples

    def run(
        self,
        chosen: Mapping[NeuronId, Chosen],
        needed: Collection[NeuronId],
        *,
        batch_size: int,
        progress: bool,
    ) -> Recorded:
        """Run the samples of the needed neurons, in the batches of all chosen ones.

        So activations do not depend, to the bit, on which neurons are still needed: in other
        batches they would be rounded differently.

        Args:
            chosen: All neurons.
            needed: Those of them that are recorded.
            batch_size: Samples per forward.
            progress: Whether to show a bar.

        Raises:
            AtlasError: If the atlas cannot find the samples.
            UnknownNameError: If the given samples are not those of the scan.
            CaptureError: If activations cannot be read as promised.
        """
        needing: dict[int, list[NeuronId]] = defaultdict(list)
        for neuron in needed:
            for position in dict.fromkeys(each.position for each in chosen[neuron].places):
                needing[position].append(neuron)
        order = sorted({each.position for every in chosen.values() for each in every.places})
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        batches = [batch for batch in batches if any(p in needing for p in batch)]
        recorded: Recorded = {}
        bar = tqdm(batches, desc="exemplars", unit="batch", disable=not progress)
        for positions in bar:
            # A sample that only others need is a part of the batch all the same.
            found = {
                position: sample
                for position in positions
                if (sample := self._sample(position, position in needing)) is not None
            }
            kept, batch = self._encoded(found, needing)
            wanted = {row: needing[p] for row, p in enumerate(kept) if p in needing}
            if batch is not None and wanted:
                for neuron, row, seen, values in self._forward(batch, wanted):
                    recorded[neuron, kept[row]] = seen, values
        return recorded

    def _sample(self, position: int, is_needed: bool) -> Sample | None:
        """The sample at a position of the scan; None, and a note, if it cannot be used."""
        if self._samples is None:
            try:
                return self._atlas.sample(position)
            except SampleError as error:
                self._skip(error, is_needed)
                return None
        record_id = str(self._atlas.samples[position].id)
        given = self._samples
        found = as_sample(given[position], position) if position < len(given) else None
        if found is None or found.id != record_id:
            raise UnknownNameError(
                f"sample at position {position} of those given",
                record_id,
                [as_sample(given[i], i).id for i in range(min(len(given), 100))],
                "Pass the scanned samples in the scanned order.",
            )
        return found

    def _skip(self, error: SampleError, is_needed: bool) -> None:
        if is_needed:
            self.skipped.setdefault(error.sample_id, error)

    def _encoded(
        self, found: Mapping[int, Sample], needing: Collection[int]
    ) -> tuple[list[int], Batch | None]:
        """The positions of the samples that can be encoded, and their batch."""
        usable = dict(found)
        while usable:
            try:
                return list(usable), self._encode(list(usable.values()))
            except SampleError as error:
                at_fault = {p: error for p, each in usable.items() if each.id == error.sample_id}
                if not at_fault:
                    raise
            except NeuronLensError:
                raise
            except _REFUSALS:
                at_fault = self._refused(usable)
                if not at_fault:  # it takes each alone
                    raise
            for position, reason in at_fault.items():
                self._skip(reason, position in needing)
                del usable[position]
        return [], None

    def _encode(self, samples: Sequence[Sample]) -> Batch:
        return encode(self._adapter, samples, template=self._atlas.choices.template)

    def _refused(self, samples: Mapping[int, Sample]) -> dict[int, SampleError]:
        refused = {}
        for position, sample in samples.items():
            try:
                self._encode([sample])
            except SampleError as error:
                refused[position] = error
            except NeuronLensError:
                raise
            except _REFUSALS as error:
                detail = f"{type(error).__name__}: {error}"
                refused[position] = SampleError(sample.id, "refused by the processor", detail)
        return refused

    def _forward(
        self, batch: Batch, wanted: Mapping[int, Sequence[NeuronId]]
    ) -> Iterator[tuple[NeuronId, int, Seen, Float[np.ndarray, " token"]]]:
        """By row of the batch and neuron that is wanted there, its activations."""
        column: dict[str, dict[int, int]] = {}
        for neuron in (neuron for each in wanted.values() for neuron in each):
            columns = column.setdefault(neuron.site, {})
            columns.setdefault(self._row(neuron), len(columns))
        sink = Columns({site: list(columns) for site, columns in column.items()})
        inputs = batch.on(self._adapter.device)
        with (
            torch.inference_mode(),
            record(self._adapter, list(column), sink, batch.tokens, stop=True),
        ):
            self._adapter.forward(inputs, logits=False)
        kept = sink.fetched()
        for row, neurons in wanted.items():
            seen: dict[str, Seen] = {}
            for neuron in neurons:
                stream = self._adapter.site(neuron.site).stream
                if stream not in seen:
                    seen[stream] = self._seen(batch, row, stream)
                at = column[neuron.site][self._row(neuron)]
                values = kept[neuron.site][seen[stream].at, at]
                if not np.isfinite(values).all():
                    raise CaptureError(
                        f"{neuron} has activations that are not finite on sample "
                        f"{batch.samples[row].id!r}, which it had not in the scan. Has the model "
                        "changed?"
                    )
                yield neuron, row, seen[stream], values

    def _row(self, neuron: NeuronId) -> int:
        return self._adapter.site(neuron.site).row(neuron)

    def _seen(self, batch: Batch, row: int, stream: str) -> Seen:
        tokens = batch.map_of(row, stream)
        return Seen(
            batch.samples[row],
            tokens,
            tokens.is_role(*self._atlas.eligible).numpy(),
            batch.tokens[stream].where(row).numpy(),
        )


_REFUSALS = (ArithmeticError, LookupError, TypeError, ValueError)
"""What a processor raises at a sample that it cannot read."""


def compare(
    adapter: ModelAdapter, chosen: Mapping[NeuronId, Chosen], recorded: Recorded
) -> str | None:
    """A complaint, if other batches than the scan's gave clearly other activations."""
    tolerance = max(1e-3, 8 * torch.finfo(adapter.dtype).eps)
    worst = 0.0
    for (neuron, position), (seen, values) in recorded.items():
        then = chosen[neuron].value.get(position)
        if then is None or not seen.eligible.any():
            continue
        now = seen.largest(values)
        if neuron.expert is not None:
            # Tokens that were not routed are 0 here, above all negative activations.
            now, then = max(now, 0.0), max(then, 0.0)
        worst = max(worst, abs(now - then) / max(abs(then), 1e-3))
    if worst <= tolerance:
        return None
    return (
        f"Re-recorded activations differ from the scan's by up to {worst:.1%}. Other batches "
        "round differently, but not that much: has the model or its processor changed?"
    )

"""Chosen neurons' samples, re-recorded token by token."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Atlas
from neuronlens.errors import SampleError, UnknownNameError
from neuronlens.exemplars.choose import (
    EXPLAIN_RANKS,
    HELD_OUT_RANKS,
    Choice,
    Chosen,
    Use,
    choose,
)
from neuronlens.exemplars.exemplar import Exemplar, ExemplarSet, NeuronExemplars
from neuronlens.exemplars.record import Recorded, Recording, compare
from neuronlens.neurons import NeuronId
from neuronlens.samples import Sample


def exemplars(
    adapter: ModelAdapter,
    atlas: Atlas,
    neurons: Iterable[NeuronId],
    *,
    explain: Sequence[int] = EXPLAIN_RANKS,
    held_out: Sequence[int] = HELD_OUT_RANKS,
    validate: Sequence[int] = (),
    contrast: int = 0,
    sampling: Literal["top", "random"] = "top",
    samples: Sequence[Sample] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    only: Iterable[NeuronId] | None = None,
    progress: bool = False,
) -> ExemplarSet:
    """Re-record chosen neurons on some of their top samples, token by token.

    Each needed sample is run once for all neurons that need it, and no further than to the
    deepest site that is needed. A neuron's samples do not depend on the other neurons.

    A sample that cannot be used again, because its image is gone or has changed, is left out of
    the exemplars; one warning names those.

    Args:
        adapter: Of the scanned model.
        atlas: The scan.
        neurons: Which neurons.
        explain: Ranks, from 1, to explain from; those a neuron does not have are left out.
        held_out: Ranks to score on; none may also be explained from.
        validate: Ranks to choose among several explanations with, such as `VALIDATE_RANKS`;
            none may have another use.
        contrast: How many samples to add on which the neuron is quiet. They are drawn from the
            scanned samples that are not among its top ones: three times as many are recorded,
            and those are kept whose largest eligible activation is lowest.
        sampling: `"random"` explains from samples drawn from the whole scan instead, as
            P1 compares; the other ranks stay.
        samples: The scanned samples in their order, if the atlas cannot find them again.
        seed: Of the draws.
        batch_size: Samples per forward.
        only: Those of `neurons` that are still needed, to go on with an interrupted run; None
            for all. Each is given what it is given without this, bit for bit.
        progress: Whether to show a bar.

    Source: P1, section 4.6. `validate` and `contrast` are no part of it.

    Raises:
        AtlasError: If the atlas is of another model, or its samples were in memory.
        SampleError: If none of the samples can be used.
        ValueError: If a rank has two uses.
    """
    choice = Choice(explain, held_out, validate, contrast, sampling, seed)
    adapter.require_eval()
    atlas.check(adapter)
    known = dict.fromkeys(neurons)
    neurons = list(known)
    needed = neurons if only is None else list(dict.fromkeys(only))
    for neuron in needed:
        if neuron not in known:
            raise UnknownNameError(
                "neuron among `neurons`", neuron, neurons, "`only` names some of them."
            )
    scanned = np.array(sorted(atlas.samples))
    chosen = {neuron: choose(atlas, neuron, scanned, choice) for neuron in neurons}
    recording = Recording(adapter, atlas, samples)
    recorded = recording.run(chosen, needed, batch_size=batch_size, progress=progress)
    skipped = recording.skipped
    if skipped and not recorded and only is None:
        raise next(iter(skipped.values()))
    for complaint in (_complaint(skipped), compare(adapter, chosen, recorded)):
        if complaint is not None:
            warnings.warn(complaint, stacklevel=2)
    return ExemplarSet(
        {neuron: _made(atlas, neuron, chosen[neuron], recorded, contrast) for neuron in needed},
        skipped={name: error.reason for name, error in skipped.items()},
    )


def _made(
    atlas: Atlas, neuron: NeuronId, chosen: Chosen, recorded: Recorded, contrast: int
) -> NeuronExemplars:
    found: dict[Use, list[tuple[float, Exemplar]]] = defaultdict(list)
    for place in chosen.places:
        if (neuron, place.position) not in recorded:
            continue
        seen, activation = recorded[neuron, place.position]
        exemplar = Exemplar(
            neuron,
            seen.sample,
            seen.tokens,
            activation,
            chosen.maximum,
            atlas.choices.text_roles,
            place.rank,
            place.position,
        )
        found[place.use].append((seen.largest(activation), exemplar))

    def of(use: Use) -> tuple[Exemplar, ...]:
        return tuple(exemplar for _, exemplar in found[use])

    quietest = sorted(
        (each for each in found["contrast"] if each[0] > -np.inf), key=lambda each: each[0]
    )
    return NeuronExemplars(
        neuron,
        chosen.maximum,
        of("explain"),
        of("held_out"),
        of("validate"),
        tuple(exemplar for _, exemplar in quietest[:contrast]),
    )


def _complaint(skipped: Mapping[str, SampleError]) -> str | None:
    """Which samples could not be used, and why."""
    if not skipped:
        return None
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, error in skipped.items():
        by_reason[error.reason].append(name)
    said = "; ".join(
        f"{reason}: {len(names)} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for reason, names in by_reason.items()
    )
    return (
        f"{len(skipped)} samples could not be used again and are left out of the exemplars: "
        f"{said}. The first: {next(iter(skipped.values()))}"
    )

"""Which samples a neuron is looked at on, and what for."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final, Literal

import numpy as np
from jaxtyping import Int

from neuronlens.atlas import Atlas
from neuronlens.neurons import NeuronId

EXPLAIN_RANKS: Final = (1, 5, 9, 13, 17)
HELD_OUT_RANKS: Final = (3, 7, 11, 15, 19)
"""P1, section 4.6: explained from the first, scored on the second."""
VALIDATE_RANKS: Final = (2, 6, 10, 14, 18)
"""To choose among several explanations: as strong as the others, and none of them."""

DRAWN_PER_CONTRAST: Final = 3
"""Samples that are recorded for each contrast exemplar; the quietest are kept."""

Use = Literal["explain", "held_out", "validate", "contrast"]


@dataclass(frozen=True)
class Place:
    """A sample of a neuron.

    Attributes:
        use: What for.
        rank: Among the neuron's top samples, from 1; None if it was drawn.
        position: Of the sample in the scan.
    """

    use: Use
    rank: int | None
    position: int


@dataclass(frozen=True)
class Choice:
    """How samples are chosen.

    Attributes:
        explain, held_out, validate: Ranks, from 1.
        contrast: How many samples on which the neuron is quiet.
        sampling: Explain from top samples, or from random ones.
        seed: Of the draws.

    Raises:
        ValueError: If a rank has two uses, or is none.
    """

    explain: Sequence[int]
    held_out: Sequence[int]
    validate: Sequence[int] = ()
    contrast: int = 0
    sampling: Literal["top", "random"] = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would leak, or means nothing."""
        ranks = {name: getattr(self, name) for name in ("explain", "held_out", "validate")}
        for (one, its), (other, others) in combinations(ranks.items(), 2):
            if shared := sorted(set(its) & set(others)):
                raise ValueError(
                    f"Ranks {shared} are in both {one} and {other}; a score would leak."
                )
        if any(rank < 1 for each in ranks.values() for rank in each):
            given = ", ".join(f"{name}={each}" for name, each in ranks.items())
            raise ValueError(f"A rank counts from 1; {given} were given.")
        if self.contrast < 0:
            raise ValueError(f"contrast={self.contrast} was given; it counts samples, from 0.")
        if self.sampling not in ("top", "random"):
            raise ValueError(f"No sampling {self.sampling!r}. Samples are 'top' or 'random'.")


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a scan knows of a neuron, and the samples that were chosen for it.

    Attributes:
        maximum: Its largest eligible activation in the scan.
        places: Its samples; those for contrast are candidates.
        value: By position of its top samples, its largest eligible activation there.
    """

    maximum: float
    places: tuple[Place, ...]
    value: dict[int, float] = field(repr=False)


def choose(
    atlas: Atlas, neuron: NeuronId, scanned: Int[np.ndarray, " sample"], choice: Choice
) -> Chosen:
    """A neuron's samples: the same whatever other neurons there are.

    Args:
        atlas: The scan.
        neuron: Which neuron.
        scanned: Positions of all scanned samples, rising.
        choice: How to choose.

    Raises:
        UnknownNameError: If the neuron is not in the atlas.
    """
    known = atlas.neuron(neuron)
    top: list[int] = known.positions.tolist()

    def ranked(use: Use, ranks: Sequence[int]) -> list[Place]:
        return [Place(use, rank, top[rank - 1]) for rank in ranks if rank <= len(top)]

    def drawn(use: Use, count: int, without: Collection[int]) -> list[Place]:
        free = np.setdiff1d(scanned, list(without), assume_unique=True)
        # Of the neuron's name, not of its place in some list; Python's own hash() is salted.
        told = hashlib.sha256(f"{choice.seed} {use} {neuron}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(told[:16], "big"))
        found = rng.choice(free, min(count, len(free)), replace=False)
        return [Place(use, None, position) for position in found.tolist()]

    held_out, validate = ranked("held_out", choice.held_out), ranked("validate", choice.validate)
    if choice.sampling == "top":
        explain = ranked("explain", choice.explain)
    else:
        explain = drawn(
            "explain", len(choice.explain), {each.position for each in (*held_out, *validate)}
        )
    places = [*explain, *held_out, *validate]
    if choice.contrast:
        loud = {*top, *(each.position for each in explain)}
        places += drawn("contrast", DRAWN_PER_CONTRAST * choice.contrast, loud)
    return Chosen(
        max(known.maximum[role] for role in atlas.eligible),
        tuple(places),
        dict(zip(top, known.value.tolist(), strict=True)),
    )

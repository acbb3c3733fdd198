"""The rule by which a neuron's concepts are counted."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float, Int

from neuronlens.classify import Category
from neuronlens.concepts.cover import Cover, Union
from neuronlens.concepts.profile import FEWEST, Vocabulary, readable
from neuronlens.concepts.result import ConceptCount, CountedConcept
from neuronlens.exemplars import Exemplar
from neuronlens.explain import Modality, modalities
from neuronlens.neurons import NeuronId

LEAST: Final = 0.03
"""Share of the variance that a further concept must add."""

MOST: Final = 5

ENOUGH: Final = 10
"""Fewer samples than this say nothing about how many concepts there are."""

BEYOND: Final = 2
"""A resample can count this many concepts more than all samples do: larger sets take long."""

FIRES: Final = 3.0
"""Level, of 10, from which on a neuron fires: P1's "above 2" on whole numbers."""


@dataclass(frozen=True)
class Rule:
    """How concepts are counted.

    Attributes:
        least: Share of the variance that a further concept must add.
        most: The largest count.
        resamples: Draws of the samples; 0 for none.
        seed: Of resamples and shuffles.

    Raises:
        ValueError: If a number makes no sense.
    """

    least: float = LEAST
    most: int = MOST
    resamples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.least < 1:
            raise ValueError(
                f"least={self.least} is no share of the variance: give one between 0 and 1."
            )
        if self.most < 1 or self.resamples < 0:
            raise ValueError(
                f"most={self.most} and resamples={self.resamples} were given; they must be at "
                "least 1 and 0."
            )

    def count(
        self,
        neuron: NeuronId,
        category: Category,
        top: Sequence[Exemplar],
        contrast: Sequence[Exemplar],
        vocabulary: Vocabulary,
        settings: Mapping[str, object],
    ) -> ConceptCount:
        """Count one neuron's concepts on its top samples, the strongest first.

        Top samples on which it does not fire are left out. Those for contrast are in every
        resample, once.
        """
        used = [e for e in top if e.level[e.visual | e.text].max(initial=0) > 0]
        sides = _sides(category, used)
        reason = ""
        if not used:
            reason = "it never fires on a token that counts"
        elif len(used) < ENOUGH:
            reason = f"it fires on {len(used)} of its top samples, and {ENOUGH} are needed"
        elif not sides:
            reason = "none of the tokens that count sees a region of an image, or is text"
        elif not vocabulary.names(used, sides):
            reason = "no concept is known on its top samples: no annotation names any"
        if reason:
            return ConceptCount(
                neuron, category, None, reason, samples=len(used), settings=settings
            )
        # By its name: a count does not depend on which other neurons were asked for.
        rng = np.random.default_rng([self.seed, zlib.crc32(str(neuron).encode())])
        cover = Cover(*vocabulary.profile(used, contrast, sides))
        whole = np.ones((1, cover.samples))
        values, unions = cover.best(whole, self.most)
        by_size = values[:, 0]
        price = [
            # What adds less than `least` is not bought, whatever chance adds.
            max(self.least, cover.by_chance(unions[size][0], rng) if gain > self.least else 0)
            for size, gain in enumerate(np.diff(by_size).tolist())
        ]
        count = int(_sizes(values, price)[0])
        union = unions[count][0]
        shares, support = self._resampled(cover, len(used), union, price, rng)
        fires = cover.levels(union)[: len(used)] >= FIRES
        ranks = np.array([each.rank for each in used])
        counted = [
            CountedConcept(
                name=cover.elements[each].concept,
                visual=cover.elements[each].visual,
                text=cover.elements[each].text,
                explained=cover.explained((each,)),
                gain=cover.explained(union) - cover.explained(_without(union, each)),
                ranks=tuple(ranks[fires[:, member]].tolist()),
                share=float(fires[:, member].mean()),
                support=support[member],
                instead=_instead(cover, union, each, cover.explained(union) - self.least),
            )
            for member, each in enumerate(union)
        ]
        return ConceptCount(
            neuron,
            category,
            count,
            concepts=tuple(sorted(counted, key=lambda each: (-each.gain, each.name))),
            explained=cover.explained(union),
            by_size=tuple(by_size.tolist()),
            price=tuple(price),
            shares=shares,
            samples=len(used),
            unexplained=tuple(ranks[~fires.any(1)].tolist()),
            settings=settings,
        )

    def _resampled(
        self,
        cover: Cover,
        top: int,
        union: Union,
        price: Sequence[float],
        rng: np.random.Generator,
    ) -> tuple[dict[int, float], list[float]]:
        """Share of the resamples by count, and by element of a union those that count it too."""
        if not self.resamples:
            return {}, [float("nan")] * len(union)
        draws = np.ones((self.resamples, cover.samples))
        draws[:, :top] = rng.multinomial(top, np.full(top, 1 / top), size=self.resamples)
        values, unions = cover.best(draws, min(self.most, len(union) + BEYOND))
        sizes = _sizes(values, price)
        shares = {int(size): float(np.mean(sizes == size)) for size in np.unique(sizes)}
        drawn = [
            {cover.elements[each].concept for each in unions[size][draw]}
            for draw, size in enumerate(sizes.tolist())
        ]
        names = [cover.elements[each].concept for each in union]
        return shares, [float(np.mean([name in each for each in drawn])) for name in names]


def _sizes(
    values: Float[np.ndarray, "size draw"], price: Sequence[float]
) -> Int[np.ndarray, " draw"]:
    """The size that explains most after its price, in each draw; of equal ones the smaller."""
    total = np.concatenate([[0.0], np.cumsum(price)])[: len(values)]
    return np.asarray((values - total[:, None]).argmax(0))


def _without(union: Union, element: int) -> Union:
    return tuple(each for each in union if each != element)


def _instead(cover: Cover, union: Union, element: int, enough: float) -> tuple[str, ...]:
    """Names that could take an element's place and still explain more than enough."""
    rest = _without(union, element)
    joined = cover.joined(rest, np.ones((1, cover.samples)))[0]
    own = cover.elements[element].concept
    known: dict[str, None] = {}
    for other in np.argsort(-joined, kind="stable").tolist():
        if joined[other] > enough and cover.elements[other].concept != own:
            known.setdefault(cover.elements[other].concept)
    return tuple(known)


def _sides(category: Category, used: Sequence[Exemplar]) -> list[Modality]:
    """The modalities of a neuron's category in which it fires, if it is only in a tenth of them.

    What faint activations follow is no concept: a correlation does not see that they are faint.
    """
    firing: dict[Modality, int] = {}
    for side in modalities(category, used):
        tokens = [each.level[each.regions if side == "visual" else readable(each)] for each in used]
        if any(len(each) for each in tokens):
            firing[side] = sum(bool((each >= FIRES).any()) for each in tokens)
    return [s for s, n in firing.items() if n >= FEWEST * len(used)] or list(firing)

"""How much of a neuron unions of concepts explain, and which union of each size explains most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int

from neuronlens.concepts.profile import Element, Side

Union = tuple[int, ...]
"""Numbers of elements, rising; no two of the same concept."""

Sums = Float[np.ndarray, "3 element sample"]

ROUNDS: Final = 8
"""Most rounds of exchanging members; the search ends when a round changes nothing."""

CHANCE: Final = 0.95
"""A concept must add more than the best one does in this share of shuffles."""

SHUFFLES: Final = 60

_BETTER: Final = 1e-12
_VARIES: Final = 1e-9
"""A spread this small beside the mean square is rounding."""


class Cover:
    """How much of a neuron's activations unions of concepts explain on its top samples.

    A union predicts, at each token, the largest of what its elements predict. It explains the
    squared Pearson correlation of that with the neuron's level, over the pooled tokens of all
    samples; 0 where the correlation is negative or undefined. Over two modalities, their mean.
    """

    def __init__(self, elements: Sequence[Element], sides: Sequence[Side]) -> None:
        self.elements = tuple(elements)
        self.samples = len(sides[0].start) - 1
        self.concepts = len({each.concept for each in elements})
        self._given = tuple(sides)
        self._sides = [_Sums(side) for side in sides]
        numbers: dict[str, int] = {}
        self._names = np.array(
            [numbers.setdefault(each.concept, len(numbers)) for each in elements], dtype=int
        )
        self._known: dict[Union, list[Sums]] = {}

    def joined(
        self, base: Union, weights: Float[np.ndarray, "draw sample"]
    ) -> Float[np.ndarray, "draw element"]:
        """What a base explains with each element; -inf with a concept that it has already.

        Args:
            base: Some elements, or none.
            weights: How often each draw has each sample.
        """
        if base not in self._known:
            self._known[base] = [side.joined(base) for side in self._sides]
        parts = [
            side.explained(sums, weights)
            for side, sums in zip(self._sides, self._known[base], strict=True)
        ]
        together = np.mean(parts, 0)
        # The same words in another place are no second concept.
        together[:, self._taken(base)] = -np.inf
        return np.asarray(together)

    def explained(self, union: Union) -> float:
        """What a union explains on all samples."""
        if not union:
            return 0.0
        return float(self.joined(union[:-1], np.ones((1, self.samples)))[0, union[-1]])

    def best(
        self, weights: Float[np.ndarray, "draw sample"], most: int
    ) -> tuple[Float[np.ndarray, "size draw"], list[list[Union]]]:
        """By size from 0, what the best union explains in each draw, and which one it is.

        Best of what a search finds that adds, exchanges and drops elements. Only adding would
        not do: the best single concept (all objects are large) need not be among the best two.
        """
        draws = len(weights)
        sizes = min(most, self.concepts)
        unions: list[list[Union]] = [[()] * draws for _ in range(sizes + 1)]
        values = np.full((sizes + 1, draws), -np.inf)
        values[0] = 0
        for size in range(1, sizes + 1):
            self._add(unions[size], values[size], unions[size - 1], weights)
            self._exchange(unions[size], values[size], size, weights)
        for size in range(sizes - 1, 0, -1):
            before = list(unions[size])
            for place in range(size + 1):
                rest = [union[:place] + union[place + 1 :] for union in unions[size + 1]]
                self._take(unions[size], values[size], rest, weights)
            if unions[size] != before:
                self._exchange(unions[size], values[size], size, weights)
        return values, unions

    def by_chance(self, base: Union, rng: np.random.Generator) -> float:
        """What the best concept would add to a base if it lay where another sample has it.

        Returns:
            The `CHANCE` quantile of the largest gain over `SHUFFLES` shuffles of the samples.
        """
        own = self.explained(base)
        free = ~self._taken(base)
        gains = np.zeros(SHUFFLES)
        shuffles = [_cycle(self.samples, rng) for _ in range(SHUFFLES)]
        moved = [side.moved(shuffles) for side in self._given]
        for number in range(SHUFFLES):
            found = np.mean(
                [
                    side.shuffled(base, taken[number])
                    for side, taken in zip(self._sides, moved, strict=True)
                ],
                0,
            )
            gains[number] = found[free].max(initial=own) - own
        return float(np.quantile(gains, CHANCE))

    def levels(self, union: Union) -> Float[np.ndarray, "sample member"]:
        """The neuron's mean level on what each element predicts, by sample.

        Tokens are weighted by how much is predicted; of two modalities the larger mean counts.
        NaN where the sample neither shows nor says the concept.
        """
        found = np.full((self.samples, len(union)), np.nan)
        for side in self._sides:
            sums = side.joined(())[:, list(union)]
            with np.errstate(invalid="ignore"):
                found = np.fmax(found, (sums[2] / sums[0]).T)
        return found

    def _taken(self, base: Union) -> Bool[np.ndarray, " element"]:
        return np.isin(self._names, self._names[list(base)])

    def _add(
        self,
        unions: list[Union],
        values: Float[np.ndarray, " draw"],
        bases: Sequence[Union],
        weights: Float[np.ndarray, "draw sample"],
    ) -> None:
        """Join the best element to each draw's base, where that is better than what it has."""
        for base, group in _groups(bases):
            found = self.joined(base, weights[group])
            element = found.argmax(1)
            value = found.max(1)
            for at in np.flatnonzero(value > values[group] + _BETTER).tolist():
                values[group[at]] = value[at]
                unions[group[at]] = tuple(sorted((*base, int(element[at]))))

    def _exchange(
        self,
        unions: list[Union],
        values: Float[np.ndarray, " draw"],
        size: int,
        weights: Float[np.ndarray, "draw sample"],
    ) -> None:
        for _ in range(ROUNDS if size > 1 else 1):
            before = list(unions)
            for place in range(size):
                rest = [union[:place] + union[place + 1 :] for union in unions]
                self._add(unions, values, rest, weights)
            if unions == before:
                return

    def _take(
        self,
        unions: list[Union],
        values: Float[np.ndarray, " draw"],
        others: Sequence[Union],
        weights: Float[np.ndarray, "draw sample"],
    ) -> None:
        """Take each draw's other union, where that is better than what it has."""
        for union, group in _groups(others):
            value = self.joined(union[:-1], weights[group])[:, union[-1]]
            for at in np.flatnonzero(value > values[group] + _BETTER).tolist():
                values[group[at]] = value[at]
                unions[group[at]] = union


class _Sums:
    """One side's sums by sample, from which correlations follow for any draw of samples."""

    def __init__(self, side: Side) -> None:
        self._side = side
        size = np.diff(side.start)
        self._samples = len(size)
        self._used = np.flatnonzero(size)
        self._first = side.start[:-1][self._used]
        one = np.ones_like(side.level)
        self._own = self._sum(np.stack([one, side.level, side.level**2]))

    def joined(self, base: Union) -> Sums:
        """Of each element's union with a base: itself, its square, its product with the level."""
        union = self._union(base, self._side.predicted)
        return np.stack(
            [self._sum(union), self._sum(union**2), self._sum(union * self._side.level)]
        )

    def explained(
        self, sums: Sums, weights: Float[np.ndarray, "draw sample"]
    ) -> Float[np.ndarray, "draw element"]:
        """What unions with these sums explain, by draw."""
        own = (weights @ self._own.T).T[:, :, None]
        return _squared(own, [weights @ each.T for each in sums])

    def shuffled(
        self, base: Union, taken: Int[np.ndarray, " token"]
    ) -> Float[np.ndarray, " element"]:
        """What a base explains with each element, if elements lie where `taken` says."""
        moved = np.where(taken >= 0, self._side.predicted[:, taken], 0)
        union = self._union(base, moved).astype(float)
        return _squared(
            self._own.sum(1), [union.sum(1), (union**2).sum(1), union @ self._side.level]
        )

    def _union(
        self, base: Union, predicted: Float[np.ndarray, "element token"]
    ) -> Float[np.ndarray, "element token"]:
        if not base:
            return predicted
        return np.asarray(np.maximum(predicted, self._side.predicted[list(base)].max(0)))

    def _sum(self, values: Float[np.ndarray, "row token"]) -> Float[np.ndarray, "row sample"]:
        total = np.zeros((len(values), self._samples))
        if len(self._used):
            total[:, self._used] = np.add.reduceat(values, self._first, axis=1, dtype=float)
        return total


def _squared(
    own: Float[np.ndarray, "*sums"], joined: Sequence[Float[np.ndarray, "*axes"]]
) -> Float[np.ndarray, "*axes"]:
    """Squared correlation from sums, 0 where it is negative or undefined."""
    (count, x, xx), (y, yy, xy) = own, joined
    count = np.maximum(count, 1)
    # Sums of levels up to 10 and shares up to 1, in double precision: what cancels is rounding.
    spread_x, spread_y = xx - x * x / count, yy - y * y / count
    together = np.maximum(xy - x * y / count, 0)
    varies = (spread_x > _VARIES * xx) & (spread_y > _VARIES * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = together**2 / (spread_x * spread_y)
    return np.where(varies, np.minimum(squared, 1), 0.0)


def _groups(unions: Sequence[Union]) -> list[tuple[Union, Int[np.ndarray, " draw"]]]:
    """Which draws have which union."""
    groups: dict[Union, list[int]] = {}
    for draw, union in enumerate(unions):
        groups.setdefault(union, []).append(draw)
    return [(union, np.array(group)) for union, group in groups.items()]


def _cycle(count: int, rng: np.random.Generator) -> Int[np.ndarray, " sample"]:
    """For each sample another one: along one cycle through all, none keeps its own."""
    order = rng.permutation(count)
    source = np.empty(count, int)
    source[order] = np.roll(order, 1)
    return source

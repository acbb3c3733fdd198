"""How far a choice depends on the samples: intervals, and choices from halves of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from neuronlens.domains.choose import Choice, Rule, choose
from neuronlens.domains.counts import ModuleCounts
from neuronlens.domains.entropy import dape
from neuronlens.show import Html, table

_CHUNK = 4096
"""Neurons at a time, of which every resample's rates are held."""

_ENDS = (0.025, 0.975)


@dataclass(frozen=True, eq=False)
class ModuleIntervals:
    """Between what values of a module 95 % of the resamples lie.

    Attributes:
        rates: Of each activation probability; NaN where one block of a domain is used, because all
            its samples are in it, or because the budget leaves no more.
        dape: Of each DAPE. Resamples are noisier than the data, and noise lowers DAPE, so this
            interval lies low. NaN where a neuron fires in so few samples that it is silent in some
            resample, or where one block of some domain is used.
        counts: By domain, of how many chosen neurons belong to it; NaN where one block of some
            domain is used.
        frequency: In what share of the resamples a neuron is chosen.
    """

    rates: Float[np.ndarray, "neuron domain 2"]
    dape: Float[np.ndarray, "neuron 2"]
    counts: Mapping[str, tuple[float, float]]
    frequency: Float[np.ndarray, " neuron"]


@dataclass(frozen=True, eq=False)
class Intervals:
    """Bootstrap intervals by module, over blocks of samples.

    Attributes:
        resamples: How many.
        seed: Of the draws.
        domains: Names of the domains.
        modules: The intervals of each module.
    """

    resamples: int
    seed: int
    domains: tuple[str, ...]
    modules: Mapping[str, ModuleIntervals]

    def counts(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Of how many chosen neurons belong to each domain, by module."""
        return {name: dict(each.counts) for name, each in self.modules.items()}

    def __repr__(self) -> str:
        spelled = {
            name: [f"{domain} {low:.0f} to {high:.0f}" for domain, (low, high) in ends.items()]
            for name, ends in self.counts().items()
        }
        said = "; ".join(f"{name} {', '.join(each)}" for name, each in spelled.items())
        return f"Intervals({said}; {self.resamples} resamples)"

    def _repr_html_(self) -> Html:
        rows = [
            [name, *(f"{low:,.0f} to {high:,.0f}" for low, high in each.counts.values())]
            for name, each in self.modules.items()
        ]
        title = f"Chosen neurons by domain: 95 % intervals over {self.resamples} resamples"
        return table(["module", *self.domains], rows, title)


@dataclass(frozen=True, eq=False)
class ModuleStability:
    """How alike the choices from two halves of the samples are, as Jaccard indices.

    Each is the number of things in both choices by those in either, of every split. Shuffled means
    that the domains' names are dealt to the blocks of each half anew. A neuron that differs much
    between samples is then still chosen, but not for the same domain; so what `members` has above
    `members_shuffled` is about domains.

    Attributes:
        neurons: Of the chosen neurons.
        neurons_shuffled: The same with shuffled domains.
        members: Of the pairs of a chosen neuron and a domain it belongs to.
        members_shuffled: The same with shuffled domains.
        random: What two random sets of neurons of these sizes share on average, each drawn from
            those that pass the prefilter in its half.
        chosen: How many neurons were chosen from each half.
    """

    neurons: Float[np.ndarray, " split"]
    neurons_shuffled: Float[np.ndarray, " split"]
    members: Float[np.ndarray, " split"]
    members_shuffled: Float[np.ndarray, " split"]
    random: Float[np.ndarray, " split"]
    chosen: Int[np.ndarray, "split 2"]


@dataclass(frozen=True, eq=False)
class Stability:
    """How alike the choices from two halves of the samples are, by module.

    Attributes:
        splits: How often the samples were halved.
        seed: Of the draws.
        domains: Names of the domains.
        modules: What was found in each module; NaN where a domain's samples lie in one block.
    """

    splits: int
    seed: int
    domains: tuple[str, ...]
    modules: Mapping[str, ModuleStability]

    def summary(self) -> dict[str, dict[str, float]]:
        """Means over the splits, by module, of all that `ModuleStability` has of a split."""
        return {
            name: {kind: _mean(getattr(each, kind)) for kind in _KINDS}
            for name, each in self.modules.items()
        }

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name} {means['members']:.2f} (shuffled {means['members_shuffled']:.2f})"
            for name, means in self.summary().items()
        )
        return f"Stability(neurons with their domain: {said}; {self.splits} splits)"

    def _repr_html_(self) -> Html:
        rows = [
            [name, *(f"{value:.2f}" for value in means.values())]
            for name, means in self.summary().items()
        ]
        title = f"Jaccard index of the choices from two halves, mean of {self.splits} splits"
        head = [
            "module",
            "neurons",
            "domains shuffled",
            "neurons with domain",
            "domains shuffled",
            "random sets that pass",
        ]
        return table(head, rows, title)


_KINDS = ("neurons", "neurons_shuffled", "members", "members_shuffled", "random")


def _mean(values: Float[np.ndarray, " split"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def resampled_blocks(
    units: Bool[np.ndarray, "domain block"], resamples: int, rng: np.random.Generator
) -> Int[np.ndarray, "resample domain block"]:
    """How often each block is drawn: as many of each domain as it has, with replacement."""
    weight = np.zeros((resamples, *units.shape), int)
    for row, mine in enumerate(units):
        at = np.flatnonzero(mine)
        weight[:, row, at] = rng.multinomial(len(at), np.full(len(at), 1 / len(at)), resamples)
    return weight


def module_intervals(
    counts: ModuleCounts,
    used: Bool[np.ndarray, "domain block"],
    rule: Rule,
    resamples: int,
    seed: int,
) -> ModuleIntervals:
    """Resample a module's blocks, and choose from every resample."""
    units = used & (counts.size > 0)
    rng = np.random.default_rng(seed)
    weight = resampled_blocks(units, resamples, rng)
    domains = len(counts.domains)
    rates = np.empty((len(counts), domains, 2))
    entropy = np.empty((len(counts), 2))
    for rows, group in counts.chunks(_CHUNK):
        fired = np.matmul(counts.fired[rows].transpose(1, 0, 2).astype(float), _by_domain(weight))
        there = np.matmul(counts.tokens[group][:, None].astype(float), _by_domain(weight))
        with np.errstate(invalid="ignore"):
            drawn = fired / there  # [domain, neuron, resample]
        rates[rows] = _ends(drawn).transpose(1, 0, 2)
        entropy[rows] = _ends(dape(np.moveaxis(drawn, 0, -1)))
    alone = units.sum(1) < 2
    rates[:, alone] = np.nan
    if alone.any():
        entropy[:] = np.nan
    chosen, members = np.zeros(len(counts)), np.empty((resamples, domains))
    for number, each in enumerate(weight):
        choice = choose(counts.rates(each), rule, rng)
        chosen[choice.rows] += 1
        members[number] = choice.member.sum(0)
    if alone.any():  # a block that is always drawn would look certain
        members[:] = np.nan
    low, high = np.quantile(members, _ENDS, axis=0)
    ends = zip(low.tolist(), high.tolist(), strict=True)
    return ModuleIntervals(
        rates, entropy, dict(zip(counts.domains, ends, strict=True)), chosen / resamples
    )


def _by_domain(
    weight: Int[np.ndarray, "resample domain block"],
) -> Float[np.ndarray, "domain block resample"]:
    return weight.transpose(1, 2, 0).astype(float)


def _ends(values: Float[np.ndarray, "*axes resample"]) -> Float[np.ndarray, "*axes 2"]:
    """The interval's ends, between the two nearest resamples; NaN if one of them is."""
    rising = np.sort(values, axis=-1)
    places = np.array(_ENDS) * (values.shape[-1] - 1)
    first = places.astype(int)
    step = rising[..., np.minimum(first + 1, values.shape[-1] - 1)] - rising[..., first]
    ends = rising[..., first] + (places - first) * step
    ends[np.isnan(rising[..., -1])] = np.nan
    return np.asarray(ends)


def module_stability(
    counts: ModuleCounts,
    used: Bool[np.ndarray, "domain block"],
    rule: Rule,
    splits: int,
    seed: int,
) -> ModuleStability:
    """Halve each domain's blocks, and choose from both halves; and so with shuffled domains."""
    units = used & (counts.size > 0)
    rng = np.random.default_rng(seed)
    found = {kind: np.full(splits, np.nan) for kind in _KINDS}
    sizes = np.zeros((splits, 2), int)
    if (units.sum(1) < 2).any():  # a domain would be missing from one half
        splits = 0
    for split in range(splits):
        halves = _halves(units, rng)
        first, second = (choose(counts.rates(half), rule, rng) for half in halves)
        sizes[split] = len(first.rows), len(second.rows)
        for name, (a, b) in {
            "": (first, second),
            "_shuffled": (
                _shuffled(counts, halves[0], rule, rng),
                _shuffled(counts, halves[1], rule, rng),
            ),
        }.items():
            found[f"neurons{name}"][split] = _jaccard(a.rows, b.rows)
            found[f"members{name}"][split] = _jaccard(_pairs(a), _pairs(b))
        found["random"][split] = _random_jaccard(first, second)
    return ModuleStability(**found, chosen=sizes)


def _halves(
    units: Bool[np.ndarray, "domain block"], rng: np.random.Generator
) -> tuple[Bool[np.ndarray, "domain block"], Bool[np.ndarray, "domain block"]]:
    first = np.zeros(units.shape, bool)
    for row, mine in enumerate(units):
        at = rng.permutation(np.flatnonzero(mine))
        # Where there is an odd number, chance decides which half has one more.
        first[row, at[: (len(at) + int(rng.integers(2))) // 2]] = True
    return first, units & ~first


def _shuffled(
    counts: ModuleCounts,
    half: Bool[np.ndarray, "domain block"],
    rule: Rule,
    rng: np.random.Generator,
) -> Choice:
    """The choice from some blocks whose domains were dealt anew."""
    label = rng.permutation(np.repeat(np.arange(len(half)), half.sum(1)))
    one_hot = (label[:, None] == np.arange(len(half))).astype(float)
    fired = counts.fired[:, half].astype(float) @ one_hot
    tokens = counts.tokens[:, half].astype(float) @ one_hot
    with np.errstate(invalid="ignore"):
        return choose(fired / tokens[counts.group], rule, rng)


def _pairs(choice: Choice) -> Int[np.ndarray, " pair"]:
    """Every chosen neuron with every domain it belongs to, as one number."""
    row, domain = choice.member.nonzero()
    return np.asarray(choice.rows[row] * choice.member.shape[1] + domain)


def _random_jaccard(first: Choice, second: Choice) -> float:
    """What sets of these sizes share, of neurons that pass: expected neurons in both by either."""
    sizes = len(first.rows), len(second.rows)
    if not all(sizes):
        return float("nan")
    shared = (first.passing & second.passing).sum()
    both = sizes[0] * sizes[1] * shared / (first.passing.sum() * second.passing.sum())
    return float(both / (sum(sizes) - both))


def _jaccard(first: Int[np.ndarray, " a"], second: Int[np.ndarray, " b"]) -> float:
    both = len(np.intersect1d(first, second, assume_unique=True))
    either = len(first) + len(second) - both
    return both / either if either else float("nan")

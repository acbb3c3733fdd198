"""Whether a neuron's DAPE is lower than chance: domains' names dealt to blocks anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuronlens.domains.budget import equal_blocks
from neuronlens.domains.counts import ModuleCounts
from neuronlens.domains.entropy import dape
from neuronlens.errors import UnknownNameError
from neuronlens.neurons import NeuronId
from neuronlens.show import Html, table

_NEURONS, _DRAWS = 512, 250
"""Neurons and draws at a time: their rates stay in the processor's cache."""

_ROUNDING = 1e-12
"""Nats by which equal entropies may round apart; a null as near as that counts as low."""


@dataclass(frozen=True, eq=False)
class ModuleChance:
    """What chance says of a module's neurons.

    Attributes:
        counts: How often they fired.
        used: Blocks that count: about as many tokens of each domain.
        dape: Over these blocks; NaN where a neuron never fired.
        p: Share of draws with as low a DAPE; NaN likewise.
        adjusted: Smallest q at which a neuron is called specific; NaN likewise.
        specific: Whether it is.
        chosen: Whether the neuron is one of the chosen ones.
    """

    counts: ModuleCounts
    used: Bool[np.ndarray, "domain block"]
    dape: Float[np.ndarray, " neuron"]
    p: Float[np.ndarray, " neuron"]
    adjusted: Float[np.ndarray, " neuron"]
    specific: Bool[np.ndarray, " neuron"]
    chosen: Bool[np.ndarray, " neuron"]

    @property
    def blocks(self) -> dict[str, int]:
        """How many blocks of each domain count. With few, the test has little power."""
        there = (self.used & (self.counts.size > 0)).sum(1).tolist()
        return dict(zip(self.counts.domains, there, strict=True))

    @property
    def tested(self) -> int:
        """How many neurons fired, so that there was something to test."""
        return int((~np.isnan(self.p)).sum())


@dataclass(frozen=True, eq=False)
class Chance:
    """Which neurons' DAPE is lower than chance, by module.

    Attributes:
        draws: How often the domains' names were dealt anew.
        q: Share of false ones among those called specific, at most, on average.
        seed: Of the draws.
        domains: Names of the domains.
        modules: What was found in each module.
    """

    draws: int
    q: float
    seed: int
    domains: tuple[str, ...]
    modules: Mapping[str, ModuleChance]

    def counts(self) -> dict[str, dict[str, int]]:
        """By module: neurons `tested`, with p at most 0.05 (`nominal`), and called `specific`.

        `chosen` are the chosen neurons that were tested, `chosen_specific` those of them that
        are specific.
        """
        return {
            name: {
                "tested": each.tested,
                "nominal": int((each.p <= 0.05).sum()),
                "specific": int(each.specific.sum()),
                "chosen": int((each.chosen & ~np.isnan(each.p)).sum()),
                "chosen_specific": int((each.chosen & each.specific).sum()),
            }
            for name, each in self.modules.items()
        }

    def least(self, module: str) -> int:
        """How many neurons must reach the smallest p-value before any is called specific.

        Raises:
            UnknownNameError: If there is no such module.
        """
        return int(np.ceil(self._module(module).tested / (1 + self.draws) / self.q - 1e-9))

    def select(self, module: str | None = None, *, chosen: bool = False) -> list[NeuronId]:
        """Neurons that are called specific.

        Args:
            module: Of this module; None for all.
            chosen: Only those that were also chosen.

        Raises:
            UnknownNameError: If there is no such module.
        """
        found = []
        for each in self.modules.values() if module is None else [self._module(module)]:
            mine = each.specific & each.chosen if chosen else each.specific
            found += each.counts.neurons(np.flatnonzero(mine))
        return found

    def _module(self, name: str) -> ModuleChance:
        if name not in self.modules:
            raise UnknownNameError("module among these", name, self.modules)
        return self.modules[name]

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name} {n['specific']} of {n['tested']}" for name, n in self.counts().items()
        )
        few = min((min(m.blocks.values()) for m in self.modules.values()), default=0)
        return (
            f"Chance({said} specific at q={self.q}, {self.draws} draws, {few} blocks or more of a "
            "domain)"
        )

    def _repr_html_(self) -> Html:
        rows = [
            [
                name,
                f"{n['tested']:,}",
                f"{n['nominal']:,} ({0.05 * n['tested']:,.0f} by chance)",
                f"{n['specific']:,}",
                f"{n['chosen_specific']:,} of {n['chosen']:,}",
                f"{self.least(name):,}",
                ", ".join(f"{d} {n}" for d, n in self.modules[name].blocks.items()),
            ]
            for name, n in self.counts().items()
        ]
        head = ["module", "tested", "p <= 0.05", "specific", "of the chosen", "least", "blocks"]
        title = (
            f"DAPE lower than chance: {self.draws:,} draws, at most {self.q:.0%} false. None is "
            "called specific before as many as 'least' reach the smallest p-value. With few blocks "
            "of a domain there is little that could be told from chance."
        )
        return table(head, rows, title)


def module_chance(
    counts: ModuleCounts,
    chosen: Bool[np.ndarray, " neuron"],
    *,
    draws: int,
    q: float,
    seed: int,
    blocks: int,
) -> ModuleChance:
    """Test every neuron of a module that fires.

    Args:
        counts: How often its neurons fired.
        chosen: Which neurons were chosen; no part of the test.
        draws: How often to deal the domains' names anew.
        q: Of the false-discovery control.
        seed: Of the draws.
        blocks: Seed of the choice of blocks.
    """
    used = equal_blocks(counts.size, counts.domains, blocks)
    observed = dape(counts.rates(used))
    p = (1 + lower_by_chance(counts, used, observed, draws, seed)) / (1 + draws)
    p[np.isnan(observed)] = np.nan
    adjusted = benjamini_hochberg(p)
    specific = adjusted <= q  # False for NaN
    return ModuleChance(counts, used, observed, p, adjusted, specific, chosen)


def lower_by_chance(
    counts: ModuleCounts,
    used: Bool[np.ndarray, "domain block"],
    observed: Float[np.ndarray, " neuron"],
    draws: int,
    seed: int,
) -> Float[np.ndarray, " neuron"]:
    """In how many draws the DAPE of each neuron is as low as the observed one.

    All neurons see the same draws. Each domain is dealt as many blocks as it has.
    """
    units = used & (counts.size > 0)
    label = np.repeat(np.arange(len(units)), units.sum(1))
    domains = len(counts.domains)
    rng = np.random.default_rng(seed)
    fired, tokens = counts.fired[:, units], counts.tokens[:, units]
    found = np.zeros(len(counts))
    for start in range(0, draws, _DRAWS):
        some = min(_DRAWS, draws - start)
        dealt = rng.permuted(np.broadcast_to(label, (some, len(label))), axis=1)
        # [unit, domain x draw]: each domain's rates lie side by side.
        one_hot = (dealt == np.arange(domains)[:, None, None]).reshape(-1, len(label)).T
        hot = torch.from_numpy(one_hot.astype(float))
        for rows, group in counts.chunks(_NEURONS):
            there = torch.from_numpy(tokens[group].astype(float)) @ hot
            # Scaled so that every neuron's rates are about 1: nothing large cancels.
            mine = fired[rows] / np.maximum(fired[rows].sum(1, keepdims=True), 1)
            rate = (torch.from_numpy(mine.astype(float)) @ hot) * (tokens[group].sum() / there)
            null = _entropies(rate.view(len(mine), domains, some))
            bound = torch.from_numpy(observed[rows, None] + _ROUNDING)
            # What cannot be told (an expert without tokens in a domain) counts as low.
            found[rows] += (~(null > bound)).sum(1).numpy()
    return found


def _entropies(rate: Float[Tensor, "neuron domain draw"]) -> Float[Tensor, "neuron draw"]:
    whole = rate.sum(1)
    entropies: Tensor = torch.special.entr(rate).sum(1) / whole + whole.log()
    return entropies


def benjamini_hochberg(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Adjusted p-values: the smallest q at which each test is called; NaN tests are none.

    Source: Benjamini and Hochberg (1995).
    """
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return adjusted

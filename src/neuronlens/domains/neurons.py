"""Domain-specific neurons, module by module, and the tables P2 makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from neuronlens.domains.chance import Chance, module_chance
from neuronlens.domains.choose import Choice, Rule
from neuronlens.domains.counts import ModuleCounts, Rate
from neuronlens.domains.resample import (
    Intervals,
    Stability,
    module_intervals,
    module_stability,
)
from neuronlens.errors import MissingExtraError, UnknownNameError
from neuronlens.neurons import NeuronId
from neuronlens.show import Html, table
from neuronlens.tokens import Role

if TYPE_CHECKING:
    import pandas as pd

Budget = Literal["equal", "all"]


@dataclass(frozen=True)
class DomainReadings(Rule):
    """Everything a choice of domain-specific neurons depends on beside the scan.

    Attributes:
        roles: Roles of the tokens that count.
        budget: Whether domains are compared over about as many tokens, or over all they have.
        rate: What a routed expert's probabilities are over.
        seed: Of the draws: blocks, ties at the cut, equal largest probabilities.
    """

    roles: tuple[Role, ...]
    budget: Budget
    rate: Rate
    seed: int


@dataclass(frozen=True, eq=False)
class ModuleNeurons:
    """One module's neurons: their activation probabilities, and which were chosen.

    Attributes:
        counts: How often they fired, by domain and block of samples.
        used: Blocks that count.
        rates: Activation probability in each domain.
        choice: The chosen ones.
        silent: Whether a neuron never fired, in any block of these domains.
    """

    counts: ModuleCounts
    used: Bool[np.ndarray, "domain block"]
    rates: Float[np.ndarray, "neuron domain"]
    choice: Choice
    silent: Bool[np.ndarray, " neuron"]

    @property
    def chosen(self) -> Bool[np.ndarray, " neuron"]:
        """Whether a neuron was chosen."""
        mask = np.zeros(len(self.counts), bool)
        mask[self.choice.rows] = True
        return mask

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens of each domain were used."""
        used = (self.counts.size * self.used).sum(1)
        return dict(zip(self.counts.domains, used.tolist(), strict=True))


@dataclass(frozen=True)
class Overlap:
    """How many chosen neurons two domains share.

    Attributes:
        domains: In the order of rows and columns.
        shared: Neurons of both; on the diagonal, all of the domain.
        jaccard: Those of both by those of either; NaN where neither has one.
    """

    domains: tuple[str, ...]
    shared: Int[np.ndarray, "domain domain"]
    jaccard: Float[np.ndarray, "domain domain"]


@dataclass(frozen=True, eq=False)
class DomainNeurons:
    """The neurons that are specific to some domains, and how they were chosen.

    The lowest share of DAPE exists in any data: `chance` says whether a neuron's is lower than
    chance, `stability` whether other samples would give the same neurons.

    Attributes:
        readings: What the choice depends on.
        domains: Names of the domains.
        modules: Each module's neurons, by its name.
        left_out: By site, why it was not looked at.
        model: Fingerprint of the model.
        scan: The scan's readings.
    """

    readings: DomainReadings
    domains: tuple[str, ...]
    modules: Mapping[str, ModuleNeurons]
    left_out: Mapping[str, str]
    model: str
    scan: Mapping[str, object]

    def module(self, name: str) -> ModuleNeurons:
        """One module's neurons.

        Raises:
            UnknownNameError: If it was not looked at.
        """
        if name not in self.modules:
            advice = " ".join(
                dict.fromkeys(
                    f"{site} was left out: {why}."
                    for site, why in self.left_out.items()
                    if site.split(".")[0] == name.split(".")[0]
                )
            )
            raise UnknownNameError("module among these", name, self.modules, advice[:300])
        return self.modules[name]

    def counts(self) -> dict[str, dict[str, int]]:
        """Chosen neurons by module and domain; one that belongs to several counts in each.

        Source: P2, Table 1.
        """
        return {
            name: dict(zip(self.domains, each.choice.member.sum(0).tolist(), strict=True))
            for name, each in self.modules.items()
        }

    def layers(self, module: str = "language") -> dict[str, dict[int, int]]:
        """Chosen neurons of a module by domain and layer.

        Source: P2, Figure 5.
        """
        each = self.module(module)
        layer = each.counts.layer
        found = {}
        for column, domain in enumerate(self.domains):
            mine = Counter(layer[each.choice.rows[each.choice.member[:, column]]].tolist())
            found[domain] = {int(n): mine[n] for n in np.unique(layer)}
        return found

    def silent(self, module: str = "vision") -> dict[int, tuple[int, int]]:
        """By layer, how many neurons never fired, and how many there are.

        Over all samples of these domains, whatever the budget.

        Source: P2, appendix D and Figure 9.
        """
        each = self.module(module)
        layer = each.counts.layer
        return {
            int(n): (int(each.silent[layer == n].sum()), int((layer == n).sum()))
            for n in np.unique(layer)
        }

    def overlap(self, module: str = "language") -> Overlap:
        """How many chosen neurons each two domains share."""
        member = self.module(module).choice.member.astype(int)
        shared = member.T @ member
        own = shared.diagonal()
        with np.errstate(invalid="ignore"):
            jaccard = shared / (own[:, None] + own - shared)
        return Overlap(self.domains, shared, jaccard)

    def select(self, domain: str | None = None, module: str | None = None) -> list[NeuronId]:
        """Chosen neurons, to be deactivated or looked at.

        Args:
            domain: Those that belong to it; None for all that were chosen.
            module: Those of this module; None for every module.

        Raises:
            UnknownNameError: If a name is not among these.
        """
        if domain is not None and domain not in self.domains:
            raise UnknownNameError("domain among these", domain, self.domains)
        found = []
        for each in self.modules.values() if module is None else [self.module(module)]:
            rows = each.choice.rows
            if domain is not None:
                rows = rows[each.choice.member[:, self.domains.index(domain)]]
            found += each.counts.neurons(rows)
        return found

    def of(self, neuron: NeuronId) -> tuple[str, ...]:
        """Domains that a neuron was chosen for; empty if it was not chosen."""
        module, row = self.place(neuron)
        each = self.modules[module].choice
        at = np.flatnonzero(each.rows == row)
        if not len(at):
            return ()
        return tuple(d for d, mine in zip(self.domains, each.member[at[0]], strict=True) if mine)

    def place(self, neuron: NeuronId) -> tuple[str, int]:
        """The module of a neuron, and its row there.

        Raises:
            UnknownNameError: If it was not looked at.
        """
        for name, each in self.modules.items():
            if neuron.site in each.counts.starts:
                return name, each.counts.row(neuron)
        known = [site for each in self.modules.values() for site in each.counts.starts]
        raise UnknownNameError(
            "site among these", neuron.site, known, self.left_out.get(neuron.site, "")
        )

    def chance(self, draws: int = 1000, *, q: float = 0.05, seed: int = 0) -> Chance:
        """Whether each neuron's DAPE is lower than chance.

        Blocks of samples are given the domains' names anew, at random, `draws` times. Blocks and
        not tokens, since the tokens of an image are not independent. A neuron's p-value is
        (1 + how many draws give as low a DAPE) / (1 + draws); which neurons are called specific
        is decided in each module by Benjamini and Hochberg's procedure.

        Blocks of domains with more tokens vary less, so that they cannot be exchanged for those
        of smaller domains. So domains are compared over equal budgets here, whatever the budget of
        the choice.

        Args:
            draws: How many. The smallest p-value is 1 / (1 + draws).
            q: Share of false ones among those called specific, at most, on average.
            seed: Of the draws.

        Raises:
            ValueError: If `draws` or `q` make no sense.
        """
        if draws < 1:
            raise ValueError(f"draws={draws}: chance is found out by drawing. Give 1 or more.")
        if not 0 < q < 1:
            raise ValueError(f"q={q} is no share of false ones. Give one between 0 and 1.")
        modules = {
            name: module_chance(
                each.counts, each.chosen, draws=draws, q=q, seed=seed, blocks=self.readings.seed
            )
            for name, each in self.modules.items()
        }
        return Chance(draws, q, seed, self.domains, modules)

    def intervals(self, resamples: int = 500, *, seed: int = 0) -> Intervals:
        """How far probabilities, DAPE and the counts by domain would move with other samples.

        Each domain's blocks of samples are drawn with replacement; 95 % of the resamples lie
        between the two ends.

        Raises:
            ValueError: If there are fewer than two resamples.
        """
        if resamples < 2:
            raise ValueError(f"resamples={resamples} give no interval. Give 2 or more.")
        modules = {
            name: module_intervals(each.counts, each.used, self.readings, resamples, seed)
            for name, each in self.modules.items()
        }
        return Intervals(resamples, seed, self.domains, modules)

    def stability(self, splits: int = 20, *, seed: int = 0) -> Stability:
        """Whether other samples would give the same neurons.

        Each domain's blocks are dealt at random to two halves, and neurons are chosen from each.

        Raises:
            ValueError: If there is no split.
        """
        if splits < 1:
            raise ValueError(f"splits={splits} compare nothing. Give 1 or more.")
        modules = {
            name: module_stability(each.counts, each.used, self.readings, splits, seed)
            for name, each in self.modules.items()
        }
        return Stability(splits, seed, self.domains, modules)

    def table(self, module: str | None = None, *, chosen: bool = False) -> pd.DataFrame:
        """One row per neuron: probabilities, DAPE, whether it was chosen and for what.

        Args:
            module: Only of this module; None for all.
            chosen: Only those that were chosen.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtraError("pandas", "table", "A data frame") from None
        parts = []
        for name in self.modules if module is None else [module]:
            each = self.module(name)
            counts, choice = each.counts, each.choice
            member = np.zeros(each.rates.shape, bool)
            member[choice.rows] = choice.member
            start = np.repeat(list(counts.starts.values()), [s.neurons for s in counts.sites])
            width = np.repeat([s.width for s in counts.sites], [s.neurons for s in counts.sites])
            within = np.arange(len(counts)) - start
            columns: dict[str, object] = {
                "site": np.repeat(list(counts.starts), [s.neurons for s in counts.sites]),
                "module": name,
                "layer": counts.layer,
                "index": within % width,
            }
            if any(site.experts for site in counts.sites):
                columns["expert"] = within // width
            columns |= {f"p_{d}": each.rates[:, i] for i, d in enumerate(self.domains)}
            columns |= {"dape": choice.dape, "passing": choice.passing, "chosen": each.chosen}
            columns |= {f"in_{d}": member[:, i] for i, d in enumerate(self.domains)}
            columns |= {"silent": each.silent, "inert": counts.inert}
            frame = pd.DataFrame(columns)
            parts.append(frame[frame["chosen"]] if chosen else frame)
        return pd.concat(parts, ignore_index=True)

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name} {len(each.choice.rows)} of {len(each.counts)}"
            for name, each in self.modules.items()
        )
        return f"DomainNeurons({', '.join(self.domains)}: {said})"

    def _repr_html_(self) -> Html:
        head = ["module", "neurons", "chosen", *self.domains, "in none", "passing", "silent"]
        rows: list[list[object]] = []
        for name, each in self.modules.items():
            choice = each.choice
            taken = f"{len(choice.rows):,}"
            if len(choice.rows) < choice.wanted:
                taken += f" of {choice.wanted:,} asked for: no more pass"
            elif choice.drawn < choice.tied:
                taken += f" ({choice.drawn:,} drawn of {choice.tied:,} that tie)"
            inert = int(each.counts.inert[choice.rows].sum())
            rows.append(
                [
                    name,
                    f"{len(each.counts):,}",
                    taken + (f", {inert:,} inert" if inert else ""),
                    *(f"{n:,}" for n in choice.member.sum(0)),
                    f"{int((~choice.member.any(1)).sum()):,}",
                    f"{int(choice.passing.sum()):,}",
                    f"{int(each.silent.sum()):,}",
                ]
            )
            used = [f"{each.tokens[domain]:,}" for domain in self.domains]
            rows.append(["", "", "tokens", *used, "", "", ""])
        said = ", ".join(f"{name}={value}" for name, value in self._spelled().items())
        whole = table(head, rows, f"Domain-specific neurons. {said}")
        if not self.left_out:
            return whole
        sites: dict[str, list[str]] = {}
        for site, why in self.left_out.items():
            sites.setdefault(why, []).append(site)
        left = table(["left out", "why"], [[", ".join(s), why] for why, s in sites.items()])
        return Html(whole + left)

    def _spelled(self) -> dict[str, object]:
        roles = "/".join(role.name.lower() for role in self.readings.roles)
        return asdict(self.readings) | {"roles": roles}

"""How often the neurons of a module fired, by domain and block of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from neuronlens.atlas import Atlas
from neuronlens.errors import UnknownNameError
from neuronlens.neurons import NeuronId, NeuronSite
from neuronlens.running import COUNTED
from neuronlens.tokens import Role

Rate = Literal["all", "routed"]
"""Tokens a routed expert's rate is over: all of them, or those that were routed to it."""


@dataclass(frozen=True, eq=False)
class ModuleCounts:
    """How often a module's neurons fired, by domain and block of samples.

    Attributes:
        name: The module's.
        sites: Its sites; neurons are in their order, and in the order of rows within each.
        domains: Names of the domains.
        fired: Tokens with an act_fn output above 0.
        tokens: Tokens there were, for neurons that share a stream (and an expert, where rates
            are over routed tokens).
        group: Which row of `tokens` is each neuron's; rising.
        size: Tokens of all the module's streams together: what budgets are about.
    """

    name: str
    sites: tuple[NeuronSite, ...]
    domains: tuple[str, ...]
    fired: Int[np.ndarray, "neuron domain block"]
    tokens: Int[np.ndarray, "group domain block"]
    group: Int[np.ndarray, " neuron"]
    size: Int[np.ndarray, "domain block"]

    def __len__(self) -> int:
        return len(self.fired)

    @property
    def starts(self) -> dict[str, int]:
        """Where each site's neurons begin."""
        ends = np.cumsum([0, *(site.neurons for site in self.sites)]).tolist()
        return {site.name: start for site, start in zip(self.sites, ends, strict=False)}

    @property
    def layer(self) -> Int[np.ndarray, " neuron"]:
        """Layer of each neuron."""
        return np.repeat([s.layer for s in self.sites], [s.neurons for s in self.sites])

    @property
    def inert(self) -> Bool[np.ndarray, " neuron"]:
        """Whether a neuron cannot affect the model's output."""
        return np.repeat([s.inert for s in self.sites], [s.neurons for s in self.sites])

    def neurons(self, rows: Int[np.ndarray, " chosen"]) -> list[NeuronId]:
        """The neurons of some rows."""
        starts = list(self.starts.values())
        at = np.searchsorted(starts, rows, side="right") - 1
        found = []
        for row, place in zip(rows.tolist(), at.tolist(), strict=True):
            site = self.sites[place]
            expert, index = divmod(row - starts[place], site.width)
            found.append(site.neuron(index, expert if site.experts else None))
        return found

    def row(self, neuron: NeuronId) -> int:
        """The row of a neuron.

        Raises:
            UnknownNameError: If it is not of this module.
        """
        starts = self.starts
        if neuron.site not in starts:
            raise UnknownNameError(f"site in {self.name}", neuron.site, starts)
        site = next(site for site in self.sites if site.name == neuron.site)
        return starts[neuron.site] + site.row(neuron)

    def rates(
        self, weight: Float[np.ndarray, "domain block"] | Bool[np.ndarray, "domain block"]
    ) -> Float[np.ndarray, "neuron domain"]:
        """Activation probabilities with each block counted so many times.

        Returns:
            NaN where there is no token to fire on.
        """
        fired = np.einsum("ndb,db->nd", self.fired, weight, dtype=float, casting="unsafe")
        tokens = np.einsum("gdb,db->gd", self.tokens, weight, dtype=float, casting="unsafe")
        with np.errstate(invalid="ignore"):
            return np.asarray(fired / tokens[self.group])

    def chunks(self, size: int) -> Iterator[tuple[slice, int]]:
        """Rows that share their tokens, at most `size` at a time, with their row of `tokens`."""
        edges = np.searchsorted(self.group, np.arange(len(self.tokens) + 1))
        for group, (first, end) in enumerate(pairwise(edges)):
            for start in range(int(first), int(end), size):
                yield slice(start, min(start + size, int(end))), group


def read_counts(
    atlas: Atlas,
    modules: Mapping[str, Sequence[NeuronSite]],
    domains: Sequence[str],
    roles: Sequence[Role],
    rate: Rate,
) -> dict[str, ModuleCounts]:
    """The counts of some modules' sites, one site after the other read from the atlas."""
    at = [atlas.manifest.domains.index(domain) for domain in domains]
    places = [COUNTED.index(role) for role in roles]
    return {name: _module(atlas, name, sites, at, places, rate) for name, sites in modules.items()}


def _module(
    atlas: Atlas,
    name: str,
    sites: Sequence[NeuronSite],
    at: Sequence[int],
    places: Sequence[int],
    rate: Rate,
) -> ModuleCounts:
    fired: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    group: list[np.ndarray] = []
    streams: dict[str, np.ndarray] = {}
    for site in sites:
        with atlas.read(site.name) as file:
            # Only one site is ever held with all its roles.
            counted = file.get_tensor("fired").numpy()[:, at][..., places].sum(-1)
            there = file.get_tensor("tokens").numpy()[at][..., places].sum(-1)
            routed = file.get_tensor("routed").numpy()[:, at][..., places].sum(-1)
        fired.append(counted)
        streams[site.stream] = there
        first = sum(map(len, tokens))
        if rate == "routed" and site.experts:
            tokens.append(routed)
            group.append(first + np.arange(site.neurons) // site.width)
        else:
            tokens.append(there[None])
            group.append(np.full(site.neurons, first))
    return ModuleCounts(
        name,
        tuple(sites),
        tuple(atlas.manifest.domains[each] for each in at),
        np.concatenate(fired),
        np.concatenate(tokens),
        np.concatenate(group),
        np.sum(list(streams.values()), axis=0),
    )

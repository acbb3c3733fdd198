"""From what neurons add to the residual stream to logits, and back from a word to neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neuronlens.adapters import ModelAdapter, SiteSelection
from neuronlens.errors import AdapterError, UnknownNameError
from neuronlens.lens.columns import Columns
from neuronlens.lens.inputs import MeanInputs
from neuronlens.lens.norm import LinearPart
from neuronlens.lens.writes import NormPart
from neuronlens.neurons import Module, NeuronId, NeuronSite


class Readout:
    """The linear way from what is added to the final state to logits.

    Attributes:
        hidden: Length of the residual stream's vectors.
        can_come: False for words that the model never gives (Chameleon's image words).

    Raises:
        UnknownNameError: If there is no such treatment of the norm.
        AdapterError: If the model has several residual streams, among which what a block writes
            is shared out differently at every token, or a head that is not linear.
    """

    def __init__(self, adapter: ModelAdapter, norm: NormPart, words: int) -> None:
        if norm not in get_args(NormPart):
            raise UnknownNameError("treatment of the norm", norm, get_args(NormPart))
        decoding = adapter.decoding
        name = type(adapter.model).__name__
        if decoding.layout != "one":
            raise AdapterError(
                f"{name} has several residual streams, and what a block writes is shared out "
                "among them differently at every token: a neuron's column has no logits of its own."
            )
        self.hidden = decoding.shape[0]
        self._adapter = adapter
        self._words = words
        self.can_come = torch.ones(words, dtype=torch.bool)
        self.can_come[list(decoding.masked)] = False
        self._rest = replace(decoding, norm=None, cap=None, masked=())
        self._norm: LinearPart | None = None
        if norm == "scale" and decoding.norm is not None:
            self._norm = LinearPart(adapter.model.get_submodule(decoding.norm), self.hidden)
        with torch.no_grad():
            probe = torch.randn(2, self.hidden, generator=torch.Generator().manual_seed(0))
            one, two, both = self._plain(torch.cat([probe, probe.sum(0, keepdim=True)]))
        if (both - one - two).abs().max() > 0.05 * both.abs().max():
            raise AdapterError(
                f"The head of {name} is not linear (it transforms states before it unembeds them), "
                "so a neuron's column has no logits of its own."
            )

    def _plain(self, states: Float[Tensor, "row hidden"]) -> Float[Tensor, "row word"]:
        """Logits of normed states, less those of none, which are the head's bias."""
        rows = torch.cat([states, torch.zeros_like(states[:1])])
        logits = self._rest.logits(
            self._adapter.model, rows.to(self._adapter.device, self._adapter.dtype)
        )
        found: Tensor = (logits[:-1] - logits[-1]).float()
        return found

    @torch.no_grad()
    def logits(self, columns: Float[Tensor, "neuron hidden"]) -> Float[Tensor, "neuron word"]:
        """Logits of what is added to a final state of length 1; 0 for masked words."""
        found = self._plain(self._normed(columns))
        return found * self.can_come.to(found.device)

    def direction(self, word: int, relative: bool) -> Float[Tensor, " hidden"]:
        """Of which a column's product is a word's logit.

        Args:
            word: Its number.
            relative: Whether the mean over all words is taken off.
        """
        with torch.enable_grad(), torch.inference_mode(False):
            state = torch.zeros(1, self.hidden, device=self._adapter.device, requires_grad=True)
            logits = self._plain(self._normed(state))[0]
            others = logits[self.can_come.to(logits.device)].mean()
            value = logits[word] - others if relative else logits[word]
            (gradient,) = torch.autograd.grad(value, state)
        return gradient[0]

    def _normed(self, columns: Tensor) -> Tensor:
        return columns if self._norm is None else self._norm(columns)

    def of(
        self, neurons: Sequence[NeuronId], words: Sequence[int] | None, size: int
    ) -> Float[np.ndarray, "neuron word"]:
        """What neurons add to the logits of some words, or of all, per unit of their input.

        Args:
            neurons: Which neurons.
            words: Numbers of the words; None for all.
            size: For how many neurons logits are computed at once.
        """
        site = {neuron: self._adapter.site(neuron.site) for neuron in neurons}
        row = {neuron: each.row(neuron) for neuron, each in site.items()}
        for each in dict.fromkeys(site.values()):
            refuse(self._adapter, each)
        found = np.zeros((len(neurons), self._words if words is None else len(words)), np.float32)
        for each in dict.fromkeys(site.values()):
            columns = Columns(self._adapter, each, self.hidden)
            mine = [i for i, neuron in enumerate(neurons) if site[neuron] == each]
            for start in range(0, len(mine), size):
                some = mine[start : start + size]
                logits = self.logits(columns.of(torch.tensor([row[neurons[i]] for i in some])))
                found[some] = (logits if words is None else logits[:, words]).cpu().numpy()
        return found

    def writers(
        self,
        word: int,
        sites: Sequence[NeuronSite],
        n: int,
        relative: bool,
        inputs: MeanInputs | None,
    ) -> list[tuple[NeuronId, float]]:
        """The n neurons that write a word the most.

        By the absolute value of what they add per unit of their input; or, with `inputs`, by that
        times their mean input.
        """
        direction = self.direction(word, relative)[:, None]
        best = _Best(n, absolute=inputs is None)
        for site in sites:
            values = Columns(self._adapter, site, self.hidden).along(direction)[:, 0].double()
            if inputs is not None:
                values = values * inputs.mean(site)
            best.add(site, values.numpy())
        return best.result()


def writing_sites(adapter: ModelAdapter, sites: SiteSelection) -> list[NeuronSite]:
    """The chosen sites; of a module, or of all, those whose neurons write words.

    Raises:
        UnknownNameError: If there is no such site.
        AdapterError: If neurons of a site that was named, or of all, write no words.
    """
    chosen = adapter.select(sites)
    if sites is None or (isinstance(sites, str) and sites in get_args(Module)):
        chosen = [site for site in chosen if _why_not(adapter, site) is None] or chosen
    for site in chosen:
        refuse(adapter, site)
    return chosen


def refuse(adapter: ModelAdapter, site: NeuronSite) -> None:
    """Refuse a site whose neurons do not write into the stream that is unembedded.

    Raises:
        AdapterError: If it is one.
    """
    why = _why_not(adapter, site)
    if why is not None:
        raise AdapterError(
            f"Neurons of {site.name} write no words: {why}. Only neurons of the decoder whose "
            "states are unembedded do: choose sites of the language model."
        )


def _why_not(adapter: ModelAdapter, site: NeuronSite) -> str | None:
    if site.module != "language":
        return f"they are the {site.module}'s"
    stream = adapter.answer_stream
    return None if site.stream == stream else f"they run on {site.stream!r}, not on {stream!r}"


class _Best:
    """The neurons of the largest values among those that come by."""

    def __init__(self, n: int, absolute: bool) -> None:
        self._n, self._absolute = n, absolute
        self._found: list[tuple[float, float, NeuronId]] = []

    def add(self, site: NeuronSite, values: Float[np.ndarray, " neuron"]) -> None:
        """Take a site's neurons; ties are kept in the order in which they came."""
        rank = np.abs(values) if self._absolute else values
        for row in np.argsort(-rank, kind="stable")[: self._n].tolist():
            expert = row // site.width if site.experts else None
            neuron = site.neuron(row % site.width, expert)
            self._found.append((float(rank[row]), float(values[row]), neuron))
        self._found = sorted(self._found, key=lambda each: -each[0])[: self._n]

    def result(self) -> list[tuple[NeuronId, float]]:
        """The best, with their values."""
        return [(neuron, value) for _, value, neuron in self._found]

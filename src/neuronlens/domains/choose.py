"""The neurons with the lowest DAPE of a module, and the domains each belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from neuronlens.domains.entropy import dape

Assign = Literal["bar", "argmax"]

_SAME = 1e-12
"""DAPE that differs by no more is the same: two ways to the same entropy round apart."""


@dataclass(frozen=True)
class Rule:
    """How neurons are chosen from their activation probabilities.

    Attributes:
        share: Of all neurons of the module, silent and filtered ones included.
        prefilter: Quantile of the module's probabilities that one of a neuron's must exceed;
            None lets every neuron that fires pass.
        bar: Quantile that a probability must exceed for the neuron to belong to the domain.
        assign: `"bar"`: to every domain above the bar; `"argmax"`: to the one with the largest
            probability.
    """

    share: float
    prefilter: float | None
    bar: float
    assign: Assign


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen neurons of a module.

    Attributes:
        rows: Which, rising.
        member: To which domains each belongs; to none where no probability exceeds the bar.
        dape: Of every neuron; NaN where it is silent.
        passing: Whether a neuron fires and passes the prefilter.
        filter: What the prefilter's quantile is; -inf without one.
        bar: What the bar's quantile is.
        wanted: How many were asked for.
        cut: The largest DAPE that was chosen; NaN if nothing was.
        tied: How many of the passing neurons have exactly that DAPE.
        drawn: How many of these were chosen: at random, if not all of them.
    """

    rows: Int[np.ndarray, " chosen"]
    member: Bool[np.ndarray, "chosen domain"]
    dape: Float[np.ndarray, " neuron"]
    passing: Bool[np.ndarray, " neuron"]
    filter: float
    bar: float
    wanted: int
    cut: float
    tied: int
    drawn: int


def choose(
    rates: Float[np.ndarray, "neuron domain"], rule: Rule, rng: np.random.Generator
) -> Choice:
    """Choose the neurons with the lowest DAPE among those that pass the prefilter.

    Source: P2, section 3.2, and its code for the prefilter and the bar: the value at rank
    round(quantile x numbers) among all the module's probabilities, exceeded strictly. A silent
    neuron is never chosen (there, without the prefilter, its DAPE would count as 0). Neurons
    that tie at the cut are drawn at random (there, whatever sorting leaves first).
    """
    entropy = dape(rates)
    least = -np.inf if rule.prefilter is None else quantile(rates, rule.prefilter)
    bar = least if rule.bar == rule.prefilter else quantile(rates, rule.bar)
    passing = ~np.isnan(entropy) & (rates > least).any(1)
    candidates = np.flatnonzero(passing)
    low = entropy[candidates]
    wanted = round(rule.share * len(rates))
    count = min(wanted, len(candidates))
    cut, tied, drawn = np.nan, 0, 0
    rows = candidates[:0]
    if count:
        cut = float(np.partition(low, count - 1)[count - 1])
        below, ties = candidates[low < cut - _SAME], candidates[np.abs(low - cut) <= _SAME]
        drawn, tied = count - len(below), len(ties)
        if drawn < tied:
            ties = rng.choice(ties, drawn, replace=False)
        rows = np.sort(np.concatenate([below, ties]))
    return Choice(
        rows,
        _assigned(rates[rows], bar, rule.assign, rng),
        entropy,
        passing,
        float(least),
        float(bar),
        wanted,
        cut,
        tied,
        drawn,
    )


def quantile(rates: Float[np.ndarray, "neuron domain"], of: float) -> float:
    """The value at rank round(of x numbers), from 1: one that occurs, as in P2's code.

    NaN are no numbers; NaN if there is no other.
    """
    known = rates[~np.isnan(rates)]
    if not len(known):
        return np.nan
    rank = max(1, round(of * len(known))) - 1
    return float(np.partition(known, rank)[rank])


def _assigned(
    rates: Float[np.ndarray, "chosen domain"],
    bar: float,
    assign: Assign,
    rng: np.random.Generator,
) -> Bool[np.ndarray, "chosen domain"]:
    if assign == "bar":
        return np.asarray(rates > bar)
    # Of domains that are equally likely one is drawn: the first name means nothing.
    best = rates == rates.max(1, keepdims=True, initial=0)
    ranked = np.where(best, rng.random(rates.shape), -1).argmax(1)
    return np.asarray(ranked[:, None] == np.arange(rates.shape[1]))

"""Average entropy of the lens by layer, of image and text tokens, by domain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from jaxtyping import Float, Int, Shaped

from neuronlens.errors import MissingExtraError, SampleError, UnknownNameError
from neuronlens.samples import Sample
from neuronlens.show import Html, table
from neuronlens.tokens import Role

if TYPE_CHECKING:
    import pandas as pd

KINDS: Final = ("visual", "text")
"""Kinds of tokens that are averaged apart."""

EVERYTHING: Final = "all"
"""The one group, where samples are not told apart."""

NO_DOMAIN: Final = "(none)"
"""The group of samples without a domain, where others have one."""

PERCENTILES: Final = (2.5, 97.5)

By = Callable[[Sample], str]


@dataclass(frozen=True, eq=False)
class EntropyCurves:
    """Average entropy by layer, of visual and of text tokens; shows itself in a notebook.

    Every array is indexed by `groups`, then by `KINDS` (visual, text), then by `layers`.

    Attributes:
        layers: Which layers: 0 is the embeddings, l the output of the l-th decoder layer.
        groups: Domains, in the order in which they came.
        mean: Entropy in nats, from 0 to ln(`words`): the mean over all tokens of all samples of
            a group. NaN where it has no such token.
        interval: Where 95 % of the means of resampled samples lie. NaN for fewer than two samples.
        tokens: How many tokens the means are of.
        samples: How many samples have such a token.
        divergence: Mean KL(last layer || this layer) in nats; None if it was not asked for.
        agreement: Share of tokens whose likeliest word is the last layer's; None likewise.
        words: Size of the vocabulary.
        text_roles: Which tokens are text.
        skipped: By id, why a sample could not be used.

    Source: P2, Figure 7 and Table 9.
    """

    layers: tuple[int, ...]
    groups: tuple[str, ...]
    mean: Float[np.ndarray, "group kind layer"]
    interval: Float[np.ndarray, "group kind layer 2"]
    tokens: Int[np.ndarray, "group kind"]
    samples: Int[np.ndarray, "group kind"]
    words: int
    text_roles: tuple[Role, ...]
    divergence: Float[np.ndarray, "group kind layer"] | None = None
    agreement: Float[np.ndarray, "group kind layer"] | None = None
    skipped: Mapping[str, SampleError] | None = None

    def __repr__(self) -> str:
        tokens = ", ".join(
            f"{count:,} {kind}" for kind, count in zip(KINDS, self.tokens.sum(0), strict=True)
        )
        groups = f"{len(self.groups)} group{'s' if len(self.groups) != 1 else ''}"
        return f"EntropyCurves({len(self.layers)} layers, {groups}, {tokens} tokens)"

    def curve(self, kind: str, group: str | None = None) -> Float[np.ndarray, " layer"]:
        """Mean entropy by layer.

        Args:
            kind: `"visual"` or `"text"`.
            group: A domain; None if there is only one.

        Raises:
            UnknownNameError: If there is no such kind or group.
        """
        if kind not in KINDS:
            raise UnknownNameError("kind of token", kind, KINDS)
        if group is None and len(self.groups) == 1:
            group = self.groups[0]
        if group not in self.groups:
            raise UnknownNameError("group of these curves", group, self.groups)
        found: Float[np.ndarray, " layer"] = self.mean[self.groups.index(group), KINDS.index(kind)]
        return found

    def at(self, layers: Iterable[int]) -> EntropyCurves:
        """The same at some layers only, as in P2, Table 9.

        Raises:
            UnknownNameError: If one of them was not read.
        """
        chosen = tuple(layers)
        for layer in chosen:
            if layer not in self.layers:
                raise UnknownNameError("layer of these curves", layer, self.layers)
        rows = [self.layers.index(layer) for layer in chosen]
        return replace(
            self,
            layers=chosen,
            mean=self.mean[..., rows],
            interval=self.interval[..., rows, :],
            divergence=None if self.divergence is None else self.divergence[..., rows],
            agreement=None if self.agreement is None else self.agreement[..., rows],
        )

    def table(self) -> pd.DataFrame:
        """One row per group, kind of token and layer.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtraError("pandas", "table", "A data frame") from None
        rows = []
        for g, group in enumerate(self.groups):
            for t, kind in enumerate(KINDS):
                for i, layer in enumerate(self.layers):
                    row: dict[str, object] = {
                        "group": group,
                        "kind": kind,
                        "layer": layer,
                        "entropy": self.mean[g, t, i],
                        "low": self.interval[g, t, i, 0],
                        "high": self.interval[g, t, i, 1],
                        "tokens": self.tokens[g, t],
                        "samples": self.samples[g, t],
                    }
                    if self.divergence is not None and self.agreement is not None:
                        row["divergence"] = self.divergence[g, t, i]
                        row["agreement"] = self.agreement[g, t, i]
                    rows.append(row)
        return pd.DataFrame(rows)

    def _repr_html_(self) -> Html:
        head = ["tokens", "group", "of", *(f"layer {layer}" for layer in self.layers)]
        rows = [
            [kind, group, f"{self.tokens[g, t]:,} in {self.samples[g, t]:,} samples"]
            + [
                f"{m:.3f} ({low:.3f} to {high:.3f})" if np.isfinite(low) else f"{m:.3f}"
                for m, (low, high) in zip(self.mean[g, t], self.interval[g, t], strict=True)
            ]
            for t, kind in enumerate(KINDS)
            for g, group in enumerate(self.groups)
        ]
        skipped = f"; {len(self.skipped)} samples skipped" if self.skipped else ""
        return table(head, rows, f"mean entropy in nats, of {self.words:,} words{skipped}")


class Totals:
    """Sums over each sample's tokens, from which means and intervals are made.

    A sum is kept for every sample, because tokens of one sample are not independent: samples are
    resampled, not tokens; and all samples of the same images, or of one group, together.
    """

    def __init__(self, layers: int, measures: int) -> None:
        self._shape = len(KINDS), layers, measures
        self._group: list[str] = []
        self._unit: list[str] = []
        self._sums: list[Float[np.ndarray, "kind layer measure"]] = []
        self._counts: list[Int[np.ndarray, " kind"]] = []

    def add(
        self,
        group: str,
        unit: str,
        kind: Int[np.ndarray, " token"],
        values: Float[np.ndarray, "layer token measure"],
    ) -> None:
        """Add one sample's tokens; `kind` is each one's number in `KINDS`, `unit` its images."""
        sums, counts = np.zeros(self._shape), np.zeros(len(KINDS), np.int64)
        for number in range(len(KINDS)):
            mine = kind == number
            counts[number] = mine.sum()
            sums[number] = values[:, mine].sum(1, dtype=np.float64)
        self._group.append(group)
        self._unit.append(unit)
        self._sums.append(sums)
        self._counts.append(counts)

    def curves(
        self,
        layers: Sequence[int],
        *,
        words: int,
        text_roles: tuple[Role, ...],
        skipped: Mapping[str, SampleError],
        resamples: int,
        seed: int,
    ) -> EntropyCurves:
        """Means by group, with the intervals of the first measure."""
        groups = tuple(dict.fromkeys(self._group))
        sums, counts = np.array(self._sums), np.array(self._counts)
        of = np.array([groups.index(each) for each in self._group])
        units = np.unique(self._unit, return_inverse=True)[1]
        means, intervals = [], []
        for number in range(len(groups)):
            mine_s, mine_c = sums[of == number], counts[of == number]
            means.append(_mean(mine_s.sum(0), mine_c.sum(0)))
            rng = np.random.default_rng([seed, number])
            unit = units[of == number]
            joined = _by_unit(mine_s[..., 0], unit), _by_unit(mine_c, unit)
            intervals.append(_interval(*joined, resamples, rng))
        mean = np.array(means)
        compared = mean.shape[-1] > 1
        return EntropyCurves(
            layers=tuple(layers),
            groups=groups,
            mean=mean[..., 0],
            interval=np.array(intervals),
            tokens=np.array([counts[of == g].sum(0) for g in range(len(groups))]),
            samples=np.array([(counts[of == g] > 0).sum(0) for g in range(len(groups))]),
            words=words,
            text_roles=text_roles,
            divergence=mean[..., 1] if compared else None,
            agreement=mean[..., 2] if compared else None,
            skipped=dict(skipped),
        )


def _by_unit(
    values: Shaped[np.ndarray, "sample ..."], unit: Int[np.ndarray, " sample"]
) -> Shaped[np.ndarray, "unit ..."]:
    """Sums over the samples of each unit, in the order of their names."""
    names, place = np.unique(unit, return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]), values.dtype)
    np.add.at(sums, place, values)
    return sums


def _mean(
    sums: Float[np.ndarray, "kind layer measure"], counts: Int[np.ndarray, " kind"]
) -> Float[np.ndarray, "kind layer measure"]:
    tokens = np.where(counts > 0, counts, np.nan)
    return np.asarray(sums / tokens[:, None, None])


def _interval(
    sums: Float[np.ndarray, "unit kind layer"],
    counts: Int[np.ndarray, "unit kind"],
    resamples: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "kind layer 2"]:
    """Percentiles of the mean over tokens of resampled units, those with such tokens."""
    found = np.full((*sums.shape[1:], 2), np.nan)
    for kind in range(counts.shape[1]):
        here = counts[:, kind] > 0
        some, tokens = sums[here, kind], counts[here, kind]
        if len(some) < 2 or resamples < 1:
            continue
        draws = np.empty((resamples, some.shape[1]))
        for number in range(resamples):
            weight = np.bincount(rng.integers(len(some), size=len(some)), minlength=len(some))
            draws[number] = weight @ some / (weight @ tokens)
        found[kind] = np.percentile(draws, PERCENTILES, axis=0).T
    return found

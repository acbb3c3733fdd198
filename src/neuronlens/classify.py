"""Visual, text, multi-modal or unknown: what kind of tokens each neuron answers to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from neuronlens.atlas import Atlas
from neuronlens.errors import MissingExtraError, RescanError, UnknownNameError
from neuronlens.neurons import Module, NeuronId, NeuronSite
from neuronlens.running import ABSENT, COUNTED
from neuronlens.show import Html, table
from neuronlens.tokens import Role

if TYPE_CHECKING:
    import pandas as pd

Category = Literal["visual", "text", "multimodal", "unknown"]
CATEGORIES: Final[tuple[Category, ...]] = ("visual", "text", "multimodal", "unknown")
"""In the order that breaks ties."""

Scale = Literal["ten", "normalized", "raw"]
Quantise = Literal["floor", "round"]


@dataclass(frozen=True)
class NeuronClassifier:
    """Classifies neurons by how many tokens of their top samples they fire on.

    A sample is visual-activated if more than `n_v` of its visual tokens exceed `t_v`, and
    text-activated if more than `n_t` of its eligible text tokens exceed `t_t`. The shares
    of a neuron's top samples that are only visual-, only text-, doubly and not activated
    are p_v, p_t, p_m and p_u; the largest gives the category.

    Source: P1, section 3.2 and Table 1. The scale of `t_v` and `t_t` and their quantisation
    are readings (docs/methods.md, rows 1 to 4): "above 2" on the floored scale means at
    least 30 % of the neuron's maximum.

    Attributes:
        t_v: Threshold for visual tokens, exceeded strictly.
        n_v: Number of tokens, exceeded strictly; below the scan's `keep_visual`.
        t_t: Threshold for text tokens.
        n_t: Number of tokens; below the scan's `keep_text`.
        scale: `"ten"`: 0 to 10, 10 the neuron's maximum; `"normalized"`: 0 to 1;
            `"raw"`: act_fn outputs as they are.
        quantise: How values on the 0..10 scale become integers; None leaves them real.
        maximum: `"joint"`: one maximum over visual and text tokens; `"role"`: visual
            tokens against the visual, text tokens against the text maximum.
        top: How many of the kept samples to use; None for all.
    """

    t_v: float = 2
    n_v: int = 4
    t_t: float = 3
    n_t: int = 2
    scale: Scale = "ten"
    quantise: Quantise | None = "floor"
    maximum: Literal["joint", "role"] = "joint"
    top: int | None = None

    def __post_init__(self) -> None:
        """Check the readings.

        Raises:
            ValueError: If one of them makes no sense.
        """
        if self.scale not in ("ten", "normalized", "raw"):
            raise ValueError(f"No scale {self.scale!r}. Scales are 'ten', 'normalized', 'raw'.")
        if self.quantise not in ("floor", "round", None):
            raise ValueError(
                f"No way to quantise {self.quantise!r}: give 'floor', 'round' or None."
            )
        if self.maximum not in ("joint", "role"):
            raise ValueError(f"No maximum {self.maximum!r}: give 'joint' or 'role'.")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top={self.top} samples are nothing to classify by: give 1 or more.")
        if self.scale != "raw" and min(self.t_v, self.t_t) < 0:
            raise ValueError(
                f"t_v={self.t_v} and t_t={self.t_t}: below 0 there is nothing on this scale, which "
                "starts there. Give 0 or more, or scale='raw'."
            )
        if min(self.n_v, self.n_t) < 0:
            raise ValueError(f"n_v={self.n_v} and n_t={self.n_t} count tokens: give 0 or more.")

    def classify(self, atlas: Atlas) -> Classification:
        """Classify every neuron of an atlas.

        Raises:
            RescanError: If the scan kept too little for these readings; names the rescan.
        """
        kept = atlas.choices
        for what, asked, have in (
            ("keep_visual", self.n_v + 1, kept.keep_visual),
            ("keep_text", self.n_t + 1, kept.keep_text),
            ("n", self.top or 1, kept.n),
        ):
            if asked > have:
                raise RescanError(
                    f"These readings need {what}={asked}, but the scan kept {what}={have}. Scan "
                    f"again with scan(..., {what}={asked})."
                )
        sites = {name: self._site(atlas, site) for name, site in atlas.sites.items()}
        return Classification(
            self,
            sites,
            dict(atlas.sites),
            atlas.manifest.model.fingerprint,
            atlas.choices.model_dump(mode="json"),
        )

    def _site(self, atlas: Atlas, site: NeuronSite) -> SiteCategories:
        statistics = atlas.statistics(site.name)
        used = slice(0, self.top)
        present = statistics.top.ids[:, used] != ABSENT
        by_role = statistics.roles.maximum.double()

        def over(*roles: Role) -> Float[Tensor, " neuron"]:
            return by_role[[COUNTED.index(role) for role in roles]].amax(0)

        text_roles = atlas.choices.text_roles
        joint = over(Role.VISUAL, *text_roles)
        own = self.maximum == "role"
        visual = self._exceeds(
            statistics.top.visual[:, used, self.n_v], over(Role.VISUAL) if own else joint, self.t_v
        )
        text = self._exceeds(
            statistics.top.text[:, used, self.n_t], over(*text_roles) if own else joint, self.t_t
        )
        kinds = torch.stack([visual & ~text, text & ~visual, visual & text, ~visual & ~text], -1)
        count = present.sum(1)
        hits = (kinds & present[..., None]).sum(1)
        silent = (joint <= 0) | (count == 0)
        hits[silent] = 0
        share = hits.double() / count[:, None]
        share[silent] = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        # Compared as whole numbers: shares of equal counts might differ in the last bit.
        hits[silent, CATEGORIES.index("unknown")] = 1
        ranked = hits.sort(dim=1, descending=True).values
        return SiteCategories(
            probability=share.numpy(),
            category=hits.numpy().argmax(1),
            margin=(share.sort(dim=1, descending=True).values[:, :2].diff(dim=1) * -1)[
                :, 0
            ].numpy(),
            is_tie=(ranked[:, 0] == ranked[:, 1]).numpy(),
            silent=silent.numpy(),
            samples=count.numpy(),
        )

    def _exceeds(
        self,
        value: Float[Tensor, "neuron rank"],
        maximum: Float[Tensor, " neuron"],
        threshold: float,
    ) -> Bool[Tensor, "neuron rank"]:
        value = value.double()
        if self.scale != "raw":
            # In double precision: the quotient of 16-bit values lands on whole numbers.
            full = 10 if self.scale == "ten" else 1
            value = (full * value.clamp(min=0) / maximum[:, None]).where(maximum[:, None] > 0, 0.0)
            if self.scale == "ten" and self.quantise is not None:
                value = value.floor() if self.quantise == "floor" else value.round()
        return value > threshold


@dataclass(frozen=True, eq=False)
class SiteCategories:
    """The classification of one site's neurons.

    Attributes:
        probability: p_v, p_t, p_m, p_u per neuron, each a share of its top samples.
        category: Index of the largest in `CATEGORIES`; ties go to the earlier one.
        margin: Largest minus second largest probability.
        is_tie: Whether these are equal.
        silent: Whether the neuron never exceeded 0 on an eligible token: p_u is 1.
        samples: How many top samples there were.
    """

    probability: Float[np.ndarray, "neuron 4"]
    category: Int[np.ndarray, " neuron"]
    margin: Float[np.ndarray, " neuron"]
    is_tie: Bool[np.ndarray, " neuron"]
    silent: Bool[np.ndarray, " neuron"]
    samples: Int[np.ndarray, " neuron"]


@dataclass(frozen=True, eq=False)
class Classification:
    """Every neuron's category, and the readings it depends on.

    Shares and histograms are of the language model unless asked otherwise: a site of one
    modality (vision encoder, projector) cannot be anything but visual or unknown.

    Attributes:
        classifier: The readings.
        sites: The categories of each site's neurons.
        described: Each site's description.
        model: Fingerprint of the model.
        scan: The scan's readings.
    """

    classifier: NeuronClassifier
    sites: Mapping[str, SiteCategories]
    described: Mapping[str, NeuronSite]
    model: str
    scan: Mapping[str, object]

    @property
    def readings(self) -> dict[str, object]:
        """All readings these numbers depend on, the scan's and the classifier's."""
        return {**self.scan, **asdict(self.classifier)}

    def of(self, neuron: NeuronId) -> Category:
        """The category of one neuron."""
        return CATEGORIES[int(self._row(neuron)[0].category[self._row(neuron)[1]])]

    def probability(self, neuron: NeuronId) -> dict[Category, float]:
        """(p_v, p_t, p_m, p_u) of one neuron, by category."""
        site, row = self._row(neuron)
        return dict(zip(CATEGORIES, site.probability[row].tolist(), strict=True))

    def _row(self, neuron: NeuronId) -> tuple[SiteCategories, int]:
        if neuron.site not in self.sites:
            raise UnknownNameError("site in this classification", neuron.site, self.sites)
        return self.sites[neuron.site], self.described[neuron.site].row(neuron)

    def _of_module(self, module: Module | None) -> list[str]:
        names = [n for n, s in self.described.items() if module is None or s.module == module]
        if not names:
            known = {site.module for site in self.described.values()}
            raise UnknownNameError("module in this classification", module, sorted(known))
        return names

    def shares(self, module: Module | None = "language") -> dict[Category, float]:
        """Share of neurons in each category."""
        category = np.concatenate([self.sites[name].category for name in self._of_module(module)])
        counts = np.bincount(category, minlength=len(CATEGORIES)) / len(category)
        return dict(zip(CATEGORIES, counts.tolist(), strict=True))

    def above(self, p: float, module: Module | None = "language") -> dict[Category, float]:
        """Share of neurons whose probability of a category is above `p`, strictly.

        Source: P1, section 4.3 and Figure 5 (there p is 0.8).
        """
        probability = self._probabilities(module)
        shares = (probability > p).mean(0)
        return dict(zip(CATEGORIES, shares.tolist(), strict=True))

    def histograms(
        self, module: Module | None = "language", bins: int = 20
    ) -> tuple[dict[Category, NDArray[np.int64]], NDArray[np.float64]]:
        """Number of neurons by probability of each category, and the bins' edges.

        Source: P1, Figure 5.
        """
        probability, edges = self._probabilities(module), np.linspace(0, 1, bins + 1)
        # p lives on the grid of 1/n: what lies on an edge must not fall by rounding.
        counts = [np.histogram(column + 1e-9, edges)[0] for column in probability.T]
        at_one = (probability + 1e-9 > 1).sum(0)
        for column, extra in zip(counts, at_one, strict=True):
            column[-1] += extra
        return dict(zip(CATEGORIES, counts, strict=True)), edges

    def layers(
        self, share: float = 0.03, module: Module = "language"
    ) -> dict[Category, dict[int, float]]:
        """Neurons per layer among the `share` most probable of each category.

        Neurons that tie at the cut are weighted fractionally, so that the numbers add up
        and no layer is favoured by its index.

        Source: P1, section 4.4 and Figure 7 (there the top 3 %).
        """
        names = self._of_module(module)
        layer = np.concatenate(
            [np.full(len(self.sites[name].category), self.described[name].layer) for name in names]
        )
        probability = self._probabilities(module)
        wanted = share * len(layer)
        found: dict[Category, dict[int, float]] = {}
        for column, category in enumerate(CATEGORIES):
            weight = top_weights(probability[:, column], wanted)
            totals = np.bincount(layer, weights=weight)
            found[category] = {int(n): float(totals[n]) for n in np.unique(layer)}
        return found

    def select(
        self,
        category: Category,
        *,
        p: float | None = None,
        n: int | None = None,
        seed: int = 0,
        module: Module | None = "language",
    ) -> list[NeuronId]:
        """Neurons of a category.

        Args:
            category: Which.
            p: Only neurons with at least this probability of it.
            n: Draw this many at random; all if there are no more. None for all.
            seed: Of the draw.
            module: Only neurons of this module; None for all.

        Returns:
            The neurons, in the order of sites and rows.
        """
        if category not in CATEGORIES:
            raise UnknownNameError("category", category, CATEGORIES)
        column = CATEGORIES.index(category)
        found = []
        for name in self._of_module(module):
            site, described = self.sites[name], self.described[name]
            chosen = site.category == column
            if p is not None:
                chosen &= site.probability[:, column] >= p - 1e-9
            found += [_neuron(described, int(row)) for row in np.flatnonzero(chosen)]
        if n is not None and n < len(found):
            drawn = np.random.default_rng(seed).choice(len(found), n, replace=False)
            found = [found[i] for i in sorted(drawn)]
        return found

    def pick(
        self,
        categories: Sequence[Category] = ("visual", "text", "multimodal"),
        *,
        p: float = 0.8,
        n: int = 800,
        seed: int = 0,
        module: Module | None = "language",
    ) -> list[NeuronId]:
        """High-confidence neurons of several categories, to be explained.

        Args:
            categories: Which; by default all that say what to look at.
            p: Least probability of the category.
            n: Most neurons of each category, drawn at random.
            seed: Of the draws.
            module: Only neurons of this module; None for all.

        Source: P1, section 4.6: 800 of each category above 0.8.
        """
        return [
            neuron
            for category in categories
            for neuron in self.select(category, p=p, n=n, seed=seed, module=module)
        ]

    def table(self, module: Module | None = None) -> pd.DataFrame:
        """One row per neuron: probabilities, category, margin, tie, silence.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtraError("pandas", "table", "A data frame") from None
        parts = []
        for name in self._of_module(module):
            site, described = self.sites[name], self.described[name]
            rows = np.arange(len(site.category))
            columns: dict[str, object] = {
                "site": name,
                "layer": described.layer,
                "index": rows % described.width,
                **{c: site.probability[:, i] for i, c in enumerate(CATEGORIES)},
                "category": np.array(CATEGORIES)[site.category],
                "margin": site.margin,
                "is_tie": site.is_tie,
                "silent": site.silent,
                "samples": site.samples,
            }
            if described.experts:
                columns["expert"] = rows // described.width
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def _probabilities(self, module: Module | None) -> Float[np.ndarray, "neuron 4"]:
        return np.concatenate([self.sites[name].probability for name in self._of_module(module)])

    def __repr__(self) -> str:
        count = sum(len(site.category) for site in self.sites.values())
        return f"Classification({count} neurons at {len(self.sites)} sites, {self.classifier})"

    def _repr_html_(self) -> Html:
        rows = []
        for module in dict.fromkeys(site.module for site in self.described.values()):
            shares, sure = self.shares(module), self.above(0.8, module)
            names = self._of_module(module)
            count = sum(len(self.sites[name].category) for name in names)
            silent = sum(int(self.sites[name].silent.sum()) for name in names)
            cells = [f"{shares[c]:.1%} ({sure[c]:.1%})" for c in CATEGORIES]
            rows.append([module, f"{count:,}", *cells, f"{silent:,}"])
        readings = ", ".join(f"{name}={value}" for name, value in asdict(self.classifier).items())
        return table(
            ["module", "neurons", *CATEGORIES, "silent"],
            rows,
            f"Share of neurons by category (in brackets: with p above 0.8). {readings}",
        )


def top_weights(values: Float[np.ndarray, " neuron"], count: float) -> Float[np.ndarray, " neuron"]:
    """1 for the `count` largest values, 0 for others, a fraction for those that tie at the cut."""
    weight = np.zeros(len(values))
    left = min(float(count), float(len(values)))
    for value in np.unique(values)[::-1]:
        if left <= 0:
            break
        tied = values == value
        weight[tied] = min(1.0, left / tied.sum())
        left -= tied.sum()
    return weight


def _neuron(site: NeuronSite, row: int) -> NeuronId:
    expert, index = divmod(row, site.width)
    return site.neuron(index, expert if site.experts else None)

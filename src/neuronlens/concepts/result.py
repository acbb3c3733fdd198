"""How many known concepts a neuron's top samples need, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from neuronlens.classify import Category
from neuronlens.concepts.profile import Place
from neuronlens.neurons import NeuronId
from neuronlens.show import Html, table


@dataclass(frozen=True)
class CountedConcept:
    """One of the concepts that a neuron's top samples need.

    Attributes:
        name: Of the concept.
        visual: Whether it predicts the neuron's visual tokens.
        text: Where it predicts its text tokens: `"on"` the concept's words, or on the token
            `"before"` them; None if it predicts none.
        explained: Share of the variance of the neuron's activations that it explains alone, from
            0 to 1.
        gain: What all counted concepts explain together, less what they do without this one.
        ranks: Of the top samples in which the neuron fires on it: its mean level there is at
            least 3 on the 0..10 scale. A sample may be among those of several concepts.
        share: Their share of the samples.
        support: Share of the resamples that count it too; NaN without resamples.
        instead: Concepts that could take its place at the price of less than one concept, the
            best first: other names of the same, or wider and narrower ones.
    """

    name: str
    visual: bool
    text: Place | None
    explained: float
    gain: float
    ranks: tuple[int, ...]
    share: float
    support: float
    instead: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ConceptCount:
    """How many known concepts a neuron's top samples need.

    It counts among the *known* names. A neuron for all that flies has one concept if "aviation"
    is known, and two if only "airplane" and "airport" are. One that no known name predicts has
    none, whatever it does.

    Attributes:
        neuron: Which.
        category: What decided whether visual tokens, text tokens or both count.
        count: How many; 0 if no known concept predicts the neuron. None if it cannot be told.
        reason: Why it cannot be told; empty if it can.
        concepts: The counted ones, the one with the largest gain first.
        explained: Share of the variance of the neuron's activations that they explain
            together; NaN if it cannot be told.
        by_size: What the best concepts explain, by how many of them, from none on.
        price: What each further concept had to add, from the first on: `least`, or what the
            best concept adds by chance, if that is more.
        shares: By count, the share of resamples of the samples that give it; empty without any.
        samples: How many top samples were used.
        unexplained: Ranks of those in which the neuron fires on none of the concepts.
        settings: What all this depends on.
    """

    neuron: NeuronId
    category: Category
    count: int | None
    reason: str = ""
    concepts: tuple[CountedConcept, ...] = ()
    explained: float = float("nan")
    by_size: tuple[float, ...] = ()
    price: tuple[float, ...] = ()
    shares: Mapping[int, float] = field(default_factory=dict)
    samples: int = 0
    unexplained: tuple[int, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the counted concepts."""
        return tuple(each.name for each in self.concepts)

    @property
    def certainty(self) -> float:
        """Share of the resamples that give this very count; NaN without any."""
        if self.count is None or not self.shares:
            return float("nan")
        return self.shares.get(self.count, 0.0)

    @property
    def interval(self) -> tuple[int, int] | None:
        """Counts between which 95 % of the resamples lie; None without any."""
        if not self.shares:
            return None
        counts = sorted(self.shares)
        below = np.cumsum([self.shares[count] for count in counts])
        low, high = (int(np.searchsorted(below, edge)) for edge in (0.025, 0.975 - 1e-9))
        return counts[low], counts[min(high, len(counts) - 1)]

    def __repr__(self) -> str:
        if self.count is None:
            return f"ConceptCount({self.neuron}: {self.reason})"
        said = ", ".join(self.names) or "no known concept"
        agree = f", {self.certainty:.0%} of the resamples agree" if self.shares else ""
        return (
            f"ConceptCount({self.neuron}: {self.count} ({said}), explained {self.explained:.2f}"
            f"{agree})"
        )

    def _repr_html_(self) -> Html:
        rows = [
            (
                each.name,
                _where(each),
                f"{each.explained:.2f}",
                f"{each.gain:.2f}",
                f"{each.share:.0%}",
                f"{each.support:.0%}" if self.shares else "-",
                ", ".join(each.instead[:4]),
            )
            for each in self.concepts
        ]
        return table(
            ["concept", "where", "explains alone", "adds", "samples", "resamples", "or else"],
            rows,
            repr(self),
        )


def _where(concept: CountedConcept) -> str:
    words = {"on": "its words", "before": "before its words"}
    places = ["image"] if concept.visual else []
    return ", ".join([*places, *([words[concept.text]] if concept.text else [])])

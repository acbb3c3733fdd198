"""What neurons write into the vocabulary, and which neurons write a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from neuronlens.lens.words import visible
from neuronlens.neurons import NeuronId
from neuronlens.show import Html, table

NormPart = Literal["scale", "none"]
"""How the final norm is treated: its linear part is applied, or nothing of it."""


@dataclass(frozen=True, eq=False)
class NeuronWrites:
    """The words whose logits a neuron raises and lowers most; shows itself in a notebook.

    Values are logits per unit of what the down projection takes, at a final state of length
    (root mean square) 1: at a token they are multiplied by that input and divided by the length
    of the state. In a block without a gate the input is the activation. **In a gated block it is
    act_fn(gate) * up, and the sign of up differs from token to token**: an active neuron then
    raises the words of `raised` at some tokens and lowers them at others.

    Attributes:
        neuron: Which neuron.
        raised: Numbers of the words it raises most, most first.
        raised_by: Their logits per unit.
        lowered: Numbers of the words it lowers most, most first.
        lowered_by: Theirs.
        mean: Over all words. What is added to all logits alike changes no probability.
        texts: Readable text of these words.
        norm: Which part of the final norm was applied.
    """

    neuron: NeuronId
    raised: Int[np.ndarray, " k"]
    raised_by: Float[np.ndarray, " k"]
    lowered: Int[np.ndarray, " k"]
    lowered_by: Float[np.ndarray, " k"]
    mean: float
    texts: Mapping[int, str]
    norm: NormPart

    def words(self) -> list[str]:
        """Text of the words it raises."""
        return [self.texts[int(word)] for word in self.raised]

    def __repr__(self) -> str:
        raised, lowered = (
            ", ".join(
                f"{visible(self.texts[int(word)])} {by:+.2f}"
                for word, by in zip(words[:3], values[:3], strict=True)
            )
            for words, values in ((self.raised, self.raised_by), (self.lowered, self.lowered_by))
        )
        return f"NeuronWrites({self.neuron}: raises {raised}; lowers {lowered})"

    def _repr_html_(self) -> Html:
        rows = [
            [visible(self.texts[int(a)]), f"{x:+.3f}", visible(self.texts[int(b)]), f"{y:+.3f}"]
            for a, x, b, y in zip(
                self.raised, self.raised_by, self.lowered, self.lowered_by, strict=True
            )
        ]
        title = f"{self.neuron} writes, per unit of its down projection's input"
        return table(["raises", "logit", "lowers", "logit"], rows, title)

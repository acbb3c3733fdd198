"""What is called a neuron, and where it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from neuronlens.errors import UnknownNameError

Module = Literal["vision", "projector", "qformer", "language", "action"]
"""Parts of a vision-language model that hold feed-forward blocks."""


@dataclass(frozen=True, order=True)
class NeuronId:
    """One unit of the output of a feed-forward block's activation function.

    Attributes:
        site: Name of the `NeuronSite` it belongs to, such as `"language.16"`.
        index: Position along the act_fn output, from 0.
        expert: Which expert of a routed block; None for a dense one.

    Example:
        >>> str(NeuronId("language.16", 4347))
        'language.16/4347'
        >>> NeuronId.parse("language.3/e5/12")
        NeuronId(site='language.3', index=12, expert=5)
    """

    site: str
    index: int
    expert: int | None = None

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"e{self.expert}/"
        return f"{self.site}/{expert}{self.index}"

    @classmethod
    def parse(cls, text: str) -> NeuronId:
        """Read what `str` wrote.

        Raises:
            ValueError: If `text` is not of the form `site/index` or `site/eEXPERT/index`.
        """
        site, *rest = text.split("/")
        try:
            if len(rest) == 1:
                return cls(site, int(rest[0]))
            if len(rest) == 2 and rest[0].startswith("e"):
                return cls(site, int(rest[1]), int(rest[0][1:]))
        except ValueError:
            pass
        raise ValueError(
            f"{text!r} names no neuron. Write 'site/index', for example 'language.16/4347', "
            "or 'site/eEXPERT/index' for a routed block."
        )


@dataclass(frozen=True)
class NeuronSite:
    """One activation function of one feed-forward block: a row of neurons.

    Attributes:
        name: Unique within the model: module and layer, such as `"vision.3"`.
        module: Part of the model it belongs to.
        layer: Number of the block within its module, from 0.
        width: Neurons (per expert, where routed).
        path: Dotted path of the module whose output is read.
        stream: Name of the token axis it runs on.
        experts: Number of routed experts; 0 for a dense block.
        branch: Q-Former branch, `"text"` or `"query"`; None elsewhere.
        flags: `"inert"`: runs, but cannot affect the model's output. `"conditional"`: is left
            out of a forward without an image, although it is part of the language model.
    """

    name: str
    module: Module
    layer: int
    width: int
    path: str
    stream: str
    experts: int = 0
    branch: str | None = None
    flags: frozenset[str] = field(default_factory=frozenset)

    @property
    def neurons(self) -> int:
        """How many neurons the site has, over all its experts."""
        return self.width * max(1, self.experts)

    @property
    def inert(self) -> bool:
        """Whether the site runs without any effect on the model's output."""
        return "inert" in self.flags

    def neuron(self, index: int, expert: int | None = None) -> NeuronId:
        """The neuron at `index`, checked against the site's size.

        Raises:
            UnknownNameError: If the site has no such neuron.
        """
        if not 0 <= index < self.width:
            raise UnknownNameError(f"neuron in {self.name}", index, [f"0 to {self.width - 1}"])
        if expert is None and self.experts:
            raise UnknownNameError(
                f"expert in {self.name}",
                None,
                [f"0 to {self.experts - 1}"],
                "The site is routed: say which expert's neuron is meant, with expert=.",
            )
        if (expert is None) != (self.experts == 0) or not 0 <= (expert or 0) < max(1, self.experts):
            known = [f"0 to {self.experts - 1}"] if self.experts else ["None (a dense block)"]
            raise UnknownNameError(f"expert in {self.name}", expert, known)
        return NeuronId(self.name, index, expert)

    def row(self, neuron: NeuronId) -> int:
        """Position of a neuron among `neurons`, expert-major."""
        self.neuron(neuron.index, neuron.expert)
        return (neuron.expert or 0) * self.width + neuron.index

"""One neuron on one sample, token by token; what a neuron's exemplars are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from neuronlens.errors import OutputError, UnknownNameError
from neuronlens.neurons import NeuronId
from neuronlens.samples import Sample
from neuronlens.show import (
    Html,
    enlarged,
    escaped,
    figure,
    heat_map,
    levels,
    modulated,
    picture,
    shaded,
    stretched,
    table,
)
from neuronlens.tokens import TEXT_ROLES, Role, TokenMap


@dataclass(frozen=True, eq=False)
class Exemplar:
    """One neuron on one sample, token by token.

    Attributes:
        neuron: Which.
        sample: What was shown to the model.
        tokens: What each token is, on the stream of the neuron's site.
        activation: Its act_fn output on each token.
        maximum: What is 10 on the 0..10 scale: the neuron's maximum over the whole scan, or
            over this sample if there was none.
        text_roles: Roles of the text tokens that count.
        rank: Among the neuron's top samples, from 1; None if it was not chosen by rank.
        position: Of the sample in the scanned sequence; None outside a scan.
    """

    neuron: NeuronId
    sample: Sample
    tokens: TokenMap
    activation: Float[np.ndarray, " token"]
    maximum: float
    text_roles: tuple[Role, ...] = TEXT_ROLES
    rank: int | None = None
    position: int | None = None

    def __repr__(self) -> str:
        return f"Exemplar({self._title()})"

    @cached_property
    def visual(self) -> Bool[np.ndarray, " token"]:
        """True at visual tokens."""
        return self.tokens.is_role(Role.VISUAL).numpy()

    @cached_property
    def text(self) -> Bool[np.ndarray, " token"]:
        """True at the text tokens that count."""
        return self.tokens.is_role(*self.text_roles).numpy()

    @cached_property
    def level(self) -> Float[np.ndarray, " token"]:
        """Activations on the 0..10 scale, not rounded."""
        return levels(self.activation, self.maximum)

    @property
    def maximum_by_modality(self) -> tuple[float, float]:
        """Largest level on visual and on text tokens, NaN without any (P1, Figure 3)."""
        return tuple(  # type: ignore[return-value]
            float(self.level[mask].max()) if mask.any() else float("nan")
            for mask in (self.visual, self.text)
        )

    @cached_property
    def regions(self) -> Bool[np.ndarray, " token"]:
        """True at visual tokens that see one region of an image."""
        return np.asarray(self.visual & ~np.isnan(self.tokens.box.numpy()).any(-1))

    def pictures(self, values: Float[np.ndarray, " token"] | None = None) -> list[Painted]:
        """Each image of the sample, painted with `values` (0..10) instead of its own."""
        level = self.level if values is None else values
        painted = []
        for number, image in enumerate(self.sample.open_images()):
            on = self.visual & (self.tokens.image.numpy() == number)
            large = enlarged(image)
            boxes = stretched(self.tokens.box.numpy()[on].astype(float), large.width / image.width)
            painted.append(
                Painted(
                    large, modulated(large, boxes, level[on]), heat_map(large, boxes, level[on])
                )
            )
        return painted

    def shaded_text(self, values: Float[np.ndarray, " token"] | None = None) -> Html:
        """The text tokens, the greener the more active."""
        pieces, level = self._text(self.level if values is None else values)
        return shaded(pieces, level)

    def _text(
        self, level: Float[np.ndarray, " token"]
    ) -> tuple[list[str], Float[np.ndarray, " n"]]:
        if self.tokens.pieces is None:
            return [], np.zeros(0)
        shown = self.tokens.is_role(*TEXT_ROLES).numpy()
        values = np.where(self.text, level, np.nan)[shown]
        pieces = [p for p, s in zip(self.tokens.pieces, shown, strict=True) if s]
        return pieces, values

    def figure(self) -> Image.Image:
        """Image, modulated image, heat map and shaded tokens as one picture.

        Source: P1, Figure 1.
        """
        shown = [
            each
            for p in self.pictures()
            for each in ((p.image, p.modulated, p.heat) if self.regions.any() else (p.image,))
        ]
        pieces, level = self._text(self.level)
        return figure(shown, pieces, level, self._title())

    def save(self, path: str | Path) -> None:
        """Write `figure` as a PNG.

        Raises:
            OutputError: If the file cannot be written.
        """
        try:
            self.figure().save(path, "PNG")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}.") from error

    def _title(self) -> str:
        visual, text = self.maximum_by_modality
        where = "" if self.rank is None else f", rank {self.rank}"
        seen, read = ("-" if np.isnan(value) else f"{value:.1f}" for value in (visual, text))
        regions = "" if self.regions.any() or seen == "-" else " (they see no single region)"
        return (
            f"{self.neuron} on sample {self.sample.id}{where}: "
            f"largest on visual tokens {seen}{regions}, on text {read}"
        )

    def _repr_html_(self) -> Html:
        images = "".join(
            picture(each, 200, name)
            for painted in self.pictures()
            for name, each in (
                ("image", painted.image),
                ("modulated", painted.modulated),
                ("heat", painted.heat),
            )
            if name == "image" or self.regions.any()
        )
        return Html(
            f'<div style="font-family:system-ui,sans-serif;font-size:13px;max-width:640px">'
            f"<div>{escaped(self._title())}</div>{images}<div>{self.shaded_text()}</div></div>"
        )


@dataclass(frozen=True, eq=False)
class Painted:
    """An image beside its two renderings of activations."""

    image: Image.Image
    modulated: Image.Image
    heat: Image.Image


@dataclass(frozen=True, eq=False)
class NeuronExemplars:
    """One neuron's exemplars, by what they are for.

    Attributes:
        neuron: Which.
        maximum: What is 10 on the 0..10 scale.
        explain: To explain it from.
        held_out: To test an explanation with.
        validate: To choose among several explanations with.
        contrast: Samples on which it is quiet, the quietest first.
    """

    neuron: NeuronId
    maximum: float
    explain: tuple[Exemplar, ...]
    held_out: tuple[Exemplar, ...]
    validate: tuple[Exemplar, ...] = ()
    contrast: tuple[Exemplar, ...] = ()

    def _repr_html_(self) -> Html:
        rows = []
        for kind, group in (
            ("explain", self.explain),
            ("validate", self.validate),
            ("held out", self.held_out),
            ("contrast", self.contrast),
        ):
            for each in group:
                first = each.pictures()[0]
                both = Html(picture(first.image, 110) + picture(first.modulated, 110))
                visual, text = each.maximum_by_modality
                rows.append(
                    (
                        kind,
                        "random" if each.rank is None else each.rank,
                        both,
                        f"{visual:.1f} / {text:.1f}",
                        each.shaded_text(),
                    )
                )
        return table(
            ["for", "rank", "image, modulated", "largest visual / text", "text"],
            rows,
            f"{self.neuron}, largest activation {self.maximum:.3g}",
        )


class ExemplarSet(Mapping[NeuronId, NeuronExemplars]):
    """The exemplars of several neurons, by neuron.

    Attributes:
        skipped: By id, why a sample could not be used again; its exemplars are left out.
    """

    def __init__(
        self,
        by_neuron: Mapping[NeuronId, NeuronExemplars],
        *,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self._by_neuron = dict(by_neuron)
        self.skipped = dict(skipped or {})

    def __getitem__(self, neuron: NeuronId) -> NeuronExemplars:
        if neuron not in self._by_neuron:
            raise UnknownNameError("neuron in these exemplars", neuron, self._by_neuron)
        return self._by_neuron[neuron]

    def __iter__(self) -> Iterator[NeuronId]:
        return iter(self._by_neuron)

    def __len__(self) -> int:
        return len(self._by_neuron)

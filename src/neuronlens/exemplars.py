"""Chosen neurons' samples, re-recorded token by token; one neuron on one sample."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from neuronlens.activations import Activation, Routed
from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Atlas
from neuronlens.errors import CaptureError, OutputError, SampleError, UnknownNameError
from neuronlens.neurons import NeuronId, NeuronSite
from neuronlens.recorder import record
from neuronlens.samples import Sample, as_sample, encode
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

EXPLAIN_RANKS: Final = (1, 5, 9, 13, 17)
HELD_OUT_RANKS: Final = (3, 7, 11, 15, 19)
"""P1, section 4.6: explained from the first, scored on the second."""


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
    """One neuron's exemplars: those to explain it from, and those held out to test with."""

    neuron: NeuronId
    maximum: float
    explain: tuple[Exemplar, ...]
    held_out: tuple[Exemplar, ...]

    def _repr_html_(self) -> Html:
        rows = []
        for kind, group in (("explain", self.explain), ("held out", self.held_out)):
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
    """The exemplars of several neurons, by neuron."""

    def __init__(self, by_neuron: Mapping[NeuronId, NeuronExemplars]) -> None:
        self._by_neuron = dict(by_neuron)

    def __getitem__(self, neuron: NeuronId) -> NeuronExemplars:
        if neuron not in self._by_neuron:
            raise UnknownNameError("neuron in these exemplars", neuron, self._by_neuron)
        return self._by_neuron[neuron]

    def __iter__(self) -> Iterator[NeuronId]:
        return iter(self._by_neuron)

    def __len__(self) -> int:
        return len(self._by_neuron)


class _Columns:
    """A recorder's sink that keeps only the wanted neurons' columns.

    A token that was not routed to a neuron's expert has activation 0.
    """

    def __init__(self, rows: Mapping[str, Sequence[int]]) -> None:
        self._rows = rows
        self.kept: dict[str, Tensor] = {}
        self.maps: dict[str, TokenMap] = {}

    def take(self, site: NeuronSite, activation: Activation, tokens: TokenMap) -> None:
        rows = self._rows[site.name]
        if isinstance(activation, Routed):
            flat = activation.flat()
            places = [divmod(row, site.width) for row in rows]
            is_sent = [(flat.expert == expert).any(-1) for expert, _ in places]
            columns = [
                torch.where(sent, flat.column(expert, index), 0)
                for sent, (expert, index) in zip(is_sent, places, strict=True)
            ]
            self.kept[site.name] = torch.stack(columns, 1).float().cpu()
        else:
            at = torch.tensor(rows, device=activation.device)
            every = rearrange(activation, "... neuron -> (...) neuron")
            self.kept[site.name] = every[:, at].float().cpu()
        self.maps[site.name] = tokens


def exemplars(
    adapter: ModelAdapter,
    atlas: Atlas,
    neurons: Iterable[NeuronId],
    *,
    explain: Sequence[int] = EXPLAIN_RANKS,
    held_out: Sequence[int] = HELD_OUT_RANKS,
    sampling: Literal["top", "random"] = "top",
    samples: Sequence[Sample] | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> ExemplarSet:
    """Re-record chosen neurons on some of their top samples, token by token.

    Each needed sample is run once for all neurons that need it.

    Args:
        adapter: Of the scanned model.
        atlas: The scan.
        neurons: Which neurons.
        explain: Ranks, from 1, to explain from; those a neuron does not have are left out.
        held_out: Ranks to score on; none may also be explained from.
        sampling: `"random"` explains from samples drawn from the whole scan instead, as
            P1 compares; the held-out ranks stay.
        samples: The scanned samples in their order, if the atlas cannot find them again.
        seed: Of the draw.
        batch_size: Samples per forward.

    Raises:
        AtlasError: If the atlas is of another model, or its samples were in memory.
        ValueError: If a rank is both explained from and held out.
    """
    if set(explain) & set(held_out):
        shared = sorted(set(explain) & set(held_out))
        raise ValueError(f"Ranks {shared} are in both explain and held_out; a score would leak.")
    if min([*explain, *held_out], default=1) < 1:
        raise ValueError(
            f"A rank counts from 1; explain={explain}, held_out={held_out} were given."
        )
    if sampling not in ("top", "random"):
        raise ValueError(f"No sampling {sampling!r}. Samples are 'top' or 'random'.")
    adapter.require_eval()
    atlas.check(adapter)
    neurons = list(dict.fromkeys(neurons))
    everything = sorted(atlas.samples)
    wanted: dict[NeuronId, list[tuple[str, int | None, int]]] = {}
    maxima: dict[NeuronId, float] = {}
    expected: dict[tuple[NeuronId, int], float] = {}
    for number, neuron in enumerate(neurons):
        shown: list[tuple[str, int | None, int]]
        tested: list[tuple[str, int | None, int]]
        known = atlas.neuron(neuron)
        maxima[neuron] = max(known.maximum[role] for role in atlas.eligible)
        top = known.positions.tolist()
        expected |= {(neuron, p): v for p, v in zip(top, known.value.tolist(), strict=True)}
        tested = [("held_out", rank, top[rank - 1]) for rank in held_out if rank <= len(top)]
        if sampling == "top":
            shown = [("explain", rank, top[rank - 1]) for rank in explain if rank <= len(top)]
        else:
            taken = {position for _, _, position in tested}
            free = [position for position in everything if position not in taken]
            rng = np.random.default_rng([seed, number])
            drawn = rng.choice(free, min(len(explain), len(free)), replace=False)
            shown = [("explain", None, int(position)) for position in drawn]
        wanted[neuron] = [*shown, *tested]

    recorded = _record_columns(adapter, atlas, wanted, samples, batch_size)
    _compare(adapter, atlas, recorded, expected)
    made = {}
    for neuron, places in wanted.items():
        groups: dict[str, list[Exemplar]] = {"explain": [], "held_out": []}
        for kind, rank, position in places:
            sample, tokens, activation = recorded[neuron, position]
            groups[kind].append(
                Exemplar(
                    neuron,
                    sample,
                    tokens,
                    activation,
                    maxima[neuron],
                    atlas.choices.text_roles,
                    rank,
                    position,
                )
            )
        made[neuron] = NeuronExemplars(
            neuron, maxima[neuron], tuple(groups["explain"]), tuple(groups["held_out"])
        )
    return ExemplarSet(made)


_Recorded = dict[tuple[NeuronId, int], tuple[Sample, TokenMap, np.ndarray]]


def _record_columns(
    adapter: ModelAdapter,
    atlas: Atlas,
    wanted: Mapping[NeuronId, Sequence[tuple[str, int | None, int]]],
    samples: Sequence[Sample] | None,
    batch_size: int,
) -> _Recorded:
    needing: dict[int, list[NeuronId]] = defaultdict(list)
    for neuron, places in wanted.items():
        for position in dict.fromkeys(position for _, _, position in places):
            needing[position].append(neuron)
    order = sorted(needing)
    recorded: _Recorded = {}
    for start in range(0, len(order), batch_size):
        positions = order[start : start + batch_size]
        found = [_sample(atlas, position, samples) for position in positions]
        batch = encode(adapter, found, template=atlas.choices.template)
        columns: dict[str, list[int]] = defaultdict(list)
        for neuron in dict.fromkeys(n for position in positions for n in needing[position]):
            columns[neuron.site].append(adapter.site(neuron.site).row(neuron))
        sink = _Columns(columns)
        inputs = batch.on(adapter.device)
        with torch.inference_mode(), record(adapter, list(columns), sink, batch.tokens):
            adapter.forward(inputs)
        for row, position in enumerate(positions):
            maps = {s: batch.map_of(row, s) for s in {adapter.site(n).stream for n in columns}}
            for neuron in needing[position]:
                site = adapter.site(neuron.site)
                at = sink.maps[site.name].where(row)
                column = columns[site.name].index(site.row(neuron))
                values = sink.kept[site.name][at, column].numpy()
                if not np.isfinite(values).all():
                    raise CaptureError(
                        f"{neuron} has activations that are not finite on sample "
                        f"{found[row].id!r}, which it had not in the scan. Has the model changed?"
                    )
                recorded[neuron, position] = (found[row], maps[site.stream], values)
    return recorded


def _sample(atlas: Atlas, position: int, samples: Sequence[Sample] | None) -> Sample:
    if samples is None:
        return atlas.sample(position)
    record_id = str(atlas.samples[position].id)
    found = as_sample(samples[position], position) if position < len(samples) else None
    if found is None or found.id != record_id:
        raise UnknownNameError(
            f"sample at position {position} of those given",
            record_id,
            [as_sample(samples[i], i).id for i in range(min(len(samples), 100))],
            "Pass the scanned samples in the scanned order.",
        )
    return found


def _compare(
    adapter: ModelAdapter,
    atlas: Atlas,
    recorded: _Recorded,
    expected: Mapping[tuple[NeuronId, int], float],
) -> None:
    """Warn if other batches than the scan's gave clearly other activations."""
    tolerance = max(1e-3, 8 * torch.finfo(adapter.dtype).eps)
    worst = 0.0
    for key, (_, tokens, activation) in recorded.items():
        eligible = tokens.is_role(*atlas.eligible).numpy()
        if key in expected and eligible.any():
            now, then = float(activation[eligible].max()), expected[key]
            if key[0].expert is not None:
                # Tokens that were not routed are 0 here, above all negative activations.
                now, then = max(now, 0.0), max(then, 0.0)
            worst = max(worst, abs(now - then) / max(abs(then), 1e-3))
    if worst > tolerance:
        warnings.warn(
            f"Re-recorded activations differ from the scan's by up to {worst:.1%}. Other batches "
            "round differently, but not that much: has the model or its processor changed?",
            stacklevel=3,
        )


def look(
    adapter: ModelAdapter,
    neuron: NeuronId | str,
    sample: Sample,
    *,
    maximum: float | None = None,
    template: bool = True,
) -> Exemplar:
    """One neuron on one sample: shows itself in a notebook, `save` writes a PNG.

    Args:
        adapter: Of the model, with its processor.
        neuron: Which neuron, or how it is written (`"language.16/4347"`).
        sample: Any sample; the response is optional.
        maximum: What is 10 on the 0..10 scale, such as `atlas.maximum(neuron)`; by default
            the largest activation on this sample.
        template: Whether to use the processor's chat template.

    Source: P1, Figure 1.

    Raises:
        UnknownNameError: If the model has no such neuron.
        SampleError: If the sample cannot be used.
        AdapterError: If the model is in training mode.
    """
    adapter.require_eval()
    neuron = NeuronId.parse(neuron) if isinstance(neuron, str) else neuron
    site = adapter.site(neuron.site)
    row = site.row(neuron)
    batch = encode(adapter, [sample], template=template)
    sink = _Columns({site.name: [row]})
    inputs = batch.on(adapter.device)
    with torch.inference_mode(), record(adapter, site, sink, batch.tokens):
        adapter.forward(inputs)
    tokens = batch.map_of(0, site.stream)
    values = sink.kept[site.name][sink.maps[site.name].where(0), 0].numpy()
    roles = (Role.RESPONSE,) if sample.response else TEXT_ROLES
    if not np.isfinite(values).all():
        raise SampleError(sample.id, "non-finite activations", f"at {neuron}.")
    if maximum is None:
        maximum = float(values[tokens.is_role(Role.VISUAL, *roles).numpy()].max())
    return Exemplar(neuron, sample, tokens, values, maximum, roles)

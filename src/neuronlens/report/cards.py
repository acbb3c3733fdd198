"""A card for one neuron: what was said of it, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from neuronlens.classify import Category
from neuronlens.samples import Sample
from neuronlens.show import Html, enlarged, levels, modulated, picture, shaded, stretched
from neuronlens.study import NeuronRecord, SampleTokens, Study, TokenRecord
from neuronlens.tokens import TEXT_ROLES, Role

PICTURE = 164
"""Width of a card's pictures in CSS pixels."""


@dataclass(frozen=True)
class Scene:
    """One exemplar on a card; an empty string where there is nothing to show."""

    title: str
    image: Html
    true_image: Html
    simulated_image: Html
    true_text: Html
    simulated_text: Html


@dataclass(frozen=True)
class Card:
    """One neuron on the page."""

    record: NeuronRecord
    bars: list[tuple[Category, float]]
    scenes: list[Scene]
    explained_from: list[Html]


def card(
    study: Study, record: NeuronRecord, samples: Mapping[int, Sample] | None, scenes: int
) -> Card:
    """The card of one neuron of a study."""
    stream = record.stream
    exemplars = study.exemplars(record.id)
    held_out = [each for each in exemplars if each.use == "held_out"][:scenes]
    explain = [each for each in exemplars if each.use == "explain"]
    shown = []
    if record.category != "text":
        for each in explain:
            tokens = study.samples[each.position, stream]
            true = levels(np.array(each.true), record.maximum)
            shown.append(picture(_modulated(_image(tokens, samples), tokens, true), 74))
    return Card(
        record=record,
        bars=[(category, p) for category, p in record.probability.items() if p > 0],
        scenes=[
            _scene(record, each, study.samples[each.position, stream], samples) for each in held_out
        ],
        explained_from=shown,
    )


def _scene(
    record: NeuronRecord,
    exemplar: TokenRecord,
    tokens: SampleTokens,
    samples: Mapping[int, Sample] | None,
) -> Scene:
    true = levels(np.array(exemplar.true), record.maximum)
    role = np.array(tokens.role)
    visual, text = true[role == Role.VISUAL], true[np.isin(role, [int(r) for r in TEXT_ROLES])]
    simulated = _simulated(exemplar, len(true))
    image = _image(tokens, samples)
    both = record.category not in ("visual", "text")
    return Scene(
        title=(
            f"sample {tokens.sample.id}, rank {exemplar.rank}: largest on visual tokens "
            f"{_largest(visual)}, on text {_largest(text)}"
        ),
        image=picture(enlarged(image), PICTURE, "image"),
        true_image=picture(_modulated(image, tokens, true), PICTURE, "activation-modulated image"),
        simulated_image=(
            picture(_modulated(image, tokens, simulated), PICTURE, "simulated modulated image")
            if both or record.category == "visual"
            else Html()
        ),
        true_text=_shaded(tokens, true),
        simulated_text=(
            _shaded(tokens, simulated) if both or record.category == "text" else Html()
        ),
    )


def _simulated(exemplar: TokenRecord, count: int) -> Float[np.ndarray, " token"]:
    """Predictions on the 0..10 scale; NaN where there is none."""
    if not exemplar.simulated:
        return np.full(count, np.nan)
    values = np.array([np.nan if v is None else v for v in exemplar.simulated], float)
    return levels(values, max(1.0, float(np.nanmax(values, initial=0.0))))


def _largest(level: Float[np.ndarray, " token"]) -> str:
    return f"{level.max():.1f}" if len(level) else "-"


def _image(tokens: SampleTokens, samples: Mapping[int, Sample] | None) -> Image.Image:
    position = tokens.sample.position
    if samples is not None:
        return samples[position].open_images()[0]
    return tokens.sample.sample_from_files().open_images()[0]


def _modulated(
    image: Image.Image, tokens: SampleTokens, level: Float[np.ndarray, " token"]
) -> Image.Image:
    large = enlarged(image)
    on = [
        i
        for i, (image_number, box) in enumerate(zip(tokens.image, tokens.box, strict=True))
        if image_number == 0 and box is not None
    ]
    boxes = np.array([tokens.box[i] for i in on], float).reshape(-1, 4)
    return modulated(large, stretched(boxes, large.width / image.width), level[on])


def _shaded(tokens: SampleTokens, level: Float[np.ndarray, " token"]) -> Html:
    if tokens.pieces is None:
        return Html()
    at = [i for i, role in enumerate(tokens.role) if role == Role.RESPONSE]
    at = at or [i for i, role in enumerate(tokens.role) if role in TEXT_ROLES]
    return shaded([tokens.pieces[i] for i in at], level[at])

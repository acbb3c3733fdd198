"""A page that shows a study: shares, histograms, layers, and the neurons themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from neuronlens.atlas import Atlas
from neuronlens.classify import CATEGORIES, Classification
from neuronlens.errors import AtlasError, MissingExtraError, OutputError
from neuronlens.report import figures
from neuronlens.report.cards import Card, card
from neuronlens.samples import Sample
from neuronlens.study import NeuronRecord, Study

LAYER_SHARE = 0.03
"""P1, Figure 7: the top 3 % of each category."""


@dataclass(frozen=True)
class Control:
    """What the same pipeline finds where there is nothing to find.

    Attributes:
        kinds: Classification of the control, such as the same model with random weights.
        study: Its explained neurons, if it was taken that far.
    """

    kinds: Classification
    study: Study | None = None


def report(
    atlas: Atlas,
    study: Study,
    *,
    kinds: Classification,
    out: str | Path,
    controls: Mapping[str, Control] | None = None,
    samples: Sequence[Sample] | None = None,
    cards: int = 4,
    scenes: int = 2,
    title: str = "What the neurons find",
    note: str = "",
) -> Path:
    """Write `index.html`: one file, which opens without a server and loads nothing.

    Every number on it is taken from the records it is given.

    Args:
        atlas: The scan.
        study: Explained and scored neurons.
        kinds: The classification.
        out: Folder for the page; other files in it are left alone.
        controls: By name, the same pipeline on a control.
        samples: The scanned samples, if the atlas cannot find them again.
        cards: Neurons to show of each category, best score first.
        scenes: Held-out samples to show of each neuron.
        title: Heading of the page.
        note: A sentence to stand under it.

    Returns:
        The page.

    Source: P1, Figures 1 and 4 to 9.

    Raises:
        AtlasError: If atlas, study and classification are not of one model.
        MissingExtraError: If Jinja2 or matplotlib is not installed.
        OutputError: If the page cannot be written.
    """
    if not atlas.manifest.model.fingerprint == study.manifest.model == kinds.model:
        raise AtlasError(
            "Atlas, study and classification are of different models. Report on what was made "
            "from one scan."
        )
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise MissingExtraError("jinja2", "report", "A report") from None
    controls = controls or {}
    runs = {"this model": Control(kinds, study), **controls}
    classified = {
        name: run.kinds
        for name, run in runs.items()
        if run.kinds is not kinds or name == "this model"
    }
    template = files("neuronlens.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        template
    )
    text = page.render(
        title=title,
        note=note,
        atlas=atlas.manifest,
        readings=study.manifest.readings,
        study=study,
        names=figures.NAMES,
        colours=figures.COLOURS,
        categories=CATEGORIES,
        runs=runs,
        shares=figures.shares(classified),
        histograms=figures.histograms(classified),
        layers=figures.layers(kinds, LAYER_SHARE),
        layer_share=LAYER_SHARE,
        cards={
            category: _cards(study, category, samples, cards, scenes) for category in CATEGORIES
        },
    )
    return _written(Path(out), text)


def _cards(
    study: Study, category: str, samples: Sequence[Sample] | None, count: int, scenes: int
) -> list[Card]:
    def falling(record: NeuronRecord) -> float:
        value = record.score.value if record.score else None
        return 2.0 if value is None else -value

    mine = sorted((r for r in study.values() if r.category == category and r.score), key=falling)
    by_position = None if samples is None else dict(enumerate(samples))
    return [card(study, record, by_position, scenes) for record in mine[:count]]


def _written(out: Path, text: str) -> Path:
    """The page at its place, never half written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        working = out / f".index-{os.getpid()}.html"
        working.write_text(text, encoding="utf-8")
        return working.replace(out / "index.html")
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}. Choose another folder."
        ) from error


__all__ = ["Control", "report"]

"""The figures of the page, as SVG inside it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from neuronlens.classify import Classification
from neuronlens.figures import (
    COLOURS,
    NAMES,
    category_histograms,
    category_layers,
    category_shares,
)
from neuronlens.show import Html, escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def svg(figure: Figure, name: str, alt: str) -> Html:
    """A figure as SVG for a page; `name` is its own within the page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # Ids are salted by name, so that several figures in one page do not share any.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    label = escaped(alt)
    return Html(f'<figure role="img" aria-label="{label}">{text[text.index("<svg") :]}</figure>')


def shares(runs: Mapping[str, Classification]) -> Html:
    """Share of language neurons in each category, a bar for each run."""
    return svg(category_shares(runs), "shares", "Share of neurons by category")


def histograms(runs: Mapping[str, Classification]) -> Html:
    """Histogram of each probability over language neurons; controls as lines."""
    return svg(category_histograms(runs), "histograms", "Histograms of the four probabilities")


def layers(kinds: Classification, share: float) -> Html:
    """Neurons per layer among the most probable of each category."""
    return svg(category_layers(kinds, share=share), "layers", "Neurons per layer and category")


__all__ = ["COLOURS", "NAMES", "histograms", "layers", "shares", "svg"]

"""The figures of the page, as SVG inside it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from neuronlens.classify import CATEGORIES, Category, Classification
from neuronlens.errors import MissingExtraError
from neuronlens.show import Html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final[dict[Category, str]] = {
    "visual": "#2f6fd0",
    "text": "#16804a",
    "multimodal": "#8b45c4",
    "unknown": "#a3a8b0",
}
NAMES: Final[dict[Category, str]] = {
    "visual": "visual",
    "text": "text",
    "multimodal": "multi-modal",
    "unknown": "unknown",
}
_GREY = "#5b6470"


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "A report") from None
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, name: str, alt: str) -> Html:
    import matplotlib as mpl

    buffer = io.StringIO()
    # Ids are salted by name, so that several figures in one page do not share any.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return Html(f'<figure role="img" aria-label="{alt}">{text[text.index("<svg") :]}</figure>')


def shares(runs: Mapping[str, Classification]) -> Html:
    """Share of language neurons in each category, a bar for each run (P1, Figure 6)."""
    figure = _figure(10.5, 0.6 + 0.42 * len(runs))
    axes = figure.subplots()
    names = list(runs)
    left = np.zeros(len(names))
    for category in CATEGORIES:
        width = np.array([runs[name].shares()[category] for name in names]) * 100
        axes.barh(
            names, width, left=left, color=COLOURS[category], label=NAMES[category], height=0.62
        )
        for row, (start, value) in enumerate(zip(left, width, strict=True)):
            if value >= 4:
                axes.text(
                    start + value / 2,
                    row,
                    f"{value:.0f} %" if value >= 6 else f"{value:.0f}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=9,
                )
        left += width
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=10)
    axes.spines[:].set_visible(False)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    return _svg(figure, "shares", "Share of neurons by category")


def histograms(runs: Mapping[str, Classification]) -> Html:
    """Histogram of each probability over language neurons; controls as lines (P1, Figure 5)."""
    figure = _figure(10.5, 2.5)
    panels = figure.subplots(1, len(CATEGORIES))
    for axes, category in zip(panels, CATEGORIES, strict=True):
        for number, (name, kinds) in enumerate(runs.items()):
            counts, edges = kinds.histograms()
            percent = counts[category] / counts[category].sum() * 100
            if number == 0:
                axes.stairs(percent, edges, fill=True, color=COLOURS[category], label=name)
            else:
                axes.stairs(
                    percent,
                    edges,
                    color="#1c2530",
                    linewidth=1.2,
                    linestyle=("-", "--", ":")[(number - 1) % 3],
                    label=name,
                )
        axes.set_title(f"p of {NAMES[category]}", fontsize=10)
        axes.set_xlim(0, 1)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axes.set_ylim(0, 110)
        _plain(axes)
    panels[0].set_ylabel("% of neurons", fontsize=9, color=_GREY)
    handles, labels = panels[-1].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9
        )
    return _svg(figure, "histograms", "Histograms of the four probabilities")


def layers(kinds: Classification, share: float) -> Html:
    """Neurons per layer among the most probable of each category (P1, Figure 7)."""
    figure = _figure(10.5, 2.1)
    panels = figure.subplots(1, len(CATEGORIES), sharey=True)
    for axes, (category, by_layer) in zip(panels, kinds.layers(share).items(), strict=True):
        axes.bar(list(by_layer), list(by_layer.values()), color=COLOURS[category], width=0.8)
        axes.set_title(NAMES[category], fontsize=10)
        axes.set_xlabel("layer", fontsize=9, color=_GREY)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain(axes)
    panels[0].set_ylabel("neurons", fontsize=9, color=_GREY)
    return _svg(figure, "layers", "Neurons per layer and category")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_GREY)

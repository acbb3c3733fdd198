"""Visual, text, multi-modal, unknown: how many, how clear-cut, in which layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from neuronlens.classify import CATEGORIES, Classification
from neuronlens.figures.look import (
    COLOURS,
    INK,
    NAMES,
    WIDTH,
    drawn,
    named_below,
    sheet,
    whole_numbers,
)
from neuronlens.neurons import Module

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawn
def category_histograms(
    runs: Classification | Mapping[str, Classification], *, module: Module = "language"
) -> Figure:
    """How clear-cut the categories are: a histogram of each of the four probabilities.

    The first run is filled, the others are lines over it. The vertical axis is linear up to
    1 % and logarithmic above, so that rare but certain neurons can be seen.

    Args:
        runs: A classification, or several by name, the model's own first.
        module: Neurons of this module.

    Source: P1, Figures 5 and 21.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    runs = _named(runs)
    figure = sheet(WIDTH, 2.5 if len(runs) > 1 else 2.2)
    panels = figure.subplots(1, len(CATEGORIES), sharey=True)
    for axes, category in zip(panels, CATEGORIES, strict=True):
        for number, (name, kinds) in enumerate(runs.items()):
            counts, edges = kinds.histograms(module)
            percent = counts[category] / counts[category].sum() * 100
            if number == 0:
                axes.stairs(percent, edges, fill=True, color=COLOURS[category], label=name)
            else:
                style = ("-", "--", ":")[(number - 1) % 3]
                axes.stairs(percent, edges, color=INK, linewidth=1.2, linestyle=style, label=name)
        axes.set_title(f"p of {NAMES[category]}")
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axes.set_ylim(0, 110)
        axes.minorticks_off()
    panels[0].set_ylabel("% of neurons")
    if len(runs) > 1:
        named_below(figure, panels[-1].get_legend_handles_labels()[0])
    return figure


@drawn
def category_shares(
    runs: Classification | Mapping[str, Classification], *, module: Module = "language"
) -> Figure:
    """How many neurons fall into each category: one bar for each run.

    Args:
        runs: A classification, or several by name, from top to bottom.
        module: Neurons of this module.

    Source: P1, Figures 6 and 22.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    runs = _named(runs)
    figure = sheet(WIDTH, 0.6 + 0.42 * len(runs))
    axes = figure.subplots()
    # Bars stand at numbers, not at names: an axis of names would merge equal ones.
    rows = np.arange(len(runs))
    left = np.zeros(len(runs))
    for category in CATEGORIES:
        width = np.array([kinds.shares(module)[category] for kinds in runs.values()]) * 100
        axes.barh(
            rows, width, left=left, color=COLOURS[category], label=NAMES[category], height=0.62
        )
        for row, (start, value) in enumerate(zip(left, width, strict=True)):
            if value >= 4:
                axes.text(
                    start + value / 2,
                    row,
                    f"{value:.0f} %" if value >= 6 else f"{value:.0f}",
                    ha="center",
                    va="center",
                    color=INK if category == "unknown" else "white",
                    fontsize=9,
                )
        left += width
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xticks([])
    axes.set_yticks(rows, list(runs))
    axes.tick_params(length=0, labelsize=10, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


@drawn
def category_layers(
    kinds: Classification, *, share: float = 0.03, module: Module = "language"
) -> Figure:
    """Where the neurons of each category are: how many of the most probable are in each layer.

    Args:
        kinds: The classification.
        share: Of the module's neurons, how many to take of each category.
        module: Neurons of this module.

    Source: P1, Figures 7 and 23. Neurons that tie at the cut count in fractions.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = sheet(WIDTH, 2.1)
    panels = figure.subplots(1, len(CATEGORIES), sharey=True)
    for axes, (category, by_layer) in zip(panels, kinds.layers(share, module).items(), strict=True):
        axes.bar(list(by_layer), list(by_layer.values()), color=COLOURS[category], width=0.8)
        axes.set_title(NAMES[category])
        axes.set_xlabel("layer")
        whole_numbers(axes)
    panels[0].set_ylabel("neurons")
    return figure


def _named(runs: Classification | Mapping[str, Classification]) -> Mapping[str, Classification]:
    return {"this model": runs} if isinstance(runs, Classification) else runs

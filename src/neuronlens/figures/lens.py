"""What the layers of a language model are about to say, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from neuronlens.figures.glyphs import drawable
from neuronlens.figures.look import (
    GREY,
    INK,
    WIDTH,
    domain_colours,
    domain_handles,
    drawn,
    named_below,
    sheet,
    whole_numbers,
)
from neuronlens.lens import EntropyCurves, LensReading
from neuronlens.lens.words import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST: Final = 22
"""Characters of a word that fit a cell."""


@drawn
def lens_heat_map(reading: LensReading, *, token: int = 0) -> Figure:
    """The likeliest words of one token by layer, the bluer the likelier.

    Layers go from the embeddings at the bottom to the last at the top, candidates from the
    likeliest on the left. A word too long for its cell is cut.

    Args:
        reading: What the lens shows.
        token: Number of the token among those that were read.

    Source: P2, Figures 6 and 10 to 13.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        UnknownNameError: If that token was not read.
    """
    from matplotlib.colors import LinearSegmentedColormap

    rows = [reading.candidates(layer, token) for layer in reading.layers]
    shown = max(map(len, rows), default=1)
    figure = sheet(min(WIDTH, 2.4 + 1.7 * shown), 1.0 + 0.27 * len(rows))
    axes = figure.subplots()
    blue = LinearSegmentedColormap.from_list("probability", ["#ffffff", "#1f55ba"])
    drawn_cells = axes.pcolormesh(
        [[p for _, p in row] for row in rows],
        cmap=blue, vmin=0, vmax=1, edgecolors="#e2e6ec", linewidth=0.5,
    )  # fmt: skip
    for y, row in enumerate(rows):
        for x, (word, p) in enumerate(row):
            ink = "white" if p > 0.55 else INK
            said = cut(drawable(visible(word)))
            axes.text(x + 0.5, y + 0.5, said, ha="center", va="center", fontsize=9, color=ink)
    names = ["embeddings" if layer == 0 else str(layer) for layer in reading.layers]
    axes.set_yticks([y + 0.5 for y in range(len(rows))], names)
    axes.set_xticks([x + 0.5 for x in range(shown)], [str(x + 1) for x in range(shown)])
    axes.tick_params(length=0)
    axes.set_xlabel("candidate")
    axes.set_ylabel("layer")
    axes.set_title(drawable(f"token {reading.label(token)}"))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(drawn_cells, ax=axes, aspect=30, pad=0.01)
    bar.set_label("probability")
    bar.outline.set_visible(False)
    return figure


STYLES: Final = {"visual": ("--", "image tokens"), "text": ("-", "text tokens")}
"""P2, Figure 7: how the two kinds of tokens are told apart."""


@drawn
def entropy_curves(runs: EntropyCurves | Mapping[str, EntropyCurves]) -> Figure:
    """How unsure the lens is, by layer: image tokens dashed, text tokens solid, a colour a domain.

    Layer 0 is the embeddings. Bands are the 95 % intervals of the means. What has no tokens
    has no line.

    Args:
        runs: Curves, or several by name, such as those of a control: a panel for each.

    Source: P2, Figure 7.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    from matplotlib.lines import Line2D

    runs = {"": runs} if isinstance(runs, EntropyCurves) else runs
    looks = domain_colours(group for curves in runs.values() for group in curves.groups)
    figure = sheet(WIDTH, 3.6)
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, curves) in zip(panels, runs.items(), strict=True):
        for number, group in enumerate(curves.groups):
            colour, marker = looks[group]
            for row, (style, _) in enumerate(STYLES.values()):
                mean = curves.mean[number, row]
                if np.isnan(mean).all():
                    continue
                low, high = curves.interval[number, row].T
                axes.fill_between(curves.layers, low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(
                    curves.layers, mean, style, color=colour, marker=marker, markersize=4, lw=1.5
                )
        axes.set_title(name)
        axes.set_xlabel("layer")
        whole_numbers(axes)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("mean entropy in nats")
    kinds = [Line2D([], [], color=GREY, ls=style, label=label) for style, label in STYLES.values()]
    named_below(figure, [*domain_handles(looks), *kinds])
    return figure


def cut(word: str) -> str:
    """A word as long as a cell is wide."""
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…"

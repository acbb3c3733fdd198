"""What is lost with neurons of a kind, against as many drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from neuronlens.figures.look import GREY, INK, drawn, named_below, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ValueAndInterval(Protocol):
    """A mean and the ends of its interval, as an evaluation gives it."""

    @property
    def value(self) -> float:
        """The mean."""
        ...

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends; None if there is no interval."""
        ...


_LOOKS: Final = (
    ("#2f6fd0", "o", "-"), ("#c0530f", "s", "--"), ("#16804a", "^", "-."), (INK, "D", ":"),
)  # fmt: skip


@drawn
def pruning_curves(
    curves: Mapping[str, Mapping[float, ValueAndInterval]],
    *,
    full: ValueAndInterval | None = None,
    measure: str = "accuracy",
) -> Figure:
    """What is left of a measure by the share of neurons that is gone, with intervals.

    Args:
        curves: By name of what is pruned: share of neurons, from 0 to 1, to what is left.
        full: Of the whole model: a line with its interval as a band.
        measure: What is measured, for the axis.

    Source: P1, Figure 12. Its curves have no intervals.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    from matplotlib.transforms import ScaledTranslation

    figure = sheet(6.4, 3.6)
    axes = figure.subplots()
    if full is not None:
        axes.axhline(full.value, color=GREY, lw=1, label="whole model")
        if full.interval is not None:
            axes.axhspan(*full.interval, color=GREY, alpha=0.15, lw=0)
    for number, (name, points) in enumerate(curves.items()):
        if not points:
            continue
        colour, marker, style = _LOOKS[number % len(_LOOKS)]
        shares = sorted(points)
        means = [points[share].value for share in shares]
        # From the mean down to the lower end, and up to the upper one; nothing without interval.
        ends = [points[share].interval or (points[share].value,) * 2 for share in shares]
        arms = [
            [max(0.0, mean - low) for mean, (low, _) in zip(means, ends, strict=True)],
            [max(0.0, high - mean) for mean, (_, high) in zip(means, ends, strict=True)],
        ]
        # Arms at the same share stand side by side; on paper only, not in the data.
        beside = 5 / 72 * (number - (len(curves) - 1) / 2)
        moved = axes.transData + ScaledTranslation(beside, 0, figure.dpi_scale_trans)
        axes.errorbar(
            [100 * share for share in shares], means, yerr=arms, color=colour, marker=marker,
            ls=style, capsize=3, lw=1.5, markersize=5, label=name, transform=moved,
        )  # fmt: skip
        # What is moved on paper does not count when the axes are fitted to the data.
        heights = [height for pair in ends for height in pair]
        axes.update_datalim([(100 * share, heights[0]) for share in shares])
        axes.update_datalim([(100 * shares[0], height) for height in heights])
    axes.autoscale_view()
    axes.set_xlabel("% of neurons pruned")
    axes.set_ylabel(measure)
    named_below(figure, axes.get_legend_handles_labels()[0])
    return figure

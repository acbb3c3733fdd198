"""Domain-specific and silent neurons by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from neuronlens.domains import DomainNeurons
from neuronlens.figures.look import (
    GREY,
    WIDTH,
    domain_colours,
    domain_handles,
    drawn,
    named_below,
    sheet,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@drawn
def domain_layers(found: DomainNeurons, *, modules: Sequence[str] | None = None) -> Figure:
    """Where domain-specific neurons are: a panel for each module, a line for each domain.

    A neuron of several domains counts in each. A module of one layer has bars.

    Args:
        found: The selection.
        modules: Which; None for all.

    Source: P2, Figure 5.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        UnknownNameError: If there is no such module.
    """
    by_module = {name: found.layers(name) for name in modules or found.modules}
    looks = domain_colours(found.domains)
    figure, panels = _panels([len(_layers(each)) for each in by_module.values()], 3.2)
    for axes, (name, by_domain) in zip(panels, by_module.items(), strict=True):
        if len(_layers(by_domain)) == 1:
            values = [next(iter(by_domain[domain].values()), 0) for domain in looks]
            axes.bar(range(len(looks)), values, color=[c for c, _ in looks.values()], width=0.7)
            axes.set_xticks([])
            axes.set_xlabel("one layer")
        else:
            for domain, (colour, marker) in looks.items():
                layers = by_domain[domain]
                axes.plot(
                    list(layers), list(layers.values()), color=colour, marker=marker,
                    markersize=4, lw=1.5, label=domain,
                )  # fmt: skip
            axes.set_xlabel("layer")
            whole_numbers(axes)
        axes.set_title(name)
        most = max(count for layers in by_domain.values() for count in layers.values())
        axes.set_ylim(0, max(1.05 * most, 1))
        whole_numbers(axes, which="y")
    panels[0].set_ylabel("neurons")
    named_below(figure, domain_handles(looks))
    return figure


@drawn
def silent_neurons(found: DomainNeurons, *, modules: Sequence[str] | None = None) -> Figure:
    """What share of the neurons of each layer never fired on any token of any domain.

    Args:
        found: The selection, which knows what fired.
        modules: Which; None for all.

    Source: P2, Figure 9.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        UnknownNameError: If there is no such module.
    """
    by_module = {name: found.silent(name) for name in modules or found.modules}
    figure, panels = _panels([len(each) for each in by_module.values()], 2.2, sharey=True)
    most = 0.0
    for axes, (name, layers) in zip(panels, by_module.items(), strict=True):
        percent = [100 * silent / every for silent, every in layers.values()]
        axes.bar(list(layers), percent, color=GREY, width=0.8)
        axes.set_title(name)
        axes.set_xlabel("layer")
        axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
        if not any(percent):
            axes.text(
                0.5, 0.5, "no silent neurons", ha="center", va="center", transform=axes.transAxes
            )
        most = max(most, *percent)
        whole_numbers(axes)
    panels[0].set_ylim(0, max(5, 1.05 * most))
    panels[0].set_ylabel("% silent")
    return figure


def _layers(by_domain: Mapping[str, Mapping[int, int]]) -> set[int]:
    return {layer for layers in by_domain.values() for layer in layers}


def _panels(
    layers: Sequence[int], height: float, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Panels side by side, wider for modules of many layers."""
    figure = sheet(WIDTH, height)
    ratios = [min(max(each, 6), 24) for each in layers]
    panels = figure.subplots(1, len(layers), sharey=sharey, squeeze=False, width_ratios=ratios)[0]
    return figure, list(panels)

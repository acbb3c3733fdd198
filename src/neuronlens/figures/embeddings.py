"""Images by what the vision encoder makes of them, a colour for each domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neuronlens.embeddings import ImageEmbeddings, PrincipalComponents
from neuronlens.errors import DataError
from neuronlens.figures.look import domain_colours, domain_handles, drawn, named_below, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawn
def embedding_plane(embeddings: ImageEmbeddings, components: PrincipalComponents) -> Figure:
    """Where images lie in the first two directions in which their embeddings vary most.

    Axes say how much of the variance lies along them; a unit is as long on both.

    Args:
        embeddings: Of the images, with their domains.
        components: Of these embeddings.

    Source: P2, Figure 2.

    Raises:
        DataError: If the components are of other vectors, or of one direction only.
        MissingExtraError: If matplotlib is not installed.
    """
    count, directions = components.scores.shape
    if count != len(embeddings) or directions < 2:
        raise DataError(
            f"{count} images in {directions} directions do not belong to {len(embeddings)} "
            "embeddings in a plane. Give principal_components(embeddings, n=2)."
        )
    names = np.array([domain or "(none)" for domain in embeddings.domains])
    looks = domain_colours(names.tolist())
    figure = sheet(6.4, 5.0)
    axes = figure.subplots()
    for domain, (colour, marker) in looks.items():
        x, y = components.scores[names == domain, :2].T
        axes.scatter(
            x, y, s=22, color=colour, marker=marker, alpha=0.75, linewidths=0, label=domain
        )
    axes.set_aspect("equal", adjustable="datalim")
    first, second, *_ = components.explained
    axes.set_xlabel(f"first component, {first:.0%} of the variance")
    axes.set_ylabel(f"second component, {second:.0%}")
    named_below(figure, domain_handles(looks, line=False))
    return figure

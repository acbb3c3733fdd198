"""One look for all figures: colours, type, a blank sheet."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, TypeVar

from neuronlens.classify import Category
from neuronlens.errors import MissingExtraError
from neuronlens.figures.glyphs import families

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

COLOURS: Final[dict[Category, str]] = {
    "visual": "#2f6fd0",
    "text": "#16804a",
    "multimodal": "#c0530f",
    "unknown": "#a3a8b0",
}
"""Of the categories. Told apart by readers who cannot see red, green or blue (a test)."""

NAMES: Final[dict[Category, str]] = {
    "visual": "visual",
    "text": "text",
    "multimodal": "multi-modal",
    "unknown": "unknown",
}
"""Of the categories, as they stand in a figure."""

DOMAIN_COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4a515c",
)  # fmt: skip
"""Of domains, in alphabetical order: Okabe and Ito's palette for all kinds of sight."""

MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""A second sign for the domain. One more than colours repeat after, so that pairs stay unique."""

INK: Final = "#1c2530"
GREY: Final = "#5b6470"

WIDTH: Final = 10.5
"""Of a figure in inches: what a page or a notebook shows without scrolling."""

# Text is what the data says: a dollar in a token or in a name is no formula. Settings of the
# caller's, such as a dark style, would otherwise mix with ours.
_STYLE: Final[dict[str, Any]] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "normal",
    "axes.labelsize": 9,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.usetex": False,
    "text.parse_math": False,
}


def domain_colours(domains: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each domain, the same in every figure of the same domains."""
    return {
        name: (DOMAIN_COLOURS[i % len(DOMAIN_COLOURS)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(sorted(set(domains)))
    }


def domain_handles(looks: Mapping[str, tuple[str, str]], *, line: bool = True) -> list[Artist]:
    """What a legend shows of domains."""
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [], [], color=colour, marker=marker, markersize=4, lw=1.5 if line else 0, label=domain
        )
        for domain, (colour, marker) in looks.items()
    ]


def drawn(draw: Callable[P, R]) -> Callable[P, R]:
    """Make a function draw in the house style, whatever the caller's settings are."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib as mpl
            import matplotlib.figure  # whether it can be imported at all
        except ImportError:
            raise MissingExtraError("matplotlib", "report", "A figure") from None
        style: Any = {**mpl.rcParamsDefault, **_STYLE, "font.family": families()}
        kept = ("backend", "backend_fallback", "interactive", "toolbar", "timezone")
        with mpl.rc_context({k: v for k, v in style.items() if k not in kept}):
            return draw(*args, **kwargs)

    return styled


def sheet(width: float, height: float) -> Figure:
    """An empty figure, in inches, which any notebook shows."""
    return _sheet()(figsize=(width, height), layout="constrained", facecolor="white")


@cache
def _sheet() -> type[Figure]:
    from matplotlib.figure import Figure

    class Sheet(Figure):
        """A figure that shows itself: others need pyplot to be imported in the notebook."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=100)
            return buffer.getvalue()

    return Sheet


def whole_numbers(axes: Axes, *, which: Literal["x", "y"] = "x") -> None:
    """Ticks at whole numbers of layers or neurons, not between them."""
    from matplotlib.ticker import MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def named_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend for all panels, under them, with as many in a row as there is room for."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    # Inches: a letter of this size is about 0.08 wide, sign and gaps take 0.7.
    fitting = int(figure.get_figwidth() / (0.7 + 0.08 * longest))
    columns = max(1, min(fitting, len(handles), 7))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)

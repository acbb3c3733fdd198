"""Figures: what is drawn is what the result says, readable by everybody."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import neuronlens as nl
from neuronlens import figures, testbed
from neuronlens.classify import CATEGORIES
from neuronlens.domains import domain_neurons
from neuronlens.embeddings import ImageEmbeddings, principal_components
from neuronlens.errors import DataError, MissingExtraError, UnknownNameError
from neuronlens.lens import EntropyCurves, LensReading


@pytest.fixture(scope="module")
def kinds(atlas):
    return nl.NeuronClassifier(**testbed.READINGS).classify(atlas)


@pytest.fixture(scope="module")
def control(untrained_vlm, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("control") / "atlas"
    atlas = nl.scan(untrained_vlm, scenes, sites="language", out=out, n=20)
    return nl.NeuronClassifier(**testbed.READINGS).classify(atlas)


def texts(figure):
    """Every text that is drawn, with its box in pixels."""
    canvas, drawn = FigureCanvasAgg(figure), []
    draw = Text.draw

    def noted(text, renderer):
        drawn.append(text)
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        canvas.draw()  # places everything
        patch.setattr(Text, "draw", noted)
        canvas.draw()
    boxes = [(t.get_text(), t.get_window_extent()) for t in drawn if t.get_visible()]
    return [(text, box) for text, box in boxes if text.strip()]


def unreadable(figure):
    """Texts that leave the figure, and pairs that lie on each other."""
    seen = texts(figure)
    page = figure.bbox.padded(0.5)
    clipped = [
        t for t, b in seen if b.x0 < page.x0 or b.y0 < page.y0 or b.x1 > page.x1 or b.y1 > page.y1
    ]
    clashing = [
        (a, b)
        for (a, one), (b, other) in itertools.combinations(seen, 2)
        if one.padded(-1).overlaps(other.padded(-1))
    ]
    return clipped, clashing


def labels(axes, which="y"):
    return [t.get_text() for t in getattr(axes, f"get_{which}ticklabels")()]


# Categories


def test_every_segment_of_a_bar_is_as_wide_as_its_share(kinds, control):
    runs = {"mine": kinds, "control": control}
    axes = figures.category_shares(runs).axes[0]
    assert labels(axes) == ["mine", "control"]
    for category, bars in zip(CATEGORIES, axes.containers, strict=True):
        assert bars.get_label() == figures.NAMES[category]
        for bar, run in zip(bars, runs.values(), strict=True):
            members = sum(
                (s.category == CATEGORIES.index(category)).sum()
                for n, s in run.sites.items()
                if n.startswith("language")
            )
            neurons = sum(len(s.category) for n, s in run.sites.items() if n.startswith("language"))
            assert bar.get_width() == pytest.approx(100 * members / neurons)
    for row in range(2):
        ends = [bars[row].get_x() + bars[row].get_width() for bars in axes.containers]
        starts = [bars[row].get_x() for bars in axes.containers]
        assert starts == pytest.approx([0, *ends[:-1]])
        assert ends[-1] == pytest.approx(100)


def test_a_histogram_holds_every_neuron_once(kinds, control):
    figure = figures.category_histograms({"mine": kinds, "control": control})
    for axes, category in zip(figure.axes, CATEGORIES, strict=True):
        filled, line = axes.patches
        assert (filled.get_fill(), line.get_fill()) == (True, False)
        assert mpl.colors.to_hex(filled.get_facecolor()) == figures.COLOURS[category]
        for drawn, run in ((filled, kinds), (line, control)):
            values, edges, _ = drawn.get_data()
            column = np.concatenate(
                [
                    s.probability[:, CATEGORIES.index(category)]
                    for n, s in run.sites.items()
                    if n.startswith("language")
                ]
            )
            # The last bin holds its right edge, as those of the paper must.
            bins = np.minimum((column * 20 + 1e-6).astype(int), 19)
            assert values == pytest.approx(np.bincount(bins, minlength=20) / len(column) * 100)
            assert edges == pytest.approx(np.arange(21) / 20)


def test_bars_by_layer_add_up_to_the_share_asked_for(kinds):
    figure = figures.category_layers(kinds, share=0.1)
    for axes, (category, by_layer) in zip(figure.axes, kinds.layers(0.1).items(), strict=True):
        heights = {round(b.get_x() + b.get_width() / 2): b.get_height() for b in axes.patches}
        assert heights == pytest.approx(by_layer)
        assert sum(heights.values()) == pytest.approx(0.1 * 4 * 384)
        assert axes.get_title() == figures.NAMES[category]


def test_one_classification_needs_no_name(kinds):
    assert labels(figures.category_shares(kinds).axes[0]) == ["this model"]
    assert not figures.category_histograms(kinds).legends


# The look


def test_the_callers_style_changes_no_figure_and_is_left_alone(kinds):
    plain = figures.category_shares(kinds)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "font.family": "serif"}):
        other = figures.category_shares(kinds)
        assert mpl.rcParams["font.size"] == 30
    assert other.axes[0].get_facecolor() == plain.axes[0].get_facecolor()
    for one, two in zip(other.findobj(Text), plain.findobj(Text), strict=True):
        assert one.get_fontfamily() == two.get_fontfamily()
        assert one.get_fontsize() == two.get_fontsize()


def test_a_dollar_in_a_name_is_text_not_a_formula(kinds):
    name = r"$\nothing{$"
    figure = figures.category_shares({name: kinds, "a_b^c": kinds})
    assert {name, "a_b^c"} <= {text for text, _ in texts(figure)}
    assert not any(t.get_parse_math() for t in figure.findobj(Text))


def test_a_figure_shows_itself_in_a_notebook(kinds):
    assert figures.category_shares(kinds)._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("gone", ["matplotlib", "matplotlib.figure"])
def test_without_matplotlib_the_error_names_the_extra(kinds, monkeypatch, gone):
    monkeypatch.setitem(sys.modules, gone, None)
    with pytest.raises(MissingExtraError, match=r"A figure needs .*'\.\[report\]'"):
        figures.category_shares(kinds)


# What light a person with one kind of cone missing sees instead (Machado et al. 2009, severity 1).
SIGHTS = {
    "full": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}  # fmt: skip


def seen(colour, sight):
    """CIE L*a*b* of a colour as seen."""
    rgb = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(SIGHTS[sight]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_differ_for_every_kind_of_sight(sight):
    domains = [colour for colour, _ in figures.domain_colours("abcdefg").values()]
    assert len(set(domains)) == 7
    for palette in (list(figures.COLOURS.values()), domains):
        for one, other in itertools.combinations(palette, 2):
            assert np.linalg.norm(seen(one, sight) - seen(other, sight)) > 15


def test_a_domain_looks_the_same_wherever_it_stands():
    names = ["documents", "scenes", "scans", *"abcdefgh"]
    looks = figures.domain_colours(names)
    assert looks == figures.domain_colours(reversed(names))
    assert len(set(looks.values())) == len(names)


# Domains


@pytest.fixture(scope="module")
def found(atlas):
    return domain_neurons(atlas, share=0.1, inert=False)


def test_a_line_has_each_layers_neurons_of_its_domain(found):
    figure = figures.domain_layers(found)
    looks = figures.domain_colours(found.domains)
    assert [axes.get_title() for axes in figure.axes] == list(found.modules)
    for axes, name in zip(figure.axes, found.modules, strict=True):
        neurons = found.select(module=name)
        for domain, line in zip(sorted(found.domains), axes.lines, strict=name != "projector"):
            assert (line.get_color(), line.get_marker()) == looks[domain]
            mine = [n for n in neurons if domain in found.of(n)]
            layers, counts = line.get_data()
            sites = found.modules[name].counts.sites
            assert list(layers) == sorted({site.layer for site in sites})
            for layer, count in zip(layers, counts, strict=True):
                of_layer = {site.name for site in sites if site.layer == layer}
                assert count == sum(n.site in of_layer for n in mine)
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert names == sorted(found.domains)


def test_a_module_of_one_layer_has_a_bar_for_each_domain(found):
    (axes,) = figures.domain_layers(found, modules=["projector"]).axes
    assert not axes.lines
    counts = found.counts()["projector"]
    assert sum(counts.values()) > 0
    for bar, domain in zip(axes.patches, sorted(counts), strict=True):
        assert bar.get_height() == counts[domain]
        assert mpl.colors.to_hex(bar.get_facecolor()) == figures.domain_colours(counts)[domain][0]


def test_silent_neurons_are_shares_of_their_layer(found, atlas):
    figure = figures.silent_neurons(found)
    for axes, name in zip(figure.axes, found.modules, strict=True):
        for bar, site in zip(axes.patches, found.modules[name].counts.sites, strict=True):
            # From the scan itself: one layer of the testbed is one site.
            by_domain = atlas.statistics(site.name).firing.fired.values()
            fired = sum(each.sum((0, 1)) for each in by_domain)
            assert bar.get_height() == pytest.approx(100 * (fired == 0).float().mean().item())
            assert bar.get_x() + bar.get_width() / 2 == pytest.approx(site.layer)
    assert any(bar.get_height() > 0 for axes in figure.axes for bar in axes.patches)
    for axes in figure.axes:
        some = any(bar.get_height() > 0 for bar in axes.patches)
        assert [t.get_text() for t in axes.texts] == ([] if some else ["no silent neurons"])


def test_a_module_without_silent_neurons_says_so(found, monkeypatch):
    monkeypatch.setattr(type(found), "silent", lambda self, module: {0: (0, 8), 1: (0, 8)})
    (axes,) = figures.silent_neurons(found, modules=["language"]).axes
    assert [t.get_text() for t in axes.texts] == ["no silent neurons"]


def test_an_unknown_module_is_refused(found):
    for draw in (figures.domain_layers, figures.silent_neurons):
        with pytest.raises(UnknownNameError, match="lnguage"):
            draw(found, modules=["lnguage"])


# The lens


def reading(texts, probabilities, pieces=("?",), layers=(0, 3)):
    """A reading of some tokens with words of one's own."""
    ids = np.arange(np.size(probabilities)).reshape(np.shape(probabilities))
    count = ids.shape[1]
    tokens = nl.TokenMap(
        role=torch.full((count,), int(nl.Role.RESPONSE)),
        sample=torch.zeros(count, dtype=torch.long),
        image=torch.full((count,), -1),
        box=torch.full((count, 4), torch.nan),
        pieces=tuple(pieces),
    )
    return LensReading(
        layers, ids, np.array(probabilities), np.zeros(ids.shape[:2]), tokens,
        np.arange(count) + 7, dict(enumerate(texts)), 100,
    )  # fmt: skip


def test_each_cell_says_its_word_in_the_colour_of_its_probability():
    one = reading([" cat", "$x$", "dog", "<b>"], [[[0.75, 0.25]], [[0.5, 0.125]]], ["a\n"])
    figure = figures.lens_heat_map(one)
    axes = figure.axes[0]
    cells = {(t.get_position(), t.get_text()) for t in axes.texts}
    assert cells == {
        ((0.5, 0.5), "␣cat"), ((1.5, 0.5), "$x$"), ((0.5, 1.5), "dog"), ((1.5, 1.5), "<b>"),
    }  # fmt: skip
    (mesh,) = axes.collections
    assert mesh.get_array().tolist() == [[0.75, 0.25], [0.5, 0.125]]
    assert mesh.get_clim() == (0, 1)
    assert mesh.cmap(0.0)[:3] == (1, 1, 1)
    red, _, blue, _ = mesh.cmap(1.0)
    assert blue > 2 * red
    assert labels(axes) == ["embeddings", "3"]
    assert axes.get_title() == "token 7 response a⏎"
    assert not axes.yaxis_inverted()


def test_the_token_asked_for_is_drawn():
    words = ["a", "b", "c", "d"]
    both = reading(words, [[[0.5], [0.75]], [[0.25], [1.0]]], ["x", "y"])
    axes = figures.lens_heat_map(both, token=1).axes[0]
    assert [t.get_text() for t in axes.texts] == ["b", "d"]
    assert axes.get_title() == "token 8 response y"
    with pytest.raises(UnknownNameError):
        figures.lens_heat_map(both, token=2)


def test_words_too_long_or_without_a_sign_still_have_a_place():
    long = "internationalisation-of-everything"
    one = reading([long, "\u66f8\U0001fae0", "x", "y"], [[[0.9, 0.1]], [[0.5, 0.1]]])
    figure = figures.lens_heat_map(one)
    shown = [t.get_text() for t in figure.axes[0].texts]
    assert shown[0] == long[:21] + "…"
    assert "\\U0001fae0" in shown[1]  # no font of matplotlib has it
    assert unreadable(figure) == ([], [])


@pytest.fixture(scope="module")
def curves():
    mean = np.array([[[3.0, 2.0, 1.0], [1.0, 0.75, 0.5]], [[2.5, 2.25, 2.0], [np.nan] * 3]])
    interval = np.stack([mean - 0.25, mean + 0.5], -1)
    return EntropyCurves(
        layers=(0, 1, 2), groups=("b", "a"), mean=mean, interval=interval,
        tokens=np.array([[9, 9], [9, 0]]), samples=np.array([[3, 3], [3, 0]]),
        words=30, text_roles=(nl.Role.RESPONSE,),
    )  # fmt: skip


def test_image_tokens_are_dashed_text_tokens_solid_and_domains_coloured(curves):
    figure = figures.entropy_curves({"trained": curves, "other": curves})
    looks = figures.domain_colours(["a", "b"])
    assert [axes.get_title() for axes in figure.axes] == ["trained", "other"]
    for axes in figure.axes:
        drawn = [
            (line.get_color(), line.get_linestyle(), line.get_ydata().tolist())
            for line in axes.lines
        ]
        assert drawn == [
            (looks["b"][0], "--", [3.0, 2.0, 1.0]),
            (looks["b"][0], "-", [1.0, 0.75, 0.5]),
            (looks["a"][0], "--", [2.5, 2.25, 2.0]),
        ]
        assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1, 2]] * 3
        band = axes.collections[0].get_paths()[0].vertices
        assert {tuple(v) for v in band} >= {(0, 2.75), (0, 3.5), (2, 0.75), (2, 1.5)}
    legend = figure.legends[0]
    assert [t.get_text() for t in legend.get_texts()] == ["a", "b", "image tokens", "text tokens"]
    assert [line.get_linestyle() for line in legend.get_lines()] == ["-", "-", "--", "-"]


def test_one_model_needs_no_name(curves):
    (axes,) = figures.entropy_curves(curves).axes
    assert axes.get_title() == ""


# Embeddings


def test_each_image_is_a_point_of_its_domains_colour():
    domains = ("b", "a", "", "a")
    values = np.array([[0.0, 0, 0], [4, 0, 1], [0, 2, 0], [4, 2, -1]])
    given = ImageEmbeddings(values, tuple("wxyz"), (0,) * 4, domains, "tower", "model")
    plane = principal_components(given)
    figure = figures.embedding_plane(given, plane)
    (axes,) = figure.axes
    looks = figures.domain_colours(["(none)", "a", "b"])
    drawn = {points.get_label(): points for points in axes.collections}
    assert set(drawn) == set(looks)
    for name, points in drawn.items():
        mine = [i for i, domain in enumerate(domains) if (domain or "(none)") == name]
        assert points.get_offsets().tolist() == plane.scores[mine].tolist()
        assert mpl.colors.to_hex(points.get_facecolor()[0]) == looks[name][0]
    first, second = plane.explained
    assert axes.get_xlabel() == f"first component, {first:.0%} of the variance"
    assert axes.get_ylabel() == f"second component, {second:.0%}"
    FigureCanvasAgg(figure).draw()
    corner, along, up = axes.transData.transform([(0, 0), (1, 0), (0, 1)])
    assert along[0] - corner[0] == pytest.approx(up[1] - corner[1])


def test_components_of_other_embeddings_are_refused():
    values = np.arange(12.0).reshape(4, 3) ** 2
    given = ImageEmbeddings(values, tuple("wxyz"), (0,) * 4, ("a",) * 4, "tower", "model")
    for other in (principal_components(values[:3]), principal_components(values, n=1)):
        with pytest.raises(DataError, match="4 embeddings in a plane"):
            figures.embedding_plane(given, other)


# Pruning


@dataclass
class Told:
    value: float
    interval: tuple[float, float] | None


def test_points_and_intervals_stand_at_their_shares():
    given = {
        "unknown": {0.1: Told(0.5, (0.4, 0.7)), 0.05: Told(0.6, (0.55, 0.65))},
        "random": {0.05: Told(0.5, None)},
    }
    figure = figures.pruning_curves(given, full=Told(0.8, (0.7, 0.9)), measure="judge score")
    (axes,) = figure.axes
    assert axes.get_ylabel() == "judge score"
    unknown, random = axes.containers
    line, _, (bars,) = unknown.lines
    assert line.get_xdata().tolist() == pytest.approx([5, 10])
    assert line.get_ydata().tolist() == [0.6, 0.5]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert np.allclose(ends, [[0.55, 0.65], [0.4, 0.7]])
    assert random.lines[0].get_ydata().tolist() == [0.5]
    # All of it is in sight, and points of the same share stand side by side.
    FigureCanvasAgg(figure).draw()
    window = axes.get_window_extent()
    points = [
        line.get_transform().transform((x, y))
        for line, x, y in [
            (unknown.lines[0], 10, 0.4), (unknown.lines[0], 10, 0.7),
            (unknown.lines[0], 5, 0.6), (random.lines[0], 5, 0.5),
        ]
    ]  # fmt: skip
    assert all(window.contains(*point) for point in points)
    assert points[3][0] - points[2][0] == pytest.approx(5 / 72 * figure.dpi)
    assert np.ptp(random.lines[2][0].get_segments()[0][:, 1]) == 0
    assert line.get_color() != random.lines[0].get_color()
    whole = next(each for each in axes.lines if each.get_label() == "whole model")
    assert set(whole.get_ydata()) == {0.8}
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "whole model", "unknown", "random",
    ]  # fmt: skip


def test_what_was_not_pruned_has_no_curve():
    axes = figures.pruning_curves({"unknown": {}}, full=Told(0.5, None)).axes[0]
    assert [line.get_label() for line in axes.lines] == ["whole model"]
    assert not axes.containers


# All of them


def test_no_text_is_clipped_or_covered(kinds, control, found, curves):
    long = "a model with a very long name and a version"
    runs = {long: kinds, "control": control}
    points = {name: {0.1: Told(0.5, (0.4, 0.7))} for name in (long, "b", "c")}
    names = tuple(f"a domain called {i}" for i in range(9))
    images = ImageEmbeddings(np.eye(9), names, (0,) * 9, names, "tower", "model")
    for figure in (
        figures.category_shares(runs),
        figures.category_histograms(runs),
        figures.category_layers(kinds),
        figures.domain_layers(found),
        figures.silent_neurons(found),
        figures.entropy_curves({long: curves, "control": curves}),
        figures.lens_heat_map(reading(["word"] * 10, np.full((2, 1, 5), 0.2))),
        figures.pruning_curves(points, full=Told(0.8, (0.7, 0.9))),
        figures.embedding_plane(images, principal_components(images)),
    ):
        assert unreadable(figure) == ([], [])

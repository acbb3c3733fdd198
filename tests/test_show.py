from __future__ import annotations

import base64
import html
import io
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from neuronlens.show import (
    Html,
    enlarged,
    escaped,
    figure,
    heat_map,
    levels,
    modulated,
    painted,
    picture,
    shaded,
    stretched,
    table,
)

NAN = math.nan
HOSTILE = "<script>alert(\"1\")</script> & 'x'"


def boxes(*rows) -> np.ndarray:
    return np.array(rows, float)


# Levels.


def test_levels_by_hand():
    values = np.array([-1.0, 0.0, 1.0, 2.5, 5.0, 7.0, NAN])
    np.testing.assert_array_equal(levels(values, 5.0), [0, 0, 2, 5, 10, 10, NAN])


@pytest.mark.parametrize("maximum", [0.0, -2.0])
def test_a_neuron_that_never_fired_has_level_0_everywhere(maximum):
    np.testing.assert_array_equal(levels(np.array([-3.0, 0.0, NAN]), maximum), [0, 0, NAN])


@settings(max_examples=50)
@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=9),
    maximum=st.one_of(st.floats(-10, 0), st.floats(1e-3, 100)),
)
def test_levels_lie_between_0_and_10_and_keep_the_order(values, maximum):
    values = np.sort(values)
    found = levels(values, maximum)
    assert ((found >= 0) & (found <= 10)).all()
    assert (np.diff(found) >= 0).all()


# Pictures.


def test_painting_by_hand():
    # The third box lies over both others, but is less active; the last two show nothing.
    canvas = painted(
        (4, 2),
        boxes([0, 0, 2, 2], [1, 0, 3, 1], [0, 0, 3, 1], [NAN] * 4, [3, 1, 4, 2]),
        np.array([2.0, 5.0, 1.0, 10.0, NAN]),
    )
    np.testing.assert_allclose(canvas, [[0.2, 0.5, 0.5, 0.0], [0.2, 0.2, 0.0, 0.0]])


def test_painting_clips_levels():
    canvas = painted((2, 1), boxes([0, 0, 1, 1], [1, 0, 2, 1]), np.array([-3.0, 30.0]))
    np.testing.assert_array_equal(canvas, [[0, 1]])


@pytest.mark.parametrize(("level", "shown"), [(10, 200), (7.5, 150), (5, 100), (0, 0), (NAN, 0)])
def test_the_cover_is_the_more_transparent_the_more_active_a_patch_is(level, shown):
    # Opacity 1 - a/10 of black over 200 leaves 200 * a/10.
    image = Image.new("RGB", (2, 1), (200, 200, 200))
    mixed = np.asarray(modulated(image, boxes([0, 0, 1, 1]), np.array([float(level)])))
    assert mixed[0, 0].tolist() == [shown] * 3
    assert mixed[0, 1].tolist() == [0, 0, 0]  # what no token sees is covered


def test_the_cover_may_have_another_colour():
    image = Image.new("RGB", (2, 1), (100, 200, 0))
    mixed = np.asarray(modulated(image, boxes([0, 0, 1, 1]), np.array([5.0]), cover=(200, 100, 50)))
    assert mixed[0].tolist() == [[150, 150, 25], [200, 100, 50]]


def test_a_picture_without_any_box_is_covered_whole():
    image = Image.new("RGB", (3, 3), "white")
    assert not np.asarray(modulated(image, np.zeros((0, 4)), np.zeros(0))).any()


def test_a_heat_map_glows_only_where_a_patch_is_active():
    image = Image.new("RGB", (3, 1), (100, 100, 100))
    heat = np.asarray(
        heat_map(image, boxes([0, 0, 1, 1], [1, 0, 2, 1]), np.array([10.0, 0.0])), float
    )
    assert heat[0, 1].tolist() == heat[0, 2].tolist() == [75, 75, 75]
    assert heat[0, 0, 0] > heat[0, 0, 1] > heat[0, 0, 2]
    assert heat[0, 0, 0] > 200


def test_small_images_are_enlarged_with_square_pixels():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    large = enlarged(image, side=8)
    assert large.size == (8, 8)
    assert (np.asarray(large) == np.asarray(image).repeat(4, 0).repeat(4, 1)).all()
    assert enlarged(large, side=15) is large
    np.testing.assert_array_equal(stretched(boxes([0, 0.5, 1, 1]), 4), [[0, 2, 4, 4]])


def test_a_picture_carries_its_own_pixels():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    shown = picture(image, width=99, alt=HOSTILE)
    assert "width:99px" in shown
    assert html.unescape(re.search(r'alt="([^"]*)"', shown)[1]) == HOSTILE
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', shown).groups()
    with Image.open(io.BytesIO(base64.b64decode(data))) as read:
        assert kind == "png"
        assert (np.asarray(read) == np.asarray(image)).all()
    assert "image/jpeg" in picture(Image.new("RGB", (400, 400)))


def test_a_figure_holds_its_pictures_untouched():
    one, other = Image.new("RGB", (40, 30), (9, 8, 7)), Image.new("RGB", (20, 60), (1, 2, 3))
    sheet = np.asarray(
        figure([one, other], ["a ", "b\n", "c" * 300], np.array([10.0, NAN, 0]), "t")
    )
    assert (sheet == (9, 8, 7)).all(2).sum() == 40 * 30
    assert (sheet == (1, 2, 3)).all(2).sum() == 20 * 60
    assert (sheet == (22, 128, 74)).all(2).any()  # the fully active token's ground


def test_a_figure_without_text_is_a_figure():
    sheet = figure([Image.new("RGB", (40, 30))], [], np.zeros(0), "title")
    assert sheet.width >= 40
    assert sheet.height > 30


# Text.


def text_of(shown: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", shown))


@settings(max_examples=100)
@given(pieces=st.lists(st.text("ab <>&\"'/\n", max_size=5), max_size=6))
def test_shaded_text_reads_as_its_pieces(pieces):
    shown = shaded(pieces, np.linspace(0, 10, len(pieces)))
    assert text_of(shown) == "".join(pieces)


def test_shaded_tokens_say_their_level_and_are_the_greener_the_more_active():
    shown = shaded(["a", "b", "c", "d"], np.array([0.0, 5.0, 10.0, NAN]))
    assert re.findall(r'title="([\d.]+)"', shown) == ["0.00", "5.00", "10.00"]
    green = re.findall(r"rgba\(22, 128, 74, ([\d.]+)\)", shown)
    assert [float(each) for each in green] == [0, 0.5, 1, 0]


# HTML.


def test_text_is_escaped_once_and_html_never():
    assert escaped("<b>&") == "&lt;b&gt;&amp;"
    assert escaped(escaped("<b>&")) == "&lt;b&gt;&amp;"
    assert escaped(Html("<b>")) == "<b>"
    assert Html("<b>").__html__() == "<b>"
    assert escaped(3) == "3"
    assert isinstance(escaped("x"), Html)


def test_a_table_escapes_its_title_heads_and_cells():
    shown = table([HOSTILE], [[HOSTILE], [Html("<i>fine</i>")]], HOSTILE)
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;") == 3
    assert "<i>fine</i>" in shown


def test_pieces_are_escaped():
    assert "<script>" not in shaded([HOSTILE], np.array([1.0]))

"""What tokens are and see: coverage of masks, words, and one sample of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from neuronlens.tokens import Role, TokenMap

NAN = float("nan")
FINE = 8  # subpixels per pixel of the brute-force reference
masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=7))


def visual_map(boxes, images=None) -> TokenMap:
    box = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    role = torch.full((len(box),), int(Role.VISUAL), dtype=torch.int8)
    image = torch.zeros(len(box), dtype=torch.long) if images is None else torch.tensor(images)
    return TokenMap(role, torch.zeros_like(image), image, box)


def text_map(pieces, roles=None) -> TokenMap:
    roles = [Role.RESPONSE] * len(pieces) if roles is None else roles
    role = torch.tensor([int(r) for r in roles], dtype=torch.int8)
    flat = torch.zeros(len(pieces), dtype=torch.long)
    return TokenMap(role, flat, flat - 1, torch.full((len(pieces), 4), NAN), tuple(pieces))


def marked(tokens: TokenMap, words, shift: int = 0) -> list[str]:
    marks = tokens.words(words, shift)
    return [piece for piece, mark in zip(tokens.pieces, marks.tolist(), strict=True) if mark == 1]


# Coverage.


@st.composite
def masks_and_boxes(draw, beyond: int = 0):
    """A mask, and boxes on the grid of its subpixels, up to `beyond` pixels outside of it."""
    mask = draw(masks)
    low = -beyond * FINE

    def span(pixels: int):
        high = (pixels + beyond) * FINE
        ends = st.tuples(st.integers(low, high - 1), st.integers(low + 1, high))
        return ends.filter(lambda ends: ends[0] < ends[1])

    height, width = mask.shape
    spans = st.tuples(span(width), span(height))
    return mask, draw(st.lists(spans, min_size=1, max_size=4))


@settings(deadline=None)
@given(masks_and_boxes(beyond=2))
def test_coverage_of_a_fractional_box_is_what_counting_subpixels_gives(case):
    mask, spans = case
    edge = 2
    fine = np.kron(np.pad(mask, edge), np.ones((FINE, FINE)))
    o = edge * FINE
    counted = [fine[y0 + o : y1 + o, x0 + o : x1 + o].mean() for (x0, x1), (y0, y1) in spans]
    boxes = [[x0 / FINE, y0 / FINE, x1 / FINE, y1 / FINE] for (x0, x1), (y0, y1) in spans]
    share = visual_map(boxes).coverage({0: mask})
    torch.testing.assert_close(share, torch.tensor(counted).float(), atol=1e-6, rtol=0)


@settings(deadline=None)
@given(masks_and_boxes())
def test_a_mask_and_its_complement_share_every_box_inside_the_image(case):
    mask, spans = case
    tokens = visual_map(
        [[x0 / FINE, y0 / FINE, x1 / FINE, y1 / FINE] for (x0, x1), (y0, y1) in spans]
    )
    whole = tokens.coverage({0: mask}) + tokens.coverage({0: ~mask})
    torch.testing.assert_close(whole, torch.ones(len(spans)), atol=1e-6, rtol=0)


@settings(deadline=None)
@given(masks, st.integers(1, 5), st.integers(1, 5))
def test_boxes_that_tile_the_image_share_out_the_whole_mask(mask, columns, rows):
    height, width = mask.shape
    x, y = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
    boxes = [[x[i], y[j], x[i + 1], y[j + 1]] for j in range(rows) for i in range(columns)]
    share = visual_map(boxes).coverage({0: mask})
    area = mask.size / (rows * columns)
    assert share.sum().item() * area == pytest.approx(mask.sum(), abs=1e-4)


def test_the_first_axis_of_a_mask_is_height():
    mask = np.zeros((2, 3), bool)
    mask[0, 2] = True  # top right pixel
    tokens = visual_map([[2, 0, 3, 1], [1, 0, 3, 2], [0, 1, 3, 2]])
    assert tokens.coverage({0: mask}).tolist() == [1.0, 0.25, 0.0]


def test_each_token_is_covered_by_the_mask_of_its_own_image():
    full, empty = np.ones((4, 4), bool), np.zeros((9, 5), bool)
    tokens = visual_map([[0, 0, 2, 2]] * 3, images=[0, 1, 0])
    assert tokens.coverage({0: full, 1: empty}).tolist() == [1.0, 0.0, 1.0]


def test_coverage_is_nan_without_a_box_and_without_a_mask_of_the_image():
    tokens = visual_map(
        [[0, 0, 1, 1], [NAN] * 4, [0, 0, 1, 1], [0, NAN, 1, 1]], images=[0, 0, 1, 0]
    )
    share = tokens.coverage({0: np.ones((1, 1), bool)})
    torch.testing.assert_close(share, torch.tensor([1.0, NAN, NAN, NAN]), equal_nan=True)
    assert tokens.coverage({}).isnan().all()


def test_coverage_keeps_the_axes_of_a_batch():
    one = visual_map(
        [[0, 0, 1, 1], [1, 0, 2, 1], [0, 0, 2, 1], [0, 1, 2, 2], [0, 0, 2, 2], [NAN] * 4]
    )
    batch = TokenMap(
        *(t.reshape(2, 3, *t.shape[1:]) for t in (one.role, one.sample, one.image, one.box))
    )
    mask = np.array([[True, False], [False, False]])
    share = batch.coverage({0: mask})
    assert share.shape == (2, 3)
    torch.testing.assert_close(
        share.flatten(), one.coverage({0: mask}), equal_nan=True, atol=0, rtol=0
    )


# Words.


def test_a_word_marks_every_token_that_spells_it_and_no_other():
    tokens = text_map(["A", " red", " cir", "cle", " and", " a", " circ", "us", "."])
    assert tokens.words(["circle"]).tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("pieces", "word", "found"),
    [
        ((" Red", ","), "red", [" Red"]),
        ((" red", "."), "RED", [" red"]),
        (("(", "red", ")"), "red", ["red"]),
        ((" red,", " green"), "red", [" red,"]),
        ((" red", "uced"), "red", []),
        ((" infra", "red"), "red", []),
        ((" infra", "-", "red"), "red", ["red"]),
        ((" T", "-sh", "irt", "s"), "t-shirt", []),
        ((" T", "-sh", "irt", "."), "t-shirt", [" T", "-sh", "irt"]),
        ((" C", "++", " code"), "C++", [" C", "++"]),
        ((" caf", "é", "s"), "café", []),
        ((" CAF", "É"), "café", [" CAF", "É"]),
        ((" r.d", " red"), "r.d", [" r.d"]),
        ((" red",), " red ", [" red"]),
        (("a red", " circle now"), "red circle", ["a red", " circle now"]),
        ((" red", " square", " circle"), "red circle", []),
    ],
)
def test_words_are_found_whole_whatever_their_case_and_punctuation(pieces, word, found):
    assert marked(text_map(pieces), [word]) == found


def test_every_occurrence_of_every_word_is_marked():
    tokens = text_map(["the", " dog", " and", " the", " cat", " the"])
    assert tokens.words(["the", "cat"]).tolist() == [1, 0, 0, 1, 1, 1]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([" a", " b", " c", "a"]), min_size=1, max_size=7),
    st.lists(st.sampled_from(["a", "b", "a b", "b c", "a b c", "a a"]), max_size=4),
    st.sampled_from([0, -1]),
)
@example([" a", " b"], ["a", "a b"], 0)
@example([" a", " b", " c"], ["a b", "b c"], -1)
def test_a_list_of_words_marks_what_its_words_mark_one_by_one(pieces, words, shift):
    tokens = text_map(pieces)
    one_by_one = torch.zeros(len(pieces))
    for word in words:
        one_by_one = torch.maximum(one_by_one, tokens.words([word], shift))
    torch.testing.assert_close(tokens.words(words, shift), one_by_one, atol=0, rtol=0)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([" a", " b", "b", " c"]), min_size=1, max_size=8),
    st.sampled_from([0, -1]),
)
def test_marks_of_a_phrase_are_those_of_comparing_it_at_every_place(pieces, shift):
    text, starts = "".join(pieces), np.cumsum([0, *(len(p) for p in pieces)])
    slow = [0.0] * len(pieces)
    for at in range(len(text)):
        before, behind = text[at - 1 : at] or " ", text[at + 3 : at + 4] or " "
        if text[at : at + 3] == "b b" and (before + behind).isspace():
            hit = [i for i in range(len(pieces)) if starts[i] < at + 3 and starts[i + 1] > at]
            for i in hit if shift == 0 else [hit[0] - 1] * (hit[0] > 0):
                slow[i] = 1.0
    assert text_map(pieces).words(["b b"], shift).tolist() == slow


def test_a_shift_of_minus_one_marks_only_the_token_before_a_word():
    tokens = text_map([" a", " red", " cir", "cle", " a", " circ", "le"])
    assert tokens.words(["circle"], shift=-1).tolist() == [0, 1, 0, 0, 1, 0, 0]


def test_a_word_at_the_very_start_has_no_token_before_it():
    assert text_map([" red", " and", " red"]).words(["red"], shift=-1).tolist() == [0, 1, 0]


def test_positions_that_are_not_text_are_nan_even_before_a_word():
    roles = [Role.SPECIAL, Role.PROMPT, Role.VISUAL, Role.RESPONSE]
    tokens = text_map(["<red>", "red", "", "red"], roles)
    expected = torch.tensor([NAN, 1, NAN, 1])
    torch.testing.assert_close(tokens.words(["red"]), expected, equal_nan=True)
    expected = torch.tensor([NAN, 0, NAN, 0])
    torch.testing.assert_close(tokens.words(["red"], shift=-1), expected, equal_nan=True)


@pytest.mark.parametrize("between", [Role.VISUAL, Role.SPECIAL])
@pytest.mark.parametrize(
    ("parts", "word"), [(("red", " circle"), "red circle"), (("re", "d"), "red")]
)
def test_no_word_is_found_across_an_image_or_a_marker(parts, word, between):
    first, last = parts
    apart = text_map([first, "", last], [Role.PROMPT, between, Role.PROMPT])
    assert marked(text_map(parts), [word]) == list(parts)
    assert marked(apart, [word]) == []


def test_text_beside_an_image_is_not_glued_to_it():
    tokens = text_map(["red", "<image>", "red"], [Role.PROMPT, Role.VISUAL, Role.PROMPT])
    assert marked(tokens, ["red"]) == ["red", "red"]


@pytest.mark.parametrize("words", [[], [""], [" "]], ids=["none", "empty", "blank"])
def test_no_words_mark_nothing(words):
    assert text_map([" a", " b", ".", " "]).words(words).tolist() == [0, 0, 0, 0]


def test_a_blank_word_does_not_change_what_others_mark():
    assert text_map([" a", ".", " red", "."]).words(["", "red"]).tolist() == [0, 0, 1, 0]


def test_a_map_without_text_says_how_to_get_one_with_it():
    tokens = visual_map([[0, 0, 1, 1]])
    with pytest.raises(ValueError, match=r"map\.of\(sample, pieces\)"):
        tokens.words(["red"])
    assert tokens.of(0, ("",)).words(["red"]).isnan().all()


# One sample of a batch.


@pytest.fixture
def batch() -> TokenMap:
    """Two samples of three and two tokens, padded on the right and on the left."""
    role = [
        [Role.SPECIAL, Role.VISUAL, Role.RESPONSE, Role.PAD],
        [Role.PAD, Role.PAD, Role.PROMPT, Role.RESPONSE],
    ]
    box = torch.full((2, 4, 4), NAN)
    box[0, 1] = torch.tensor([1.0, 2, 3, 4])
    image = torch.tensor([[-1, 1, -1, -1], [-1] * 4])
    return TokenMap(
        torch.tensor(role, dtype=torch.int8), torch.tensor([[0] * 4, [1] * 4]), image, box
    )


def test_a_samples_positions_are_in_order_and_without_padding(batch):
    assert batch.where(0).tolist() == [0, 1, 2]
    assert batch.where(1).tolist() == [6, 7]
    assert batch.where(2).tolist() == []


def test_one_sample_of_a_batch_keeps_its_roles_images_and_boxes(batch):
    one = batch.of(0, ["<s>", "", " red"])
    assert len(one) == 3
    assert one.role.tolist() == [Role.SPECIAL, Role.VISUAL, Role.RESPONSE]
    assert one.image.tolist() == [-1, 1, -1]
    torch.testing.assert_close(one.box, batch.box[0, :3], equal_nan=True, atol=0, rtol=0)
    assert one.pieces == ("<s>", "", " red")
    assert batch.of(1).role.tolist() == [Role.PROMPT, Role.RESPONSE]
    assert batch.of(1).pieces is None


def test_one_sample_of_a_batch_is_a_batch_of_one_sample(batch):
    one = batch.of(1)
    assert one.where(0).tolist() == [0, 1]
    torch.testing.assert_close(one.of(0).role, one.role)


def test_rows_of_one_sample_are_joined_as_those_of_two_images_are():
    two_images = TokenMap(
        role=torch.tensor([[1, 4], [1, 4], [1, 4]], dtype=torch.int8),
        sample=torch.tensor([[0, 0], [1, 1], [0, 0]]),
        image=torch.tensor([[-1, 0], [-1, 0], [-1, 1]]),
        box=torch.full((3, 2, 4), NAN),
    )
    assert two_images.where(0).tolist() == [0, 1, 4, 5]
    assert two_images.of(0).image.tolist() == [-1, 0, -1, 1]


@pytest.mark.parametrize("pieces", [[], ["a", "b"], ["a"] * 4])
def test_there_is_one_piece_for_each_token(batch, pieces):
    with pytest.raises(ValueError, match=rf"{len(pieces)} pieces given for 3 tokens"):
        batch.of(0, pieces)


def test_is_role_is_true_for_exactly_the_roles_asked_for(batch):
    for asked in [(), (Role.PAD,), (Role.PROMPT, Role.RESPONSE), tuple(Role)]:
        told = batch.is_role(*asked)
        assert told.tolist() == [[each in asked for each in row] for row in batch.role.tolist()]


def test_a_moved_map_is_the_same_map(batch):
    one = batch.of(0, ["<s>", "", " red"])
    moved = one.to(torch.device("meta"))
    assert all(t.device.type == "meta" for t in (moved.role, moved.sample, moved.image, moved.box))
    assert moved.pieces == one.pieces
    back = one.to(torch.device("cpu"))
    for name in ("role", "sample", "image", "box"):
        torch.testing.assert_close(getattr(back, name), getattr(one, name), equal_nan=True)

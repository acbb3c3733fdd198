from __future__ import annotations

import dataclasses
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

import neuronlens as nl
from handmade import CELL, scene, token_map
from neuronlens.explanation import Explanation, Failure
from neuronlens.simulate import MaskSimulator, SimulationJob, WordSimulator

SAID = ("<bos>", " the", " red", " box", " the", " Red", " cat")


class Columns:
    """Finds each phrase in the pixel columns it is given for; by image where these differ."""

    name = "Columns"

    def __init__(self, columns, width: int) -> None:
        self.columns = columns
        self.width = width
        self.asked: list[tuple[str, int, tuple[str, ...]]] = []
        self.last = lambda: None

    def segment(self, sample, image, phrases):
        assert self.last() is None, "the masks of another image are still kept"
        self.asked.append((sample.id, image, tuple(phrases)))
        masks = np.zeros((len(phrases), CELL, self.width), bool)
        self.last = weakref.ref(masks)
        for mask, phrase in zip(masks, phrases, strict=True):
            where = self.columns.get((image, phrase), self.columns.get(phrase, slice(0)))
            mask[:, where] = True
        return masks


def masked(columns, roles="vvv", phrases=("red",), soft=False, tokens=None):
    tokens = token_map(roles) if tokens is None else tokens
    job = SimulationJob(Explanation(sentence="", phrases=phrases), scene(roles.count("v")), tokens)
    segmenter = Columns(columns, CELL * roles.count("v"))
    (answer,) = MaskSimulator(segmenter, soft=soft).simulate([job])
    return answer.values.tolist() if isinstance(answer, nl.Simulation) else answer


def spelled(words, predicts=False, pieces=SAID, roles="sprrrrr"):
    explanation = Explanation(sentence="", words=words, predicts=predicts)
    job = SimulationJob(explanation, scene(1), token_map(roles, pieces))
    (answer,) = WordSimulator().simulate([job])
    return answer.values.tolist() if isinstance(answer, nl.Simulation) else answer


def test_a_simulators_job_has_no_place_for_true_activations():
    fields = {field.name for field in dataclasses.fields(SimulationJob)}
    assert fields == {"explanation", "sample", "tokens", "text_roles"}
    assert set(Explanation.model_fields) == {
        "sentence",
        "phrases",
        "words",
        "predicts",
        "explainer",
        "ties",
        "confidence",
        "asked",
    }


# Masks: a cell is 8 pixels wide.


@pytest.mark.parametrize(
    ("columns", "share", "active"),
    [(0, 0.0, 0), (3, 0.375, 0), (4, 0.5, 1), (5, 0.625, 1), (8, 1.0, 1)],
)
def test_a_token_is_active_if_at_least_half_of_its_box_is_covered(columns, share, active):
    assert masked({"red": slice(columns)}) == [active, 0, 0]
    assert masked({"red": slice(columns)}, soft=True) == [share, 0, 0]


def test_the_masks_of_all_phrases_are_united():
    where = {"red": slice(0, 8), "blue": slice(4, 12)}
    assert masked(where, phrases=("red", "blue"), soft=True) == [1, 0.5, 0]
    # Two halves of one box make a whole one.
    halves = {"left": slice(0, 4), "right": slice(4, 8)}
    assert masked(halves, phrases=("left", "right"), soft=True) == [1, 0, 0]


@pytest.mark.parametrize("soft", [False, True])
def test_nothing_found_is_simulated_as_zeros(soft):
    assert masked({}, soft=soft) == [0, 0, 0]


@pytest.mark.parametrize("soft", [False, True])
def test_only_visual_tokens_with_a_box_are_simulated(soft):
    tokens = token_map("svvvr")
    boxes = tokens.box.clone()
    boxes[2] = math.nan
    values = masked({"red": slice(0, 24)}, "svvvr", soft=soft, tokens=replace(tokens, box=boxes))
    np.testing.assert_array_equal(values, [math.nan, 1, math.nan, 1, math.nan])


def test_each_image_is_covered_by_its_own_mask():
    where = {(0, "red"): slice(0, 8), (1, "red"): slice(8, 16)}
    assert masked(where, "vvvv", tokens=two_images()) == [1, 0, 0, 1]


def test_without_a_phrase_there_is_nothing_to_look_for():
    answer = masked({}, phrases=())
    assert isinstance(answer, Failure)
    assert "no phrase" in answer.reason


def two_images(roles="vvvv"):
    """The first half of the tokens sees one image, the second another one."""
    tokens = token_map(roles)
    image, box = tokens.image.clone(), tokens.box.clone()
    half = len(roles) // 2
    image[half:] = 1
    box[half:] = box[:half]
    return replace(tokens, image=image, box=box)


def jobs_for(*asked):
    return [SimulationJob(Explanation(sentence="", phrases=p), s, t) for p, s, t in asked]


def test_the_segmenter_is_asked_once_per_image_for_the_phrases_of_all_jobs():
    segmenter = Columns({"red": slice(8)}, 24)
    one, other = scene(3, id="one"), scene(3, id="other")
    both, alone, again = two_images(), token_map("vvv"), token_map("vvv")
    jobs = jobs_for(
        (("red", "blue"), one, both),
        (("red",), other, alone),
        (("green", "red"), one, alone),
        ((), other, alone),
        (("green",), other, again),
    )
    answers = MaskSimulator(segmenter).simulate(jobs)
    assert segmenter.asked == [
        ("one", 0, ("red", "blue", "green")),
        ("one", 1, ("red", "blue")),
        ("other", 0, ("red", "green")),
    ]
    values = [each.values.tolist() if isinstance(each, nl.Simulation) else None for each in answers]
    assert values == [[1, 0, 1, 0], [1, 0, 0], [1, 0, 0], None, [0, 0, 0]]


def test_jobs_together_are_answered_as_each_alone():
    where = {"red": slice(0, 5), "blue": slice(9, 14), (1, "red"): slice(8, 15)}
    samples = [scene(3, id=name) for name in "ab"]
    maps = [two_images(), token_map("svvvr"), two_images("vrvr")]
    phrases = [("red",), ("blue",), ("blue", "red"), ("green",), ()]
    jobs = jobs_for(*[(p, s, t) for p in phrases for s in samples for t in maps])
    together = MaskSimulator(Columns(where, 24), soft=True).simulate(jobs)
    for job, answer in zip(jobs, together, strict=True):
        (alone,) = MaskSimulator(Columns(where, 24), soft=True).simulate([job])
        assert (
            isinstance(alone, Failure)
            == isinstance(answer, Failure)
            == (not job.explanation.phrases)
        )
        if isinstance(alone, nl.Simulation):
            np.testing.assert_array_equal(answer.values, alone.values)


def test_a_sample_that_cannot_be_segmented_fails_its_own_jobs_only(tmp_path):
    good = scene(3, {"red": [1]}, id="good")
    bad = replace(good, id="bad", images=(tmp_path / "gone.png",))
    wrong = replace(good, id="wrong", images=(good.images[0].resize((5, 5)),))
    tokens = token_map("vvv")
    jobs = jobs_for(
        (("red",), bad, tokens),
        (("red",), good, tokens),
        (("blue",), bad, tokens),
        (("red",), wrong, tokens),
        ((), bad, tokens),
    )
    first, second, third, fourth, fifth = MaskSimulator(nl.AnnotationSegmenter()).simulate(jobs)
    for each in (first, third):
        assert isinstance(each, Failure)
        assert each.reason.startswith("AnnotationSegmenter failed: Sample 'bad', missing image")
    assert second.values.tolist() == [0, 1, 0]
    assert "labels of its size" in fourth.reason
    assert "no phrase" in fifth.reason


def test_a_failure_in_one_image_of_several_leaves_no_half_an_answer():
    class Second(Columns):
        def segment(self, sample, image, phrases):
            if image == 1:
                raise nl.errors.SegmenterError("the second image is odd")
            return super().segment(sample, image, phrases)

    jobs = jobs_for((("red",), scene(2), two_images()))
    (answer,) = MaskSimulator(Second({"red": slice(8)}, 16)).simulate(jobs)
    assert answer == Failure("Columns failed: the second image is odd")


def test_a_mistake_in_the_program_is_not_taken_for_a_failed_sample():
    class Mistaken(Columns):
        def segment(self, sample, image, phrases):
            raise TypeError("no such argument")

    with pytest.raises(TypeError, match="no such argument"):
        MaskSimulator(Mistaken({}, 8)).simulate(jobs_for((("red",), scene(1), token_map("v"))))


def test_samples_that_share_a_token_map_are_covered_by_their_own_masks():
    tokens, explanation = token_map("vvv"), Explanation(sentence="", phrases=("red",))
    jobs = [SimulationJob(explanation, scene(3, {"red": [cell]}), tokens) for cell in (0, 2)]
    first, second = MaskSimulator(nl.AnnotationSegmenter()).simulate(jobs)
    assert first.values.tolist() == [1, 0, 0]
    assert second.values.tolist() == [0, 0, 1]


def test_phrases_of_one_sample_are_told_apart():
    tokens, sample = token_map("vvv"), scene(3, {"red": [0], "blue": [2]})
    jobs = [
        SimulationJob(Explanation(sentence="", phrases=phrases), sample, tokens)
        for phrases in (("red",), ("blue",), ("red", "blue"), ("red",))
    ]
    answers = MaskSimulator(nl.AnnotationSegmenter()).simulate(jobs)
    assert [answer.values.tolist() for answer in answers] == [
        [1, 0, 0],
        [0, 0, 1],
        [1, 0, 1],
        [1, 0, 0],
    ]


# Words.


def test_words_are_active_where_they_stand():
    np.testing.assert_array_equal(spelled(("red",)), [math.nan, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(spelled(("red", "cat")), [math.nan, 0, 1, 0, 0, 1, 1])


def test_predicting_words_are_active_right_before():
    np.testing.assert_array_equal(spelled(("red",), True), [math.nan, 1, 0, 0, 1, 0, 0])


def test_words_never_said_are_simulated_as_zeros():
    np.testing.assert_array_equal(spelled(("dog",)), [math.nan, *[0] * 6])
    np.testing.assert_array_equal(spelled(("re",)), [math.nan, *[0] * 6])


def test_a_word_of_several_tokens_is_active_on_all_of_them():
    pieces = ("<bos>", " the", " rhi", "no", "ceros", " and", " no")
    np.testing.assert_array_equal(
        spelled(("rhinoceros",), pieces=pieces), [math.nan, 0, 1, 1, 1, 0, 0]
    )
    np.testing.assert_array_equal(
        spelled(("rhinoceros",), True, pieces=pieces), [math.nan, 1, 0, 0, 0, 0, 0]
    )


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_word_is_found_nowhere(blank):
    pieces = ("<bos>", " a", " ,", " ,", " b", " .", " c")
    answer = spelled((blank, "b"), pieces=pieces)
    np.testing.assert_array_equal(answer, [math.nan, 0, 0, 0, 1, 0, 0])


def test_images_are_no_text():
    pieces = ("", " red", "", " red", "", " box", " red")
    values = spelled(("red",), pieces=pieces, roles="vrvrvpr")
    np.testing.assert_array_equal(values, [math.nan, 1, math.nan, 1, math.nan, 0, 1])


def test_without_a_word_there_is_nothing_to_spell():
    answer = spelled(())
    assert isinstance(answer, Failure)
    assert "no words" in answer.reason


def test_jobs_are_answered_in_their_order():
    tokens = token_map("sprrrrr", SAID)
    jobs = [
        SimulationJob(Explanation(sentence="", words=words), scene(1), tokens)
        for words in (("cat",), (), ("box",))
    ]
    first, second, third = WordSimulator().simulate(jobs)
    assert first.values[1:].tolist() == [0, 0, 0, 0, 0, 1]
    assert isinstance(second, Failure)
    assert third.values[1:].tolist() == [0, 0, 1, 0, 0, 0]


def test_an_explanation_has_at_most_three_phrases_and_cannot_be_changed():
    with pytest.raises(ValidationError, match="at most 3"):
        Explanation(sentence="", phrases=("a", "b", "c", "d"))
    with pytest.raises(ValidationError, match="frozen"):
        Explanation(sentence="").sentence = "other"

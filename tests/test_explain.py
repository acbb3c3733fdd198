from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import neuronlens as nl
from handmade import NEURON, exemplar, scene
from neuronlens.explain import ExplanationJob, Match
from neuronlens.explanation import Explanation, Failure

SAID = (" a", " red", " box", " and", " the", " red", " cat")


def explained(exemplars, category, **more) -> Explanation | Failure:
    (answer,) = nl.DissectionExplainer(**more).explain(
        [ExplanationJob(NEURON, category, tuple(exemplars))]
    )
    return answer


def pearson(a, b) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def test_a_job_holds_no_held_out_exemplar():
    names = {field.name for field in dataclasses.fields(ExplanationJob)}
    assert names == {"neuron", "category", "exemplars", "contrast", "draw"}


def test_the_concept_under_the_active_tokens_is_named():
    one = exemplar("vvvv", [9.0, 1.0, 0.0, 8.0], {"red": [0, 3], "blue": [1], "green": [0, 1]})
    said = explained([one], "visual")
    assert said.phrases == ("red",)
    assert (said.words, said.predicts) == ((), False)
    assert "“red”" in said.sentence
    assert "image" in said.sentence
    assert said.explainer == "dissection"


def test_the_word_under_the_active_tokens_is_named():
    one = exemplar("vrrrrrrr", [9.0, 0, 5, 0, 1, 0, 4, 0], pieces=("", *SAID))
    said = explained([one], "text")
    assert said.words == ("red",)
    assert (said.phrases, said.predicts) == ((), False)
    assert said.sentence == "the word “red”"


def test_the_place_before_the_word_is_preferred_where_it_fits_better():
    one = exemplar("rrrrrrr", [5.0, 0, 0, 0, 4, 0, 0], pieces=SAID)
    said = explained([one], "text")
    assert (said.words, said.predicts) == (("red",), True)
    assert said.sentence == "the place right before the word “red”"
    # Active on both, more on the word itself.
    said = explained([exemplar("rrrrrrr", [2.0, 5, 0, 0, 2, 5, 0], pieces=SAID)], "text")
    assert (said.words, said.predicts) == (("red",), False)


def test_of_equal_fits_the_word_itself_is_preferred_to_the_place_before_another():
    # Active on the only "red", which is also the place before the only "box".
    one = exemplar("rrrr", [0.0, 5, 0, 0], pieces=(" the", " red", " box", " is"))
    said = explained([one], "text")
    assert (said.words, said.predicts) == (("red",), False)


def test_a_word_that_opens_the_response_has_no_text_before_it():
    pieces = ("<bos>", "red", " box", " is", " red", " cat")
    one = exemplar("srrrrr", [9.0, 5, 0, 0, 5, 0], pieces=pieces)
    said = explained([one], "text")
    assert (said.words, said.predicts) == (("red",), False)


def test_a_text_neuron_needs_no_annotation_but_others_do():
    one = exemplar("vvrrrrrrr", [0.0, 9, 0, 5, 0, 1, 0, 4, 0], pieces=("", "", *SAID))
    assert explained([one], "text").words == ("red",)
    assert isinstance(explained([one], "visual"), Failure)
    assert isinstance(explained([one], "multimodal"), Failure)


def test_a_multimodal_neuron_needs_the_concept_in_both_modalities():
    # Red fits the image perfectly but is never said; blue is seen and said, less well.
    one = exemplar(
        "vvvvrrr",
        [9.0, 8.0, 7.0, 0.0, 0.0, 4.0, 0.0],
        {"red": [0, 1, 2], "blue": [0]},
        ("", "", "", "", " the", " blue", " box"),
    )
    assert explained([one], "visual").phrases == ("red",)
    said = explained([one], "multimodal")
    assert (said.phrases, said.words) == (("blue",), ("blue",))
    assert "image" in said.sentence
    assert "word" in said.sentence


@pytest.mark.parametrize("category", ["multimodal", "unknown"])
def test_a_multimodal_fit_is_the_mean_of_both_by_hand(category):
    one = exemplar(
        "vvvvrrr",
        [9.0, 8.0, 7.0, 0.0, 1.0, 4.0, 0.0],
        {"blue": [0]},
        ("", "", "", "", " the", " blue", " box"),
    )
    (match,) = nl.DissectionExplainer().matches([one], category)
    visual = pearson([9, 8, 7, 0], [1, 0, 0, 0])
    text = pearson([1, 4, 0], [0, 1, 0])
    assert match.visual == pytest.approx(visual)
    assert match.text == pytest.approx(text)
    assert match.r == pytest.approx((visual + text) / 2)


def test_a_concept_predicts_the_covered_share_of_a_token():
    labels = np.zeros((8, 24), np.uint8)
    labels[:, :12] = 1  # the first cell and half of the second
    sample = nl.Sample(
        "s", scene(3).images, "p", "r", annotations=(nl.Annotation(("red",), labels),)
    )
    one = exemplar("vvv", [4.0, 3.0, 0.0], sample=sample)
    (match,) = nl.DissectionExplainer().matches([one], "visual")
    assert match.r == pytest.approx(pearson([4, 3, 0], [1, 0.5, 0]))


def test_the_tokens_of_all_exemplars_are_pooled():
    named = [{"red": [0]}, {"red": [1, 2]}]
    values = [[1.0, 0.0, 0.5], [0.0, 9.0, 3.0]]
    each = [exemplar("vvv", v, n) for v, n in zip(values, named, strict=True)]
    (match,) = nl.DissectionExplainer().matches(each, "visual")
    assert match.r == pytest.approx(pearson([1, 0, 0.5, 0, 9, 3], [1, 0, 0, 0, 1, 1]))


def test_matches_come_best_first_and_ties_by_name():
    one = exemplar("vvvv", [9.0, 8.0, 1.0, 0.0], {"z": [0, 1], "a": [0, 1], "m": [0], "low": [3]})
    found = nl.DissectionExplainer().matches([one], "visual")
    assert [match.concept for match in found] == ["a", "z", "m", "low"]
    assert found[0].r == found[1].r > found[2].r > found[3].r


def test_a_concept_may_stand_for_several_words():
    one = exemplar("rrrrrrr", [0.0, 5, 5, 0, 0, 5, 0], pieces=SAID)
    said = explained([one], "text", words={"thing": ("red", "box"), "animal": ("cat",)})
    assert said.words == ("red", "box")
    assert "“thing”" in said.sentence


def test_only_given_concepts_are_tried():
    one = exemplar("vvv", [9.0, 0.0, 1.0], {"red": [0], "blue": [2]})
    (match,) = nl.DissectionExplainer().matches([one], "visual", concepts=["blue"])
    assert isinstance(match, Match)
    assert match.concept == "blue"


@pytest.mark.parametrize(
    ("exemplars", "category", "reason"),
    [
        ([], "visual", "no exemplar"),
        ([exemplar("vv", [1.0, 0.0])], "visual", "no known concept"),
        ([exemplar("vv", [1.0, 1.0], {"red": [0]})], "visual", "no known concept"),
        ([exemplar("vv", [1.0, 0.0], {"red": [0, 1]})], "visual", "no known concept"),
        ([exemplar("vvr", [1.0, 0.0, 1.0], {"red": [0]}, ("", "", "x"))], "text", "no known"),
        ([exemplar("vv", [1.0, 0.0], {"red": [0]})], "multimodal", "no known concept"),
        ([exemplar("vvr", [1.0, 0.0, 1.0], {"red": [0]})], "text", "no known concept"),
    ],
    ids=[
        "no exemplar",
        "no annotation",
        "constant truth",
        "concept everywhere",
        "one text token",
        "no text",
        "text unknown",
    ],
)
def test_what_no_concept_predicts_is_a_failure_with_its_reason(exemplars, category, reason):
    said = explained(exemplars, category)
    assert isinstance(said, Failure)
    assert reason in said.reason


def test_jobs_are_answered_in_their_order():
    red = exemplar("vvv", [9.0, 0.0, 0.0], {"red": [0], "blue": [1]})
    blue = exemplar("vvv", [0.0, 9.0, 0.0], {"red": [0], "blue": [1]})
    jobs = [
        ExplanationJob(NEURON, "visual", (blue,)),
        ExplanationJob(NEURON, "visual", ()),
        ExplanationJob(NEURON, "visual", (red,)),
    ]
    first, second, third = nl.DissectionExplainer().explain(jobs)
    assert (first.phrases, third.phrases) == (("blue",), ("red",))
    assert isinstance(second, Failure)


def test_another_segmenter_can_be_used():
    class Right:
        def segment(self, sample, image, phrases):
            masks = np.zeros((len(phrases), 8, 24), bool)
            masks[:, :, 16:] = True
            return masks

    one = exemplar("vvv", [0.0, 0.0, 9.0], {"red": [0]})
    (match,) = nl.DissectionExplainer(Right()).matches([one], "visual")
    assert match.r == pytest.approx(1)


def test_samples_that_share_a_token_map_are_covered_by_their_own_masks():
    one = exemplar("vvv", [9.0, 0.0, 0.0], {"red": [0], "blue": [2]})
    other = dataclasses.replace(
        one, sample=scene(3, {"red": [1], "blue": [2]}), activation=np.array([0.0, 9.0, 0.0])
    )
    said = explained([one, other], "visual")
    assert said.phrases == ("red",)
    (best, *_) = nl.DissectionExplainer().matches([one, other], "visual")
    assert best.r == pytest.approx(1)


def test_concepts_that_fit_equally_well_are_named_beside_the_chosen_one():
    one = exemplar("vvv", [9.0, 0.0, 1.0], {"round": [0], "circle": [0], "blue": [2]})
    said = explained([one], "visual")
    assert (said.phrases, said.ties) == (("circle",), ("round",))

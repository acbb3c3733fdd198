from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import neuronlens as nl
from handmade import NEURON, exemplar
from neuronlens import testbed
from neuronlens.concepts import ConceptCount, count_concepts
from neuronlens.concepts.count import Rule
from neuronlens.concepts.cover import Cover
from neuronlens.concepts.profile import Element, Side, Vocabulary
from neuronlens.errors import (
    AdapterError,
    AtlasError,
    DataError,
    RescanError,
    UnknownNameError,
)
from neuronlens.testbed import Spec

SAID = (" the", " red", " box", " and", " blue", " cat")


def counted(top, category="visual", rule=None, concepts=None, words=None, contrast=()):
    vocabulary = Vocabulary(nl.AnnotationSegmenter(), concepts, words or {})
    ranked = [replace(each, rank=rank) for rank, each in enumerate(top, 1)]
    return (rule or Rule(resamples=50)).count(NEURON, category, ranked, contrast, vocabulary, {})


def pictures(*kinds, each=8, cells=8):
    """Exemplars on rows of cells: pairs of activations and where concepts are.

    Each exemplar is turned by another number of cells, so that nothing has its place.
    """
    made = []
    for values, named in kinds:
        for turn in range(each):
            level = np.roll([*values, *[0.0] * (cells - len(values))], 3 * turn)
            places = {name: [(i + 3 * turn) % cells for i in at] for name, at in named.items()}
            made.append(exemplar("v" * cells, list(level), places, maximum=10.0))
    return made


def explained(level, predicted) -> float:
    """Squared Pearson correlation by its definition, 0 if negative or undefined."""
    if np.ptp(level) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return max(0.0, float(np.corrcoef(level, predicted)[0, 1])) ** 2


# One concept, or several, by hand.


def test_what_comes_along_with_a_concept_is_no_second_one():
    # Every red thing is large, and other large things are there on which it is quiet.
    found = counted(
        pictures(
            ([10.0, 0, 0, 0], {"red": [0], "large": [0, 1], "ring": [0]}),
            ([0, 9.0, 0, 0], {"red": [1], "large": [1, 2], "cross": [1]}),
        )
    )
    assert (found.count, found.names) == (1, ("red",))
    assert found.explained == found.by_size[1] > 0.99


def test_concepts_that_share_the_samples_among_them_are_two():
    found = counted(
        pictures(
            ([10.0, 0, 0, 0], {"red": [0], "blue": [3]}),
            ([0, 0, 10.0, 0], {"ring": [2], "blue": [3]}),
        )
    )
    assert (found.count, set(found.names)) == (2, {"red", "ring"})
    by_name = {each.name: each for each in found.concepts}
    assert by_name["red"].ranks == tuple(range(1, 9))
    assert by_name["ring"].ranks == tuple(range(9, 17))
    assert by_name["red"].share == by_name["ring"].share == 0.5
    assert found.unexplained == ()


def test_what_a_set_and_each_of_its_members_explain_by_hand():
    found = counted(
        pictures(
            ([10.0, 0, 0, 0], {"red": [0]}),
            ([0, 0, 6.0, 0], {"ring": [2]}),
        )
    )
    level = np.zeros(16)
    level[[0, 10]] = 10, 6
    red, ring = np.eye(16)[0], np.eye(16)[10]
    one = {each.name: each for each in found.concepts}
    assert found.explained == pytest.approx(explained(level, red + ring))
    assert one["red"].explained == pytest.approx(explained(level, red))
    assert one["ring"].gain == pytest.approx(explained(level, red + ring) - explained(level, red))
    assert found.concepts[0].name == "red"


def test_a_concept_that_covers_all_of_them_does_not_stand_in_their_way():
    # "object" is the best single one; of two, red and blue are, and it is not among them.
    kinds = (
        ([10.0, 0, 0, 0], {"red": [0], "object": [0, 1], "green": [1]}),
        ([10.0, 0, 0, 0], {"blue": [0], "object": [0]}),
    )
    level = np.zeros(16)
    level[[0, 8]] = 10
    both, red = np.isin(np.arange(16), [0, 1, 8]).astype(float), np.eye(16)[0]
    assert explained(level, both) > explained(level, red)
    found = counted(pictures(*kinds))
    assert (found.count, set(found.names)) == (2, {"red", "blue"})
    assert found.by_size[1] == pytest.approx(explained(level, both))


def test_two_concepts_that_cover_all_of_them_do_not_stand_in_their_way_either():
    # Large and small things are all things. No single exchange leads from them to red and blue.
    found = counted(
        pictures(
            *[([10.0], {"red": [0], "large": [0]}), ([10.0], {"blue": [0], "large": [0]})] * 2,
            ([10.0], {"red": [0], "small": [0]}),
            ([10.0], {"blue": [0], "small": [0]}),
            ([10.0], {"red": [0], "large": [0], "small": [3]}),
            ([10.0], {"blue": [0], "large": [0, 3]}),
            each=3,
        )
    )
    assert (found.count, set(found.names)) == (2, {"red", "blue"})
    assert found.explained == pytest.approx(1.0)


def test_a_sample_is_of_a_concept_if_the_neuron_fires_on_it_there():
    found = counted(
        pictures(
            ([10.0, 0, 0, 0], {"red": [0]}),
            ([0, 0, 10.0, 0], {"ring": [2]}),
            ([10.0, 0, 2.0, 0], {"red": [0], "ring": [2]}),
            ([10.0, 0, 5.0, 0], {"red": [0], "ring": [2]}),
            ([0, 0, 0, 10.0], {"blue": [5]}),
            each=4,
        )
    )
    by_name = {each.name: each.ranks for each in found.concepts}
    assert by_name == {"red": (*range(1, 5), *range(9, 17)), "ring": (*range(5, 9), *range(13, 17))}
    assert found.unexplained == tuple(range(17, 21))


def test_a_concept_in_less_than_a_tenth_of_the_samples_is_not_tried():
    most = pictures(([10.0, 0, 0, 0], {"red": [0]}), each=19)
    rare = pictures(([0, 10.0, 10.0, 10.0], {"ring": [1, 2, 3]}), each=2)
    assert counted(most + rare[:1]).names == ("red",)
    assert len(counted(most + rare[:1]).by_size) == 2
    # In a tenth it is, if the tokens of these samples bear it out.
    assert set(counted(most[:18] + rare).names) == {"red", "ring"}


@pytest.mark.parametrize(("strength", "count"), [(3.0, 1), (6.0, 2)])
def test_a_concept_counts_if_the_neuron_fires_on_it_about_as_strongly(strength, count):
    found = counted(
        pictures(
            ([10.0, 0, 0, 0], {"red": [0]}),
            ([10.0, strength, 0, 0], {"red": [0], "ring": [1]}),
        )
    )
    assert found.count == count


def test_a_concept_must_add_what_is_asked_for():
    some = pictures(
        ([10.0, 0, 0, 0], {"red": [0]}),
        ([10.0, 6.0, 0, 0], {"red": [0], "ring": [1]}),
    )
    gain = counted(some).by_size[2] - counted(some).by_size[1]
    assert counted(some, rule=Rule(least=gain - 0.01, resamples=0)).count == 2
    assert counted(some, rule=Rule(least=gain + 0.01, resamples=0)).count == 1


def test_no_more_than_most_are_counted():
    some = pictures(*((list(np.eye(4)[i] * 10), {f"c{i}": [i]}) for i in range(4)))
    assert counted(some).count == 4
    assert counted(some, rule=Rule(most=3)).count == 3


def test_other_names_of_a_concept_are_named_beside_it():
    found = counted(
        pictures(
            ([10.0, 0, 0, 0], {"red": [0], "scarlet": [0], "blue": [1]}),
            ([0, 0, 10.0, 0], {"ring": [2], "blue": [3]}),
        )
    )
    by_name = {each.name: each.instead for each in found.concepts}
    assert by_name == {"red": ("scarlet",), "ring": ()}


def test_where_no_known_concept_is_under_the_activations_the_count_is_zero():
    found = counted(pictures(([10.0, 0, 0, 0], {"red": [1]}), ([0, 0, 0, 9.0], {"blue": [2]})))
    assert (found.count, found.names, found.explained, found.reason) == (0, (), 0.0, "")
    assert found.unexplained == tuple(range(1, 17))
    # Being quiet on a concept is no way to be predicted by it.
    assert found.by_size == (0.0, 0.0, 0.0)


# Text, and both sides.


def turned(sequence, by):
    return [*sequence[by:], *sequence[:by]]


def texts(*kinds, each=8, pieces=SAID):
    """Exemplars of six words; pairs of them stay together, and change places."""
    return [
        exemplar(
            "rrrrrr", turned(v, 2 * i % 6), pieces=tuple(turned(pieces, 2 * i % 6)), maximum=10.0
        )
        for v in kinds
        for i in range(each)
    ]


def test_words_that_are_said_are_known_without_annotations():
    found = counted(texts([0.0, 10, 0, 0, 0, 0], [0.0, 0, 0, 0, 9, 0]), "text")
    assert {(e.name, e.visual, e.text) for e in found.concepts} == {
        ("red", False, "on"),
        ("blue", False, "on"),
    }


def test_a_neuron_may_fire_before_the_words():
    pieces = (" a", " red", " a", " box", " a", " cat")
    some = texts([9.0, 0, 0, 0, 0, 0], pieces=pieces, each=12)
    (concept,) = counted(some, "text").concepts
    assert (concept.name, concept.text) == ("red", "before")
    # A concept given by its words, of which one is said.
    (concept,) = counted(
        some, "text", words={"warm": ("red", "orange")}, concepts=["warm"]
    ).concepts
    assert (concept.name, concept.text) == ("warm", "before")


def both(visual, text, named, each=12):
    """Exemplars of a picture and a text, each turned by itself."""
    seen, read = pictures((visual, named), each=each), texts(text, each=each)
    return [
        exemplar(
            "v" * 8 + "r" * 6,
            [*one.activation, *other.activation],
            pieces=("",) * 8 + other.tokens.pieces,
            sample=one.sample,
            maximum=10.0,
        )
        for one, other in zip(seen, read, strict=True)
    ]


def test_one_concept_that_is_seen_and_read_is_one():
    some = both([10.0, 0, 0, 0], [0.0, 8, 0, 0, 0, 0], {"red": [0], "blue": [1]})
    found = counted(some, "multimodal")
    (concept,) = found.concepts
    assert (concept.name, concept.visual, concept.text) == ("red", True, "on")
    assert found.explained == pytest.approx(1.0)


def test_a_concept_that_is_seen_and_another_that_is_read_are_two():
    some = both([10.0, 0, 0, 0], [0.0, 0, 0, 0, 8, 0], {"red": [0], "blue": [1]})
    found = counted(some, "multimodal")
    assert {(e.name, e.visual, e.text) for e in found.concepts} == {
        ("red", True, None),
        ("blue", False, "on"),
    }


def test_what_faint_activations_follow_is_not_counted():
    some = both([2.0, 0, 0, 0], [0.0, 0, 0, 0, 10, 0], {"ring": [0], "blue": [1]})
    found = counted(some, "unknown")
    assert (found.names, found.explained) == (("blue",), pytest.approx(1.0))
    # Were the image not faint, it would count.
    some = both([4.0, 0, 0, 0], [0.0, 0, 0, 0, 10, 0], {"ring": [0], "blue": [1]})
    assert set(counted(some, "unknown").names) == {"ring", "blue"}


# What cannot be told.


@pytest.mark.parametrize(
    ("exemplars", "category", "reason"),
    [
        ([], "visual", "never fires"),
        (pictures(([-1.0, 0, 0, -2.0], {"red": [0]})), "visual", "never fires"),
        (pictures(([9.0, 0, 0, 0], {"red": [0]}), each=9), "visual", "fires on 9 of"),
        (pictures(([9.0, 0, 0, 0], {}), each=10), "visual", "no concept is known"),
        ([exemplar("rr", [9.0, 1.0], pieces=("a", "b"))] * 10, "visual", "region"),
        ([exemplar("vr", [9.0, 1.0], {"red": [0]})] * 10, "text", "region"),
    ],
    ids=["none", "silent", "few", "no names", "no image", "no text"],
)
def test_what_cannot_be_told_has_a_reason(exemplars, category, reason):
    found = counted(exemplars, category)
    assert found.count is None
    assert reason in found.reason
    assert np.isnan([found.explained, found.certainty]).all()
    assert found.interval is None
    assert reason in repr(found)


def test_samples_on_which_it_is_quiet_are_left_out():
    loud = pictures(([10.0, 0, 0, 0], {"red": [0]}), each=12)
    quiet = pictures(([-1.0, 0, 0, 0], {"red": [0, 1, 2]}), each=12)
    assert counted(loud + quiet).explained == counted(loud).explained
    assert counted(loud + quiet).samples == 12


# How sure it is.


def test_shares_of_the_resamples_are_a_distribution_about_the_count():
    some = pictures(([10.0, 0, 0, 0], {"red": [0]}), each=30)
    some += pictures(([0, 0, 10.0, 0], {"ring": [2]}), each=4)
    found = counted(some, rule=Rule(resamples=400))
    assert sum(found.shares.values()) == pytest.approx(1)
    assert set(found.shares) == {1, 2}
    assert found.certainty == found.shares[found.count]
    by_name = {each.name: each.support for each in found.concepts}
    assert by_name["red"] == 1
    # Every resample that counts two has the ring.
    assert by_name["ring"] == found.shares[2]
    # A resample has none of the four, and counts one concept, with probability (30 / 34) ** 34.
    assert 0.01 < found.shares[1] < 0.3


def test_a_clear_case_is_the_same_in_every_resample():
    found = counted(pictures(([10.0, 0, 0, 0], {"red": [0], "blue": [1]}), each=20))
    assert found.shares == {1: 1.0}
    assert (found.certainty, found.interval) == (1.0, (1, 1))


def test_without_resamples_nothing_is_said_of_certainty():
    found = counted(pictures(([9.0, 0, 0, 0], {"red": [0]}), each=12), rule=Rule(resamples=0))
    assert (found.count, found.shares, found.interval) == (1, {}, None)
    assert np.isnan([found.certainty, found.concepts[0].support]).all()
    assert "resamples" not in repr(found)
    assert "nan" not in found._repr_html_()


def test_the_interval_holds_95_percent_of_the_resamples():
    def of(**shares):
        return ConceptCount(
            NEURON, "visual", 1, shares={int(k[1:]): v for k, v in shares.items()}
        ).interval

    assert of(n0=0.02, n1=0.96, n2=0.02) == (1, 1)
    assert of(n0=0.03, n1=0.94, n2=0.03) == (0, 2)
    assert of(n1=0.5, n3=0.5) == (1, 3)
    assert of(n2=1.0) == (2, 2)


# Unions, correlations and chance, against slow references.


def made(seed, elements=5, samples=12, tokens=9):
    """A side of one modality with overlapping concepts, and a neuron of two of them and noise."""
    rng = np.random.default_rng(seed)
    start = np.concatenate([[0], np.cumsum(rng.integers(1, tokens, samples))])
    predicted = np.where(rng.random((elements, start[-1])) < 0.25, rng.random(start[-1]), 0)
    level = 8 * predicted[:2].max(0) + rng.random(start[-1])
    centre = rng.random((start[-1], 2))
    return Side(level, predicted.astype(np.float32), start, centre)


def cover_of(*sides):
    return Cover([Element(f"c{i}", True) for i in range(len(sides[0].predicted))], sides)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_a_draw_explains_what_the_repeated_samples_do(seed, draw):
    side = made(seed)
    base, new = (1, 3), 0
    found = cover_of(side).joined(base, np.array([draw], float))
    spans = list(itertools.pairwise(side.start))
    at = np.concatenate(
        [np.arange(*spans[i]) for i, n in enumerate(draw) for _ in range(n)] or [[]]
    )
    at = at.astype(int)
    if len(at) < 2:
        assert found[0, new] == 0
        return
    union = np.maximum.reduce(side.predicted[[*base, new]])[at]
    assert found[0, new] == pytest.approx(explained(side.level[at], union), abs=1e-6)
    assert np.isneginf(found[0, list(base)]).all()


def test_two_modalities_count_alike():
    one, other = made(1), made(2)
    cover = cover_of(one, other)
    expected = [
        np.mean(
            [explained(s.level, np.maximum(s.predicted[0], s.predicted[2])) for s in (one, other)]
        )
    ]
    assert cover.explained((0, 2)) == pytest.approx(expected[0])


def test_the_search_finds_what_trying_all_sets_finds():
    for seed in range(30):
        side = made(seed, elements=7)
        values, unions = cover_of(side).best(np.ones((1, 12)), 4)
        for size in range(1, 4):
            best = max(
                explained(side.level, side.predicted[list(union)].max(0))
                for union in itertools.combinations(range(7), size)
            )
            assert values[size, 0] == pytest.approx(best), (seed, size)
            assert len(set(unions[size][0])) == size


def test_resamples_are_searched_as_if_each_were_alone():
    side = made(3, elements=7)
    draws = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 20).astype(float)
    values, unions = cover_of(side).best(draws, 3)
    for number, draw in enumerate(draws):
        alone, own = cover_of(side).best(draw[None], 3)
        np.testing.assert_allclose(values[:, number], alone[:, 0])
        assert [each[number] for each in unions] == [each[0] for each in own]


def test_no_concept_is_in_a_set_twice():
    side = made(4, elements=4)
    elements = [
        Element("a", True),
        Element("a", False, "on"),
        Element("b", True),
        Element("c", True),
    ]
    cover = Cover(elements, [side])
    values, unions = cover.best(np.ones((1, 12)), 5)
    assert len(values) == 4  # none, one, two, three concepts
    for union in (each[0] for each in unions):
        names = [elements[each].concept for each in union]
        assert len(set(names)) == len(names)


def test_shuffled_tokens_are_those_at_the_same_place_of_another_sample():
    centre = np.array([[0.1], [0.5], [0.9], [0.1], [0.5], [0.9], [0.2], [0.8]])
    side = Side(np.zeros(8), np.zeros((1, 8), np.float32), np.array([0, 3, 6, 8, 8]), centre)
    (moved,) = side.moved([np.array([1, 2, 0, 1])])
    assert moved.tolist() == [3, 4, 5, 6, 6, 7, 0, 2]  # 0.5 is as near to 0.2 as to 0.8
    (moved,) = side.moved([np.array([3, 0, 1, 2])])
    assert moved.tolist() == [-1, -1, -1, 0, 1, 2, 3, 5]


def test_a_token_lies_in_its_image_whatever_the_size_of_that():
    some = [
        exemplar("rvvvv", [0.0, 9, 0, 0, 0], {"red": [0]}, pieces=("a", "", "", "", "")),
        exemplar("v" * 8, [9.0, 0, 0, 0, 0, 0, 0, 0], {"red": [0, 1]}),
    ]
    vocabulary = Vocabulary(nl.AnnotationSegmenter(), None, {})
    elements, (seen, read) = vocabulary.profile(some, [], ["visual", "text"])
    assert Element("red", True) in elements
    assert seen.start.tolist() == [0, 4, 12]
    np.testing.assert_allclose(seen.centre[[0, 3, 4, 11], 0], [1 / 8, 7 / 8, 1 / 16, 15 / 16])
    np.testing.assert_allclose(seen.predicted[elements.index(Element("red", True))].sum(), 3)
    assert read.start.tolist() == [0, 1, 1]


def test_one_in_twenty_neurons_of_noise_is_predicted_better_than_chance():
    found = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        start = np.arange(13) * 8
        predicted = (rng.random((6, 96)) < 0.3).astype(np.float32)
        # Every sample has the same cells.
        centre = np.tile(np.arange(8.0), 12)[:, None]
        cover = cover_of(Side(rng.random(96) ** 4, predicted, start, centre))
        chance = cover.by_chance((), rng)
        found.append(cover.joined((), np.ones((1, 12))).max() > chance)
    # Sixty shuffles estimate the quantile, 120 neurons the share.
    assert 0.01 < np.mean(found) < 0.12


def test_a_concept_that_is_everywhere_needs_samples_for_contrast():
    # All top samples have a background. That it is also where the neuron is quiet, they do not say.
    top = pictures(
        ([10.0, 10.0, 0, 0], {"striped": [0, 1], "background": [0, 1]}),
        ([10.0, 10.0, 0, 0], {"dotted": [0, 1], "background": [0, 1]}),
    )
    quiet = pictures(([0.0, 0, 0, 0], {"plain": [0, 1], "background": [0, 1]}))
    assert counted(top).names == ("background",)
    found = counted(top, contrast=quiet)
    assert set(found.names) == {"striped", "dotted"}
    assert found.samples == 16
    assert found.explained == pytest.approx(1.0)
    # They are no samples that it could fire on.
    assert max(rank for each in found.concepts for rank in each.ranks) == 16
    # Nor is what only they show a concept of the neuron.
    assert "plain" not in {name for each in found.concepts for name in each.instead}


def test_chance_prices_what_lies_in_the_same_place_everywhere():
    # The neuron fires on the first cell, where "sky" is in every image: any image's sky fits.
    some = [exemplar("vvvv", [10.0, 0, 0, 0], {"sky": [0], "red": [2]}) for _ in range(12)]
    found = counted(some)
    assert found.price[0] == pytest.approx(1.0)
    assert found.count == 0


# The function that users call.


def test_one_call_counts_neurons_of_a_scan(vlm, atlas, scenes):
    kinds = nl.NeuronClassifier(**testbed.READINGS).classify(atlas)
    neurons = [
        *kinds.select("visual", n=2, module="vision"),
        *kinds.select("text", n=2),
        *kinds.select("multimodal", n=1),
    ]
    found = count_concepts(vlm, atlas, neurons, kinds=kinds, n=20, samples=scenes, resamples=20)
    assert list(found) == neurons
    for neuron, each in found.items():
        assert (each.neuron, each.category) == (neuron, kinds.of(neuron))
        assert each.settings["n"] == 20
        assert each.settings["readings"] == kinds.readings
        assert len(each.by_size) == len(each.price) + 1
    # The same alone, by its written name, and with another seed's resamples another distribution.
    one = count_concepts(
        vlm, atlas, [str(neurons[1])], kinds=kinds, n=20, samples=scenes, resamples=20
    )[neurons[1]]
    assert repr(one) == repr(found[neurons[1]])
    assert one.shares == found[neurons[1]].shares
    assert one.price == found[neurons[1]].price


def test_a_result_shows_itself_and_escapes_names():
    found = counted(pictures(([9.0, 0, 0, 0], {"<b>red</b>": [0], "blue": [1]}), each=12))
    shown = found._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;red" in shown
    assert "1 (<b>red</b>)" in repr(found)


class Asked:
    """A segmenter that finds the first concept everywhere on the left and notes what is asked."""

    name = "asked"

    def __init__(self):
        self.calls = []

    def segment(self, sample, image, phrases):
        self.calls.append((sample.id, image, tuple(phrases)))
        width, height = sample.open_images()[image].size
        masks = np.zeros((len(phrases), height, width), bool)
        masks[0, :, : width // 2] = True
        return masks


def test_a_segmenter_looks_for_given_concepts_once_in_each_image(vlm, atlas, scenes):
    bare = [replace(each, annotations=()) for each in scenes]
    kinds = nl.NeuronClassifier(**testbed.READINGS).classify(atlas)
    neurons = kinds.select("visual", n=3, module="vision")
    asked = Asked()
    found = count_concepts(
        vlm,
        atlas,
        neurons,
        kinds=kinds,
        n=20,
        samples=bare,
        segmenter=asked,
        words={"dog": ("dog", "puppy"), "cat": ("cat",)},
        resamples=0,
    )
    assert {phrases for _, _, phrases in asked.calls} == {("cat", "dog")}
    streams = {vlm.site(neuron.site).stream for neuron in neurons}
    assert len(asked.calls) <= len(scenes) * len(streams)
    assert found[neurons[0]].settings["segmenter"] == "asked"
    assert found[neurons[0]].settings["concepts"] == ["cat", "dog"]


def test_a_silent_neuron_has_no_count(planted, tmp_path):
    bed = testbed.load(planted=True)
    vlm, samples = planted["one"][0], planted["one"][3]
    silent = next(each.neuron for each in bed.planted if each.kind == "silent")
    deep = nl.scan(vlm, samples[:12], sites=silent.site, out=tmp_path / "deep", n=12)
    (found,) = count_concepts(vlm, deep, [silent], n=12, samples=samples).values()
    assert found.count is None
    assert "never fires" in found.reason


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"n": 50}, RescanError, r"n=20, or scan again with scan\(..., n=50\)"),
        ({"n": 9}, ValueError, "give 10 or more"),
        ({"contrast": -1}, ValueError, "counts samples, from 0"),
        ({"least": 0.0}, ValueError, "between 0 and 1"),
        ({"most": 0}, ValueError, "at least 1 and 0"),
        ({"resamples": -1}, ValueError, "at least 1 and 0"),
        ({"concepts": "red"}, TypeError, r"\['red'\]"),
        ({"concepts": ["elephant"]}, UnknownNameError, r"'elephant'\. (Known|Closest): "),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(vlm, atlas, scenes, more, error, said):
    with pytest.raises(error, match=said):
        count_concepts(vlm, atlas, ["language.0/3"], **{"n": 20, "samples": scenes, **more})


def test_one_known_concept_among_others_is_enough(vlm, atlas, scenes):
    neuron = nl.NeuronClassifier(**testbed.READINGS).classify(atlas).select("text", n=1)
    names = ["elephant", "Red"]
    found = count_concepts(
        vlm, atlas, neuron, n=20, samples=scenes, concepts=names, resamples=0, most=1
    )
    assert list(found) == neuron
    with pytest.raises(AdapterError, match=r"A LlavaForCond.*nl\.adapt"):
        count_concepts(vlm.model, atlas, neuron, n=20, samples=scenes)


def test_what_does_not_belong_together_is_refused(vlm, untrained_vlm, atlas, scenes, tmp_path):
    with pytest.raises(AtlasError, match="other weights"):
        count_concepts(untrained_vlm, atlas, ["language.0/3"], n=20, samples=scenes)
    other = nl.scan(untrained_vlm, scenes[:2], sites="language.0", out=tmp_path / "other")
    kinds = nl.NeuronClassifier().classify(other)
    with pytest.raises(AtlasError, match="another model"):
        count_concepts(vlm, atlas, ["language.0/3"], n=20, samples=scenes, kinds=kinds)
    with pytest.raises(UnknownNameError):
        count_concepts(vlm, atlas, ["language.9/3"], n=20, samples=scenes)
    with pytest.raises(TypeError, match="Several neurons"):
        count_concepts(vlm, atlas, "language.0/3", n=20, samples=scenes)


def test_images_without_any_known_concept_are_refused_before_recording(vlm, atlas, scenes):
    bare = [replace(each, annotations=()) for each in scenes]
    kinds = nl.NeuronClassifier(**testbed.READINGS).classify(atlas)
    (seeing,) = kinds.select("visual", n=1, module="vision")
    with pytest.raises(DataError, match=r"concepts=\["):
        count_concepts(vlm, atlas, [seeing], kinds=kinds, n=20, samples=bare)
    # Text needs none.
    (reading,) = kinds.select("text", n=1)
    (found,) = count_concepts(
        vlm, atlas, [reading], kinds=kinds, n=20, samples=bare, resamples=0
    ).values()
    assert found.count is not None


# Examined on planted neurons of one and of two concepts.

TWO = (
    Spec("visual", ("yellow", "purple")),
    Spec("text", ("orange", "ring")),
    Spec("text", ("blue", "large")),
    Spec("multimodal", ("blue", "orange")),
)
"""Of two colours in images: a neuron of a colour or a shape comes out firing on all objects."""


@pytest.fixture(scope="module")
def planted(bed, tmp_path_factory):
    """Two models in which the function of some neurons is known, both scanned."""
    samples = testbed.scenes(200, seed=51)
    one = testbed.load(planted=True)
    model, truth = testbed.plant(bed.model, bed.processor, TWO, seed=5)
    made = {}
    for name, of, neurons in (("one", one.model, one.planted), ("two", model, truth)):
        vlm = nl.adapt(of, bed.processor)
        out = tmp_path_factory.mktemp(name) / "atlas"
        atlas = nl.scan(vlm, samples, sites="language.0", out=out)
        kinds = nl.NeuronClassifier(**testbed.READINGS).classify(atlas)
        functional = [each for each in neurons if each.kind != "silent"]
        made[name] = vlm, atlas, kinds, samples, functional
    return made


@pytest.mark.parametrize(("name", "count"), [("one", 1), ("two", 2)])
def test_planted_neurons_have_as_many_concepts_as_were_planted(planted, name, count):
    vlm, atlas, kinds, samples, truth = planted[name]
    found = count_concepts(
        vlm, atlas, [each.neuron for each in truth], kinds=kinds, samples=samples, resamples=20
    )
    wrong = [
        (each, found[each.neuron])
        for each in truth
        if found[each.neuron].count != count or set(found[each.neuron].names) != set(each.concepts)
    ]
    assert not wrong
    assert np.mean([each.certainty for each in found.values()]) > 0.8


def test_with_shuffled_annotations_next_to_none_is_found_in_images(planted):
    found = []
    for vlm, atlas, kinds, samples, truth in planted.values():
        seeing = [each.neuron for each in truth if kinds.of(each.neuron) == "visual"]
        wrong = testbed.shuffled(samples, seed=0)
        found += count_concepts(
            vlm, atlas, seeing, kinds=kinds, samples=wrong, resamples=0
        ).values()
    assert len(found) == 5
    assert sum(each.count > 0 for each in found) <= 1

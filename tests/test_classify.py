from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neuronlens as nl
from handmade import open_atlas, statistics
from neuronlens.classify import CATEGORIES, NeuronClassifier, top_weights
from neuronlens.errors import RescanError, UnknownNameError
from neuronlens.neurons import NeuronId
from neuronlens.running import COUNTED
from neuronlens.tokens import Role

MADE = "language.0"


def classified(folder, neurons, classifier=None, sites=None, **kept) -> nl.Classification:
    made = {name: statistics(rows, **kept) for name, rows in (sites or {MADE: neurons}).items()}
    return (classifier or NeuronClassifier(n_v=1, n_t=1)).classify(open_atlas(folder, made))


def shares(kinds: nl.Classification, row: int = 0, site: str = MADE) -> tuple[float, ...]:
    return tuple(kinds.probability(NeuronId(site, row)).values())


# By hand. With n_v = n_t = 1 two visual tokens above 2 and two text tokens above 3 are needed.


def test_the_four_kinds_of_sample_by_hand(tmp_path):
    neuron = {
        0: ([10.0, 3.0], [0.0]),  # visual: the maximum is 10, so values are levels
        1: ([1.0], [4.0, 4.0]),  # text
        2: ([3.0, 3.0, 0.0], [4.0, 9.0]),  # both
        3: ([2.9, 2.9], [3.9, 3.9]),  # neither: floors are 2 and 3, which exceed nothing
    }
    kinds = classified(tmp_path / "a", [neuron])
    assert shares(kinds) == (0.25, 0.25, 0.25, 0.25)
    assert kinds.of(NeuronId(MADE, 0)) == "visual"  # the order that breaks ties
    site = kinds.sites[MADE]
    assert (site.is_tie[0], site.margin[0], site.silent[0], site.samples[0]) == (True, 0, False, 4)


READINGS = [
    # How 2.9 of 10 counts against t_v = 2 and 3.4 or 3.5 against t_t = 3.
    ({"quantise": "floor"}, 2.9, False),
    ({"quantise": "floor"}, 3.0, True),
    ({"quantise": "round"}, 2.4, False),
    ({"quantise": "round"}, 2.5, False),  # half to even
    ({"quantise": "round"}, 2.6, True),
    ({"quantise": None}, 2.0, False),  # strictly
    ({"quantise": None}, 2.1, True),
    ({"scale": "normalized", "t_v": 0.25}, 2.5, False),
    ({"scale": "normalized", "t_v": 0.25}, 2.6, True),
    ({"scale": "raw", "t_v": 2.5}, 2.5, False),
    ({"scale": "raw", "t_v": 2.5}, 2.625, True),
]


@pytest.mark.parametrize(("reading", "value", "activated"), READINGS)
def test_every_reading_of_a_threshold_by_hand(tmp_path, reading, value, activated):
    kinds = classified(
        tmp_path / "a", [{0: ([10.0, value], [])}], NeuronClassifier(n_v=1, n_t=1, **reading)
    )
    assert kinds.of(NeuronId(MADE, 0)) == ("visual" if activated else "unknown")


@pytest.mark.parametrize(("scale", "level"), [("ten", 5.0), ("normalized", 0.5), ("raw", 2.0)])
def test_scales_count_from_the_maximum_or_as_it_is(tmp_path, scale, level):
    # Half of the maximum 4 is 5 of ten, 0.5 of one, and 2 as it is.
    neuron = {0: ([4.0, 2.0], [])}
    for threshold, expected in ((level - 0.25, "visual"), (level, "unknown")):
        reading = NeuronClassifier(n_v=1, t_v=threshold, scale=scale, quantise=None)
        kinds = classified(tmp_path / f"{threshold}", [neuron], reading)
        assert kinds.of(NeuronId(MADE, 0)) == expected


@pytest.mark.parametrize(("maximum", "expected"), [("joint", "text"), ("role", "multimodal")])
def test_one_maximum_or_one_per_role_by_hand(tmp_path, maximum, expected):
    # Visual values are 1 of 10 jointly, but 10 of their own maximum.
    neuron = {0: ([1.0, 1.0], [10.0, 10.0])}
    kinds = classified(tmp_path / "a", [neuron], NeuronClassifier(n_v=1, n_t=1, maximum=maximum))
    assert kinds.of(NeuronId(MADE, 0)) == expected


def test_only_eligible_roles_set_the_scale(tmp_path):
    made = statistics([{0: ([3.0, 3.0], [3.0, 3.0])}])
    for role in (Role.PROMPT, Role.SPECIAL):
        made.roles.maximum[COUNTED.index(role)] = 100.0
    found = NeuronClassifier(n_v=1, n_t=1).classify(open_atlas(tmp_path / "a", {MADE: made}))
    assert shares(found) == (0, 0, 1, 0)
    both = (Role.PROMPT, Role.RESPONSE)
    wider = open_atlas(tmp_path / "b", {MADE: made}, text_roles=both)
    assert shares(NeuronClassifier(n_v=1, n_t=1).classify(wider)) == (0, 0, 0, 1)


def test_thresholds_on_counts_are_strict(tmp_path):
    # P1: more than n_v = 4 visual tokens, more than n_t = 2 text tokens.
    neurons = [
        {0: ([9.0] * 4, [])},
        {0: ([9.0] * 5, [])},
        {0: ([], [9.0] * 2)},
        {0: ([], [9.0] * 3)},
    ]
    kinds = classified(tmp_path / "a", neurons, NeuronClassifier())
    said = [kinds.of(NeuronId(MADE, row)) for row in range(4)]
    assert said == ["unknown", "visual", "unknown", "text"]


@pytest.mark.parametrize(
    ("value", "maximum", "dtype", "level"),
    [
        (2.4366584, 8.122195, torch.float32, 2),  # 2.9999998, which float32 rounds to 3
        (0.82421875, 1.1796875, torch.bfloat16, 6),  # 6.987, which bfloat16 rounds to 7
    ],
    ids=["float32", "bfloat16"],
)
def test_levels_are_quantised_in_double_precision(tmp_path, value, maximum, dtype, level):
    for threshold, activated in ((level - 1, "visual"), (level, "unknown")):
        kinds = classified(
            tmp_path / f"{threshold}",
            [{0: ([maximum, value], [])}],
            NeuronClassifier(n_v=1, t_v=threshold),
            dtype=dtype,
        )
        assert kinds.of(NeuronId(MADE, 0)) == activated


def test_only_the_first_top_samples_count_if_asked(tmp_path):
    neuron = {0: ([10.0, 9.0], []), 1: ([9.0], []), 2: ([], [8.0, 8.0]), 3: ([7.0], [])}
    wanted = {1: (1, 0, 0, 0), 2: (0.5, 0, 0, 0.5), 3: (1 / 3, 1 / 3, 0, 1 / 3)}
    for top, expected in wanted.items():
        kinds = classified(tmp_path / f"{top}", [neuron], NeuronClassifier(n_v=1, n_t=1, top=top))
        assert shares(kinds) == expected
        assert kinds.sites[MADE].samples[0] == top


def test_shares_are_over_the_samples_there_are(tmp_path):
    neuron = {0: ([10.0, 9.0], []), 5: ([9.0, 9.0], []), 7: ([], [1.0])}
    kinds = classified(tmp_path / "a", [neuron], n=50)
    assert shares(kinds) == (2 / 3, 0, 0, 1 / 3)
    assert kinds.sites[MADE].samples[0] == 3


@pytest.mark.parametrize("scale", ["ten", "normalized", "raw"])
@pytest.mark.parametrize("maximum", ["joint", "role"])
@pytest.mark.parametrize(
    "neuron",
    [
        {},
        {0: ([0.0, 0.0, 0.0], [0.0, 0.0])},
        {0: ([-1.0, -2.0, -1.0], [-3.0, -0.5]), 1: ([-1.0], [])},
    ],
    ids=["no sample", "all zero", "all negative"],
)
def test_a_silent_neuron_is_unknown_and_never_nan(tmp_path, neuron, scale, maximum):
    loud = {0: ([5.0, 5.0], [5.0, 5.0])}
    reading = NeuronClassifier(n_v=1, n_t=1, t_v=0, t_t=0, scale=scale, maximum=maximum)
    kinds = classified(tmp_path / "a", [neuron, loud], reading)
    assert shares(kinds) == (0, 0, 0, 1)
    assert kinds.of(NeuronId(MADE, 0)) == "unknown"
    site = kinds.sites[MADE]
    assert site.silent.tolist() == [True, False]
    assert (site.margin[0], site.is_tie[0]) == (1, False)


def test_a_modality_that_never_fired_has_no_maximum_to_divide_by(tmp_path):
    neuron = {0: ([-1.0, -1.0], [5.0, 5.0])}
    for maximum in ("joint", "role"):
        kinds = classified(
            tmp_path / maximum, [neuron], NeuronClassifier(n_v=1, n_t=1, maximum=maximum)
        )
        assert shares(kinds) == (0, 1, 0, 0)


TIES = [
    # Kinds of the samples, winner.
    ("vt", "visual"),
    ("tm", "text"),
    ("mu", "multimodal"),
    ("vtmu", "visual"),
    ("tum", "text"),
    ("vvtt", "visual"),
    ("ttmm", "text"),
    ("uuv", "unknown"),
    ("vum", "visual"),
]
OF_KIND = {
    "v": ([9.0, 9.0], []),
    "t": ([], [9.0, 9.0]),
    "m": ([9.0, 9.0], [9.0, 9.0]),
    "u": ([9.0], []),
}


@pytest.mark.parametrize(("kinds", "winner"), TIES)
def test_ties_go_to_visual_then_text_then_multimodal(tmp_path, kinds, winner):
    found = classified(tmp_path / "a", [{i: OF_KIND[kind] for i, kind in enumerate(kinds)}])
    assert found.of(NeuronId(MADE, 0)) == winner
    counts = sorted((kinds.count(kind) for kind in "vtmu"), reverse=True)
    assert found.sites[MADE].is_tie[0] == (counts[0] == counts[1])
    margin = (counts[0] - counts[1]) / len(kinds)
    assert found.sites[MADE].margin[0] == pytest.approx(margin, abs=1e-12)


# Against a slow reference.

LEVELS = st.integers(-8, 80).map(lambda k: k / 8)
SEEN = st.dictionaries(
    st.integers(0, 6),
    st.tuples(st.lists(LEVELS, max_size=5), st.lists(LEVELS, max_size=4)),
    max_size=6,
)


def counted(values, threshold, scale, quantise, maximum) -> int:
    """How many tokens exceed the threshold, one by one."""
    above = 0
    for value in values:
        level = value
        if scale != "raw":
            level = max(0.0, value)
            full = 10 if scale == "ten" else 1
            level = full * level / maximum if maximum > 0 else 0.0
            if scale == "ten" and quantise == "floor":
                level = math.floor(level)
            elif scale == "ten" and quantise == "round":
                level = round(level)
        above += level > threshold
    return above


def by_loops(seen, reading: NeuronClassifier, n: int) -> tuple[list[int], bool]:
    """How many top samples are of each kind, and whether the neuron is silent."""
    every = [v for both in seen.values() for side in both for v in side]
    joint = max(every, default=-math.inf)
    own = [
        max((v for both in seen.values() for v in both[side]), default=-math.inf) for side in (0, 1)
    ]
    ranked = sorted((-max([*v, *t]), p) for p, (v, t) in seen.items() if [*v, *t])
    counts = [0, 0, 0, 0]
    for _, position in ranked[: min(n, reading.top or n)]:
        visual, text = (
            counted(
                values,
                threshold,
                reading.scale,
                reading.quantise,
                own[side] if reading.maximum == "role" else joint,
            )
            > needed
            for side, (values, threshold, needed) in enumerate(
                zip(
                    seen[position],
                    (reading.t_v, reading.t_t),
                    (reading.n_v, reading.n_t),
                    strict=True,
                )
            )
        )
        counts[2 if visual and text else 0 if visual else 1 if text else 3] += 1
    return counts, joint <= 0 or not ranked


READINGS_DRAWN = st.builds(
    NeuronClassifier,
    t_v=st.sampled_from([0, 0.2, 0.5, 1, 2, 3, 9]),
    n_v=st.integers(0, 3),
    t_t=st.sampled_from([0, 0.3, 1, 3, 4.5]),
    n_t=st.integers(0, 2),
    scale=st.sampled_from(["ten", "normalized", "raw"]),
    quantise=st.sampled_from(["floor", "round", None]),
    maximum=st.sampled_from(["joint", "role"]),
    top=st.sampled_from([None, 1, 2, 4]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=100)
@given(neurons=st.lists(SEEN, min_size=1, max_size=4), reading=READINGS_DRAWN)
def test_a_classification_is_what_counting_token_by_token_gives(dtype, neurons, reading):
    with tempfile.TemporaryDirectory() as folder:
        kinds = classified(
            Path(folder) / "a", neurons, reading, n=4, keep_visual=4, keep_text=3, dtype=dtype
        )
    site = kinds.sites[MADE]
    for row, seen in enumerate(neurons):
        counts, silent = by_loops(seen, reading, 4)
        assert site.silent[row] == silent
        eligible = sum(bool([*visual, *text]) for visual, text in seen.values())
        assert site.samples[row] == min(eligible, reading.top or 4)
        if silent:
            counts = [0, 0, 0, 1]
        expected = [count / sum(counts) for count in counts]
        assert site.probability[row].tolist() == expected
        assert site.category[row] == counts.index(max(counts))
        first, second = sorted(counts, reverse=True)[:2]
        assert site.is_tie[row] == (first == second)
        assert site.margin[row] == pytest.approx((first - second) / sum(counts), abs=1e-12)


# What the scan did not keep, and what makes no sense.


@pytest.mark.parametrize(
    "reading", [{"n_v": 7}, {"n_t": 3}, {"top": 21}], ids=["keep_visual", "keep_text", "n"]
)
def test_the_rescan_that_an_error_advises_makes_it_work(vlm, atlas, scenes, tmp_path, reading):
    classifier = NeuronClassifier(**reading)
    with pytest.raises(RescanError, match="but the scan kept") as error:
        classifier.classify(atlas)
    ((name, value),) = re.findall(r"scan\(\.\.\., (\w+)=(\d+)\)", str(error.value))
    advised = {"n": atlas.choices.n, name: int(value)}
    again = nl.scan(vlm, scenes[:3], out=tmp_path / "a", sites="vision.0", **advised)
    assert classifier.classify(again).sites.keys() == {"vision.0"}


@pytest.mark.parametrize(
    "reading",
    [
        {"scale": "hundred"},
        {"quantise": "ceil"},
        {"maximum": "both"},
        {"n_v": -1},
        {"n_t": -1},
        {"top": 0},
        {"top": -1},
    ],
    ids=str,
)
def test_readings_that_make_no_sense_are_refused(reading):
    with pytest.raises(ValueError, match=str(next(iter(reading.values())))):
        NeuronClassifier(**reading)


def test_a_raw_threshold_below_zero_is_compared_with_values_as_they_are(tmp_path):
    # Two tokens above -0.5 in the first sample; one in the second, which has no third token.
    neuron = {0: ([4.0, -0.25, -1.0], []), 1: ([3.0, -1.0], []), 2: ([2.0], [])}
    reading = NeuronClassifier(n_v=1, t_v=-0.5, n_t=0, scale="raw")
    kinds = classified(tmp_path / "a", [neuron], reading)
    assert shares(kinds) == (1 / 3, 0, 0, 2 / 3)


# What a classification answers.


@pytest.fixture(scope="module")
def kinds(atlas) -> nl.Classification:
    return NeuronClassifier(n_t=1).classify(atlas)


def test_probabilities_are_shares(kinds):
    for site in kinds.sites.values():
        assert np.isfinite(site.probability).all()
        assert (site.probability >= 0).all()
        np.testing.assert_allclose(site.probability.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("module", ["language", "vision", "projector", None])
@pytest.mark.parametrize("bins", [1, 7, 20])
def test_every_neuron_is_once_in_each_histogram(kinds, module, bins):
    counts, edges = kinds.histograms(module, bins)
    neurons = sum(site.width for site in kinds.described.values() if module in (None, site.module))
    assert len(edges) == bins + 1
    for category in CATEGORIES:
        assert len(counts[category]) == bins
        assert counts[category].sum() == neurons


def test_a_probability_on_an_edge_lies_in_the_bin_above(tmp_path):
    visual, other = ([9.0, 9.0], []), ([9.0], [])
    neurons = [{i: visual if i < hits else other for i in range(10)} for hits in range(11)]
    counts, _ = classified(tmp_path / "a", neurons, n=10).histograms(bins=10)
    # p = 0, 0.1, ..., 0.9 each in its own bin; 1.0 with 0.9 in the last.
    assert counts["visual"].tolist() == [1] * 9 + [2]


def test_shares_and_tables_agree(kinds):
    table = kinds.table()
    assert len(table) == sum(site.width for site in kinds.described.values())
    language = table[table["site"].str.startswith("language")]
    for category, share in kinds.shares().items():
        assert share == pytest.approx((language["category"] == category).mean())
        assert kinds.above(0.8)[category] == pytest.approx((language[category] > 0.8).mean())
    row = table.iloc[900]
    neuron = NeuronId(row["site"], int(row["index"]))
    assert kinds.of(neuron) == row["category"]
    assert kinds.probability(neuron) == {c: row[c] for c in CATEGORIES}
    assert sum(kinds.shares(None).values()) == pytest.approx(1)


def test_above_is_strict(tmp_path):
    visual, other = ([9.0, 9.0], []), ([9.0], [])
    neurons = [{i: visual if i < hits else other for i in range(5)} for hits in (3, 4, 5)]
    found = classified(tmp_path / "a", neurons, n=5)
    assert found.above(0.8)["visual"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("share", [0.001, 0.03, 0.3, 1.0])
def test_neurons_per_layer_add_up_to_the_share_asked_for(kinds, share):
    for module, layers in (("language", 4), ("vision", 3)):
        neurons = sum(s.width for s in kinds.described.values() if s.module == module)
        for totals in kinds.layers(share, module).values():
            assert len(totals) == layers
            assert sum(totals.values()) == pytest.approx(share * neurons)


def tied(folder, order, sites=("language.0", "language.1")) -> nl.Classification:
    """Each site has one neuron with p_v = 1, three with 0.5, and two with 0."""
    sure, half, none = (
        {0: ([9.0, 9.0], []), 1: (second, [])} for second in ([9.0, 9.0], [9.0], [9.0])
    )
    none = {0: ([9.0], []), 1: ([9.0], [])}
    rows = [sure, half, half, half, none, none]
    return classified(folder, None, sites={name: [rows[i] for i in order] for name in sites})


def test_neurons_that_tie_at_the_cut_are_weighted_fractionally(tmp_path):
    # Of 12 neurons 5 are wanted: both sure ones, and half of each of the six that tie.
    found = tied(tmp_path / "a", range(6)).layers(5 / 12)["visual"]
    assert found == {0: pytest.approx(2.5), 1: pytest.approx(2.5)}


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(6)), share=st.floats(0.01, 1))
def test_neurons_per_layer_do_not_depend_on_the_order_of_neurons_or_sites(order, share):
    with tempfile.TemporaryDirectory() as folder:
        one = tied(Path(folder) / "a", range(6)).layers(share)
        other = tied(Path(folder) / "b", order, ("language.1", "language.0")).layers(share)
    for category in CATEGORIES:
        assert other[category] == pytest.approx(one[category])


@settings(max_examples=100)
@given(
    values=st.lists(st.integers(0, 5).map(lambda k: k / 5), min_size=1, max_size=20),
    count=st.floats(0, 25),
)
def test_weights_add_up_and_never_prefer_a_smaller_value(values, count):
    weights = top_weights(np.array(values), count)
    assert weights.sum() == pytest.approx(min(count, len(values)))
    assert ((weights >= 0) & (weights <= 1)).all()
    for value, weight in zip(values, weights, strict=True):
        for other, its in zip(values, weights, strict=True):
            assert weight == its if value == other else (value < other or its == 0 or weight == 1)


def test_selected_neurons_are_of_the_category_and_sure_enough(kinds):
    found = kinds.select("text", p=0.9)
    assert found
    assert all(kinds.of(n) == "text" and kinds.probability(n)["text"] >= 0.9 for n in found)
    assert found == sorted(found, key=lambda n: (n.site, n.index))
    assert set(found) <= set(kinds.select("text"))
    everything = [n for category in CATEGORIES for n in kinds.select(category, module=None)]
    assert len(everything) == len(set(everything)) == len(kinds.table())


def test_a_probability_at_the_bar_is_selected(tmp_path):
    visual, other = ([9.0, 9.0], []), ([9.0], [])
    found = classified(tmp_path / "a", [{i: visual if i < 4 else other for i in range(5)}], n=5)
    assert found.select("visual", p=0.8) == [NeuronId(MADE, 0)]
    assert found.select("visual", p=0.81) == []


def test_a_draw_is_repeated_by_its_seed_and_changed_by_another(kinds):
    whole = kinds.select("text")
    drawn = kinds.select("text", n=20, seed=3)
    assert kinds.select("text", n=20, seed=3) == drawn
    assert kinds.select("text", n=20, seed=4) != drawn
    assert len(set(drawn)) == 20
    assert [n for n in whole if n in set(drawn)] == drawn
    assert kinds.select("text", n=len(whole) + 1) == whole


def test_names_that_do_not_exist_are_refused_with_those_that_do(kinds):
    with pytest.raises(UnknownNameError, match=r"No category 'visula'.*visual"):
        kinds.select("visula")
    with pytest.raises(UnknownNameError, match=r"No module in this classification 'qformer'"):
        kinds.shares("qformer")
    with pytest.raises(UnknownNameError, match=r"No site in this classification 'language.8'"):
        kinds.of(NeuronId("language.8", 0))
    with pytest.raises(UnknownNameError, match=r"neuron in language.0 '400'"):
        kinds.of(NeuronId("language.0", 400))


def test_a_classification_carries_all_its_readings(kinds, atlas):
    assert kinds.readings["n_t"] == 1
    assert kinds.readings["quantise"] == "floor"
    assert kinds.readings["n"] == atlas.choices.n
    assert kinds.readings["text_roles"] == [3]
    assert kinds.model == atlas.manifest.model.fingerprint


def test_a_classification_shows_shares_and_silent_neurons(kinds):
    shown = kinds._repr_html_()
    for word in ("language", "1,536", "silent", "n_t=1"):
        assert word in shown


def test_a_threshold_below_the_scales_start_is_refused():
    for reading in ({"t_v": -1}, {"t_t": -0.5, "scale": "normalized"}):
        with pytest.raises(ValueError, match="scale='raw'"):
            nl.NeuronClassifier(**reading)
    nl.NeuronClassifier(t_v=-1, scale="raw")

"""What is called a neuron, and how it is counted."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuronlens.errors import NeuronLensError, UnknownNameError
from neuronlens.neurons import NeuronId, NeuronSite

site_names = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=12)
numbers = st.integers(0, 10**6)


@settings(deadline=None)
@given(site_names, numbers, st.none() | numbers)
@example("language.0", 0, 0)
def test_a_written_neuron_is_read_back_as_itself(site, index, expert):
    neuron = NeuronId(site, index, expert)
    assert NeuronId.parse(str(neuron)) == neuron


@pytest.mark.parametrize(
    "text",
    ["", "language.16", "language.16/", "language.16/x", "a/3/4", "a/ex/4", "a/e1/", "a/e1/2/3"],
)
def test_text_that_names_no_neuron_is_refused_with_the_form_it_should_have(text):
    with pytest.raises(ValueError, match=r"names no neuron.*'language.16/4347'") as raised:
        NeuronId.parse(text)
    assert repr(text) in str(raised.value)


def test_the_neuron_that_the_refusal_gives_as_an_example_can_be_read():
    assert NeuronId.parse("language.16/4347") == NeuronId("language.16", 4347)


def test_neurons_sort_by_site_then_index_and_serve_as_keys():
    three = [NeuronId("vision.0", 2), NeuronId("language.1", 10), NeuronId("language.1", 9)]
    assert sorted(three) == [three[2], three[1], three[0]]
    assert {NeuronId("vision.0", 2): "same"}[three[0]] == "same"


def site(width: int = 4, experts: int = 0, **more) -> NeuronSite:
    return NeuronSite(
        name="language.2",
        module="language",
        layer=2,
        width=width,
        path="model.layers.2.mlp.act_fn",
        stream="language",
        experts=experts,
        **more,
    )


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 5))
def test_rows_number_a_sites_neurons_from_0_without_a_gap_expert_by_expert(width, experts):
    here = site(width, experts)
    each = [
        here.neuron(index, expert)
        for expert in (range(experts) if experts else [None])
        for index in range(width)
    ]
    assert [here.row(neuron) for neuron in each] == list(range(here.neurons))


@pytest.mark.parametrize("index", [-1, 4, 4347])
def test_a_site_has_no_neuron_beyond_its_width(index):
    with pytest.raises(UnknownNameError, match=rf"neuron in language\.2 '{index}'.*0 to 3"):
        site().neuron(index)


@pytest.mark.parametrize(
    ("experts", "expert", "known"),
    [(0, 0, "a dense block"), (3, None, "0 to 2"), (3, 3, "0 to 2"), (3, -1, "0 to 2")],
)
def test_an_expert_is_named_exactly_where_the_block_has_that_expert(experts, expert, known):
    with pytest.raises(UnknownNameError, match=rf"expert in language\.2 '{expert}'.*{known}"):
        site(experts=experts).neuron(0, expert)


def test_the_row_of_a_neuron_the_site_does_not_have_is_refused():
    with pytest.raises(UnknownNameError):
        site(width=4).row(NeuronId("language.2", 4))


def test_only_a_site_with_the_flag_is_inert():
    assert site(flags=frozenset({"inert"})).inert
    assert not site().inert
    assert not site(flags=frozenset({"conditional"})).inert


def test_an_unknown_name_is_a_lookup_error_that_lists_near_names_or_the_first_twelve():
    few = UnknownNameError("site", "langage.1", ["language.1", "vision.1"])
    assert str(few) == "No site 'langage.1'. Known: language.1, vision.1."
    near = UnknownNameError("site", "langage.1", ["language.1", *"abcde"])
    assert isinstance(near, LookupError)
    assert isinstance(near, NeuronLensError)
    assert str(near) == "No site 'langage.1'. Closest: language.1."
    far = UnknownNameError("site", "zzz", [f"a.{n}" for n in range(13)], "Look again.")
    assert "Known: a.0, a.1, " in str(far)
    assert "a.11, ..." in str(far)
    assert "a.12" not in str(far)
    assert str(far).endswith("Look again.")
    assert "(none)" in str(UnknownNameError("site", "zzz", []))

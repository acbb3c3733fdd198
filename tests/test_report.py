"""The page: self-contained, complete, escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import neuronlens as nl
from neuronlens import testbed
from neuronlens.errors import AtlasError, MissingExtraError, OutputError
from neuronlens.report import figures


@pytest.fixture(scope="module")
def hostile(scenes):
    """Scenes of which the ids and captions carry markup and braces."""
    markup = "<script>alert(1)</script> {{ x }}"
    return [
        replace(s, id=f"<b>{i}</b>", response=f"{markup} {s.response}")
        for i, s in enumerate(scenes)
    ]


@pytest.fixture(scope="module")
def made(vlm, hostile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    atlas = nl.scan(vlm, hostile, out=folder / "atlas", n=20, batch_size=6)
    kinds = nl.NeuronClassifier(**testbed.READINGS).classify(atlas)
    some = [n for c in ("visual", "text", "multimodal") for n in kinds.select(c, n=4)]
    study = nl.explain_neurons(vlm, atlas, some, kinds=kinds, samples=hostile)
    page = nl.report(
        atlas, study, kinds=kinds, out=folder, samples=hostile, cards=2, scenes=1,
        controls={"the <same>": nl.Control(kinds, study), "kinds only": nl.Control(kinds)},
    )  # fmt: skip
    return atlas, kinds, study, page


class Links(HTMLParser):
    """Everything a page would fetch, and its scripts."""

    def __init__(self):
        super().__init__()
        self.fetched, self.scripts, self.images = [], 0, 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.images += tag == "img"
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not value.startswith(("data:", "#"))
        ]


def test_the_page_fetches_nothing_and_runs_no_script(made):
    links = Links()
    links.feed(made[3].read_text(encoding="utf-8"))
    assert links.images > 6
    assert (links.fetched, links.scripts) == ([], 0)
    assert not re.search(r"url\((?!#)", made[3].read_text(encoding="utf-8"))
    assert "@import" not in made[3].read_text(encoding="utf-8")


def test_text_of_the_data_is_shown_escaped(made):
    page = made[3].read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page
    assert "the &lt;same&gt;" in page
    assert "<b>0</b>" not in page


def test_every_number_of_a_card_is_the_records(made):
    _, _, study, page = made
    text = page.read_text(encoding="utf-8")
    card = r"<code>(.*?)</code>.*?score <b>(.*?)</b> beside a null of <b>(.*?)</b>"
    shown = re.findall(card, text, re.DOTALL)
    assert len(shown) >= 3
    for neuron, score, null in shown:
        record = study[nl.NeuronId.parse(neuron)]
        assert score == f"{record.score.value:.2f}"
        assert null == (f"{record.null_mean:.2f}" if record.null else "&ndash;")


def test_the_best_scored_neurons_come_first(made):
    _, _, study, page = made
    shown = re.findall(r"<code>(.*?)</code>", page.read_text(encoding="utf-8"))
    for category in ("visual", "text", "multimodal"):
        mine = [r for r in study.values() if r.category == category and r.score is not None]
        mine.sort(key=lambda r: -r.score.value)
        assert [s for s in shown if study[nl.NeuronId.parse(s)].category == category] == [
            r.neuron for r in mine[:2]
        ]


def test_every_id_a_figure_refers_to_is_defined_once(made):
    page = made[3].read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert len(used) > 3
    assert {each: ids.count(each) for each in used} == dict.fromkeys(used, 1)


def test_products_of_different_models_are_refused(made, untrained_vlm, scenes, tmp_path):
    _, kinds, study, _ = made
    other = nl.scan(untrained_vlm, scenes, sites="projector", out=tmp_path / "atlas")
    with pytest.raises(AtlasError, match="different models"):
        nl.report(other, study, kinds=kinds, out=tmp_path / "page")


def test_an_unwritable_folder_is_refused(made, hostile, tmp_path):
    atlas, kinds, study, _ = made
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        nl.report(atlas, study, kinds=kinds, samples=hostile, out=tmp_path / "file" / "page")


def test_without_matplotlib_the_error_names_the_extra(made, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"'\.\[report\]'"):
        figures.shares({"this model": made[1]})

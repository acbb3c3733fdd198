"""The worked examples that precede a question to a chat model: are they true?"""

from __future__ import annotations

import io
import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import neuronlens as nl
from neuronlens import testbed
from neuronlens.errors import DataError, UnknownNameError
from neuronlens.explanation import Explanation
from neuronlens.simulate import MaskSimulator, SimulationJob, WordSimulator
from neuronlens.testbed import worked
from neuronlens.testbed.world import draw
from neuronlens.tokens import Role
from neuronlens.worked import KINDS, WORKED_VERSION, read_worked, worked_examples

pytestmark = pytest.mark.xdist_group("testbed")

FRESH = 60
FRESH_SEED = 98

ALL = [each for kind in KINDS for each in worked_examples(kind)]
SHOWN = [(each, exemplar) for each in ALL for exemplar in each.exemplars]


def opened(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"), float)


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads((files("neuronlens.worked") / "data" / "worked.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def found():
    return worked.record()


@pytest.fixture(scope="module")
def fresh():
    """True activations of every worked neuron on scenes that were not shown, with token maps."""
    bed = testbed.load(planted=True)
    vlm = nl.adapt(bed.model, bed.processor)
    samples = testbed.scenes(FRESH, seed=FRESH_SEED)
    sites = sorted({each.neuron.site for each in ALL})
    batch = nl.encode(vlm, samples)
    with nl.ActivationRecorder(vlm, sites) as recorder, torch.inference_mode():
        vlm.forward(batch.inputs)
    true, maps = {}, {}
    for each in ALL:
        stream = vlm.site(each.neuron.site).stream
        column = recorder.activations[each.neuron.site][..., each.neuron.index].flatten()
        for row in range(FRESH):
            at = batch.tokens[stream].where(row)
            true[each.neuron, row] = column[at].numpy()
            maps[each.neuron, row] = batch.map_of(row, stream)
    return samples, true, maps


# What the loader gives.


@pytest.mark.parametrize("kind", KINDS)
def test_eight_different_neurons_of_each_kind_with_two_exemplars(kind):
    examples = worked_examples(kind)
    assert len({each.neuron for each in examples}) == 8
    assert {each.kind for each in examples} == {kind}
    assert all(len(each.exemplars) == 2 for each in examples)
    assert worked_examples(kind) is examples


@pytest.mark.parametrize(("kind", "shows", "reads"), [
    ("visual", True, False), ("text", False, True), ("multimodal", True, True),
])  # fmt: skip
def test_a_kind_shows_and_answers_for_its_own_modalities_only(kind, shows, reads):
    for each in worked_examples(kind):
        assert bool(each.phrases) == shows
        assert bool(each.words) == reads
        assert reads or not each.predicts
        for exemplar in each.exemplars:
            assert (exemplar.raw is not None) == (exemplar.modulated is not None) == shows
            assert bool(exemplar.tokens) == reads


def test_text_is_answered_for_both_on_the_word_and_before_it():
    for kind in ("text", "multimodal"):
        before = sum(each.predicts for each in worked_examples(kind))
        assert 2 <= before <= 6


def test_confidence_is_neither_always_high_nor_always_the_same():
    confidence = [each.confidence for each in ALL]
    assert all(0.4 <= value <= 0.95 for value in confidence)
    for kind in KINDS:
        assert min(each.confidence for each in worked_examples(kind)) < 0.7
        assert max(each.confidence for each in worked_examples(kind)) >= 0.9


def test_answers_are_fragments_and_no_word_lists():
    assert len({each.sentence for each in ALL}) == len(ALL)
    for each in ALL:
        assert each.sentence[0].islower()
        assert each.sentence[-1] not in " .,;:"
        assert not set(each.sentence) & set("\"'“”`[]\n") - {"'"}
        assert 3 <= len(each.sentence.split()) <= 22
        assert sum(word in each.sentence.split() for word in each.words) <= 2
        for said in (*each.phrases, *each.words):
            assert said == said.lower().strip()
        assert not any("." in phrase for phrase in each.phrases)
        assert len(each.phrases) <= 3
        assert len(each.words) <= 5


@pytest.mark.parametrize(("each", "exemplar"), SHOWN, ids=[str(e.neuron) for e, _ in SHOWN])
def test_pictures_are_jpeg_and_levels_are_integers(each, exemplar):
    for data in (exemplar.raw, exemplar.modulated):
        if each.kind != "text":
            image = opened(data)
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))
    if each.kind != "visual":
        levels = [level for _, level in exemplar.tokens]
        assert all(type(level) is int and 0 <= level <= 10 for level in levels)
        assert min(levels) == 0  # tokens at which it is silent are there as well
        assert max(levels) >= 5


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(UnknownNameError, match=r"'unknown'\. Known: visual, text, multimodal"):
        worked_examples("unknown")


# What ships.


def test_the_package_holds_what_the_list_names_and_nothing_else(stored):
    named = {
        exemplar[picture]
        for neuron in stored["neurons"]
        for exemplar in neuron["exemplars"]
        for picture in ("raw", "modulated")
    }
    here = {each.name: each for each in (files("neuronlens.worked") / "data").iterdir()}
    assert set(here) == (named - {None}) | {"worked.json"}
    assert sum(len(each.read_bytes()) for each in here.values()) < 400_000
    assert stored["version"] == WORKED_VERSION


def test_the_generator_writes_what_ships(found, tmp_path):
    worked.write(tmp_path, found)
    with as_file(files("neuronlens.worked") / "data") as data:
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in data.iterdir())
        assert (tmp_path / "worked.json").read_bytes() == (data / "worked.json").read_bytes()
        for path in tmp_path.glob("*.jpg"):
            # Bytes are the same with one version of the encoder; pixels with any.
            again, ships = pixels(path.read_bytes()), pixels((data / path.name).read_bytes())
            assert np.abs(again - ships).mean() < 0.5, path.name


def test_scenes_are_top_samples_and_those_of_one_neuron_differ(stored, found):
    for neuron in stored["neurons"]:
        one, other = neuron["exemplars"]
        assert one["scene"] != other["scene"]
        assert one["rank"] < other["rank"] <= 17
        assert [each.rank for each in found[neuron["neuron"]]] == [one["rank"], other["rank"]]
        for each in neuron["exemplars"]:
            assert each["scene"].startswith(f"scene-{stored['scenes_seed']}-")


def test_pictures_and_levels_follow_from_the_activations_on_the_scene(stored, found):
    for neuron in stored["neurons"]:
        (example,) = (each for each in ALL if str(each.neuron) == neuron["neuron"])
        for where, shown, exemplar in zip(
            neuron["exemplars"], example.exemplars, found[neuron["neuron"]], strict=True
        ):
            scene = draw(worked.SCENE_SEED, int(where["scene"].split("-")[-1]))
            share = np.clip(exemplar.activation / exemplar.maximum, 0, 1)
            if shown.tokens:
                text = share[exemplar.tokens.is_role(Role.RESPONSE).numpy()] * 10
                pieces, level = zip(*shown.tokens, strict=True)
                assert "".join(pieces).split() == scene.caption.split()
                assert len(level) == len(text)
                above = text - np.array(level)
                assert ((above > -1e-4) & (above < 1)).all()
                # Another machine, which rounds differently, is to find the same levels.
                between = text[(text > 0.5) & (text < 9.999)]
                assert np.abs(between - np.rint(between)).min(initial=1) > 1e-3
            if shown.raw is not None:
                large = scene.image.repeat(4, 0).repeat(4, 1).astype(float)
                clear = share[exemplar.tokens.is_role(Role.VISUAL).numpy()].reshape(8, 8)
                covered = large * clear.repeat(32, 0).repeat(32, 1)[..., None]
                assert np.abs(pixels(shown.raw) - large).mean() < 5
                assert np.abs(pixels(shown.modulated) - covered).mean() < 3
                dark = clear.repeat(32, 0).repeat(32, 1) == 0
                bright = clear.repeat(32, 0).repeat(32, 1) > 0.8
                assert dark.any()
                # Under an opaque cover nothing may show, apart from what a JPEG smears.
                assert pixels(shown.modulated)[dark].mean() < 4
                if bright.any():
                    assert pixels(shown.modulated)[bright].mean() > 60


# Whether the answers are true.


def r(pairs) -> float:
    true, said = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return 0.0 if np.ptp(said) == 0 else float(np.corrcoef(true, said)[0, 1])


def score(fresh, neuron, answer) -> float:
    """How well an answer predicts a neuron on the fresh scenes, by the study's simulators."""
    samples, true, maps = fresh
    said = Explanation(
        sentence=answer.sentence,
        phrases=answer.phrases,
        words=answer.words,
        predicts=answer.predicts,
    )
    jobs = [SimulationJob(said, s, maps[neuron, row]) for row, s in enumerate(samples)]
    sides = []
    for simulator, role, counts in (
        (MaskSimulator(nl.AnnotationSegmenter()), Role.VISUAL, answer.phrases),
        (WordSimulator(), Role.RESPONSE, answer.words),
    ):
        if counts:
            pairs = []
            for row, simulated in enumerate(simulator.simulate(jobs)):
                at = maps[neuron, row].is_role(role).numpy()
                pairs.append((true[neuron, row][at], simulated.values[at]))
            sides.append(r(pairs))
    return float(np.mean(sides))


@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_predicts_its_neuron_on_other_scenes_far_better_than_any_other(fresh, kind):
    examples = worked_examples(kind)
    own = [score(fresh, each.neuron, each) for each in examples]
    for each, value in zip(examples, own, strict=True):
        others = [score(fresh, each.neuron, o) for o in examples if o is not each]
        assert value > 0.55, each.neuron
        assert value > np.mean(others) + 0.45, each.neuron
        assert value > max(others) + 0.15, each.neuron
    assert np.mean(own) > 0.75


def test_words_are_said_on_the_right_side(fresh):
    """On the word or before it: the other place fits worse."""
    samples, true, maps = fresh
    for each in ALL:
        if each.words:
            fits = {}
            for shift in (0, -1):
                pairs = []
                for row in range(len(samples)):
                    tokens = maps[each.neuron, row]
                    at = tokens.is_role(Role.RESPONSE).numpy()
                    said = tokens.words(each.words, shift).numpy()
                    pairs.append((true[each.neuron, row][at], said[at]))
                fits[shift] = r(pairs)
            assert fits[-1 if each.predicts else 0] > fits[0 if each.predicts else -1] + 0.2


# Damaged files.


@pytest.fixture
def copied(tmp_path) -> Path:
    with as_file(files("neuronlens.worked") / "data") as data:
        return Path(shutil.copytree(data, tmp_path / "data"))


def test_a_copy_is_read_like_what_ships(copied):
    assert read_worked(copied) == {kind: worked_examples(kind) for kind in KINDS}


def edited(folder: Path, change) -> None:
    path = folder / "worked.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def a_picture(folder: Path) -> Path:
    return sorted(folder.glob("*.jpg"))[0]


DAMAGES = {
    "no list": (lambda f: (f / "worked.json").unlink(), r"worked\.json cannot be read"),
    "list cut short": (
        lambda f: (f / "worked.json").write_bytes((f / "worked.json").read_bytes()[:5000]),
        r"worked\.json is not as it was written",
    ),
    "no picture": (lambda f: a_picture(f).unlink(), r"\.jpg cannot be read"),
    "picture cut short": (
        lambda f: a_picture(f).write_bytes(a_picture(f).read_bytes()[:-300]),
        r"\.jpg is not a whole JPEG file",
    ),
    "another file as picture": (
        lambda f: a_picture(f).write_bytes(b"not a picture\xff\xd9"),
        r"\.jpg is not a whole JPEG file",
    ),
    "another version": (
        lambda f: edited(f, lambda c: c.update(version="0")),
        r"version '0', not '1'",
    ),
    "a neuron too few": (lambda f: edited(f, lambda c: c["neurons"].pop()), r"7 multimodal"),
    "a level of 11": (
        lambda f: edited(
            f, lambda c: c["neurons"][-1]["exemplars"][0]["tokens"][0].__setitem__(1, 11)
        ),
        r"neurons\.23\.exemplars\.0\.tokens\.0\.1: .*less than or equal to 10",
    ),
    "no neuron's name": (
        lambda f: edited(f, lambda c: c["neurons"][0].update(neuron="nobody")),
        r"'nobody' names no neuron",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_what_to_do(copied, damage):
    done, said = DAMAGES[damage]
    done(copied)
    with pytest.raises(DataError, match=said) as caught:
        read_worked(copied)
    assert "python -m neuronlens.testbed.worked" in str(caught.value)
    assert "Install neuronlens again" in str(caught.value)


def test_the_command_writes_a_folder_that_can_be_read(found, tmp_path, monkeypatch):
    monkeypatch.setattr(worked, "record", lambda: found)
    monkeypatch.setattr("sys.argv", ["worked", "--out", str(tmp_path / "deep" / "data")])
    worked.main()
    assert read_worked(tmp_path / "deep" / "data").keys() == set(KINDS)


def test_a_folder_that_cannot_be_written_is_an_error(found, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(nl.errors.OutputError, match="cannot be written"):
        worked.write(tmp_path / "file", found)

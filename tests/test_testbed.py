"""Facts of the shipped model, its world and its planted neurons."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import neuronlens as nl
from neuronlens import testbed
from neuronlens.testbed import train
from neuronlens.testbed.world import draw

pytestmark = pytest.mark.xdist_group("testbed")

SCENE_0 = "a7caefa0bfe86ef980a1308444a363f893473937a4963302ebd9044ab294ca7d"


def test_it_loads_like_any_model_and_is_small(bed):
    assert type(bed.model) is LlavaForConditionalGeneration
    assert isinstance(bed.processor, LlavaProcessor)
    assert bed.model.num_parameters() < 1.3e6
    assert (testbed.FOLDER / "model.safetensors").stat().st_size < 2.5e6


def test_a_scene_is_the_same_for_ever():
    """numpy does not promise its random stream; this notices a change."""
    scene = draw(0, 0)
    assert hashlib.sha256(scene.image.tobytes()).hexdigest() == SCENE_0
    assert scene.caption.split()[:3] == ["the", "image", "shows"]


def test_masks_are_exact_disjoint_and_named():
    for index in range(50):
        scene = draw(3, index)
        covered = np.sum([o.mask for o in scene.objects], axis=0)
        assert covered.max() == 1
        for number, item in enumerate(scene.objects, 1):
            np.testing.assert_array_equal(scene.labels == number, item.mask)
            assert scene.names[number] == (item.colour, item.shape, item.size)
            colour = np.median(scene.image[item.mask], axis=0)
            assert np.abs(colour - testbed.COLOURS[item.colour]).max() < 25


def test_held_out_scenes_are_captioned_right(bed):
    accuracy = train.held_out_accuracy(bed.model, bed.processor, 300)
    assert accuracy["objects"] >= 0.80
    assert accuracy["texture"] >= 0.95


def correlations(adapter, scenes):
    """[neuron, concept] Pearson r over patches, and over caption words (on or before the word)."""
    names = [*testbed.COLOURS, *testbed.SHAPES]
    seen, read, covers, on, before = [], [], [], [], []
    for start in range(0, len(scenes), 50):
        batch = nl.encode(adapter, scenes[start : start + 50])
        with nl.ActivationRecorder(adapter, "language") as recorder, torch.inference_mode():
            adapter.model(**batch.inputs)
        values = torch.cat(list(recorder.activations.values()), -1).numpy()
        for row, sample in enumerate(batch.samples):
            caption = sample.response.split()
            seen.append(values[row, 2:66])
            read.append(values[row, 71 : 71 + len(caption)])
            masks = [
                sum((a.mask() for a in sample.annotations if name in a.names), np.zeros((64, 64)))
                for name in names
            ]
            covers.append(np.stack([m.reshape(8, 8, 8, 8).mean((1, 3)).ravel() for m in masks], 1))
            spelled = np.array([[word == name for name in names] for word in caption], float)
            on.append(spelled)
            before.append(np.vstack([spelled[1:], np.zeros((1, len(names)))]))

    def r(values, predictions):
        x, y = np.concatenate(values), np.concatenate(predictions)
        x, y = (x - x.mean(0)) / (x.std(0) + 1e-9), (y - y.mean(0)) / y.std(0)
        return x.T @ y / len(x)

    return r(seen, covers), np.maximum(r(read, on), r(read, before))


def test_concepts_live_in_both_modalities_of_the_trained_model_only(vlm, untrained_vlm):
    scenes = testbed.scenes(200, seed=31)
    found = [
        int((np.minimum(*correlations(adapter, scenes)).max(1) >= 0.5).sum())
        for adapter in (vlm, untrained_vlm)
    ]
    assert found[0] >= 50
    assert found[1] == 0


def captions(model, processor, scenes):
    adapter = nl.adapt(model, processor)
    asked = [nl.Sample(s.id, s.images, s.prompt) for s in scenes]
    inputs = nl.encode(adapter, asked).inputs
    with torch.inference_mode():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    return out[:, inputs["input_ids"].shape[1] :]


def test_planting_changes_neither_logits_nor_captions(bed):
    planted = testbed.load(planted=True)
    scenes = testbed.scenes(50, seed=41)
    inputs = nl.encode(nl.adapt(bed.model, bed.processor), scenes).inputs
    with torch.inference_mode():
        before, after = bed.model(**inputs).logits, planted.model(**inputs).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        captions(planted.model, bed.processor, scenes),
        captions(bed.model, bed.processor, scenes),
        atol=0,
        rtol=0,
    )


def test_a_neuron_with_two_concepts_can_be_planted(bed):
    spec = testbed.Spec("visual", ("red", "blue"))
    model, planted = testbed.plant(bed.model, bed.processor, [spec], layer=1, seed=3)
    neuron = planted[[p.kind for p in planted].index("visual")].neuron
    assert neuron.site == "language.1"
    adapter = nl.adapt(model, bed.processor)
    row = [s.name for s in adapter.select("language")].index(neuron.site) * 385 + neuron.index
    visual, _ = correlations(adapter, testbed.scenes(100, seed=43))
    both = [list(testbed.COLOURS).index(c) for c in spec.concepts]
    assert sorted(visual[row].argsort()[-2:].tolist()) == sorted(both)
    assert visual[row][both].min() > 0.4


def test_an_unknown_concept_cannot_be_planted(bed):
    with pytest.raises(ValueError, match=r"No scene shows \['pink'\]"):
        testbed.plant(bed.model, bed.processor, [testbed.Spec("visual", ("pink",))])


def test_written_scenes_read_back_as_they_are(tmp_path):
    made = testbed.scenes(12, seed=6)
    read = nl.read_samples(testbed.write(tmp_path / "data", 12, seed=6))
    for a, b in zip(made, read, strict=True):
        assert (a.id, a.prompt, a.response, a.domain) == (b.id, b.prompt, b.response, b.domain)
        np.testing.assert_array_equal(np.array(a.images[0]), np.array(Image.open(b.images[0])))
        for x, y in zip(a.annotations, b.annotations, strict=True):
            assert x.names == y.names
            np.testing.assert_array_equal(x.mask(), y.mask())


def test_shuffled_annotations_are_all_of_other_samples():
    made = testbed.scenes(30, seed=6)
    wrong = testbed.shuffled(made, seed=1)
    assert [s.id for s in wrong] == [s.id for s in made]
    assert all(w.annotations is not m.annotations for w, m in zip(wrong, made, strict=True))
    assert sorted(map(id, (s.annotations for s in wrong))) == sorted(
        map(id, (s.annotations for s in made))
    )


def test_training_runs_from_nothing_and_writes_what_load_reads(tmp_path, capsys):
    accuracy = train.train(tmp_path, scenes=300, effort=0.005)
    assert set(accuracy) == {"objects", "texture", "whole_caption"}
    assert {p.name for p in testbed.FOLDER.iterdir()} == {p.name for p in tmp_path.iterdir()}
    assert "joint 0" in capsys.readouterr().out


def test_the_untrained_copy_is_the_same_every_time():
    a, b = testbed.untrained().state_dict(), testbed.untrained().state_dict()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=0, rtol=0)

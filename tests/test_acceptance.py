"""The pipeline examined on ground truth: an independent reference, controls, planted neurons."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import neuronlens as nl
from neuronlens import testbed
from neuronlens.scan import batch_plan

pytestmark = pytest.mark.xdist_group("acceptance")

N = 50
CLASSIFIER = nl.NeuronClassifier(**testbed.READINGS)


# An independent slow reference: activations from the weights, roles by hand. It repeats the
# model's arithmetic operation by operation, so that it is equal to the last bit.


def layer_norm(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def rms_norm(x, norm):
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def linear(x, module):
    return F.linear(x, module.weight, module.bias)


def attention(x, own, heads, turn=lambda x: x, mask=None, causal=False):
    q, k, v = (split(linear(x, p), heads) for p in (own.q_proj, own.k_proj, own.v_proj))
    seen = F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=mask, is_causal=causal)
    return seen.transpose(1, 2).flatten(-2)


def rotary(length, width, theta):
    """Rotary positions, in the split-halves layout."""
    frequency = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
    angle = torch.outer(torch.arange(length).float(), frequency)
    cos, sin = (torch.cat([f, f], -1) for f in (angle.cos(), angle.sin()))

    def turn(x):
        half = width // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    return turn


def reference_activations(model, pixels, ids, lengths):
    """act_fn outputs of every site, recomputed from the weights without calling a module."""
    found = {}
    tower = model.model.vision_tower
    heads = model.config.vision_config.num_attention_heads
    kernel = tower.embeddings.patch_embedding.weight
    patches = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    cls = tower.embeddings.class_embedding.expand(len(pixels), 1, -1)
    x = torch.cat([cls, patches], 1) + tower.embeddings.position_embedding.weight
    x = layer_norm(x, tower.pre_layrnorm)
    for number, layer in enumerate(tower.encoder.layers):
        own = layer.self_attn
        x = x + linear(attention(layer_norm(x, layer.layer_norm1), own, heads), own.out_proj)
        h = linear(layer_norm(x, layer.layer_norm2), layer.mlp.fc1)
        found[f"vision.{number}"] = act = h * torch.sigmoid(1.702 * h)
        x = x + linear(act, layer.mlp.fc2)
    projector = model.model.multi_modal_projector
    found["projector.0"] = act = F.gelu(linear(x[:, 1:], projector.linear_1))
    features = linear(act, projector.linear_2)

    language, config = model.model.language_model, model.config.text_config
    x = F.embedding(ids, language.embed_tokens.weight)
    x[ids == model.config.image_token_id] = features.flatten(0, 1)
    length, heads = ids.shape[1], config.num_attention_heads
    attended = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & attended[:, None, None, :]
    how = {"causal": True} if attended.all() else {"mask": mask}
    turn = rotary(length, config.hidden_size // heads, config.rope_parameters["rope_theta"])
    for number, layer in enumerate(language.layers):
        own, mlp = layer.self_attn, layer.mlp
        seen = attention(rms_norm(x, layer.input_layernorm), own, heads, turn, **how)
        x = x + linear(seen, own.o_proj)
        h = rms_norm(x, layer.post_attention_layernorm)
        found[f"language.{number}"] = act = F.silu(linear(h, mlp.gate_proj))
        x = x + linear(act * linear(h, mlp.up_proj), mlp.down_proj)
    return found


def reference_tables(model, processor, samples, plan):
    """Per site: [sample, neuron] the falling visual and response activations, by plain sorting.

    Roles are counted by hand: <bos> user: 64 patches, four words, assistant:, the caption.
    """
    words = processor.tokenizer.get_vocab()
    tables = {}
    for batch in plan:
        captions = [samples[p].response.split() for p in batch]
        longest = max(len(caption) for caption in captions)
        start = 2 + 64 + 4 + 1
        ids = torch.zeros(len(batch), start + longest, dtype=torch.long)
        images = [samples[p].images[0] for p in batch]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        for row, caption in enumerate(captions):
            text = [
                "<bos>",
                "user:",
                *["<image>"] * 64,
                "describe",
                "the",
                "image",
                ".",
                "assistant:",
            ]
            ids[row, : start + len(caption)] = torch.tensor([words[w] for w in [*text, *caption]])
        with torch.inference_mode():
            lengths = [start + len(caption) for caption in captions]
            found = reference_activations(model, pixels, ids, lengths)
        for row, (position, caption) in enumerate(zip(batch, captions, strict=True)):
            for site, act in found.items():
                first = {"vision": 1, "projector": 0, "language": 2}[site.split(".")[0]]
                visual = act[row, first : first + 64].sort(0, descending=True).values
                text = act[row, start : start + len(caption)].sort(0, descending=True).values
                text = text if site.startswith("language") else text[:0]
                tables[site, position] = visual.double().numpy(), text.double().numpy()
    return tables


def reference_categories(tables, sites, count, readings):
    """Shares of the four kinds among each neuron's top samples, in plain loops."""
    answer = {}
    for site in sites:
        visual = np.stack([tables[site, p][0][:5] for p in range(count)])
        text = np.full((count, 3, visual.shape[2]), -np.inf)
        for p in range(count):
            values = tables[site, p][1][:3]
            text[p, : len(values)] = values
        for neuron in range(visual.shape[2]):
            value = np.maximum(visual[:, 0, neuron], text[:, 0, neuron])
            maximum = value.max()
            top = sorted(range(count), key=lambda p: (-value[p], p))[:N]
            kinds = [0, 0, 0, 0]
            for p in top:
                levels = [
                    math.floor(10 * max(a, 0.0) / maximum) if maximum > 0 else 0
                    for a in (visual[p, 4, neuron], text[p, readings["n_t"], neuron])
                ]
                v, t = levels[0] > 2, levels[1] > 3
                kinds[0 if v and not t else 1 if t and not v else 2 if v else 3] += 1
            answer[site, neuron] = top, [k / len(top) for k in kinds]
    return answer


@pytest.mark.parametrize(
    ("batch_size", "window"), [(8, 64), (20, 20), (5, 200)], ids=["eight", "unordered", "global"]
)
def test_scan_and_classify_equal_a_slow_reference(bed, vlm, tmp_path, batch_size, window):
    samples = testbed.scenes(200, seed=11)
    atlas = nl.scan(vlm, samples, out=tmp_path / "atlas", n=N, batch_size=batch_size, window=window)
    kinds = CLASSIFIER.classify(atlas)
    plan = [[p for p, _ in batch] for batch in batch_plan(samples, batch_size, window)]
    tables = reference_tables(bed.model, bed.processor, samples, plan)
    expected = reference_categories(tables, vlm.sites, 200, testbed.READINGS)
    wrong_top = wrong_kind = 0
    for (site, index), (top, shares) in expected.items():
        neuron = nl.NeuronId(site, index)
        wrong_kind += list(kinds.probability(neuron).values()) != shares
        statistics = atlas.statistics(site) if index == 0 else statistics
        wrong_top += statistics.top.ids[index].tolist() != top
    assert (wrong_top, wrong_kind) == (0, 0)


# Controls: what the same pipeline finds where there is nothing to find.


def believed(adapter, atlas, samples, outside):
    """Multi-modal neurons scored r >= .5 on both modalities, named as they are outside the scan."""
    kinds = CLASSIFIER.classify(atlas)
    found = kinds.select("multimodal")
    study = nl.explain_neurons(adapter, atlas, found, kinds=kinds, samples=samples, null_draws=0)
    agreeing = study.agreeing(0.5)
    best = best_concepts(adapter, agreeing, outside)
    return [n for n in agreeing if study[n].explanation.phrases[0] == best[n]]


def best_concepts(adapter, neurons, outside):
    """For each neuron the concept with the largest mean of both correlations, without our maps."""
    if not neurons:
        return {}
    seen, read = [], []  # activations on patches and on caption words
    covers, spelled = [], {0: [], -1: []}
    for start in range(0, len(outside), 50):
        batch = nl.encode(adapter, outside[start : start + 50])
        with nl.ActivationRecorder(adapter, "language") as recorder, torch.inference_mode():
            adapter.model(**batch.inputs)
        for row, sample in enumerate(batch.samples):
            values = np.stack([recorder.activations[n.site][row, :, n.index] for n in neurons], 1)
            caption = sample.response.split()
            seen.append(values[2:66])
            read.append(values[71 : 71 + len(caption)])
            masks = [
                np.any(
                    [a.mask() for a in sample.annotations if c in a.names] or [np.zeros((64, 64))],
                    0,
                )
                for c in testbed.CONCEPTS
            ]
            covers.append(np.stack([m.reshape(8, 8, 8, 8).mean((1, 3)).ravel() for m in masks], 1))
            on = np.array([[word == c for c in testbed.CONCEPTS] for word in caption], float)
            spelled[0].append(on)
            spelled[-1].append(np.vstack([on[1:], np.zeros((1, len(testbed.CONCEPTS)))]))

    def correlate(values, predictions):
        x, y = np.concatenate(values), np.concatenate(predictions)
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean(0)) / y.std(0)
        return x.T @ y / len(x)

    text = np.maximum(correlate(read, spelled[0]), correlate(read, spelled[-1]))
    fit = (correlate(seen, covers) + text) / 2
    return {n: testbed.CONCEPTS[row.argmax()] for n, row in zip(neurons, fit, strict=True)}


@pytest.fixture(scope="module")
def scanned():
    return testbed.scenes(500, seed=21)


@pytest.fixture(scope="module")
def outside():
    return testbed.scenes(300, seed=22)


@pytest.fixture(scope="module")
def trained_atlas(vlm, scanned, tmp_path_factory):
    return nl.scan(vlm, scanned, sites="language", out=tmp_path_factory.mktemp("trained") / "atlas")


def test_at_least_15_multimodal_neurons_are_found_and_named_right(
    vlm, trained_atlas, scanned, outside
):
    assert len(believed(vlm, trained_atlas, scanned, outside)) >= 15


def test_at_most_one_is_found_in_untrained_weights(untrained_vlm, scanned, outside, tmp_path):
    atlas = nl.scan(untrained_vlm, scanned, sites="language", out=tmp_path / "atlas")
    assert (
        CLASSIFIER.classify(atlas).shares()["multimodal"] > 0.3
    )  # there is plenty to be fooled by
    assert len(believed(untrained_vlm, atlas, scanned, outside)) <= 1


def test_at_most_one_is_found_with_shuffled_annotations(vlm, trained_atlas, scanned, outside):
    wrong = testbed.shuffled(scanned, seed=0)
    assert len(believed(vlm, trained_atlas, wrong, outside)) <= 1


# Planted neurons: their truth is known.


FRESH = (
    *(testbed.Spec("text", (word,)) for word in ("red", "triangle", "green", "circle")),
    *(testbed.Spec("visual", (word,)) for word in ("blue", "purple", "square", "ring")),
    *(testbed.Spec("multimodal", (word,)) for word in ("yellow", "orange", "diamond", "triangle")),
)


def assert_all_found(adapter, planted, samples, out):
    atlas = nl.scan(adapter, samples, sites="language", out=out)
    kinds = CLASSIFIER.classify(atlas)
    functional = [each for each in planted if each.kind != "silent"]
    study = nl.explain_neurons(
        adapter,
        atlas,
        [each.neuron for each in functional],
        kinds=kinds,
        samples=samples,
        null_draws=0,
    )
    wrong = []
    for each in functional:
        said = study[each.neuron].explanation
        named = {*said.phrases, *said.words}
        if kinds.of(each.neuron) != each.kind or named != set(each.concepts) or said.predicts:
            wrong.append((each, kinds.of(each.neuron), said))
    assert not wrong
    for each in planted:
        if each.kind == "silent":
            assert kinds.probability(each.neuron)["unknown"] == 1


def test_the_shipped_planted_neurons_are_all_found(scanned, tmp_path):
    bed = testbed.load(planted=True)
    assert len({each.concepts for each in bed.planted if each.kind != "silent"}) == 12
    assert_all_found(nl.adapt(bed.model, bed.processor), bed.planted, scanned, tmp_path / "atlas")


def test_freshly_planted_neurons_are_all_found(bed, scanned, tmp_path):
    shipped = {(spec.kind, spec.concepts) for spec in testbed.SHIPPED}
    assert not shipped & {(spec.kind, spec.concepts) for spec in FRESH}
    model, planted = testbed.plant(bed.model, bed.processor, FRESH, seed=7)
    assert_all_found(nl.adapt(model, bed.processor), planted, scanned, tmp_path / "atlas")

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neuronlens as nl
from neuronlens import embeddings, testbed
from neuronlens.embeddings import image_embeddings, principal_components
from neuronlens.errors import AdapterError, SampleError
from neuronlens.samples import Batch, Sample
from zoo import entries

ZOO = entries()


# Of the testbed, beside transformers' own hidden states.


def hidden_states(bed, samples) -> np.ndarray:
    """Mean over patches of the last vision block's output, as the tower itself gives it."""
    pictures = [sample.open_images()[0] for sample in samples]
    pixels = bed.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tower = bed.model.model.vision_tower
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    return states[-1][:, 1:].mean(1).numpy()  # without the class token


def test_an_embedding_is_the_mean_of_the_last_blocks_patches(bed, vlm, scenes):
    found = image_embeddings(vlm, scenes[:5], batch_size=2)
    assert found.values == pytest.approx(hidden_states(bed, scenes[:5]), abs=1e-5)
    assert found.samples == tuple(sample.id for sample in scenes[:5])
    assert found.domains == tuple(sample.domain for sample in scenes[:5])
    assert found.images == (0,) * 5
    assert found.taken == "model.vision_tower.encoder.layers.2"
    assert found.model == vlm.fingerprint()
    assert (len(found), repr(found)) == (
        5,
        "ImageEmbeddings(5 images, 96 values each, of model.vision_tower.encoder.layers.2)",
    )


def test_every_image_of_a_sample_has_its_vector(vlm, scenes):
    first, second, third = (sample.images[0] for sample in scenes[:3])
    several = [Sample("two", (first, second), "look ."), Sample("one", (third,), "look .")]
    found = image_embeddings(vlm, several)
    assert list(zip(found.samples, found.images, strict=True)) == [
        ("two", 0),
        ("two", 1),
        ("one", 0),
    ]
    assert found.domains == ("", "", "")
    alone = image_embeddings(vlm, scenes[:3])
    assert found.values == pytest.approx(alone.values, abs=1e-5)


def test_no_hook_is_left_however_it_ends(vlm, scenes):
    hooks = vlm.model.get_submodule("model.vision_tower.encoder.layers.2")._forward_hooks
    before = dict(hooks)  # transformers has one of its own there
    image_embeddings(vlm, scenes[:1])
    assert dict(hooks) == before
    broken = Sample("broken", (b"no image",), "look .")
    with pytest.raises(SampleError, match="corrupt image"):
        image_embeddings(vlm, [scenes[0], broken])
    assert dict(hooks) == before


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"samples": []}, ValueError, "No samples"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(vlm, scenes, how, error, said):
    with pytest.raises(error, match=said):
        image_embeddings(vlm, how.get("samples", scenes[:1]), batch_size=how.get("batch_size", 8))


def test_textures_lie_apart_in_the_plane(vlm):
    scenes = testbed.scenes(60, seed=3)
    found = image_embeddings(vlm, scenes, batch_size=20)
    plane = principal_components(found)
    # Nearest other scene in the plane: mostly one of the same texture.
    distance = np.linalg.norm(plane.scores[:, None] - plane.scores, axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = np.array(found.domains)[distance.argmin(1)]
    assert (nearest == np.array(found.domains)).mean() > 0.6  # a quarter by chance


# Of other families: changing one sample's image moves its own vector alone.

FAMILIES = {
    # Block that is read, and number of the hidden state it is, where that is known.
    "llava": "model.vision_tower.encoder.layers.0",  # read one layer before the end
    "instructblip": "vision_model.encoder.layers.1",
    "qwen2_5_vl": "model.visual.blocks.1",  # patches of all images in one row, by windows
    "internvl": "model.vision_tower.encoder.layer.1",
    "llava_next": "model.vision_tower.encoder.layers.0",  # tiles
    "fast_vlm": "model.vision_tower.timm_model.stages.3.blocks.0",  # channels first
    "got_ocr2": "model.vision_tower.layers.1",  # rows and columns before channels
    "mllama": "model.vision_model.global_transformer.layers.1",
    "vision-encoder-decoder": "encoder.layers.1",
}


@contextmanager
def model_of(name):
    entry = ZOO[name]
    model = entry.model()
    yield entry, nl.adapt(model)


def vectors(adapter, entry, images):
    inputs = entry.inputs(adapter.model, images)
    batch = Batch(inputs, adapter.tokens(inputs), (), adapter)
    site, path = embeddings.last_block(adapter)
    rows = embeddings._block_output(adapter, batch, site, path)
    return path, list(embeddings._means(rows, batch.tokens[site.stream]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_depends_on_its_own_image_alone(name):
    if name not in ZOO:
        pytest.fail(f"this release of transformers has no {name}")
    with model_of(name) as (entry, adapter):
        images = entry.images()
        path, before = vectors(adapter, entry, images)
        assert path == FAMILIES[name]
        assert [each[:2] for each in before] == [(0, 0), (1, 0)]
        images[0][0] = 1 - images[0][0]
        _, after = vectors(adapter, entry, images)
        (own, other) = (
            (x[2] - y[2]).abs().max().item() for x, y in zip(before, after, strict=True)
        )
        assert own > 1e-3
        assert other < 1e-5


def test_a_vector_is_the_mean_of_what_the_block_gave(bed):
    # By the test's own hook, on patches in window order.
    with model_of("qwen2_5_vl") as (entry, adapter):
        images = entry.images()
        seen = []
        block = adapter.model.get_submodule("model.visual.blocks.1")
        handle = block.register_forward_hook(lambda _m, _a, out: seen.append(out))
        _, found = vectors(adapter, entry, images)
        handle.remove()
        inputs = entry.inputs(adapter.model, images)
        patches = inputs["image_grid_thw"].prod(1).tolist()
        for (_, _, mean), rows in zip(found, seen[0].split(patches), strict=True):
            assert mean.numpy() == pytest.approx(rows.mean(0).numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [("fuyu", "no vision encoder with feed-forward blocks"), ("gemma3n", "no row of blocks")],
)
def test_a_model_without_blocks_of_vision_is_refused(name, said):
    with model_of(name) as (_, adapter), pytest.raises(AdapterError, match=said):
        embeddings.last_block(adapter)


def test_an_output_that_does_not_fit_the_tokens_is_refused(vlm, scenes, monkeypatch):
    site, _ = embeddings.last_block(vlm)
    monkeypatch.setattr(embeddings, "last_block", lambda adapter: (site, "model.language_model"))
    with pytest.raises(AdapterError, match=r"model.language_model gave outputs of shape .* tokens"):
        image_embeddings(vlm, scenes[:1])


# Principal components.

TABLES = st.integers(3, 8).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(-9, 9), min_size=width, max_size=width), min_size=4, max_size=9
    )
)


@settings(deadline=None)
@given(TABLES)
def test_components_are_the_eigenvectors_of_the_covariance(table):
    values = np.array(table, float)
    if (values == values[0]).all():
        return
    n = min(len(values) - 1, values.shape[1])
    found = principal_components(values, n)
    eigenvalues = np.linalg.eigvalsh(np.cov(values.T))[::-1]
    assert found.explained == pytest.approx(eigenvalues[:n] / eigenvalues.sum(), abs=1e-9)
    assert found.directions @ found.directions.T == pytest.approx(np.eye(n), abs=1e-9)
    assert found.scores == pytest.approx((values - values.mean(0)) @ found.directions.T, abs=1e-8)
    strong = found.explained > 1e-9
    spread = found.scores[:, strong].var(0, ddof=1)
    assert spread == pytest.approx(eigenvalues[:n][strong], rel=1e-6)


def test_the_sign_does_not_depend_on_the_order_of_the_vectors():
    values = np.random.default_rng(0).normal(size=(9, 4)) * [5, 3, 2, 1]
    found = principal_components(values, 3)
    turned = principal_components(values[::-1], 3)
    assert turned.directions == pytest.approx(found.directions)
    assert turned.scores[::-1] == pytest.approx(found.scores)
    assert (np.abs(found.directions).max(1) == found.directions.max(1)).all()


def test_components_are_told_in_a_line():
    found = principal_components(np.diag([3.0, 2, 1])[:, :2], 2)
    one, two = found.explained
    assert repr(found) == (
        f"PrincipalComponents(3 vectors, 2 directions: {one:.1%}, {two:.1%} of the variance)"
    )


def test_a_bare_model_is_refused(vlm, scenes):
    with pytest.raises(AdapterError, match=r"A Llava.*nl\.adapt"):
        image_embeddings(vlm.model, scenes)


@pytest.mark.parametrize(
    ("values", "n", "said"),
    [
        ([[1, 2], [3, 4]], 2, "2 components asked of 2 vectors of 2 values. Give from 1 to 1"),
        ([[1, 2], [3, 4], [5, 7]], 3, "Give from 1 to 2"),
        ([[1, 2]], 1, "at least two vectors"),
        ([[1, 2], [3, 4]], 0, "0 components"),
        ([1, 2, 3], 1, "no table"),
        ([[1, 2], [1, 2], [1, 2]], 1, "All vectors are the same"),
        ([[1, 2], [float("nan"), 2], [1, 2]], 1, "NaN or infinite"),
    ],
)
def test_what_has_no_components_is_refused(values, n, said):
    with pytest.raises(ValueError, match=said):
        principal_components(np.array(values, float), n)

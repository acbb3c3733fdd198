"""The suite for third parties: it passes for right adapters, and names what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import neuronlens as nl
import strangers
from neuronlens import testing
from neuronlens.adapters import StructuralAdapter
from neuronlens.adapters.families.llava import LlavaAdapter
from neuronlens.testing import check_adapter
from zoo import entries

ZOO = entries()

GATES = {
    "model.vision_tower.timm_model.final_conv.se",
    "model.vision_tower.head.mlp",
    "model.density_router",
}
"""Blocks that look like feed-forward blocks and are none: gates, routers, heads."""


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_architecture_passes(name):
    entry = ZOO[name]
    model = entry.model()
    found = check_adapter(model, entry.inputs(model, entry.images()))
    assert (found.visual > 0) == (entry.spatial != "none")
    assert (found.boxes > 0) == (entry.spatial == "region")
    assert found.padded > 0
    assert not [path for path in found.left_out if "audio" not in path and path not in GATES]
    assert set(found.inert) == {site.name for site in found.sites if site.inert}


@pytest.mark.parametrize(
    ("model", "per_image"), [(strangers.intern_chat, 2), (strangers.first_qwen, 3)]
)
def test_models_nobody_registered_pass(model, per_image):
    images = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    found = check_adapter(model(), strangers.inputs(images, per_image))
    assert found.visual == 2 * per_image
    assert found.single


def llava():
    model = ZOO["llava"].model()
    return model, ZOO["llava"].inputs(model, ZOO["llava"].images())


def broken(change):
    model, inputs = llava()
    return change(model), inputs


class NoInert(LlavaAdapter):
    def is_inert(self, stack, layer, last):
        return False


class Shifted(LlavaAdapter):
    """Visual tokens one position too far."""

    def placeholders(self, inputs, ids):
        return super().placeholders(inputs, ids).roll(1, 1)


class PadForgotten(LlavaAdapter):
    def text_roles(self, ids, attention=None):
        return super().text_roles(ids)


class WrongWidth(LlavaAdapter):
    def tokens(self, inputs, originals=None):
        maps = super().tokens(inputs, originals)
        maps["projector"] = maps["vision"]
        return maps


class Doubled(LlavaAdapter):
    """A site that does not run."""

    def find_sites(self):
        for site in super().find_sites():
            if site.module == "projector":
                self.model.never = torch.nn.GELU()
                self.taps.pop(site.name)
                site = type(site)(
                    site.name, site.module, site.layer, site.width, "never", site.stream
                )
            yield site


@pytest.mark.parametrize(
    ("family", "said"),
    [
        (NoInert, r"site vision\.1 is flagged inert: False"),
        (Shifted, "VISUAL is exactly where"),
        (PadForgotten, "PAD is exactly where attention_mask is 0"),
    ],
)
def test_a_law_that_does_not_hold_is_named(family, said):
    model, inputs = llava()
    with pytest.raises(AssertionError, match=said):
        check_adapter(family(model), inputs)


def test_a_block_that_nobody_declared_is_named():
    class Undeclared(StructuralAdapter):
        def blocks(self):
            return [block for block in super().blocks() if "transformer.h.1" not in block.path]

    images = torch.rand(2, 3, 8, 16)
    with pytest.raises(AssertionError, match=r"transformer\.h\.1\.mlp have none.*special_block"):
        check_adapter(Undeclared(strangers.first_qwen()), strangers.inputs(images, 3))


def test_a_stream_of_another_length_and_a_site_that_never_runs_are_errors_of_the_recorder():
    for family, said in [(WrongWidth, "has .* tokens"), (Doubled, "never ran: projector")]:
        model, inputs = llava()
        with pytest.raises(nl.NeuronLensError, match=said):
            check_adapter(family(model), inputs)


def test_a_recorder_that_changed_the_model_would_be_noticed(monkeypatch):
    model, inputs = llava()
    plain = testing._logits
    calls = []

    def drifting(vlm, given):
        calls.append(1)
        return plain(vlm, given) + 1e-6 * len(calls)

    monkeypatch.setattr(testing, "_logits", drifting)
    with pytest.raises(AssertionError, match="leaves the logits as they are"):
        check_adapter(model, inputs)


def test_the_structural_adapter_alone_gets_llava_right():
    # LLaVA as if nobody had registered it: sites, visual tokens and boxes by structure and
    # experiment are those that the family's description says.
    model, inputs = llava()
    known, found = nl.adapt(model), StructuralAdapter(model)
    assert {s.path for s in known.sites.values()} == {s.path for s in found.sites.values()}
    said, established = known.tokens(inputs), found.tokens(inputs)
    for stream in ("language", "vision", "projector"):
        assert torch.equal(said[stream].role, established[stream].role)
        torch.testing.assert_close(
            said[stream].box, established[stream].box, equal_nan=True, atol=0, rtol=0
        )
        assert torch.equal(said[stream].image, established[stream].image)
        assert torch.equal(said[stream].sample, established[stream].sample)


class UpProjection(LlavaAdapter):
    """Reads the up projection in the activation's place."""

    def blocks(self):
        for block in super().blocks():
            if "language_model" in block.path:
                tap = replace(block.tap, path=f"{block.path}.up_proj")
                block = replace(block, tap=tap)
            yield block


def test_reading_the_wrong_factor_of_the_product_is_not_noticed_by_deactivation_alone():
    # Zeroing either factor zeroes the product, so this is what check_adapter cannot tell.
    model, inputs = llava()
    assert check_adapter(UpProjection(model), inputs)


class Forgetful(LlavaAdapter):
    not_run = r"layers\.0\."


def test_blocks_without_a_site_are_told():
    model, inputs = llava()
    assert len(check_adapter(Forgetful(model), inputs).left_out) == 2
    assert "left out: nothing" in repr(check_adapter(nl.adapt(model), inputs))


def test_a_batch_without_padding_is_refused():
    model, inputs = llava()
    one = {name: value[:1, :] for name, value in inputs.items()}
    with pytest.raises(ValueError, match="two samples of which one is padded"):
        check_adapter(model, one)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llava"])
def test_a_neuron_that_is_off_already_is_not_taken_away_twice(name):
    entry = ZOO[name]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    site = next(s for s in vlm.select("language") if s.experts or name == "llava")
    with torch.no_grad(), nl.ActivationRecorder(vlm, site) as recorder:
        plain = model(**inputs).logits
    out = recorder.activations[site.name]
    expert = int(out.expert.max()) if site.experts else None
    neurons = [nl.NeuronId(site.name, index, expert) for index in (0, 1, 2)]
    with torch.no_grad():
        with nl.deactivate(vlm, neurons[:2]):
            once = model(**inputs).logits
            with nl.deactivate(vlm, neurons):
                nested = model(**inputs).logits
            again = model(**inputs).logits
        with nl.deactivate(vlm, neurons):
            together = model(**inputs).logits
    torch.testing.assert_close(nested, together, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, once)
    assert not torch.allclose(once, plain)
    assert vlm.changed == set()

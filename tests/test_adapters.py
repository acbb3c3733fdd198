"""Adapters: where the neurons are, whose processor it is, and what every token sees."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import matplotlib.cbook
import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PixtralVisionConfig,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import neuronlens as nl
from neuronlens import testbed
from neuronlens.adapters import StructuralAdapter, base, get
from neuronlens.adapters.discover import feed_forward_blocks
from neuronlens.adapters.families.llava import LlavaAdapter
from neuronlens.adapters.geometry import resized_and_cropped
from neuronlens.errors import AdapterError, CaptureError, UnknownNameError
from neuronlens.hooks import hooked
from neuronlens.testbed import build
from neuronlens.tokens import Role

IMAGE = 4  # the testbed's <image>


def clip(**more) -> CLIPVisionConfig:
    sizes = {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "projection_dim": 16,
    }
    return CLIPVisionConfig(**sizes | more)


def small_llava(vision=None, text: dict | None = None, **config) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights, with the testbed's words."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 1024,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision or clip(),
                text_config=LlamaConfig(**sizes | (text or {})),
                image_token_index=IMAGE,
                **config,
            )
        ).eval()
    assert sum(p.numel() for p in model.parameters()) < 200_000
    return model


def processor_of(side: int, patch: int, backend=CLIPImageProcessor, **more) -> LlavaProcessor:
    images = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images |= more.pop("images", {})
    settings = {
        "tokenizer": build.tokenizer(),
        "patch_size": patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "chat_template": build.CHAT_TEMPLATE,
    }
    return LlavaProcessor(backend(**images), **settings | more)


# Where the neurons are.


def test_llava_1_5_7b_has_the_neurons_its_paper_counts_and_adapts_without_weights():
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig())
    start = time.perf_counter()
    vlm = nl.adapt(model)
    assert time.perf_counter() - start < 5
    neurons = {
        m: sum(s.neurons for s in vlm.select(m)) for m in ("language", "vision", "projector")
    }
    assert neurons == {"language": 32 * 11_008, "vision": 24 * 4096, "projector": 4096}
    assert neurons == {"language": 352_256, "vision": 98_304, "projector": 4_096}
    assert sum(neurons.values()) == sum(site.neurons for site in vlm.sites.values())
    assert [site.name for site in vlm.sites.values() if site.inert] == ["vision.23"]
    assert str(vlm.neuron(16, 4347)) == "language.16/4347"


def test_the_testbed_is_a_tiny_llava_with_every_site_in_the_order_it_runs(vlm, scenes):
    assert sum(p.numel() for p in vlm.model.parameters()) < 1_500_000
    ran = []
    batch = nl.encode(vlm, scenes[:1])
    acts = {name: vlm.model.get_submodule(site.path) for name, site in vlm.sites.items()}
    with hooked(acts, lambda name, _out: ran.append(name)), torch.inference_mode():
        vlm.model(**batch.inputs)
    assert ran == list(vlm.sites)
    assert ran == [
        "vision.0",
        "vision.1",
        "vision.2",
        "projector.0",
        "language.0",
        "language.1",
        "language.2",
        "language.3",
    ]


def activation_modules(model: nn.Module) -> set[str]:
    """Paths of everything a transformers MLP calls its activation."""
    return {
        path
        for path, _ in model.named_modules()
        if path.rsplit(".", 1)[-1] in ("act_fn", "activation_fn", "act")
    }


def test_every_activation_of_a_feed_forward_block_is_one_site_with_a_name_of_its_own(vlm):
    for adapter in (vlm, nl.adapt(small_llava())):
        assert {site.path for site in adapter.sites.values()} == activation_modules(adapter.model)
        assert all(name == site.name for name, site in adapter.sites.items())
        assert all(name == f"{site.module}.{site.layer}" for name, site in adapter.sites.items())


def test_widths_are_those_the_config_gives(vlm):
    config = vlm.model.config
    assert {s.width for s in vlm.select("vision")} == {config.vision_config.intermediate_size}
    assert {s.width for s in vlm.select("language")} == {config.text_config.intermediate_size}
    assert {s.width for s in vlm.select("projector")} == {config.text_config.hidden_size}


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, -3, -4, 1, 2, [-3, -2], [1, -1]], ids=str)
def test_a_site_is_inert_exactly_if_silencing_it_changes_no_bit_of_the_logits(layer, tower):
    full = {"vision_feature_select_strategy": "full"} if tower == "siglip" else {}
    model = small_llava(siglip() if full else clip(), vision_feature_layer=layer, **full)
    vlm = nl.adapt(model)
    inputs = {
        "input_ids": torch.tensor([[1, 5, *[IMAGE] * 4, 7, 8]]),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
    }
    with torch.inference_mode():
        plain = model(**inputs).logits
        for site in vlm.sites.values():
            with hooked(
                {site.name: vlm.model.get_submodule(site.path)},
                lambda _name, out: torch.zeros_like(out),
            ):
                silenced = model(**inputs).logits
            assert torch.equal(silenced, plain) == site.inert, site.name


def test_only_what_runs_behind_the_layer_that_is_read_is_inert():
    inert = {
        layer: [
            s.name
            for s in nl.adapt(small_llava(vision_feature_layer=layer)).sites.values()
            if s.inert
        ]
        for layer in (-1, -2, 1)
    }
    assert inert == {-1: [], -2: ["vision.2"], 1: ["vision.1", "vision.2"]}


def siglip(**more) -> SiglipVisionConfig:
    """A tower without CLS token, and with a pooling head that LLaVA does not read."""
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24}
    return SiglipVisionConfig(**sizes, num_hidden_layers=3, num_attention_heads=2, **more)


def test_a_tower_whose_tokens_are_not_described_is_refused_by_name():
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24}
    tower = PixtralVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(AdapterError, match=r"'pixtral'.*docs/adapters\.md"):
        nl.adapt(small_llava(tower, vision_feature_layer=-1, vision_feature_select_strategy="full"))


def test_a_pooling_head_is_no_site_and_hides_no_layer():
    model = small_llava(siglip(), vision_feature_layer=-1, vision_feature_select_strategy="full")
    vision = nl.adapt(model).select("vision")
    layers = {path for path in activation_modules(model.model.vision_tower) if ".layers." in path}
    assert {site.path for site in vision} == {f"model.vision_tower.{path}" for path in layers}
    assert [site.name for site in vision] == ["vision.0", "vision.1", "vision.2"]


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", [clip, siglip])
def test_maps_fit_what_runs_with_and_without_a_cls_token_and_with_and_without_the_first(
    tower, strategy
):
    model = small_llava(tower(), vision_feature_layer=-2, vision_feature_select_strategy=strategy)
    processor = processor_of(
        16,
        8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower is clip),
    )
    vlm = nl.adapt(model, processor)
    batch = nl.encode(vlm, testbed.scenes(2))
    with nl.ActivationRecorder(vlm, None) as recorder, torch.inference_mode():
        model(**batch.inputs)
    for name, kept in recorder.activations.items():
        assert kept.shape[:-1] == batch.tokens[vlm.sites[name].stream].role.shape
    quarters = [[0, 0, 32, 32], [32, 0, 64, 32], [0, 32, 32, 64], [32, 32, 64, 64]]
    every = ([None] if tower is clip else []) + quarters
    passed = every if strategy == "full" else every[1:]  # LLaVA drops the first, CLS or not
    at = batch.inputs["input_ids"][1] == IMAGE
    text = batch.tokens["language"]
    vision, projector = batch.tokens["vision"], batch.tokens["projector"]
    for role, box, wanted, cls in [
        (vision.role[1], vision.box[1], every, Role.SPECIAL),
        # CLS, passed on, depends on the image: a visual token that sees no single region.
        (projector.role[1], projector.box[1], passed, Role.VISUAL),
        (text.role[1][at], text.box[1][at], passed, Role.VISUAL),
    ]:
        assert [None if here.isnan().all() else here.tolist() for here in box] == wanted
        assert role.tolist() == [Role.VISUAL if here else cls for here in wanted]


# Looking sites and neurons up.


def test_a_neuron_is_named_by_layer_and_index_in_the_language_module_by_default(vlm):
    assert vlm.neuron(3, 383) == nl.NeuronId("language.3", 383)
    assert vlm.neuron(layer=2, index=0, module="vision") == nl.NeuronId("vision.2", 0)
    assert vlm.neuron(0, 127, "projector") == nl.NeuronId("projector.0", 127)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((4, 0), r"No site 'language\.4'\. Closest: .*language\.3"),
        ((0, 384), r"No neuron in language\.0 '384'.*0 to 383"),
        ((0, -1), r"No neuron in language\.0 '-1'"),
        ((0, 0, "qformer"), r"No site 'qformer\.0'"),
        ((0, 0, "language", 1), r"No expert in language\.0 '1'.*dense"),
    ],
)
def test_a_neuron_the_model_does_not_have_is_a_lookup_error(vlm, asked, said):
    with pytest.raises(UnknownNameError, match=said):
        vlm.neuron(*asked)


def test_sites_are_selected_by_module_name_or_themselves_in_the_models_order_once_each(vlm):
    names = lambda chosen: [site.name for site in vlm.select(chosen)]  # noqa: E731
    assert names(None) == list(vlm.sites)
    assert names("vision") == ["vision.0", "vision.1", "vision.2"]
    assert names("language.2") == ["language.2"]
    assert names(vlm.site("language.2")) == ["language.2"]
    assert names(["language.3", "vision", vlm.site("vision.1"), "language.0"]) == [
        "vision.0",
        "vision.1",
        "vision.2",
        "language.0",
        "language.3",
    ]
    assert names(s for s in ("vision.1",)) == ["vision.1"]
    assert names([]) == []


def test_a_name_that_selects_nothing_is_a_lookup_error_with_near_names(vlm):
    with pytest.raises(UnknownNameError, match=r"No site 'langage\.1'\. Closest: .*language\.1"):
        vlm.select("langage.1")
    with pytest.raises(UnknownNameError, match=r"No module in this model 'qformer'\. .*vision"):
        vlm.select(["vision", "qformer"])


# Which adapter.


def test_a_model_type_nobody_registered_gets_the_structural_adapter():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    vlm = nl.adapt(LlamaForCausalLM(config))
    assert type(vlm) is StructuralAdapter
    assert {name: site.width for name, site in vlm.sites.items()} == {"language.0": 8}
    assert get("zzz") is StructuralAdapter


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        ("llava-hf/llava-1.5-7b-hf", "not str.*from_pretrained"),
        (None, "not NoneType"),
        (LlavaConfig, "not type"),
        (nn.Linear(1, 1), "Linear has no config.model_type"),
        (nn.Sequential(nn.Linear(1, 1)), "not a wrapper around it"),
    ],
)
def test_what_is_no_hugging_face_model_is_refused(thing, said):
    with pytest.raises(AdapterError, match=said):
        nl.adapt(thing)


def test_a_compiled_model_is_refused_before_anything_is_read_of_it():
    with pytest.raises(CaptureError, match="compiled"):
        nl.adapt(torch.compile(testbed.untrained()))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    return base._registry


def renamed(model_type: str) -> LlavaForConditionalGeneration:
    model = small_llava()
    model.config.model_type = model_type
    return model


def test_a_registered_family_is_found_by_each_of_its_model_types(registry):
    @nl.register("my_llava", "my_llava_next")
    class MyAdapter(LlavaAdapter):
        pass

    assert type(nl.adapt(renamed("my_llava"))) is MyAdapter
    assert type(nl.adapt(renamed("my_llava_next"))) is MyAdapter
    assert type(nl.adapt(small_llava())) is LlavaAdapter


def test_a_family_of_an_installed_package_is_found_by_its_entry_point(
    registry, tmp_path, monkeypatch
):
    (tmp_path / "lens_for_mine.py").write_text(
        "from neuronlens.adapters.families.llava import LlavaAdapter\n"
        "class Mine(LlavaAdapter): pass\n"
    )
    installed = tmp_path / "lens_for_mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: lens-for-mine\nVersion: 1.0\n"
    )
    (installed / "entry_points.txt").write_text(
        "[neuronlens.adapters]\nmine = lens_for_mine:Mine\n"
    )
    assert get("mine") is StructuralAdapter
    monkeypatch.syspath_prepend(tmp_path)
    assert type(nl.adapt(renamed("mine"))).__name__ == "Mine"


def test_a_family_that_finds_no_site_is_not_this_models(registry):
    @nl.register("siteless")
    class Siteless(LlavaAdapter):
        def find_sites(self):
            return ()

    with pytest.raises(AdapterError, match=r"no feed-forward block that Siteless recognises"):
        nl.adapt(renamed("siteless"))


def test_a_family_that_names_two_sites_alike_is_refused(registry):
    @nl.register("mixed_up")
    class MixedUp(LlavaAdapter):
        def find_sites(self):
            return (replace(site, name="language.0") for site in super().find_sites())

    with pytest.raises(AdapterError, match="MixedUp gives the same name to several sites"):
        nl.adapt(renamed("mixed_up"))


class Nested(nn.Module):
    """Two stages of two blocks, the blocks of which have a feed-forward part each."""

    def __init__(self) -> None:
        super().__init__()
        block = {
            "up": nn.Linear(3, 5),
            "act": nn.GELU(),
            "gate": nn.Sigmoid(),
            "down": nn.Linear(5, 3),
        }
        mlps = [nn.ModuleDict({"mlp": nn.ModuleDict(copy.deepcopy(block))}) for _ in range(4)]
        self.stages = nn.ModuleList([nn.ModuleList(mlps[:2]), nn.ModuleList(mlps[2:])])
        self.pooler = nn.ModuleDict({"dense": nn.Linear(3, 3), "activation": nn.Tanh()})
        self.head = nn.ModuleDict(
            {"one": nn.Linear(3, 7), "act": nn.ReLU(), "two": nn.Linear(7, 3)}
        )


def test_a_block_is_an_activation_between_two_projections():
    model = nn.ModuleDict({"tower": Nested()})
    found = list(feed_forward_blocks(model, "tower"))
    assert [(block.path, block.tap.path, block.width) for block in found] == [
        ("tower.stages.0.0.mlp", "tower.stages.0.0.mlp.act", 5),
        ("tower.stages.0.1.mlp", "tower.stages.0.1.mlp.act", 5),
        ("tower.stages.1.0.mlp", "tower.stages.1.0.mlp.act", 5),
        ("tower.stages.1.1.mlp", "tower.stages.1.1.mlp.act", 5),
        ("tower.head", "tower.head.act", 7),
    ]


# Whose processor.


def more_words(count: int):
    tokenizer = build.tokenizer()
    tokenizer.add_tokens([f"new{n}" for n in range(count)])
    return tokenizer


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: processor_of(64, 16), r"patch size 16 \(the model's is 8\)"),
        (
            lambda: processor_of(64, 8, image_token="<unk>"),
            r"image token id 3 \(the model's is 4\)",
        ),
        (lambda: processor_of(336, 8), r"image size \(336, 336\) \(the model's is \(64, 64\)\)"),
        (
            lambda: processor_of(64, 8, vision_feature_select_strategy="full"),
            r"feature selection 'full' \(the model's is 'default'\)",
        ),
        (
            lambda: processor_of(64, 8, tokenizer=more_words(3)),
            r"57 tokens \(the model embeds 54\)",
        ),
        (lambda: processor_of(336, 14), "patch size 14 .*image size"),
        (build.tokenizer, "not a processor of images and text"),
        (CLIPImageProcessor, "not a processor of images and text"),
    ],
    ids=[
        "patch",
        "image token",
        "image size",
        "strategy",
        "words",
        "two things",
        "tokenizer",
        "images",
    ],
)
def test_another_models_processor_is_refused_with_every_difference(bed, wrong, said):
    with pytest.raises(AdapterError, match=said):
        nl.adapt(bed.model, wrong())


def test_a_tokenizer_that_uses_fewer_words_than_the_model_embeds_is_accepted():
    assert len(build.tokenizer()) < 60  # as embeddings padded to a multiple of 64 are
    nl.adapt(small_llava(), processor_of(16, 8))


# Shared description.


def test_a_fingerprint_follows_the_weights_and_nothing_else(bed, vlm, untrained_vlm):
    assert nl.adapt(testbed.load().model).fingerprint() == vlm.fingerprint()
    assert untrained_vlm.fingerprint() != vlm.fingerprint()
    changed = copy.deepcopy(bed.model)
    with torch.no_grad():
        changed.model.language_model.layers[2].mlp.gate_proj.weight[0, 0] += 1
    assert nl.adapt(changed).fingerprint() != vlm.fingerprint()


def test_a_model_that_drops_out_is_refused_until_it_is_in_eval_mode():
    model = small_llava()
    model.model.language_model.layers.append(nn.Dropout(0.1))
    vlm = nl.adapt(model.train())
    with pytest.raises(AdapterError, match=r"layers\.2'.*model\.eval\(\)"):
        vlm.require_eval()
    model.eval()
    vlm.require_eval()


def test_attention_that_drops_out_is_refused_too():
    vlm = nl.adapt(small_llava(text={"attention_dropout": 0.1}).train())
    with pytest.raises(AdapterError, match=r"self_attn'.*model\.eval\(\)"):
        vlm.require_eval()


def test_training_mode_without_dropout_is_harmless():
    model = small_llava()
    model.model.language_model.layers.append(nn.Dropout(0.0))
    nl.adapt(model.train()).require_eval()


def test_special_tokens_are_special_unattended_ones_padding_and_others_prompt(vlm):
    ids = torch.tensor([[0, 0, 1, 5, 3, 2, 0]])
    attention = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    pad, special, prompt = Role.PAD, Role.SPECIAL, Role.PROMPT
    # <unk>, 3, stands for a word of the text.
    assert vlm.text_roles(ids, attention).tolist() == [
        [pad, pad, special, prompt, prompt, special, special]
    ]
    assert vlm.text_roles(ids).tolist() == [
        [special, special, special, prompt, prompt, special, special]
    ]
    without_processor = nl.adapt(vlm.model)
    assert (
        without_processor.text_roles(ids, attention).tolist()
        == vlm.text_roles(ids, attention).tolist()
    )


def test_an_adapter_shows_itself_with_every_module_and_its_inert_sites():
    model = small_llava(vision_feature_layer=-2)
    model.config.name_or_path = "<b>mine</b>"
    shown = str(nl.adapt(model)._repr_html_())
    for text in ("vision.2", "projector", "language", "act_fn", "llava", "72"):
        assert text in shown
    assert "<b>mine" not in shown


# Tokens: roles and numbers.


def pixels(images: int, side: int = 64) -> torch.Tensor:
    return torch.zeros(images, 3, side, side)


def row(*counts: int, length: int = 200) -> list[int]:
    """Ids of a prompt with runs of image tokens, padded on the right."""
    ids = [1]
    for count in counts:
        ids += [5, *[IMAGE] * count]
    return [*ids, 7, *[0] * (length - len(ids) - 1)]


def test_image_tokens_belong_to_their_rows_images_in_order(vlm):
    ids = torch.tensor([row(64), row(64, 64), row()])
    mask = (ids != 0).long()
    streams = vlm.tokens({"input_ids": ids, "pixel_values": pixels(3), "attention_mask": mask})
    text = streams["language"]
    assert text.is_role(Role.VISUAL).tolist() == (ids == IMAGE).tolist()
    assert text.is_role(Role.PAD).tolist() == (ids == 0).tolist()
    assert text.sample.tolist() == [[n] * 200 for n in range(3)]
    assert text.image[0].unique_consecutive().tolist() == [-1, 0, -1]
    assert text.image[1].unique_consecutive().tolist() == [-1, 0, -1, 1, -1]
    assert text.image[2].unique().tolist() == [-1]
    for stream, tokens in (("vision", 65), ("projector", 64)):
        rows = streams[stream]
        assert rows.role.shape == (3, tokens)
        assert rows.sample[:, 0].tolist() == [0, 1, 1]
        assert rows.image[:, -1].tolist() == [0, 0, 1]


def test_without_original_sizes_boxes_are_the_patches_of_the_processed_image(vlm):
    streams = vlm.tokens({"input_ids": torch.tensor([row(64)]), "pixel_values": pixels(1)})
    patches = torch.tensor(
        [[x, y, x + 8.0, y + 8.0] for y in range(0, 64, 8) for x in range(0, 64, 8)]
    )
    torch.testing.assert_close(streams["projector"].box[0], patches, atol=0, rtol=0)
    torch.testing.assert_close(streams["vision"].box[0, 1:], patches, atol=0, rtol=0)
    text = streams["language"]
    torch.testing.assert_close(text.box[text.is_role(Role.VISUAL)], patches, atol=0, rtol=0)
    assert text.box[~text.is_role(Role.VISUAL)].isnan().all()


def test_the_cls_token_is_special_and_sees_no_region(vlm):
    vision = vlm.tokens({"input_ids": torch.tensor([row(64)]), "pixel_values": pixels(1)})["vision"]
    assert vision.role[0].tolist() == [Role.SPECIAL] + [Role.VISUAL] * 64
    assert vision.box[0, 0].isnan().all()
    assert vision.image[0, 0] == -1


def test_text_alone_has_a_language_stream_alone(vlm):
    streams = vlm.tokens({"input_ids": torch.tensor([[1, 5, 7]])})
    assert list(streams) == ["language"]
    assert streams["language"].role.tolist() == [[Role.SPECIAL, Role.PROMPT, Role.PROMPT]]


@pytest.mark.parametrize(
    ("rows", "images", "said"),
    [
        ([[], [64]], 2, r"2 images of 64 tokens.*hold \[0, 64\] image tokens"),
        ([[], []], 1, r"hold \[0, 0\] image tokens"),
        ([[64], [64]], 3, r"3 images .*hold \[64, 64\]"),
        ([[64, 64], [64]], 2, r"hold \[128, 64\]"),
        ([[60], [68]], 2, r"hold \[60, 68\]"),
        ([[64]], 0, "hold 64 image tokens, but there are no pixel_values"),
    ],
)
def test_as_many_images_as_placeholders_are_needed(vlm, rows, images, said):
    inputs = {"input_ids": torch.tensor([row(*counts) for counts in rows])}
    if images:
        inputs["pixel_values"] = pixels(images)
    with pytest.raises(AdapterError, match=said):
        vlm.tokens(inputs)


@pytest.mark.parametrize(
    "originals",
    [[[(64, 64)]], [[(64, 64)], []], [[(64, 64)], [(64, 64), (32, 64)]]],
    ids=["a row too few", "an image too few", "an image too many"],
)
def test_original_sizes_must_be_those_of_the_rows_images(vlm, originals):
    inputs = {"input_ids": torch.tensor([row(64), row(64)]), "pixel_values": pixels(2)}
    vlm.tokens(inputs, [[(64, 64)], [(64, 64)]])
    with pytest.raises(AdapterError, match="original"):
        vlm.tokens(inputs, originals)


def test_embeddings_in_place_of_ids_are_refused(vlm):
    with pytest.raises(AdapterError, match=r"called with inputs_embeds.*Call it with input_ids"):
        vlm.tokens({"inputs_embeds": torch.zeros(1, 2, 128), "pixel_values": None})


# Geometry, by experiment: which token's embedding moves when pixels of the photograph change?


def hopper() -> np.ndarray:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return np.array(image.convert("RGB"))


PHOTOGRAPHS = {
    "451 x 300": skimage.data.chelsea,
    "600 x 400": skimage.data.coffee,
    "512 x 600": hopper,
    "299 x 451": lambda: np.rot90(skimage.data.chelsea())[:, 1:],
}
BACKENDS = {"torchvision": CLIPImageProcessor, "pil": CLIPImageProcessorPil}


@pytest.fixture(scope="module")
def large() -> LlavaForConditionalGeneration:
    """CLIP-L's input size, 336 pixels in patches of 14, in front of one layer."""
    vision = clip(image_size=336, patch_size=14, hidden_size=48, num_hidden_layers=1)
    return small_llava(vision, {"num_hidden_layers": 1}, vision_feature_layer=-1)


def inverted(photo: np.ndarray, region) -> Image.Image:
    """The photograph with black and white swapped in a region of whole pixels inside of it."""
    left, top, right, bottom = region
    inside = np.s_[
        int(np.ceil(top - 1e-3)) : int(bottom + 1e-3), int(np.ceil(left - 1e-3)) : int(right + 1e-3)
    ]
    assert photo[inside].size > 0
    changed = photo.copy()
    changed[inside] = np.where(photo[inside] > 127, 0, 255)
    return Image.fromarray(changed)


def moved_by(vlm, pictures, reference) -> torch.Tensor:
    """How far each patch's embedding is moved, before any attention: [picture, patch]."""
    embed = vlm.model.model.vision_tower.embeddings
    process = vlm.processor.image_processor
    with torch.inference_mode():
        there = embed(process([reference], return_tensors="pt")["pixel_values"])
        here = embed(process(list(pictures), return_tensors="pt")["pixel_values"])
    return (here - there)[:, 1:].norm(dim=-1)


def parts(box, strip: float = 0.2):
    """The inner part of a box, and a strip along each of its edges."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    for a, b, c, d in [
        (0.1, 0.1, 0.9, 0.9),
        (0, 0, strip, 1),
        (1 - strip, 0, 1, 1),
        (0, 0, 1, strip),
        (0, 1 - strip, 1, 1),
    ]:
        yield left + a * width, top + b * height, left + c * width, top + d * height


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [64, 336])
def test_a_tokens_box_holds_the_pixels_of_the_photograph_it_sees(
    bed, large, photograph, backend, side
):
    model, patch = (bed.model, 8) if side == 64 else (large, 14)
    vlm = nl.adapt(model, processor_of(side, patch, BACKENDS[backend]))
    photo = PHOTOGRAPHS[photograph]()
    original = Image.fromarray(photo)
    assert photo.shape[0] != photo.shape[1]
    boxes = (
        nl.encode(vlm, [nl.Sample("photo", (original,), "describe .")]).tokens["projector"].box[0]
    )
    n = side // patch
    corners, inner = [0, n - 1, n * n - n, n * n - 1], [n + 2, n * (n // 2) + n // 3]
    asked = [(token, part) for token in corners + inner for part in parts(boxes[token].tolist())]
    moved = moved_by(vlm, [inverted(photo, part) for _, part in asked], original)
    assert moved.argmax(1).tolist() == [token for token, _ in asked]


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_no_box_holds_move_no_token(bed, photograph, backend):
    vlm = nl.adapt(bed.model, processor_of(64, 8, BACKENDS[backend]))
    photo = PHOTOGRAPHS[photograph]()
    original = Image.fromarray(photo)
    height, width = photo.shape[:2]
    boxes = (
        nl.encode(vlm, [nl.Sample("photo", (original,), "describe .")]).tokens["projector"].box[0]
    )
    left, top = boxes[:, :2].amin(0).tolist()
    right, bottom = boxes[:, 2:].amax(0).tolist()
    assert min(right - left, bottom - top) == pytest.approx(min(width, height), abs=1e-3)
    reach = 2 * min(width, height) / 64  # of the bicubic filter, in pixels of the photograph
    outside = [
        (0, 0, left - reach, height),
        (right + reach, 0, width, height),
        (0, 0, width, top - reach),
        (0, bottom + reach, width, height),
    ]
    outside = [(a, b, c, d) for a, b, c, d in outside if c - a >= 1 and d - b >= 1]
    assert len(outside) == 2  # a side on the left and right, or above and below
    assert moved_by(vlm, [inverted(photo, each) for each in outside], original).max() == 0
    beside = (
        (right - reach, 0, width, height)
        if right < width - 1
        else (0, bottom - reach, width, height)
    )
    assert moved_by(vlm, [inverted(photo, beside)], original).max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(80, 72), (77, 69), (48, 52), (51, 41), (45, 99)], ids=str)
def test_boxes_are_right_to_the_pixel_where_the_processor_only_crops_and_pads(bed, backend, size):
    vlm = nl.adapt(bed.model, processor_of(64, 8, BACKENDS[backend], images={"do_resize": False}))
    width, height = size
    photo = skimage.data.chelsea()[:height, :width]
    original = Image.fromarray(photo)
    boxes = (
        nl.encode(vlm, [nl.Sample("photo", (original,), "describe .")]).tokens["projector"].box[0]
    )
    seen = (~boxes.isnan().any(-1)).nonzero().squeeze(1).tolist()
    asked = [seen[0], seen[-1], seen[len(seen) // 2]]
    moved = moved_by(vlm, [inverted(photo, boxes[token].tolist()) for token in asked], original)
    for token, each in zip(asked, moved, strict=True):
        assert each.nonzero().squeeze(1).tolist() == [token]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_the_size_an_image_is_resized_to_is_the_processors_own(backend, width, height):
    processor = BACKENDS[backend](size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    whole = processor(Image.new("RGB", (width, height)), do_center_crop=False, return_tensors="np")
    resized = whole["pixel_values"].shape[:1:-1]
    placed = resized_and_cropped(processor, (width, height), (16, 16))
    assert placed.scale == pytest.approx((resized[0] / width, resized[1] / height))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_processor_that_squeezes_gives_boxes_of_the_photographs_shape(bed, backend):
    squeeze = {"size": {"height": 64, "width": 64}}
    vlm = nl.adapt(bed.model, processor_of(64, 8, BACKENDS[backend], images=squeeze))
    photo = skimage.data.chelsea()
    original = Image.fromarray(photo)
    boxes = (
        nl.encode(vlm, [nl.Sample("photo", (original,), "describe .")]).tokens["projector"].box[0]
    )
    torch.testing.assert_close(boxes[-1], torch.tensor([451 * 7 / 8, 300 * 7 / 8, 451, 300]))
    asked = [(token, part) for token in (0, 7, 20, 63) for part in parts(boxes[token].tolist())]
    moved = moved_by(vlm, [inverted(photo, part) for _, part in asked], original)
    assert moved.argmax(1).tolist() == [token for token, _ in asked]


def test_patches_that_see_only_padding_have_no_box(bed):
    vlm = nl.adapt(bed.model, processor_of(64, 8, images={"do_resize": False}))
    small = nl.Sample("small", (Image.new("RGB", (32, 64)),), "describe .")
    boxes = nl.encode(vlm, [small]).tokens["projector"].box[0].reshape(8, 8, 4)
    assert boxes.isnan().any(-1).all(0).tolist() == [
        True,
        True,
        False,
        False,
        False,
        False,
        True,
        True,
    ]
    torch.testing.assert_close(boxes[0, 2], torch.tensor([0.0, 0, 8, 8]))


def test_settings_that_do_not_explain_the_processed_size_are_an_error(vlm):
    inputs = {"input_ids": torch.tensor([row(16)]), "pixel_values": pixels(1, side=32)}
    with pytest.raises(AdapterError, match=r"\(64, 64\).*but the model was given \(32, 32\)"):
        vlm.tokens(inputs, [[(100, 50)]])


@pytest.mark.parametrize(("have", "fits"), [("5.19.0", False), ("6.0.0", False), ("5.23.0", True)])
def test_a_transformers_outside_the_range_is_refused_with_the_range(monkeypatch, have, fits):
    model = small_llava()
    monkeypatch.setattr(base, "version", lambda name: have)
    if fits:
        assert nl.adapt(model)
        return
    with pytest.raises(AdapterError, match=rf"transformers {have} is installed.*>=5\.20"):
        nl.adapt(model)


def test_more_images_than_placeholders_and_none_are_both_told(vlm):
    batch = nl.encode(vlm, testbed.scenes(1))
    twice = dict(batch.inputs) | {"pixel_values": batch.inputs["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(AdapterError, match=r"2 images of 64 tokens.*hold \[64\] image tokens"):
        vlm.tokens(twice)
    ids = batch.inputs["input_ids"]
    without = {"input_ids": ids[:, ids[0] != IMAGE], "pixel_values": batch.inputs["pixel_values"]}
    with pytest.raises(AdapterError, match=r"1 images of 64 tokens.*hold \[0\] image tokens"):
        vlm.tokens(without)


def test_an_unknown_site_lists_near_names(vlm):
    with pytest.raises(UnknownNameError, match=r"language\.9.*language\.3|language\.9.*Closest"):
        vlm.site("language.9")


def test_a_processor_that_lacks_what_the_family_compares_is_another_models():
    class Needy(LlavaAdapter):
        def agreements(self):
            return {"tiles": (self.processor.image_processor.max_tiles, 4)}

    bed = testbed.load()
    with pytest.raises(AdapterError, match=r"belongs to another model.*max_tiles"):
        Needy(bed.model, bed.processor)

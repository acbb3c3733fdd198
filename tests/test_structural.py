"""Models nobody registered: what is established about them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neuronlens as nl
import strangers
from neuronlens.adapters import experiment
from neuronlens.adapters.structural import StructuralAdapter
from neuronlens.errors import AdapterError


def images(count: int = 2, height: int = 8, width: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def chat() -> nl.ModelAdapter:
    return nl.adapt(strangers.intern_chat())


@pytest.fixture
def qwen() -> nl.ModelAdapter:
    return nl.adapt(strangers.first_qwen())


def test_blocks_are_found_by_structure_under_any_name(chat, qwen):
    assert {name: (site.path, site.width) for name, site in chat.sites.items()} == {
        "vision.0": ("vision_model.inner.layers.0.mlp.act", 20),
        "vision.1": ("vision_model.inner.layers.1.mlp.act", 20),
        "projector.0": ("mlp1.2", 28),
        "language.0": ("language_model.layers.0.feed_forward.act_fn", 24),
        "language.1": ("language_model.layers.1.feed_forward.act_fn", 24),
    }
    assert {name: site.width for name, site in qwen.sites.items()} == {
        "language.0": 24,
        "language.1": 24,
        "vision.0": 20,
        "vision.1": 20,
    }


def test_it_is_the_same_on_the_meta_device(chat):
    with torch.device("meta"):
        model = strangers.InternChat(strangers.InternChatConfig())
    assert nl.adapt(model).sites == chat.sites
    with torch.device("meta"):
        other = strangers.FirstQwen(strangers.FirstQwenConfig())
    assert len(nl.adapt(other).sites) == 4


def test_a_functional_activation_is_recorded_as_it_is(qwen):
    given = strangers.inputs(images(), 3)
    seen = {}
    block = qwen.model.transformer.h[1].mlp
    handle = block.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0]))
    with torch.no_grad(), nl.ActivationRecorder(qwen, None) as recorder:
        qwen.model(**given)
    handle.remove()
    act = F.silu(F.linear(seen["x"], block.w2.weight))
    torch.testing.assert_close(recorder.activations["language.1"], act)
    assert any("silu(w2) * w1" in line for line in qwen.established)


def test_deactivating_is_zeroing_the_column_of_the_down_projection(chat, qwen):
    for vlm, site, down in [
        (chat, "language.0", chat.model.language_model.layers[0].feed_forward.w2),
        (qwen, "language.0", qwen.model.transformer.h[0].mlp.c_proj),
        (chat, "projector.0", chat.model.mlp1[3]),
    ]:
        given = strangers.inputs(images(), 8 if vlm is chat else 3)
        given = given if vlm is qwen else strangers.inputs(images(), 2)
        with torch.no_grad():
            plain = vlm.model(**given).logits
            with nl.deactivate(vlm, nl.NeuronId(site, 4)):
                without = vlm.model(**given).logits
            again = vlm.model(**given).logits
            down.weight[:, 4] = 0
            edited = vlm.model(**given).logits
        torch.testing.assert_close(without, edited)
        assert not torch.allclose(without, plain)
        assert torch.equal(again, plain)


def test_visual_tokens_and_their_boxes_are_established_by_changing_pixels(chat):
    given = strangers.inputs(images(), 2)
    maps = chat.tokens(given)
    language = maps["language"]
    assert torch.equal(language.role == nl.Role.VISUAL, given["input_ids"] == strangers.IMAGE)
    assert torch.equal(language.role == nl.Role.PAD, given["attention_mask"] == 0)
    assert language.box[0][language.role[0] == nl.Role.VISUAL].tolist() == [
        [0, 0, 8, 8],
        [8, 0, 16, 8],
    ]
    assert language.sample[1].tolist() == [1] * language.role.shape[1]
    vision = maps["vision"]
    assert vision.role.tolist() == [[nl.Role.SPECIAL] + [nl.Role.VISUAL] * 8] * 2
    assert vision.box[0, 2].tolist() == [4, 0, 8, 4]
    assert vision.box[0, 5].tolist() == [0, 4, 4, 8]
    assert maps["projector"].box[1].tolist() == [[0, 0, 8, 8], [8, 0, 16, 8]]
    assert any("2 of" not in line and "boxes: 4 of 4" in line for line in chat.established)


def test_another_text_costs_two_runs_and_another_shape_a_new_experiment(chat, monkeypatch):
    runs = []
    plain = experiment.Experiment.run
    monkeypatch.setattr(
        experiment.Experiment,
        "run",
        lambda self, pixels, mixing: runs.append(1) or plain(self, pixels, mixing=mixing),
    )
    given = strangers.inputs(images(), 2)
    first = chat.tokens(given)
    once = len(runs)
    assert chat.tokens(given)["language"].role.equal(first["language"].role)
    assert len(runs) == once
    text = torch.tensor([[9], [9]])
    longer = {
        name: torch.cat([value, text if name == "input_ids" else text * 0 + 1], 1)
        if value.ndim == 2
        else value.flip(0)
        for name, value in given.items()
    }
    after = chat.tokens(longer)["language"]
    assert len(runs) == once + 2
    assert torch.equal(after.role == nl.Role.VISUAL, longer["input_ids"] == strangers.IMAGE)
    assert torch.equal(
        after.box[after.role == nl.Role.VISUAL],
        first["language"].box[first["language"].role == nl.Role.VISUAL],
    )
    chat.tokens(strangers.inputs(images(height=16, width=8), 2))
    assert len(runs) > once + 10


def test_learned_queries_see_no_single_region(qwen):
    given = strangers.inputs(images(), 3)
    language = qwen.tokens(given)["language"]
    visual = language.role == nl.Role.VISUAL
    assert torch.equal(visual, given["input_ids"] == strangers.IMAGE)
    assert language.box[visual].isnan().all()
    assert any("boxes: 0 of 6" in line for line in qwen.established)


def test_a_recorded_forward_fits_its_maps(chat):
    given = strangers.inputs(images(), 2)
    with torch.no_grad(), nl.ActivationRecorder(chat, None) as recorder:
        chat.model(**given)
    for name, out in recorder.activations.items():
        assert out.shape[:-1] == recorder.tokens[chat.sites[name].stream].role.shape


def test_what_runs_only_on_images_needs_no_image_for_the_text(chat):
    given = strangers.inputs(images(), 2)
    text = {"input_ids": given["input_ids"][:, -3:]}
    role = chat.tokens(text)["language"].role
    assert role.tolist() == [[nl.Role.PROMPT] * 3] * 2


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(16, 24, bias=False),
            nn.Linear(16, 24, bias=False),
            nn.Linear(24, 16, bias=False),
        )

    def forward(self, x):
        return self.c(self.a(x) ** 3 * self.b(x))


def test_a_function_that_is_not_known_is_an_error_that_says_what_to_write():
    model = strangers.first_qwen()
    model.transformer.h[1].mlp = Cubed()
    with pytest.raises(AdapterError, match=r"Cubed looks like a feed-forward.*special_block"):
        nl.adapt(model)


def test_a_model_without_feed_forward_blocks_is_refused():
    model = strangers.first_qwen()
    for block in model.transformer.h:
        block.mlp = nn.Identity()
    for block in model.transformer.visual.transformer.resblocks:
        block.mlp = nn.Identity()
    with pytest.raises(AdapterError, match="no feed-forward block"):
        nl.adapt(model)


def test_image_tokens_that_the_model_inserts_by_itself_are_refused():
    model = strangers.intern_chat()

    class Inserting(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.attention, self.feed_forward = layer.attention, layer.feed_forward
            self.layer = [layer]

        def forward(self, x, mask=None):
            return self.layer[0](x, mask)

    original = model.forward

    def longer(input_ids, pixel_values=None, attention_mask=None, use_cache=False):
        more = torch.cat([input_ids, input_ids[:, :1]], 1)
        return original(more, pixel_values)

    model.forward = longer
    vlm = nl.adapt(model)
    with pytest.raises(AdapterError, match="puts image tokens between"):
        vlm.tokens(strangers.inputs(images(), 2))


def test_tokens_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = strangers.InternChat(strangers.InternChatConfig())
    with pytest.raises(AdapterError, match="meta device"):
        nl.adapt(model).tokens(strangers.inputs(images(), 2))


def test_it_is_the_structural_adapter(chat):
    assert isinstance(chat, StructuralAdapter)
    assert chat.established[0].startswith("language: the blocks in 'language_model.layers'") or any(
        line.startswith("language: ") for line in chat.established
    )


class Places:
    """An image processor that resizes to half, keeps the aspect ratio, and pads a square."""

    def __call__(self, images, return_tensors):
        from PIL import Image

        canvas = Image.new("RGB", (32, 32))
        width, height = images[0].size
        scale = 24 / max(width, height)
        small = images[0].resize((round(width * scale), round(height * scale)))
        canvas.paste(small, (4, 2))
        pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
        return {"pixel_values": pixels[None].float() / 255}


@pytest.mark.parametrize("original", [(48, 48), (96, 48), (60, 90)])
def test_boxes_in_original_pixels_are_placed_by_painting(chat, original):
    class Processor:
        tokenizer = None
        image_processor = Places()

    chat.processor = Processor()
    placed = chat.place(original, (32, 32), 0)
    scale = 24 / max(original)
    there = [4 + scale * 10, 2 + scale * 20, 4 + scale * 30, 2 + scale * 40]
    back = placed.to_original(torch.tensor([there]))
    torch.testing.assert_close(back, torch.tensor([[10.0, 20, 30, 40]]), atol=0.7, rtol=0)
    with pytest.raises(AdapterError, match="Boxes cannot be placed"):
        chat.place(original, (40, 32), 0)


def test_two_lists_as_near_to_the_embedding_are_an_error_and_names_can_tell():
    class Flat(strangers.InternChat):
        def __init__(self, config, name):
            super().__init__(config)
            self.words = self.language_model.tok_embeddings
            self.layers = self.language_model.layers
            setattr(self, name, self.vision_model.inner["layers"])
            del self.language_model, self.vision_model

        def get_input_embeddings(self):
            return self.words

    found = nl.adapt(Flat(strangers.InternChatConfig(), "vision_layers"))
    assert {s.path.split(".")[0] for s in found.select("language")} == {"layers"}
    assert {s.path.split(".")[0] for s in found.select("vision")} == {"vision_layers"}
    with pytest.raises(AdapterError, match="equally near to the token embedding 'words'"):
        nl.adapt(Flat(strangers.InternChatConfig(), "eyes"))


def test_a_peft_wrapper_is_refused_with_the_way_in():
    class Wrapper(strangers.InternChat):
        def get_base_model(self):
            return self

    with pytest.raises(AdapterError, match=r"model\.get_base_model\(\)"):
        nl.adapt(Wrapper(strangers.InternChatConfig()))


def test_tiles_cannot_be_told_by_changing_pixels(chat):
    given = strangers.inputs(images(), 2)
    with pytest.raises(AdapterError, match="several tiles of an image"):
        chat.tokens(given | {"pixel_values": given["pixel_values"][None].repeat(2, 1, 1, 1, 1)})


def test_dropout_would_make_every_token_visual_and_is_refused(chat):
    chat.model.train()
    chat.model.drop = nn.Dropout(0.5)
    with pytest.raises(AdapterError, match=r"model\.eval\(\)"):
        chat.tokens(strangers.inputs(images(), 2))


@pytest.mark.parametrize("original", [(500, 100), (100, 100), (90, 300)])
def test_a_real_centre_crop_is_placed_where_its_own_geometry_says(chat, original):
    from transformers import CLIPImageProcessor

    from neuronlens.adapters.geometry import resized_and_cropped

    clip = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_normalize=True
    )

    class Processor:
        tokenizer = None
        image_processor = clip

    chat.processor = Processor()
    corners = torch.tensor([[8.0, 8, 24, 40], [40, 16, 56, 48]])
    placed = chat.place(original, (64, 64), 0).to_original(corners)
    known = resized_and_cropped(clip, original, (64, 64)).to_original(corners)
    torch.testing.assert_close(placed, known, atol=max(original) / 64, rtol=0)


def test_boxes_of_large_images_are_those_of_the_patches(chat):
    # 144 pixels are more than the finest experiment can change one by one.
    maps = chat.tokens(strangers.inputs(images(2, 16, 144), 36))
    width = maps["vision"].box[0, 1:, 2] - maps["vision"].box[0, 1:, 0]
    assert set(width.tolist()) == {4.0}
    assert maps["language"].box[0][maps["language"].role[0] == nl.Role.VISUAL][1].tolist() == [
        *(8, 0, 16, 8)
    ]

"""The recorder: right numbers, every token once, nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation import utils as generation

import neuronlens as nl
from neuronlens import testbed
from neuronlens.activations import Routed
from neuronlens.errors import CaptureError, UnknownNameError
from neuronlens.hooks import hooked
from neuronlens.tokens import Role
from zoo import entries

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
ZOO = entries()


# An independent reference: the whole model, written out from its weights.


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None, turn=None
) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if turn is not None:
        q, k = turn(q), turn(k)
    score = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if allowed is not None:
        score = score.masked_fill(~allowed[:, None], -1e30)
    return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)


def rotated(position: Tensor, width: int = 32):
    speed = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angle = (position[:, None, :, None] * speed).repeat(1, 1, 1, 2)

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    return turn


@torch.no_grad()
def by_hand(model, ids: Tensor, pixels: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """act_fn outputs of every site of the testbed's model, without running the model."""
    w = {name.removeprefix("model."): p for name, p in model.named_parameters()}
    acts = {}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def rms_norm(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    tower = "vision_tower"
    x = F.conv2d(pixels, w[f"{tower}.embeddings.patch_embedding.weight"], stride=8).flatten(2).mT
    x = torch.cat([w[f"{tower}.embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = layer_norm(x + w[f"{tower}.embeddings.position_embedding.weight"], f"{tower}.pre_layrnorm")
    for n in range(3):
        at = f"{tower}.encoder.layers.{n}"
        normed = layer_norm(x, f"{at}.layer_norm1")
        q, k, v = (linear(normed, f"{at}.self_attn.{each}_proj") for each in "qkv")
        x = x + linear(attention(q, k, v, 4, None), f"{at}.self_attn.out_proj")
        inner = linear(layer_norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        acts[f"vision.{n}"] = inner * torch.sigmoid(1.702 * inner)
        x = x + linear(acts[f"vision.{n}"], f"{at}.mlp.fc2")
    acts["projector.0"] = F.gelu(linear(x[:, 1:], "multi_modal_projector.linear_1"))
    seen = linear(acts["projector.0"], "multi_modal_projector.linear_2")

    mask = torch.ones_like(ids) if mask is None else mask
    h = w["language_model.embed_tokens.weight"][ids]
    h[ids == 4] = seen.flatten(0, 1)
    allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & (mask[:, None] == 1)
    turn = rotated((mask.cumsum(1) - 1).clamp(min=0))
    for n in range(4):
        at = f"language_model.layers.{n}"
        normed = rms_norm(h, f"{at}.input_layernorm")
        q, k, v = (linear(normed, f"{at}.self_attn.{each}_proj") for each in "qkv")
        h = h + linear(attention(q, k, v, 4, allowed, turn), f"{at}.self_attn.o_proj")
        normed = rms_norm(h, f"{at}.post_attention_layernorm")
        acts[f"language.{n}"] = F.silu(linear(normed, f"{at}.mlp.gate_proj"))
        h = h + linear(
            acts[f"language.{n}"] * linear(normed, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj"
        )
    return acts


def assert_recorded(
    kept: dict[str, Tensor], reference: dict[str, Tensor], mask: Tensor | None = None
) -> None:
    """Equal at every token that is not padding."""
    assert kept
    for name, activation in kept.items():
        wanted = reference[name]
        assert activation.shape == wanted.shape, name
        if mask is not None and name.startswith("language"):
            activation, wanted = activation[mask == 1], wanted[mask == 1]
        torch.testing.assert_close(
            activation, wanted, msg=lambda text, name=name: f"{name}: {text}", **CLOSE
        )


@pytest.fixture
def batch(vlm, scenes) -> nl.samples.Batch:
    return nl.encode(vlm, scenes[:3])


@pytest.fixture
def asked(vlm, scenes) -> nl.samples.Batch:
    """Two prompts of the same length, without responses."""
    return nl.encode(vlm, [replace(scene, response=None) for scene in scenes[:2]])


@pytest.fixture
def padded(vlm, scenes) -> nl.samples.Batch:
    """Two prompts of different lengths, padded on the left as generation wants them."""
    processor = copy.deepcopy(vlm.processor)
    processor.tokenizer.padding_side = "left"
    longer = "describe the image . what colour is the ring ?"
    samples = [replace(scenes[0], response=None), replace(scenes[1], response=None, prompt=longer)]
    batch = nl.encode(nl.adapt(vlm.model, processor), samples)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [71, 77]
    return batch


def hooks_of(model) -> int:
    return sum(
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
    )


class Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.sites: list[str] = []
        self.activations: dict[str, Tensor] = {}
        self.tokens: dict[str, nl.TokenMap] = {}

    def take(self, site, activation, tokens) -> None:
        self.sites.append(site.name)
        self.activations[site.name] = activation
        self.tokens[site.name] = tokens


# One forward.


def test_recorded_activations_are_those_computed_from_the_weights(vlm, batch):
    with nl.ActivationRecorder(vlm, None) as recorder, torch.inference_mode():
        vlm.model(**batch.inputs)
    inputs = batch.inputs
    reference = by_hand(
        vlm.model, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    )
    assert set(recorder.activations) == set(vlm.sites) == set(reference)
    assert_recorded(recorder.activations, reference, inputs["attention_mask"])


def test_the_reference_computes_the_models_own_logits(vlm, batch):
    """The reference is only worth something if it is the model."""
    acts = by_hand(vlm.model, batch.inputs["input_ids"], batch.inputs["pixel_values"])
    with torch.inference_mode():
        plain = vlm.model(**batch.inputs).logits
        site = vlm.site("language.1")
        with hooked(
            {"here": vlm.model.get_submodule(site.path)}, lambda _name, _out: acts["language.1"]
        ):
            replaced = vlm.model(**batch.inputs).logits
        with hooked(
            {"here": vlm.model.get_submodule(site.path)}, lambda _name, out: torch.zeros_like(out)
        ):
            silenced = vlm.model(**batch.inputs).logits
    attended = batch.inputs["attention_mask"] == 1
    torch.testing.assert_close(replaced[attended], plain[attended], atol=1e-3, rtol=1e-3)
    assert (silenced - plain)[attended].abs().max() > 0.1


def test_record_hands_every_site_once_in_order_with_the_map_of_its_stream(vlm, batch):
    sink = Kept()
    with nl.record(vlm, None, sink, batch.tokens), torch.inference_mode():
        vlm.model(**batch.inputs)
    assert sink.sites == list(vlm.sites)
    inputs = batch.inputs
    reference = by_hand(
        vlm.model, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    )
    assert_recorded(sink.activations, reference, inputs["attention_mask"])
    for name, tokens in sink.tokens.items():
        assert tokens is batch.tokens[vlm.sites[name].stream]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_in_a_batch_gives_the_activations_it_gives_alone(vlm, scenes, side):
    processor = copy.deepcopy(vlm.processor)
    processor.tokenizer.padding_side = side
    padded = nl.adapt(vlm.model, processor)

    def recorded(samples):
        batch, sink = nl.encode(padded, samples), Kept()
        with nl.record(vlm, None, sink, batch.tokens), torch.inference_mode():
            vlm.model(**batch.inputs)
        return {
            name: [act.flatten(0, 1)[sink.tokens[name].where(n)] for n in range(len(samples))]
            for name, act in sink.activations.items()
        }

    together = recorded(scenes[:4])
    lengths = {len(each) for each in together["language.0"]}
    assert len(lengths) > 1
    for number, scene in enumerate(scenes[:4]):
        for name, (alone,) in recorded([scene]).items():
            torch.testing.assert_close(together[name][number], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "sites", ["language", "vision.1", ["projector", "language.3"], None], ids=str
)
def test_only_the_chosen_sites_are_recorded(vlm, asked, sites):
    with nl.ActivationRecorder(vlm, sites) as recorder, torch.inference_mode():
        vlm.model(**asked.inputs)
    wanted = [site.name for site in vlm.select(sites)]
    assert list(recorder.activations) == list(recorder.sites) == wanted


def test_a_sink_is_handed_activations_without_their_history(vlm, asked):
    sink = Kept()
    with nl.record(vlm, None, sink, asked.tokens):
        vlm.model(**asked.inputs)
    assert not any(activation.requires_grad for activation in sink.activations.values())


def test_a_name_that_is_no_site_is_refused_before_anything_runs(vlm):
    with pytest.raises(UnknownNameError, match=r"Closest: .*language\.3"):
        nl.ActivationRecorder(vlm, "language.4")


def test_what_is_recorded_is_a_copy_without_gradient_of_the_models_own_precision(vlm, asked):
    seen = []
    watch = vlm.model.get_submodule(vlm.site("language.2").path).register_forward_hook(
        lambda _m, _a, out: seen.append(out)
    )
    try:
        with nl.ActivationRecorder(vlm, "language.2", device="cpu") as recorder:
            vlm.model(**asked.inputs)
    finally:
        watch.remove()
    computed = seen[0].detach().clone()
    with torch.no_grad():
        seen[0].zero_()  # as a later in-place operation of the model might
    kept = recorder.activations["language.2"]
    assert seen[0].requires_grad
    assert not kept.requires_grad
    assert kept.dtype == seen[0].dtype
    assert torch.equal(kept, computed)


def test_activations_of_a_half_precision_model_stay_in_half_precision(bed, asked):
    model = copy.deepcopy(bed.model).to(torch.bfloat16)
    vlm = nl.adapt(model, bed.processor)
    with nl.ActivationRecorder(vlm, None) as recorder, torch.inference_mode():
        model(**asked.inputs | {"pixel_values": asked.inputs["pixel_values"].bfloat16()})
    assert {act.dtype for act in recorder.activations.values()} == {torch.bfloat16}


def test_recording_changes_no_bit_of_the_logits_and_leaves_nothing_behind(vlm, batch):
    before = hooks_of(vlm.model)
    with torch.inference_mode():
        plain = vlm.model(**batch.inputs).logits
        with nl.ActivationRecorder(vlm, None) as recorder:
            assert hooks_of(vlm.model) > before
            recorded = vlm.model(**batch.inputs).logits
        assert hooks_of(vlm.model) == before
        with nl.record(vlm, None, Kept(), batch.tokens):
            handed = vlm.model(**batch.inputs).logits
        after = vlm.model(**batch.inputs).logits
    assert hooks_of(vlm.model) == before
    for each in (recorded, handed, after):
        assert torch.equal(each, plain)
    assert len(recorder.runs) == 1  # the forwards after the block are not in it


def test_nothing_is_left_behind_when_the_block_raises(vlm, asked):
    before = hooks_of(vlm.model)
    with pytest.raises(ArithmeticError), nl.ActivationRecorder(vlm, None):
        raise ArithmeticError
    with pytest.raises(ValueError, match="image size"), nl.ActivationRecorder(vlm, None):
        vlm.model(input_ids=asked.inputs["input_ids"], pixel_values=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ArithmeticError), nl.record(vlm, None, Kept(), asked.tokens):
        raise ArithmeticError
    assert hooks_of(vlm.model) == before


def test_a_recorder_forgets_its_last_block_when_it_enters_another(vlm, asked):
    recorder = nl.ActivationRecorder(vlm, "language.0")
    with recorder, torch.inference_mode():
        vlm.model(**asked.inputs)
    first = recorder.activations["language.0"]
    one = {name: value[:1] for name, value in asked.inputs.items()}
    with recorder, torch.inference_mode():
        vlm.model(**one)
    torch.testing.assert_close(recorder.activations["language.0"], first[:1], atol=1e-5, rtol=1e-4)


def test_inputs_may_be_given_by_position_and_the_mask_left_out(vlm, asked):
    ids, pixels = asked.inputs["input_ids"], asked.inputs["pixel_values"]
    with nl.ActivationRecorder(vlm, None) as recorder, torch.inference_mode():
        vlm.model(ids, pixels)
    assert_recorded(recorder.activations, by_hand(vlm.model, ids, pixels))
    assert torch.equal(recorder.tokens["vision"].role, asked.tokens["vision"].role)


def test_tokens_are_those_of_the_inputs(vlm, batch):
    with nl.ActivationRecorder(vlm, None) as recorder, torch.inference_mode():
        vlm.model(**batch.inputs)
    for stream, tokens in vlm.tokens(batch.inputs).items():
        told = recorder.tokens[stream]
        for name in ("role", "sample", "image", "box"):
            torch.testing.assert_close(getattr(told, name), getattr(tokens, name), equal_nan=True)


# Generation.


NEW = 6
WAYS = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 30},
    "chunks of which the last is one token": {"prefill_chunk_size": 35},
    "chunks of which the first has no image": {"prefill_chunk_size": 2},
}
# Before transformers 5.23, a prompt in chunks is read without its image.
SEEING = [
    way
    for way, how in WAYS.items()
    if "prefill_chunk_size" not in how or hasattr(generation, "_slice_mm_encoder_output")
]


def generated(vlm, batch, sites=None, **how):
    with nl.ActivationRecorder(vlm, sites) as recorder:
        out = vlm.model.generate(**batch.inputs, do_sample=False, **{"max_new_tokens": NEW} | how)
    return recorder, out


def fed(batch, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What entered the model, as the arguments of one teacher-forced forward."""
    ids, mask = out[:, :-1], batch.inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
    return ids, batch.inputs["pixel_values"], mask


def ended_early(out: Tensor, prompt: int, end: int) -> list[list[Role]]:
    """Roles the fed generated tokens should have: until the first end, the end, then padding."""
    roles = []
    for row in out[:, prompt:-1].tolist():
        n = row.index(end) if end in row else len(row)
        end_role = [Role.SPECIAL if end == 2 else Role.RESPONSE] * (n < len(row))
        roles.append([Role.RESPONSE] * n + end_role + [Role.PAD] * (len(row) - n - 1))
    return roles


@pytest.mark.parametrize("way", SEEING)
def test_generation_records_what_one_teacher_forced_forward_gives(vlm, asked, way):
    recorder, out = generated(vlm, asked, **WAYS[way])
    prompt = asked.inputs["input_ids"].shape[1]
    assert prompt % 35 == 1
    assert out.shape == (2, prompt + NEW)
    assert recorder.activations["language.3"].shape == (2, prompt + NEW - 1, 384)
    assert recorder.activations["vision.0"].shape == (2, 65, 256)
    assert set(recorder.activations) == set(vlm.sites)
    assert_recorded(recorder.activations, by_hand(vlm.model, *fed(asked, out)))


@pytest.mark.parametrize("way", SEEING)
def test_generation_with_padding_records_what_one_teacher_forced_forward_gives(vlm, padded, way):
    recorder, out = generated(vlm, padded, **WAYS[way])
    ids, pixels, mask = fed(padded, out)
    assert_recorded(recorder.activations, by_hand(vlm.model, ids, pixels, mask), mask)


@pytest.mark.parametrize("prompts", ["asked", "padded"])
@pytest.mark.parametrize("way", WAYS)
def test_after_generation_the_prompt_has_its_roles_and_what_is_new_is_the_response(
    vlm, request, prompts, way
):
    batch = request.getfixturevalue(prompts)
    recorder, out = generated(vlm, batch, **WAYS[way])
    tokens = recorder.tokens
    prompt = vlm.tokens(batch.inputs)
    length = prompt["language"].role.shape[1]
    # A last chunk of one token cannot be told from a generated one (see the class).
    chunk = WAYS[way].get("prefill_chunk_size", length)
    sure = length - (length % chunk == 1)
    assert tokens["language"].role[:, :sure].tolist() == prompt["language"].role[:, :sure].tolist()
    assert tokens["language"].role[:, length:].tolist() == ended_early(out, length, end=2)
    for name in ("sample", "image", "box"):
        told = getattr(tokens["language"], name)[:, :length]
        torch.testing.assert_close(told, getattr(prompt["language"], name), equal_nan=True)
    assert tokens["language"].sample.tolist() == [
        [0] * (length + NEW - 1),
        [1] * (length + NEW - 1),
    ]
    assert (tokens["language"].image[:, length:] == -1).all()
    assert tokens["language"].box[:, length:].isnan().all()
    for name, act in recorder.activations.items():
        assert act.shape[:-1] == tokens[vlm.sites[name].stream].role.shape


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["dynamic cache", "static cache", "prompt in chunks"])
def test_padding_is_known_whatever_form_the_models_mask_takes(bed, padded, attention, way):
    model = copy.deepcopy(bed.model)
    model.set_attn_implementation(attention)
    recorder, _ = generated(nl.adapt(model, bed.processor), padded, "language.0", **WAYS[way])
    role = recorder.tokens["language"].role[:, : padded.inputs["attention_mask"].shape[1]]
    assert torch.equal(role == Role.PAD, padded.inputs["attention_mask"] == 0)


def test_recording_does_not_change_what_is_generated(vlm, asked):
    for how in (*WAYS.values(), {"num_beams": 3}):
        plain = vlm.model.generate(**asked.inputs, do_sample=False, max_new_tokens=NEW, **how)
        assert torch.equal(generated(vlm, asked, **how)[1], plain)


def test_a_prompt_without_an_image_can_be_generated_from(vlm):
    ids = torch.tensor([[1, 5, 25, 7, 8, 9, 6]])
    with nl.ActivationRecorder(vlm, "language") as recorder:
        out = vlm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4
        )
    with nl.ActivationRecorder(vlm, "language") as forced, torch.inference_mode():
        vlm.model(input_ids=out[:, :-1])
    for name, act in recorder.activations.items():
        torch.testing.assert_close(act, forced.activations[name], **CLOSE)
    assert list(recorder.tokens) == ["language"]


def test_a_row_that_ended_is_padding_while_others_go_on(vlm, scenes):
    asked = nl.encode(vlm, [replace(scene, response=None) for scene in scenes[:6]])
    prompt = asked.inputs["input_ids"].shape[1]
    recorder, out = generated(vlm, asked, "language.0", max_new_tokens=80)
    wanted = ended_early(out, prompt, end=2)
    assert len({row.count(Role.PAD) for row in wanted}) > 1
    tokens = recorder.tokens["language"]
    assert tokens.role[:, prompt:].tolist() == wanted
    for row, roles in enumerate(wanted):
        assert len(tokens.where(row)) == prompt + len(roles) - roles.count(Role.PAD)


def test_a_row_that_ended_on_a_token_given_to_generate_is_padding_too(vlm, asked):
    prompt = asked.inputs["input_ids"].shape[1]
    plain = generated(vlm, asked, "language.0", max_new_tokens=12)[1][:, prompt:].tolist()
    end = next(token for token in plain[0][:8] if token not in plain[1])
    recorder, out = generated(vlm, asked, "language.0", max_new_tokens=12, eos_token_id=end)
    wanted = ended_early(out, prompt, end)
    assert Role.PAD in wanted[0]
    assert [
        [r == Role.PAD for r in row]
        for row in recorder.tokens["language"].role[:, prompt:].tolist()
    ] == [[r == Role.PAD for r in row] for row in wanted]


def test_a_loop_of_ones_own_with_a_cache_is_recorded_as_one_sequence(vlm, asked):
    ids, pixels = asked.inputs["input_ids"], asked.inputs["pixel_values"]
    for cache in (
        DynamicCache(config=vlm.model.config.text_config),
        StaticCache(config=vlm.model.config.text_config, max_cache_len=80),
    ):
        with nl.ActivationRecorder(vlm, None) as recorder, torch.inference_mode():
            out = vlm.model(input_ids=ids, pixel_values=pixels, past_key_values=cache)
            grown = ids
            for _ in range(3):
                grown = torch.cat([grown, out.logits[:, -1:].argmax(-1)], 1)
                out = vlm.model(input_ids=grown[:, -1:], past_key_values=cache)
        assert_recorded(recorder.activations, by_hand(vlm.model, grown, pixels))
        assert recorder.tokens["language"].role.shape == grown.shape


@torch.inference_mode()
def test_a_recorder_does_not_keep_the_cache_alive(vlm, asked):
    cache = DynamicCache(config=vlm.model.config.text_config)
    with nl.ActivationRecorder(vlm, "language.0") as recorder:
        out = vlm.model(**asked.inputs, past_key_values=cache)
        vlm.model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=cache)
    alive = weakref.ref(cache)
    del cache, out
    gc.collect()
    assert alive() is None
    assert recorder.activations["language.0"].shape[1] == 72


@torch.inference_mode()
def test_a_loop_of_ones_own_without_a_cache_keeps_every_token_and_image_once(vlm, asked):
    grown, pixels = asked.inputs["input_ids"], asked.inputs["pixel_values"]
    with nl.ActivationRecorder(vlm, None) as recorder:
        for _ in range(3):
            out = vlm.model(input_ids=grown, pixel_values=pixels, use_cache=False)
            grown = torch.cat([grown, out.logits[:, -1:].argmax(-1)], 1)
    assert_recorded(recorder.activations, by_hand(vlm.model, grown[:, :-1], pixels))


@pytest.fixture
def counting():
    """A compile config that compiles on any machine and counts how often compiled code ran."""
    torch._dynamo.reset()
    runs = []

    def backend(graph, _inputs):
        def run(*args):
            runs.append("compiled")
            return graph.forward(*args)

        return run

    config = CompileConfig(fullgraph=False, backend=backend, mode=None)
    config._compile_all_devices = True
    yield config, runs
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about transformers' code
def test_a_static_cache_that_would_compile_is_run_uncompiled_and_recorded_fully(
    bed, asked, counting
):
    config, runs = counting
    model = testbed.untrained()  # a compiled call stays with the model
    vlm = nl.adapt(model, bed.processor)
    how = {"max_new_tokens": 4, "cache_implementation": "static", "compile_config": config}
    plain = model.generate(**asked.inputs, **how, do_sample=False)
    compiled = len(runs)
    assert compiled > 0
    recorder, out = generated(vlm, asked, **how)
    assert len(runs) == compiled
    assert torch.equal(out, plain)
    assert_recorded(recorder.activations, by_hand(model, *fed(asked, out)))
    model.generate(**asked.inputs, **how, do_sample=False)
    assert len(runs) > compiled  # and compiled again afterwards


# Beams.


def beams(vlm, batch, **how):
    how = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True} | how
    return generated(vlm, batch, **how)


@pytest.mark.parametrize("end", [2, "the word that some beams end on"])
def test_followed_beams_are_teacher_forced_forwards_of_the_returned_sequences(vlm, asked, end):
    prompt = asked.inputs["input_ids"].shape[1]
    length, how = 8, {}
    if end != 2:
        first = beams(vlm, asked, max_new_tokens=length)[1].sequences[:, prompt:]
        end = int(first[0, 6])
        how = {"eos_token_id": end, "length_penalty": 0.1}
    recorder, out = beams(vlm, asked, max_new_tokens=length, **how)
    followed = recorder.follow(out.beam_indices)
    assert list(followed) == [site.name for site in vlm.select("language")]
    pixels = asked.inputs["pixel_values"].repeat_interleave(2, 0)
    reference = by_hand(vlm.model, out.sequences[:, :-1], pixels)
    kept = [
        row.index(end) + 1 if end in row else len(row) for row in out.sequences[:, prompt:].tolist()
    ]
    if how:
        assert len(set(kept)) > 1
    for name, act in followed.items():
        assert act.shape[0] == 4
        for row, new in enumerate(kept):
            there = prompt + new - 1
            torch.testing.assert_close(act[row, :there], reference[name][row, :there], **CLOSE)
            assert act[row, there:].isnan().all()


def test_beams_were_swapped_so_that_following_them_matters(vlm, asked):
    recorder, out = beams(vlm, asked, max_new_tokens=8)
    rows = out.beam_indices
    assert any(len(set(row.tolist()) - {-1}) > 1 for row in rows)
    kept = recorder.activations["language.3"]
    followed = recorder.follow(rows)["language.3"]
    assert any(not torch.equal(followed[n], kept[rows[n, 0]]) for n in range(len(rows)))


def test_a_row_of_beams_is_sample_times_beams_plus_beam_and_images_are_encoded_once(vlm, asked):
    recorder, _ = beams(vlm, asked)
    prompt = asked.inputs["input_ids"].shape[1]
    kept, tokens = recorder.activations, recorder.tokens
    assert kept["language.0"].shape == (6, prompt + NEW - 1, 384)
    assert kept["vision.0"].shape == (2, 65, 256)
    reference = by_hand(vlm.model, asked.inputs["input_ids"], asked.inputs["pixel_values"])
    for row in range(6):
        torch.testing.assert_close(
            kept["language.3"][row, :prompt], reference["language.3"][row // 3], **CLOSE
        )
    torch.testing.assert_close(kept["vision.2"], reference["vision.2"], **CLOSE)
    for name, act in kept.items():
        assert act.shape[:-1] == tokens[vlm.sites[name].stream].role.shape


# What cannot be recorded as promised.


def test_two_unrelated_forwards_are_two_runs_and_not_one_activation(vlm, asked, scenes):
    other = nl.encode(vlm, scenes[5:6])
    with nl.ActivationRecorder(vlm, None) as recorder, torch.inference_mode():
        vlm.model(**asked.inputs)
        vlm.model(**other.inputs)
    with pytest.raises(CaptureError, match=r"2 sequences .*recorder\.runs"):
        recorder.activations  # noqa: B018
    with pytest.raises(CaptureError, match="2 sequences"):
        recorder.tokens  # noqa: B018
    assert len(recorder.runs) == 2
    for run, batch in zip(recorder.runs, (asked, other), strict=True):
        inputs = batch.inputs
        assert_recorded(run, by_hand(vlm.model, inputs["input_ids"], inputs["pixel_values"]))


def test_another_prompt_of_one_token_more_is_another_run_and_not_a_step(vlm, asked, scenes):
    longer = [
        replace(scene, response=None, prompt="describe the image . what") for scene in scenes[:2]
    ]
    other = nl.encode(vlm, longer)
    assert other.inputs["input_ids"].shape[1] == asked.inputs["input_ids"].shape[1] + 1
    with nl.ActivationRecorder(vlm) as recorder, torch.inference_mode():
        vlm.model(**asked.inputs)
        vlm.model(**other.inputs)
    assert [run["language.0"].shape[1] for run in recorder.runs] == [71, 72]


def test_two_generations_are_two_runs(vlm, asked):
    with nl.ActivationRecorder(vlm, None) as recorder:
        outs = [
            vlm.model.generate(
                **{name: value[n : n + 1] for name, value in asked.inputs.items()},
                do_sample=False,
                max_new_tokens=3,
            )
            for n in range(2)
        ]
    with pytest.raises(CaptureError, match="2 sequences"):
        recorder.activations  # noqa: B018
    for n, (run, out) in enumerate(zip(recorder.runs, outs, strict=True)):
        pixels = asked.inputs["pixel_values"][n : n + 1]
        assert_recorded(run, by_hand(vlm.model, out[:, :-1], pixels))


def test_a_run_of_text_alone_has_nothing_of_the_image_before_it(vlm, asked):
    with nl.ActivationRecorder(vlm, None) as recorder, torch.inference_mode():
        vlm.model.generate(**asked.inputs, do_sample=False, max_new_tokens=2)
        vlm.model(input_ids=torch.tensor([[1, 5, 7]]))
    with_image, without = recorder.runs
    assert set(with_image) == set(vlm.sites)
    assert set(without) == {site.name for site in vlm.select("language")}


def test_nothing_run_is_no_activation(vlm):
    with pytest.raises(CaptureError, match="never ran"), nl.ActivationRecorder(vlm) as recorder:
        pass
    with pytest.raises(CaptureError, match="0 sequences"):
        recorder.activations  # noqa: B018


@pytest.mark.parametrize("part", ["model", "model.language_model"])
def test_calling_a_part_of_the_model_is_refused(vlm, part):
    inner = vlm.model.get_submodule(part)
    with pytest.raises(CaptureError, match="Call the model itself"), nl.ActivationRecorder(vlm):
        inner(input_ids=torch.tensor([[1, 5, 7]]))


@torch.inference_mode()
def test_a_part_called_after_the_model_is_refused_too(vlm, asked):
    with nl.ActivationRecorder(vlm) as recorder:
        vlm.model(**asked.inputs)
        with pytest.raises(CaptureError, match="outside a call"):
            vlm.model.model.language_model(input_ids=torch.tensor([[1, 5, 7]]))
    assert recorder.activations["language.0"].shape[:2] == asked.inputs["input_ids"].shape


def test_embeddings_in_place_of_ids_are_refused(vlm):
    embedded = vlm.model.get_input_embeddings()(torch.tensor([[1, 5, 7]])).detach()
    with pytest.raises(CaptureError, match="not inputs_embeds"), nl.ActivationRecorder(vlm):
        vlm.model(inputs_embeds=embedded)


@pytest.mark.parametrize("sites", ["vision", None], ids=str)
def test_text_alone_cannot_be_recorded_where_images_are_seen(vlm, sites):
    text = {"input_ids": torch.tensor([[1, 5, 7]])}
    with (
        pytest.raises(CaptureError, match=r"vision\.0.*with an image"),
        nl.ActivationRecorder(vlm, sites),
    ):
        vlm.model(**text)
    with (
        pytest.raises(CaptureError, match=r"vision\.0"),
        nl.record(vlm, sites, Kept(), vlm.tokens(text)),
    ):
        vlm.model(**text)
    with nl.ActivationRecorder(vlm, "language") as recorder:
        vlm.model(**text)
    assert recorder.activations["language.0"].shape == (1, 3, 384)


def test_a_recorder_that_starts_in_the_middle_is_refused(vlm, asked):
    with torch.inference_mode():
        out = vlm.model(**asked.inputs, use_cache=True)
        new = out.logits[:, -1:].argmax(-1)
        with (
            pytest.raises(CaptureError, match="continues 71 cached tokens, but 0 were recorded"),
            nl.ActivationRecorder(vlm),
        ):
            vlm.model(input_ids=new, past_key_values=out.past_key_values)


@torch.inference_mode()
def test_a_cache_that_went_back_is_refused(vlm, asked):
    ids, pixels = asked.inputs["input_ids"], asked.inputs["pixel_values"]
    with nl.ActivationRecorder(vlm):
        out = vlm.model(input_ids=ids, pixel_values=pixels, use_cache=True)
        out.past_key_values.crop(-1)
        with pytest.raises(CaptureError, match="continues 70 cached tokens, but 71"):
            vlm.model(input_ids=ids[:, -1:], past_key_values=out.past_key_values)


def test_assisted_decoding_is_refused(vlm, asked):
    one = {name: value[:1] for name, value in asked.inputs.items()}
    with pytest.raises(CaptureError, match="assisted decoding"), nl.ActivationRecorder(vlm):
        vlm.model.generate(**one, do_sample=False, max_new_tokens=40, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("other", ["of other samples", "of a longer batch", "of one sample"])
def test_record_refuses_a_token_map_of_other_inputs(vlm, scenes, asked, other):
    wrong = {
        "of other samples": lambda: nl.encode(vlm, scenes[:2]).tokens,
        "of a longer batch": lambda: (
            nl.encode(vlm, [replace(s, response=None) for s in scenes[:3]]).tokens
        ),
        "of one sample": lambda: {name: tokens.of(0) for name, tokens in asked.tokens.items()},
    }[other]()
    with (
        pytest.raises(CaptureError, match="Are the token maps those of these inputs"),
        torch.inference_mode(),
        nl.record(vlm, "language", Kept(), wrong),
    ):
        vlm.model(**asked.inputs)


def test_record_needs_a_map_of_every_stream_it_reads(vlm, asked):
    language = {"language": asked.tokens["language"]}
    with (
        pytest.raises(
            CaptureError, match=r"vision\.0 runs on the stream 'vision'.*given: language"
        ),
        nl.record(vlm, None, Kept(), language),
        torch.inference_mode(),
    ):
        vlm.model(**asked.inputs)


@torch.inference_mode()
def test_record_takes_one_forward_per_block(vlm, asked):
    with nl.record(vlm, "language", Kept(), asked.tokens):
        vlm.model(**asked.inputs)
        with pytest.raises(CaptureError, match=r"language\.0 ran twice.*ActivationRecorder"):
            vlm.model(**asked.inputs)


def test_a_follower_of_two_runs_is_refused(vlm, asked):
    with nl.ActivationRecorder(vlm) as recorder, torch.inference_mode():
        vlm.model(**asked.inputs)
        vlm.model(**asked.inputs)
    with pytest.raises(CaptureError, match="2 sequences"):
        recorder.follow(torch.zeros(1, 1, dtype=torch.long))


# A forward that ends early.


class Copied(Kept):
    """A sink that keeps a copy."""

    def take(self, site, activation, tokens) -> None:
        copied = activation.copy() if isinstance(activation, Routed) else activation.clone()
        super().take(site, copied, tokens)


def assert_same_bits(one, other) -> None:
    if isinstance(one, Routed):
        assert torch.equal(one.expert, other.expert)
        one, other = one.values, other.values
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def forwards_of(model) -> dict[str, int]:
    """Counts, from now on, how often each module has run."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():

        def count(_module, _args, _out, name=name) -> None:
            counts[name] = counts.get(name, 0) + 1

        module.register_forward_hook(count)
    return counts


@torch.inference_mode()
@pytest.mark.parametrize(
    "sites", ["vision.1", "projector", "language.0", ["language.2", "vision.0"], None], ids=str
)
def test_a_stopped_forward_hands_over_the_bits_of_a_whole_one(vlm, batch, sites):
    whole, stopped = Kept(), Kept()
    with nl.record(vlm, sites, whole, batch.tokens):
        vlm.model(**batch.inputs)
    with nl.record(vlm, sites, stopped, batch.tokens, stop=True):
        vlm.model(**batch.inputs)
    assert stopped.sites == whole.sites == [site.name for site in vlm.select(sites)]
    for name in whole.sites:
        assert torch.equal(stopped.activations[name], whole.activations[name])


@torch.inference_mode()
def test_nothing_behind_the_deepest_chosen_site_is_run(bed, batch):
    model = copy.deepcopy(bed.model)
    vlm, ran = nl.adapt(model, bed.processor), forwards_of(model)
    with nl.record(vlm, ["language.1", "vision.0"], Kept(), batch.tokens, stop=True):
        vlm.model(**batch.inputs)
        ran["what stands behind the forward"] = 1
    layers = "model.language_model.layers"
    assert ran[f"{layers}.1.mlp.gate_proj"] == 1
    assert not {f"{layers}.1.mlp.down_proj", f"{layers}.2.mlp.gate_proj", "lm_head"} & set(ran)
    assert "what stands behind the forward" not in ran
    with nl.record(vlm, ["language.1", "vision.0"], Kept(), batch.tokens):
        vlm.model(**batch.inputs)
    assert ran[f"{layers}.1.mlp.down_proj"] == ran["lm_head"] == 1  # unless it is asked to stop


ENDED = [
    "llava",
    "qwen2_5_vl",
    "mllama",
    "instructblip",
    "idefics",
    "florence2",
    "blip-2+t5",
    "qwen3_vl_moe",
    "llama4",
    "gemma3",
    "gemma4",
    "paligemma",
    "lfm2_vl",
]


@torch.no_grad()
@pytest.mark.parametrize("name", ENDED)
def test_every_site_can_be_the_last_and_the_model_is_afterwards_what_it_was(name):
    entry = ZOO[name]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    tokens, whole = vlm.tokens(inputs), Copied()
    plain = model(**inputs).logits
    with nl.record(vlm, None, whole, tokens):
        model(**inputs)
    hooks = hooks_of(model)
    for site in vlm.sites:
        stopped = Copied()
        ended = True
        with nl.record(vlm, site, stopped, tokens, stop=True):
            model(**inputs)
            ended = False
        assert ended
        assert stopped.sites == [site]
        assert_same_bits(stopped.activations[site], whole.activations[site])
        assert hooks_of(model) == hooks
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["internvl", "blip-2", "llava"])
def test_weights_that_were_brought_in_for_a_stopped_forward_are_taken_away_again(name):
    entry = ZOO[name]
    model = entry.model()
    inputs = entry.inputs(model, entry.images())
    plain = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    vlm = nl.adapt(model)
    assert torch.equal(model(**inputs).logits, plain)

    def away() -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.is_meta]

    before = away()
    assert before
    for site in vlm.sites:
        with nl.record(vlm, site, Kept(), vlm.tokens(inputs), stop=True):
            model(**inputs)
        assert away() == before
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_a_chosen_site_that_is_left_out_lets_the_forward_run_to_its_end():
    entry = ZOO["mllama"]
    model = entry.model()
    vlm = nl.adapt(model)
    conditional = next(site for site in vlm.sites.values() if "conditional" in site.flags)
    ids = torch.tensor([[1, 5, 7]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sink, logits = Kept(), None
    with nl.record(vlm, ["language.0", conditional], sink, vlm.tokens(text), stop=True):
        logits = model(**text).logits
    assert sink.sites == ["language.0"]
    assert torch.equal(logits, model(**text).logits)


@torch.no_grad()
def test_a_kernel_that_goes_around_a_block_is_missed_although_the_forward_is_stopped():
    entry = ZOO["lfm2_vl"]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    site = next(s for s in vlm.sites.values() if type(vlm.tap(s)).__name__ == "Functional")
    last = max(s.layer for s in vlm.sites.values() if s.module == site.module)
    site = vlm.sites[f"{site.module}.{last}"]
    tap = vlm.tap(site)
    block = model.get_submodule(tap.path)
    before = model.get_submodule(tap.before)
    block.forward = lambda x: x + before(x).sum() * 0
    for stop in (False, True):
        with (
            pytest.raises(CaptureError, match=rf"{site.name}"),
            nl.record(vlm, site, Kept(), vlm.tokens(inputs), stop=stop),
        ):
            model(**inputs)


def test_a_site_that_never_runs_is_missed_although_a_stop_was_asked_for(vlm):
    text = {"input_ids": torch.tensor([[1, 5, 7]])}
    with (
        pytest.raises(CaptureError, match=r"vision\.0.*with an image"),
        nl.record(vlm, ["vision.0", "language.0"], Kept(), vlm.tokens(text), stop=True),
    ):
        vlm.model(**text)


class Broken:
    """A sink that cannot take anything."""

    def take(self, site, activation, tokens) -> None:
        raise ArithmeticError(site.name)


def test_errors_in_a_block_that_would_stop_are_the_users(vlm, asked):
    before = hooks_of(vlm.model)
    with (
        pytest.raises(ArithmeticError, match="mine"),
        nl.record(vlm, "language.0", Kept(), asked.tokens, stop=True),
    ):
        raise ArithmeticError("mine")
    with (
        pytest.raises(ArithmeticError, match=r"language\.0"),
        nl.record(vlm, "language.0", Broken(), asked.tokens, stop=True),
    ):
        vlm.model(**asked.inputs)
    assert hooks_of(vlm.model) == before


@torch.inference_mode()
def test_the_block_within_another_that_is_stopped_ends_with_it(vlm, asked):
    outer, inner, before = Kept(), Kept(), hooks_of(vlm.model)
    with nl.record(vlm, "language.0", outer, asked.tokens, stop=True):
        with nl.record(vlm, "language.2", inner, asked.tokens, stop=True):
            vlm.model(**asked.inputs)
        pytest.fail("the outer block goes on")
    assert (outer.sites, inner.sites) == (["language.0"], [])
    with (
        pytest.raises(CaptureError, match="never ran"),
        nl.record(vlm, "language.2", outer, asked.tokens),
        nl.record(vlm, "language.0", inner, asked.tokens, stop=True),
    ):
        vlm.model(**asked.inputs)
    assert hooks_of(vlm.model) == before


class Silent:
    """A sink that keeps nothing."""

    def take(self, site, activation, tokens) -> None:
        return


def test_a_stopped_forward_keeps_nothing_alive(vlm, asked):
    alive = []
    module = vlm.model.get_submodule("model.language_model.layers.0")
    hook = module.register_forward_pre_hook(lambda _m, args: alive.append(weakref.ref(args[0])))
    gc.collect()
    gc.disable()
    try:
        with (
            torch.inference_mode(),
            nl.record(vlm, "language.0", Silent(), asked.tokens, stop=True),
        ):
            vlm.model(**asked.inputs)
        assert len(alive) == 1
        assert alive[0]() is None
    finally:
        gc.enable()
        hook.remove()

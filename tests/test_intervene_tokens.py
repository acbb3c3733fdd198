"""Interventions at some tokens: against plain hooks that edit the tensors by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation import utils as generation

import neuronlens as nl
from neuronlens.errors import AdapterError, CaptureError, InterventionError
from zoo import entries

ZOO = entries()
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PAD, BOS, EOS, IMAGE, USER, ASSISTANT = 0, 1, 2, 4, 5, 6
"""Ids of the testbed's tokenizer."""
NEVER = [0, 1, 2, 3, 4]
"""Special tokens, which generation is kept from giving."""

LANGUAGE = [nl.NeuronId(f"language.{n}", index) for n in (1, 2) for index in range(0, 384, 5)]
VISION = [nl.NeuronId("vision.1", index) for index in range(0, 256, 3)]
PROJECTOR = [nl.NeuronId("projector.0", index) for index in range(0, 128, 2)]
EVERY = [*LANGUAGE, *VISION, *PROJECTOR]

KINDS: dict[str, tuple[Callable[..., nl.Intervention], Callable[[Tensor], Tensor]]] = {
    "deactivate": (lambda *a, **k: nl.deactivate(*a, **k), lambda old: old * 0),
    "amplify": (lambda *a, **k: nl.amplify(*a, 2.5, **k), lambda old: old * 2.5),
    "set_to": (lambda *a, **k: nl.set_to(*a, 1.25, **k), lambda old: old * 0 + 1.25),
}
Meant = Callable[[str, int, int], bool]
"""Whether an activation is changed: of which site, in which row, at which token."""


def module_of(vlm: nl.ModelAdapter, site: str) -> nn.Module:
    part, layer = site.split(".")
    model = vlm.model.model
    if part == "language":
        return model.language_model.layers[int(layer)].mlp.act_fn
    if part == "vision":
        return model.vision_tower.encoder.layers[int(layer)].mlp.activation_fn
    return model.multi_modal_projector.act


@contextmanager
def by_hand(
    vlm: nl.ModelAdapter,
    neurons: Sequence[nl.NeuronId],
    change: Callable[[Tensor], Tensor],
    is_meant: Meant,
) -> Iterator[None]:
    """Plain hooks that go through the rows and tokens of each tensor."""
    by_site: dict[str, list[int]] = {}
    for neuron in neurons:
        by_site.setdefault(neuron.site, []).append(neuron.index)
    with ExitStack() as stack:
        for site, index in by_site.items():

            def write(_m: Any, _a: Any, out: Tensor, site: str = site, at: Any = index) -> Tensor:
                new = out.clone()
                for row in range(out.shape[0]):
                    for token in range(out.shape[1]):
                        if is_meant(site, row, token):
                            new[row, token, at] = change(out[row, token, at])
                return new

            stack.callback(module_of(vlm, site).register_forward_hook(write).remove)
        yield


def roles_of(row: Sequence[int], *, start: int, markers: bool) -> list[str]:
    """Of a row of ids whose response begins at `start`; template markers may be special."""
    special = {BOS, EOS, *((USER, ASSISTANT) if markers else ())}
    return [
        "pad"
        if token == PAD
        else "visual"
        if token == IMAGE
        else "special"
        if token in special
        else "prompt"
        if at < start
        else "response"
        for at, token in enumerate(row)
    ]


def covers(role: str, wanted: str | Sequence[str]) -> bool:
    several = [wanted] if isinstance(wanted, str) else wanted
    return role in several or (role in ("prompt", "response") and "text" in several)


def at_roles(roles: Sequence[Sequence[str]], wanted: str | Sequence[str]) -> Meant:
    """The tower's first token is CLS; all others of it and of the projector are visual."""

    def is_meant(site: str, row: int, token: int) -> bool:
        if site.startswith("language"):
            return covers(roles[row][token], wanted)
        is_class = site.startswith("vision") and token == 0
        return covers("special" if is_class else "visual", wanted)

    return is_meant


@pytest.fixture(scope="module")
def batch(vlm, scenes) -> nl.samples.Batch:
    """Three samples of different lengths."""
    short = replace(scenes[1], response=" ".join(str(scenes[1].response).split()[:6]))
    found = nl.encode(vlm, [scenes[0], short, scenes[2]])
    assert (found.inputs["input_ids"] == PAD).any()
    return found


@pytest.fixture(scope="module")
def asked(vlm, scenes) -> nl.samples.Batch:
    """Two prompts of different lengths, padded on the left as generation wants them."""
    return left(vlm, scenes, ["describe the image .", "describe the image . what colour is it ?"])


def left(vlm, scenes, prompts: Sequence[str]) -> nl.samples.Batch:
    processor = copy.deepcopy(vlm.processor)
    processor.tokenizer.padding_side = "left"
    samples = [
        replace(scene, response=None, prompt=prompt)
        for scene, prompt in zip(scenes, prompts, strict=False)
    ]
    return nl.encode(nl.adapt(vlm.model, processor), samples)


@torch.no_grad()
def logits(vlm: nl.ModelAdapter, inputs: Mapping[str, Any]) -> Tensor:
    return vlm.model(**inputs).logits


def real(batch: nl.samples.Batch) -> Tensor:
    return batch.inputs["attention_mask"] == 1


def starts(batch: nl.samples.Batch) -> list[int]:
    """Where the responses begin: behind the second marker."""
    return [row.index(ASSISTANT) + 1 for row in batch.inputs["input_ids"].tolist()]


# Roles.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "roles", ["visual", "text", "prompt", "response", "special", ("visual", nl.Role.RESPONSE)]
)
def test_only_tokens_of_the_roles_are_changed(vlm, batch, kind, roles):
    make, change = KINDS[kind]
    names = [each if isinstance(each, str) else each.name.lower() for each in roles]
    names = [roles] if isinstance(roles, str) else names
    rows = batch.inputs["input_ids"].tolist()
    told = [
        roles_of(row, start=start, markers=True)
        for row, start in zip(rows, starts(batch), strict=True)
    ]
    with by_hand(vlm, EVERY, change, at_roles(told, names)):
        wanted = logits(vlm, batch.inputs)
    plain = logits(vlm, batch.inputs)
    with make(vlm, EVERY, roles=roles, tokens=batch.tokens):
        found = logits(vlm, batch.inputs)
    assert not torch.allclose(wanted[real(batch)], plain[real(batch)], **CLOSE)
    torch.testing.assert_close(found[real(batch)], wanted[real(batch)], **CLOSE)
    assert torch.equal(logits(vlm, batch.inputs), plain)


@pytest.mark.parametrize("roles", ["visual", "text", "special"])
def test_what_a_forward_tells_by_itself_needs_no_token_maps(vlm, batch, roles):
    rows = batch.inputs["input_ids"].tolist()
    told = [roles_of(row, start=0, markers=False) for row in rows]
    with by_hand(vlm, EVERY, lambda old: old * 0, at_roles(told, roles)):
        wanted = logits(vlm, batch.inputs)
    with nl.deactivate(vlm, EVERY, roles=roles):
        found = logits(vlm, batch.inputs)
    torch.testing.assert_close(found[real(batch)], wanted[real(batch)], **CLOSE)


def test_each_role_in_turn_is_every_token(vlm, batch):
    with nl.amplify(vlm, EVERY, 2.5):
        everywhere = logits(vlm, batch.inputs)
    with ExitStack() as stack:
        for roles in ("response", "special", "visual", "prompt"):
            stack.enter_context(nl.amplify(vlm, EVERY, 2.5, roles=roles, tokens=batch.tokens))
        found = logits(vlm, batch.inputs)
    torch.testing.assert_close(found[real(batch)], everywhere[real(batch)], **CLOSE)


# Positions.


def places(batch: nl.samples.Batch, sample: int) -> list[int]:
    """Indices of a sample's tokens in its row, without padding."""
    return [i for i, token in enumerate(batch.inputs["input_ids"][sample].tolist()) if token != PAD]


@pytest.mark.parametrize("kind", KINDS)
def test_only_these_positions_of_every_sample_are_changed(vlm, asked, kind):
    make, change = KINDS[kind]
    rows = [places(asked, 0), places(asked, 1)]
    assert rows[0][0] > 0 == rows[1][0]  # the first is padded on the left
    meant = [{row[0], row[5], row[66], row[-1], row[-3]} for row in rows]
    with by_hand(vlm, LANGUAGE, change, lambda _s, row, token: token in meant[row]):
        wanted = logits(vlm, asked.inputs)
    positions = [0, 5, 66, -1, -3]
    with make(vlm, LANGUAGE, positions=positions, tokens=asked.tokens):
        found = logits(vlm, asked.inputs)
    torch.testing.assert_close(found[real(asked)], wanted[real(asked)], **CLOSE)


def test_each_sample_may_have_positions_of_its_own(vlm, batch):
    wanted_at = [[0, -2], [], [70, 66]]
    prompt = [
        row.index(start - 1) + 1
        for row, start in zip([places(batch, i) for i in range(3)], starts(batch), strict=True)
    ]
    meant = [
        {places(batch, i)[at if at >= 0 else prompt[i] + at] for at in row}
        for i, row in enumerate(wanted_at)
    ]
    with by_hand(vlm, LANGUAGE, lambda old: old * 0, lambda _s, row, token: token in meant[row]):
        wanted = logits(vlm, batch.inputs)
    with nl.deactivate(vlm, LANGUAGE, positions=wanted_at, tokens=batch.tokens):
        found = logits(vlm, batch.inputs)
    torch.testing.assert_close(found[real(batch)], wanted[real(batch)], **CLOSE)


def test_positions_are_those_of_the_stream_that_a_site_runs_on(vlm, batch):
    def is_meant(_site: str, _row: int, token: int) -> bool:
        return token in (0, 3, 64 if _site == "vision.1" else 63)

    with by_hand(vlm, VISION, lambda old: old * 0, is_meant):
        wanted = logits(vlm, batch.inputs)
    with nl.deactivate(vlm, VISION, positions=[0, 3, -1]):
        found = logits(vlm, batch.inputs)
    torch.testing.assert_close(found[real(batch)], wanted[real(batch)], **CLOSE)


def test_roles_and_positions_must_both_hold(vlm, batch):
    meant = {0, 1, 66, 67}
    with by_hand(
        vlm, LANGUAGE, lambda old: old * 0, lambda _s, _row, token: token in meant and token > 1
    ):
        wanted = logits(vlm, batch.inputs)
    with nl.deactivate(vlm, LANGUAGE, positions=sorted(meant), roles="prompt", tokens=batch.tokens):
        found = logits(vlm, batch.inputs)
    torch.testing.assert_close(found[real(batch)], wanted[real(batch)], **CLOSE)


# Samples.


def test_a_batch_changed_by_sample_is_each_sample_changed_by_itself(vlm, scenes):
    samples = scenes[:4]
    batch = nl.encode(vlm, samples)
    sets = [
        nl.amplify(vlm, EVERY[::2], 3.0),
        None,
        nl.deactivate(vlm, VISION, roles="visual"),
        nl.set_to(vlm, LANGUAGE[1::2], 0.5, positions=[3, 67]),
    ]
    with nl.by_sample(vlm, sets) as changed:
        found = logits(vlm, batch.inputs)
    assert set(changed.neurons) == {n for each in sets if each for n in each.neurons}
    for number, (sample, each) in enumerate(zip(samples, sets, strict=True)):
        alone = nl.encode(vlm, [sample])
        with each if each is not None else ExitStack():
            wanted = logits(vlm, alone.inputs)[0]
        torch.testing.assert_close(found[number, : len(wanted)], wanted, **CLOSE)


ORDERED = ["qwen2_5_vl", "qwen3_vl_moe", "mllama", "llava_next", "internvl", "unlimited_ocr"]


@pytest.mark.parametrize("name", ORDERED)
@torch.no_grad()
def test_tiles_and_window_order_belong_to_their_sample(name):
    entry = ZOO[name]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    sites = [site for site in vlm.sites.values() if site.module == "vision" and not site.inert]
    neurons = [site.neuron(index) for site in sites for index in range(0, site.width, 3)]
    off = nl.deactivate(vlm, neurons)
    plain = model(**inputs).logits
    with off:
        everywhere = model(**inputs).logits
    for sample, sets in enumerate(([off, None], [None, off])):
        with nl.by_sample(vlm, sets):
            found = model(**inputs).logits
        torch.testing.assert_close(found[sample], everywhere[sample], **CLOSE)
        torch.testing.assert_close(found[1 - sample], plain[1 - sample], **CLOSE)
        assert not torch.allclose(everywhere[sample], plain[sample], **CLOSE)


@torch.no_grad()
def test_a_forward_that_broke_off_between_tiles_is_forgotten():
    entry = ZOO["unlimited_ocr"]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    site = vlm.site("vision.0")
    calls: list[int] = []

    def halt(*_call: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError

    first = nl.by_sample(
        vlm, [nl.deactivate(vlm, [site.neuron(i) for i in range(site.width)]), None]
    )
    with first:
        wanted = model(**inputs).logits
    handle = model.get_submodule(site.path).register_forward_pre_hook(halt)
    with first:
        with pytest.raises(ArithmeticError):
            model(**inputs)
        handle.remove()
        found = model(**inputs).logits
    torch.testing.assert_close(found, wanted, **CLOSE)


@torch.no_grad()
def test_in_window_order_a_position_is_the_token_that_runs_there():
    entry = ZOO["qwen2_5_vl"]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    site = vlm.site("vision.0")
    neurons = [site.neuron(index) for index in range(site.width)]
    box = vlm.tokens(inputs)["vision"].box
    first = int((vlm.tokens(inputs)["vision"].sample == 0).sum())
    assert (box[1:first, 1] < box[: first - 1, 1]).any()  # not in reading order
    kept: list[Tensor] = []
    down = model.get_submodule(vlm.tap(site).down)
    handle = down.register_forward_pre_hook(lambda _m, args: kept.append(args[0].clone()))
    model(**inputs)
    with nl.deactivate(vlm, neurons, positions=[[2, 7], [1]]):
        model(**inputs)
    handle.remove()
    changed = (kept[0] != kept[1]).any(-1).flatten().nonzero().flatten().tolist()
    assert changed == [2, 7, first + 1]


@torch.no_grad()
def test_class_tokens_of_tiles_are_special_and_patches_visual():
    entry = ZOO["llava_next"]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    site = vlm.site("vision.0")
    kept: list[Tensor] = []
    down = model.get_submodule(vlm.tap(site).down)
    handle = down.register_forward_pre_hook(lambda _m, args: kept.append(args[0].clone()))
    model(**inputs)
    for roles in ("special", "visual"):
        with nl.set_to(vlm, site.neuron(4), 9.0, roles=roles):
            model(**inputs)
    with (
        pytest.warns(UserWarning, match="No token"),
        nl.deactivate(vlm, site.neuron(4), roles="text"),
    ):
        model(**inputs)
    handle.remove()
    tiles, tokens = kept[0].shape[:2]
    changed = [(each != kept[0]).any(-1) for each in kept[1:]]
    is_class = torch.zeros(tiles, tokens, dtype=torch.bool)
    is_class[:, 0] = True
    assert tiles > 2
    assert torch.equal(changed[0], is_class)
    assert torch.equal(changed[1], ~is_class)
    assert not changed[2].any()


# Generation.

NEW = 6
WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 30},
    "chunks, the last of one token": {"prefill_chunk_size": 25},
}
SEEING = [
    way
    for way, how in WAYS.items()
    if "prefill_chunk_size" not in how or hasattr(generation, "_slice_mm_encoder_output")
]


def generate(vlm: nl.ModelAdapter, inputs: Mapping[str, Any], **how: Any) -> Any:
    how = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW} | how
    how |= {"return_dict_in_generate": True, "output_scores": True}
    return vlm.model.generate(**inputs, suppress_tokens=NEVER, **how)


@torch.no_grad()
def step_by_step(vlm, batch, kind: str, neurons, meant: Callable[..., Meant]) -> Any:
    """One whole forward for each new token, edited by hand; ids and scores."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    scores = []
    for _ in range(NEW):
        with by_hand(vlm, neurons, KINDS[kind][1], meant(ids)):
            out = vlm.model(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=batch.inputs["pixel_values"],
                use_cache=False,
            ).logits[:, -1]
        out[:, NEVER] = -float("inf")
        scores.append(out)
        ids = torch.cat([ids, out.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids, torch.stack(scores)


def role_in_generation(prompt: int, wanted: str) -> Callable[[Tensor], Meant]:
    def meant(ids: Tensor) -> Meant:
        told = [roles_of(row, start=prompt, markers=False) for row in ids.tolist()]
        return at_roles(told, wanted)

    return meant


@pytest.mark.parametrize("roles", ["visual", "prompt", "response", "special"])
@pytest.mark.parametrize("kind", ["deactivate", "set_to"])
def test_generation_is_step_by_step_forwards_edited_by_hand(vlm, asked, roles, kind):
    prompt = asked.inputs["input_ids"].shape[1]
    assert prompt % 25 == 1
    assert prompt > 60
    wanted, scores = step_by_step(vlm, asked, kind, EVERY, role_in_generation(prompt, roles))
    plain = torch.stack(generate(vlm, asked.inputs).scores)
    assert not torch.allclose(plain[1:], scores[1:], **CLOSE)
    ways = SEEING if kind == "deactivate" else ["dynamic cache"]
    for way in ways:
        with KINDS[kind][0](vlm, EVERY, roles=roles):
            found = generate(vlm, asked.inputs, **WAYS[way])
        assert torch.equal(found.sequences, wanted), way
        torch.testing.assert_close(torch.stack(found.scores), scores, **CLOSE, msg=way)
    assert torch.equal(torch.stack(generate(vlm, asked.inputs).scores), plain)


@pytest.mark.parametrize("way", SEEING)
def test_positions_go_on_through_generated_tokens(vlm, asked, way):
    prompt = asked.inputs["input_ids"].shape[1]
    first = [places(asked, 0)[0], places(asked, 1)[0]]

    def meant(_ids: Tensor) -> Meant:
        # The last but one token of each prompt, and in each row the second generated.
        at = [{prompt - 2, prompt + 1}, {prompt - 2, prompt + 1}]
        return lambda _site, row, token: token in at[row]

    wanted, scores = step_by_step(vlm, asked, "set_to", LANGUAGE, meant)
    positions = [[-2, prompt + 1 - first[0]], [-2, prompt + 1 - first[1]]]
    with nl.set_to(vlm, LANGUAGE, 1.25, positions=positions):
        found = generate(vlm, asked.inputs, **WAYS[way])
    assert torch.equal(found.sequences, wanted)
    torch.testing.assert_close(torch.stack(found.scores), scores, **CLOSE)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_with_beams_a_samples_rows_are_all_changed_and_no_others(vlm, scenes, cache):
    prompts = ["describe the image ."] * 3
    batch = left(vlm, scenes, prompts)
    how = {"num_beams": 3, "num_return_sequences": 2, "use_cache": cache}
    sets = [
        nl.set_to(vlm, EVERY, 0.7, roles=["visual", "response"]),
        None,
        nl.deactivate(vlm, LANGUAGE, positions=[3, -1, 72, 74]),
    ]
    with nl.by_sample(vlm, sets):
        found = generate(vlm, batch.inputs, **how)
    plain = generate(vlm, batch.inputs, **how)
    for number, each in enumerate(sets):
        alone = left(vlm, scenes[number : number + 1], prompts[:1])
        with each if each is not None else ExitStack():
            wanted = generate(vlm, alone.inputs, **how)
        mine = slice(2 * number, 2 * number + 2)
        assert torch.equal(found.sequences[mine], wanted.sequences)
        close = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(found.sequences_scores[mine], wanted.sequences_scores, **close)
        is_same = torch.allclose(
            found.sequences_scores[mine], plain.sequences_scores[mine], **close
        )
        assert is_same == (each is None)


@pytest.mark.parametrize("name", ["mllama", "qwen2_5_vl"])
def test_beams_of_an_image_are_its_samples_encoded_once_or_for_every_beam(name):
    entry = ZOO[name]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    shape, mask = inputs["input_ids"].shape, inputs["attention_mask"]
    for key, value in inputs.items():  # pad on the left
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            rows = zip(value, mask, strict=True)
            moved = [torch.cat([row[gap == 0], row[gap == 1]]) for row, gap in rows]
            inputs[key] = torch.stack(moved)
    role = vlm.tokens(inputs)["language"].role
    words = set(inputs["input_ids"][role == nl.Role.PROMPT].tolist())
    others = [i for i in range(model.config.get_text_config().vocab_size) if i not in words]
    sites = [site for site in vlm.sites.values() if site.module in ("vision", "projector")]
    off = nl.deactivate(vlm, [s.neuron(i) for s in sites if not s.inert for i in range(s.width)])

    def scores(change: Any) -> Tensor:
        how = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 2, "do_sample": False}
        how |= {"return_dict_in_generate": True, "output_scores": True}
        with change:
            return model.generate(**inputs, **how, suppress_tokens=others).sequences_scores

    plain, everywhere = scores(ExitStack()), scores(off)
    assert ((plain - everywhere).abs() > 1e-2).all()
    for sample, sets in enumerate(([off, None], [None, off])):
        found = scores(nl.by_sample(vlm, sets))
        torch.testing.assert_close(found[sample], everywhere[sample], **CLOSE)
        torch.testing.assert_close(found[1 - sample], plain[1 - sample], **CLOSE)


def test_given_token_maps_are_followed_by_generation(vlm, asked):
    """With them, the template's markers are special, which the inputs alone do not tell."""
    prompt = asked.inputs["input_ids"].shape[1]

    def meant(ids: Tensor) -> Meant:
        told = [roles_of(row, start=prompt, markers=True) for row in ids.tolist()]
        # A marker that is generated is none of the template's.
        told = [row[:prompt] + ["response"] * (len(row) - prompt) for row in told]
        return at_roles(told, "special")

    wanted, scores = step_by_step(vlm, asked, "set_to", LANGUAGE, meant)
    with nl.set_to(vlm, LANGUAGE, 1.25, roles="special", tokens=asked.tokens):
        found = generate(vlm, asked.inputs, num_beams=1)
    assert torch.equal(found.sequences, wanted)
    torch.testing.assert_close(torch.stack(found.scores), scores, **CLOSE)


@torch.no_grad()
def test_a_loop_of_ones_own_is_followed_step_by_step(vlm, asked):
    prompt = asked.inputs["input_ids"].shape[1]
    wanted, scores = step_by_step(vlm, asked, "set_to", EVERY, role_in_generation(prompt, "text"))
    for cached in (True, False):
        ids, mask = asked.inputs["input_ids"], asked.inputs["attention_mask"]
        cache, fed, found = DynamicCache() if cached else None, ids, []
        with nl.set_to(vlm, EVERY, 1.25, roles="text"):
            for step in range(NEW):
                pixels = asked.inputs["pixel_values"] if step == 0 or not cached else None
                out = vlm.model(
                    input_ids=fed,
                    attention_mask=mask,
                    pixel_values=pixels,
                    past_key_values=cache,
                    use_cache=cached,
                ).logits[:, -1]
                out[:, NEVER] = -float("inf")
                found.append(out)
                new = out.argmax(-1, keepdim=True)
                ids = torch.cat([ids, new], 1)
                mask = torch.cat([mask, torch.ones_like(new)], 1)
                fed = new if cached else ids
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(torch.stack(found), scores, **CLOSE)


def test_the_recorder_and_an_intervention_follow_the_same_generation(vlm, asked):
    neurons = [nl.NeuronId("language.2", index) for index in range(384)]
    with nl.set_to(vlm, neurons, 7.0, roles="response"), nl.ActivationRecorder(vlm, None) as seen:
        generate(vlm, asked.inputs)
    is_response = seen.tokens["language"].role == nl.Role.RESPONSE
    assert torch.equal((seen.activations["language.2"] == 7).all(-1), is_response)
    assert is_response.any()
    assert (seen.activations["vision.0"] != 7).any()


# What cannot be told.


def test_a_forward_alone_does_not_tell_prompt_from_response(vlm, batch):
    for roles in ("prompt", "response", ["response", "visual"]):
        with (
            pytest.raises(CaptureError, match=r"Give tokens=batch.tokens.*roles='text'"),
            nl.deactivate(vlm, LANGUAGE, roles=roles),
        ):
            logits(vlm, batch.inputs)
    off = nl.deactivate(vlm, VISION, roles="response")
    with pytest.warns(UserWarning, match="No token was of role response"), off:
        found = logits(vlm, batch.inputs)  # a tower has no response, whatever the prompt is
    assert torch.equal(found, logits(vlm, batch.inputs))


def test_a_forward_alone_does_not_tell_where_the_prompt_ends(vlm, batch):
    with (
        pytest.raises(CaptureError, match=r"Negative positions .* Give tokens=batch\.tokens"),
        nl.deactivate(vlm, LANGUAGE, positions=[3, -1]),
    ):
        logits(vlm, batch.inputs)


def test_token_maps_of_another_batch_are_refused(vlm, batch, asked):
    off = nl.deactivate(vlm, LANGUAGE, roles="response", tokens=batch.tokens)
    with pytest.raises(CaptureError, match="are of 117 tokens, but the model was given 76"), off:
        logits(vlm, asked.inputs)
    with pytest.raises(CaptureError, match="are of 117 tokens, but the model was given 76"), off:
        generate(vlm, asked.inputs)
    fewer = {name: each[:, :-1] for name, each in batch.inputs.items() if each.ndim == 2}
    with pytest.raises(CaptureError, match="of 117 tokens, but the model was given 116"), off:
        logits(vlm, {**batch.inputs, **fewer})


def test_a_part_of_the_model_alone_is_refused(vlm, batch):
    pixels = batch.inputs["pixel_values"]
    with (
        pytest.raises(CaptureError, match="outside a call of the model"),
        nl.deactivate(vlm, VISION, roles="visual"),
        torch.no_grad(),
    ):
        vlm.model.get_image_features(pixel_values=pixels)
    with nl.deactivate(vlm, VISION, roles="visual", tokens=batch.tokens), torch.no_grad():
        vlm.model.get_image_features(pixel_values=pixels)
    with (
        pytest.raises(CaptureError, match="outside a call of the model"),
        nl.deactivate(vlm, LANGUAGE, roles="visual"),
        torch.no_grad(),
    ):
        vlm.model.model(**batch.inputs)


def test_where_generate_calls_a_part_of_the_model_roles_are_refused_and_everywhere_works():
    entry = ZOO["blip-2"]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    neuron = next(iter(vlm.select("language"))).neuron(0)
    with (
        pytest.raises(CaptureError, match="change the neurons at every token"),
        nl.deactivate(vlm, neuron, roles="visual"),
    ):
        model.generate(**inputs, max_new_tokens=2)
    with nl.deactivate(vlm, neuron):
        model.generate(**inputs, max_new_tokens=2)


def test_an_encoder_decoder_that_generates_is_refused_with_roles():
    entry = ZOO["florence2"]
    model = entry.model()
    vlm, inputs = nl.adapt(model), entry.inputs(model, entry.images())
    neuron = vlm.site("language.0").neuron(0)
    with (
        pytest.raises(CaptureError, match=r"outside a call of the model|encoder-decoder"),
        nl.deactivate(vlm, neuron, roles="visual"),
    ):
        model.generate(**inputs, max_new_tokens=2)


def test_embeddings_in_place_of_ids_are_refused(vlm, batch):
    embeds = vlm.model.get_input_embeddings()(batch.inputs["input_ids"])
    with (
        pytest.raises(CaptureError, match="inputs_embeds"),
        nl.deactivate(vlm, LANGUAGE, roles="text"),
        torch.no_grad(),
    ):
        vlm.model(inputs_embeds=embeds, attention_mask=batch.inputs["attention_mask"])
    with (
        pytest.raises(CaptureError, match="inputs_embeds"),
        nl.deactivate(vlm, LANGUAGE, roles="text"),
    ):
        vlm.model.generate(inputs_embeds=embeds, max_new_tokens=2)


@torch.no_grad()
def test_a_step_whose_beginning_was_not_followed_is_refused(vlm, asked):
    out = vlm.model(**asked.inputs, use_cache=True)
    mask = torch.cat([asked.inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with (
        pytest.raises(CaptureError, match="but 0 were followed"),
        nl.deactivate(vlm, LANGUAGE, roles="text"),
    ):
        vlm.model(
            input_ids=torch.full((2, 1), 7),
            attention_mask=mask,
            past_key_values=out.past_key_values,
        )


def test_another_number_of_samples_is_refused(vlm, batch):
    two = nl.by_sample(vlm, [nl.deactivate(vlm, VISION), None])
    with (
        pytest.raises(InterventionError, match="of 2 samples, one by one, but the batch has 3"),
        two,
    ):
        logits(vlm, batch.inputs)
    positions = nl.deactivate(vlm, LANGUAGE, positions=[[1], [2]])
    with pytest.raises(InterventionError, match="of 2 samples"), positions:
        logits(vlm, batch.inputs)


def test_a_position_that_a_sample_has_not_is_refused(vlm, batch):
    with (
        pytest.raises(InterventionError, match=r"Sample 0 .* position 65: its prompt has 65"),
        nl.deactivate(vlm, VISION, positions=[1, 65]),
    ):
        logits(vlm, batch.inputs)
    with (
        pytest.raises(InterventionError, match="position -72: its prompt has 71"),
        nl.deactivate(vlm, LANGUAGE, positions=[-72], tokens=batch.tokens),
    ):
        logits(vlm, batch.inputs)


@pytest.mark.parametrize(
    ("limits", "said"),
    [({"roles": "response"}, "of role response"), ({"positions": [500]}, "at position 500")],
)
def test_roles_and_positions_that_no_token_has_are_warned_of_once(vlm, asked, limits, said):
    nothing = nl.deactivate(vlm, LANGUAGE, **limits, tokens=asked.tokens)
    plain = logits(vlm, asked.inputs)
    with pytest.warns(UserWarning, match=f"{said} while the block ran") as seen, nothing:
        assert torch.equal(logits(vlm, asked.inputs), plain)
    assert seen[0].filename == __file__
    with nothing:  # a warning would be an error
        logits(vlm, asked.inputs)


def test_that_some_sample_has_no_such_token_is_not_warned_of(vlm, scenes):
    some = nl.encode(vlm, [scenes[0], replace(scenes[1], response=None)])
    off = nl.deactivate(vlm, LANGUAGE, roles="response")
    with nl.by_sample(vlm, [off, off], tokens=some.tokens):
        logits(vlm, some.inputs)
    nothing = nl.by_sample(vlm, [None, off], tokens=some.tokens)
    with pytest.warns(UserWarning, match="of role response"), nothing:
        logits(vlm, some.inputs)


def test_an_error_in_the_block_is_not_followed_by_a_warning(vlm, asked):
    nothing = nl.deactivate(vlm, LANGUAGE, roles="response", tokens=asked.tokens)
    with pytest.raises(KeyError, match="mine"), nothing:
        raise KeyError(f"mine {logits(vlm, asked.inputs).shape}")


def test_inputs_that_are_not_the_models_say_what_to_do_instead(vlm, batch):
    without = {k: v for k, v in batch.inputs.items() if k != "pixel_values"}
    with (
        pytest.raises(AdapterError, match=r"image tokens.*change the neurons at every token"),
        nl.deactivate(vlm, LANGUAGE, roles="visual"),
    ):
        logits(vlm, without)


# Gradients.


def gradients(vlm: nl.ModelAdapter, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    vlm.model.zero_grad()
    vlm.model(**inputs).logits.square().mean().backward()
    found = {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    return found


RENAMED = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)


@RENAMED
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_model_edited_by_hand(bed, batch, kind, checkpointing):
    make, change = KINDS[kind]
    vlm = nl.adapt(copy.deepcopy(bed.model), bed.processor)
    if checkpointing:
        vlm.model.train()
        vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = batch.inputs["input_ids"].tolist()
    told = [roles_of(row, start=0, markers=False) for row in rows]
    with by_hand(vlm, EVERY, change, at_roles(told, "visual")):
        wanted = gradients(vlm, batch.inputs)
    with make(vlm, EVERY, roles="visual"):
        found = gradients(vlm, batch.inputs)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@RENAMED
def test_recomputation_after_several_forwards_is_refused(bed, batch):
    vlm = nl.adapt(copy.deepcopy(bed.model), bed.processor)
    vlm.model.train()
    vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
    with nl.deactivate(vlm, LANGUAGE, roles="visual"):
        first = vlm.model(**batch.inputs).logits.sum()
        vlm.model(**batch.inputs)
        with pytest.raises(CaptureError, match="Run one forward"):
            first.backward()

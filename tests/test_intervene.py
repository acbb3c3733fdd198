"""Interventions at every token: laws of one, of several, of experts; controls; what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import neuronlens as nl
from neuronlens.adapters.gates import PRODUCTS, gate_of, product, product_of
from neuronlens.errors import AdapterError, CaptureError, InterventionError, UnknownNameError
from neuronlens.hooks import Call, is_only_ours
from neuronlens.samples import Batch
from zoo import entries

ZOO = entries()
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SOME = [nl.NeuronId("language.1", index) for index in range(0, 384, 4)]


class Run:
    """A zoo model, and a site of it with a neuron that is not silent."""

    def __init__(self, name: str, site: str, model: Any = None) -> None:
        self.model = ZOO[name].model() if model is None else model
        self.inputs = ZOO[name].inputs(self.model, ZOO[name].images())
        self.vlm = nl.adapt(self.model)
        self.site = self.vlm.site(site)
        with nl.ActivationRecorder(self.vlm, site) as recorder:
            self.plain = self.logits()
        out = recorder.activations[site]
        expert = int(out.expert.max()) if self.site.experts else None
        self.neurons = [self.site.neuron(index, expert) for index in range(0, self.site.width, 2)]

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model(**self.inputs).logits

    def within(self, *interventions: nl.Intervention) -> Tensor:
        with ExitStack() as stack:
            for each in interventions:
                stack.enter_context(each)
            return self.logits()


MECHANISMS = {
    "module": ("llava", "language.0"),
    "function": ("lfm2_vl", "language.0"),
    "function of a fused projection": ("minimax_m3_vl", "language.0"),
    "channels first": ("hunyuan_vl", "projector.0"),
    "shared experts": ("inkling_mm_model", "language.1.shared"),
    "projection": ("gemma3n", "vision.0"),
    "called twice": ("llama4", "projector.1"),
    "experts": ("qwen3_vl_moe", "language.1"),
    "experts with interleaved gates": ("internvl+gpt_oss", "language.0"),
    "experts with a norm behind": ("muse_spark", "language.1"),
    "experts that all tokens run through": ("llama4", "language.1"),
    "experts of a modality": ("ernie4_5_vl_moe", "language.1"),
}


MECHANISMS = {name: where for name, where in MECHANISMS.items() if where[0] in ZOO}
"""A neuron of each, in the architectures that this release has."""

CUSTOM = {
    "glm5_next": "Glm5NextTextExperts",
    "inkling2": "Inkling2Experts",
    "internvl+gpt_oss": "GptOssExperts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "step3p7": "Step3p7Experts",
}
"""Experts with gates of their own, by architecture."""


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {}


@pytest.fixture(params=MECHANISMS)
def run(request, runs) -> Run:
    if request.param not in runs:
        runs[request.param] = Run(*MECHANISMS[request.param])
    return runs[request.param]


# Several at once.


def test_a_later_intervention_sees_what_the_earlier_gave(run):
    vlm, some, others = run.vlm, run.neurons, run.neurons[1:]
    plain = run.logits()

    def same(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, **CLOSE)

    three, six, off = nl.set_to(vlm, some, 3), nl.set_to(vlm, some, 6), nl.deactivate(vlm, some)
    double, half = nl.amplify(vlm, some, 2), nl.amplify(vlm, some, 0.5)
    assert not torch.allclose(run.within(three), run.within(six), **CLOSE)
    same(run.within(three, double), run.within(six))
    same(run.within(double, three), run.within(three))
    same(run.within(double, half), plain)
    same(run.within(double, double), run.within(nl.amplify(vlm, some, 4)))
    same(run.within(off, off), run.within(off))
    same(run.within(off, double), run.within(off))
    same(run.within(three, off), run.within(off))
    same(run.within(off, three), run.within(three))  # raised from exactly 0
    # Of overlapping sets, each neuron follows its own.
    same(
        run.within(three, nl.amplify(vlm, others, 2)),
        run.within(nl.set_to(vlm, some[0], 3), nl.set_to(vlm, others, 6)),
    )
    assert torch.equal(run.logits(), plain)
    assert vlm.changed == set()


def test_inside_itself_an_intervention_is_made_twice(run):
    double = nl.amplify(run.vlm, run.neurons, 2)
    with double:
        once = run.logits()
        with double:
            twice = run.logits()
            assert run.vlm.changed == set(run.neurons)
        again = run.logits()
    four = run.within(nl.amplify(run.vlm, run.neurons, 4))
    torch.testing.assert_close(twice, four, **CLOSE)
    assert torch.equal(again, once)
    assert not torch.allclose(once, twice, **CLOSE)


def test_two_adapters_of_a_model_know_of_each_other(run):
    other = nl.adapt(run.model)
    found = run.within(nl.deactivate(run.vlm, run.neurons), nl.set_to(other, run.neurons, 3))
    torch.testing.assert_close(found, run.within(nl.set_to(other, run.neurons, 3)), **CLOSE)


def test_each_neuron_is_set_to_its_own_value(run):
    values = {neuron: 0.5 + 0.1 * number for number, neuron in enumerate(run.neurons)}
    one_by_one = [nl.set_to(run.vlm, neuron, value) for neuron, value in values.items()]
    found = run.within(nl.set_to(run.vlm, reversed(run.neurons), values))
    torch.testing.assert_close(found, run.within(*one_by_one), **CLOSE)
    by_name = {str(neuron): value for neuron, value in values.items()}
    assert torch.equal(run.within(nl.set_to(run.vlm, run.neurons, by_name)), found)


def test_samples_and_roles_are_told_apart_whatever_the_mechanism(run):
    three = nl.set_to(run.vlm, run.neurons, 3.0)
    plain, everywhere = run.logits(), run.within(three)
    for sample, sets in enumerate(([three, None], [None, three])):
        found = run.within(nl.by_sample(run.vlm, sets))
        torch.testing.assert_close(found[sample], everywhere[sample], **CLOSE)
        torch.testing.assert_close(found[1 - sample], plain[1 - sample], **CLOSE)
    real = run.vlm.tokens(run.inputs)["language"].role != nl.Role.PAD
    role = run.vlm.tokens(run.inputs)[run.site.stream].role
    if run.site.stream != "language" and (role == nl.Role.PAD).any():
        return  # padding of an image is no role's, and may matter
    numbers = {"special": nl.Role.SPECIAL, "visual": nl.Role.VISUAL, "text": nl.Role.PROMPT}
    present = {name: number for name, number in numbers.items() if (role == number).any()}
    by_role = {name: nl.set_to(run.vlm, run.neurons, 3.0, roles=name) for name in present}
    torch.testing.assert_close(run.within(*by_role.values())[real], everywhere[real], **CLOSE)
    with nl.ActivationRecorder(run.vlm, run.site) as recorder:
        run.logits()
    out = recorder.activations[run.site.name]
    ran = torch.ones_like(role, dtype=torch.bool)
    if run.site.experts:  # only some tokens are sent to the expert
        ran = ~out.column(run.neurons[0].expert, 0).isnan()
    for name, number in present.items():
        moves = not torch.allclose(run.within(by_role[name])[real], plain[real], **CLOSE)
        assert moves == bool((ran & (role == number)).any()), name


# Experts, against the block written out.


def block_by_hand(
    block: Any, x: Tensor, expert: Tensor, weight: Tensor, act: Any, change: Any
) -> Tensor:
    """Token by token and expert by expert, from the weights; `change` edits an activation."""
    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for slot in range(expert.shape[1]):
            number = int(expert[token, slot])
            gate, up = (block.gate_up_proj[number] @ x[token]).chunk(2)
            written = block.down_proj[number] @ (change(number, token, act(gate)) * up)
            if hasattr(block, "post_expert_norm"):
                written = block.post_expert_norm(written)
            total = total + weight[token, slot] * written
        rows.append(total)
    return torch.stack(rows)


@contextmanager
def written_out(block: nn.Module, act: Any, change: Any) -> Iterator[None]:
    def instead(_block: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        x, expert, weight = (*args, *kwargs.values())[:3]
        rows = x.reshape(-1, x.shape[-1])
        chosen = expert.reshape(len(rows), -1)
        return block_by_hand(
            block, rows, chosen, weight.reshape(chosen.shape), act, change
        ).reshape(out.shape)

    handle = block.register_forward_hook(instead, with_kwargs=True)
    yield
    handle.remove()


@pytest.mark.parametrize(
    "name", ["experts", "experts with a norm behind", "experts whose activations are 0"]
)
@torch.no_grad()
def test_changed_experts_are_those_written_out_token_by_token(name, runs):
    act, key = F.silu, name
    if name == "experts whose activations are 0":
        model = ZOO["qwen3_vl_moe"].model()
        for module in model.modules():
            if type(module).__name__ == "Qwen3VLMoeTextExperts":
                module.act_fn, act = nn.ReLU(), F.relu
        assert act is F.relu
        runs[name] = Run("qwen3_vl_moe", "language.1", model)
        key = "experts"
    run = runs.setdefault(name, Run(*MECHANISMS[key]))
    block = run.model.get_submodule(run.site.path)
    expert = run.neurons[0].expert
    at = [neuron.index for neuron in run.neurons]
    zeros = []

    def edited(new: Any) -> Any:
        def change(number: int, _token: int, old: Tensor) -> Tensor:
            if number != expert:
                return old
            zeros.append(int((old[at] == 0).sum()))
            return old.index_copy(0, torch.tensor(at), new(old[at]))

        return change

    with written_out(block, act, lambda _n, _t, old: old):
        torch.testing.assert_close(run.logits(), run.plain, **CLOSE)
    for made, new in (
        (nl.set_to(run.vlm, run.neurons, 1.5), lambda old: torch.full_like(old, 1.5)),
        (nl.amplify(run.vlm, run.neurons, -2), lambda old: old * -2),
        (nl.deactivate(run.vlm, run.neurons), lambda old: old * 0),
    ):
        with written_out(block, act, edited(new)):
            wanted = run.logits()
        torch.testing.assert_close(run.within(made), wanted, **CLOSE)
    assert (sum(zeros) > 0) == (act is F.relu)


@torch.no_grad()
def test_the_product_of_every_gate_is_what_the_block_itself_makes():
    seen = set()
    for entry in ZOO.values():
        if not any(hasattr(site, "experts") for site in entry.sites):
            continue
        model = entry.model("meta")
        for block in model.modules():
            kind = type(block).__name__
            if not hasattr(block, "down_proj") or not hasattr(block, "num_experts"):
                continue
            if kind in seen or getattr(block, "down_proj", None) is None:
                continue
            if not isinstance(block.down_proj, Tensor) or kind == "Llama4TextExperts":
                continue
            seen.add(kind)
            projected = 9 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
            act = gate_of(block)(block, projected)
            found = product_of(block, False)(block, act, projected)
            torch.testing.assert_close(found, product(block, projected))
    assert {kind for name, kind in CUSTOM.items() if name in ZOO} <= seen
    assert set(CUSTOM.values()) == set(PRODUCTS)


def test_where_the_factor_of_an_activation_is_not_known_it_can_be_multiplied_alone(
    runs, monkeypatch
):
    run = runs.setdefault("gpt_oss", Run("internvl+gpt_oss", "language.0"))
    double, off = nl.amplify(run.vlm, run.neurons, 2), nl.deactivate(run.vlm, run.neurons)
    three = nl.set_to(run.vlm, run.neurons, 3)
    wanted = [run.within(double), run.within(off)]
    monkeypatch.delitem(PRODUCTS, "GptOssExperts")
    for found, known in zip((run.within(double), run.within(off)), wanted, strict=True):
        torch.testing.assert_close(found, known, **CLOSE)
    torch.testing.assert_close(run.within(nl.set_to(run.vlm, run.neurons, 0)), wanted[1], **CLOSE)
    with pytest.raises(AdapterError, match=r"GptOssExperts .*\.PRODUCTS"):
        run.within(three)
    assert run.vlm.changed == set()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_how_experts_are_run_does_not_matter(implementation, runs):
    run = Run("qwen3_vl_moe", "language.1")
    wanted = run.within(nl.set_to(run.vlm, run.neurons, 3.0))
    for part in run.model.modules():
        if hasattr(part, "set_experts_implementation") and part._can_set_experts_implementation():
            part.set_experts_implementation(implementation)
    found = run.within(nl.set_to(run.vlm, run.neurons, 3.0))
    torch.testing.assert_close(found, wanted, **CLOSE)


# Nothing is left, and nobody else is touched.


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@contextmanager
def closing_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    """A hook of ours that is gone behind the block: the model is other tests' too."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_generate_of_the_users_own_is_followed_and_is_there_again(vlm, scenes, monkeypatch):
    batch = nl.encode(vlm, scenes[:1])
    neurons = [nl.NeuronId("language.3", index) for index in range(384)]
    off = nl.deactivate(vlm, neurons, roles="response")
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "output_scores": True}
    how |= {"return_dict_in_generate": True}
    with off:
        expected = torch.stack(vlm.model.generate(**batch.inputs, **how).scores)
    plain = vlm.model.generate

    def own(**inputs: Any) -> Any:
        return plain(**inputs)

    monkeypatch.setitem(vars(vlm.model), "generate", own)
    with off:
        found = torch.stack(vlm.model.generate(**batch.inputs, **how).scores)
    assert torch.equal(found, expected)
    assert vars(vlm.model)["generate"] is own


def test_everything_is_as_before_when_the_block_ends_however_it_ends(vlm, scenes):
    model = vlm.model
    inputs = nl.encode(vlm, scenes[:2]).inputs
    model.generate(**inputs, max_new_tokens=2)  # a model keeps something of its first one
    before = hooks_of(model), set(vars(model)), set(vars(model.base_model))
    with torch.no_grad():
        plain = model(**inputs).logits
    last = model.model.language_model.layers[3].mlp

    def halt(*_call: Any) -> None:
        raise ArithmeticError

    every = [
        nl.deactivate(vlm, SOME),
        nl.set_to(vlm, SOME, 1.0, roles="visual"),
        nl.by_sample(vlm, [None, nl.amplify(vlm, SOME, 2, positions=[3])]),
    ]
    for each in every:
        with closing_hook(last, halt):
            with pytest.raises(ArithmeticError), each, torch.no_grad():
                model(**inputs)
            with pytest.raises(ArithmeticError), each, each:
                model.generate(**inputs, max_new_tokens=2)
        with each, torch.no_grad():
            assert vlm.changed == set(SOME)
            changed = model(**inputs).logits
        assert not torch.equal(changed, plain)
        assert (hooks_of(model), set(vars(model)), set(vars(model.base_model))) == before
        assert vlm.changed == set()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, plain)


def test_a_block_that_never_ran_is_told(vlm):
    before = hooks_of(vlm.model)
    with pytest.raises(CaptureError, match=r"language\.1"), nl.deactivate(vlm, SOME):
        assert hooks_of(vlm.model) == before + 1
    assert hooks_of(vlm.model) == before


def test_a_hook_of_ones_own_keeps_the_tensor_it_was_shown(vlm, scenes):
    """An activation is written where it is, but not if somebody else may hold it."""
    inputs = nl.encode(vlm, scenes[:2]).inputs
    act = vlm.model.model.language_model.layers[1].mlp.act_fn
    kept: list[Tensor] = []
    handle = act.register_forward_hook(lambda _m, _a, out: kept.append(out))
    with torch.no_grad():
        vlm.model(**inputs)
        with nl.set_to(vlm, SOME, 5.0):
            vlm.model(**inputs)
    handle.remove()
    torch.testing.assert_close(kept[1], kept[0])


@torch.no_grad()
def test_what_a_projection_is_given_is_changed_for_it_alone(runs):
    run = runs.setdefault("projection", Run(*MECHANISMS["projection"]))
    down = run.model.get_submodule(run.vlm.tap(run.site).path)
    kept: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    run.logits()
    assert not torch.equal(run.within(nl.set_to(run.vlm, run.neurons, 5.0)), run.plain)
    handle.remove()
    torch.testing.assert_close(kept[1], kept[0])


def test_only_what_nobody_else_has_is_written_into():
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    module, given, fresh = Own(), torch.randn(3, 4), torch.randn(3, 4)
    with torch.no_grad():
        assert is_only_ours(Call(module, (given,), {}, fresh))
        assert not is_only_ours(Call(module, (given,), {}, given))
        assert not is_only_ours(Call(module, (), {"x": given}, given[:2]))
        assert not is_only_ours(Call(module, (given,), {}, torch.ones(3, 1).expand(3, 4)))
        assert not is_only_ours(Call(nn.Sequential(module), (given,), {}, fresh))
        handles = [module.register_forward_hook(lambda *_: None) for _ in range(2)]
        assert not is_only_ours(Call(module, (given,), {}, fresh))
        handles[0].remove()
        assert is_only_ours(Call(module, (given,), {}, fresh))
    assert not is_only_ours(Call(module, (given,), {}, fresh.requires_grad_()))


# What an intervention says of itself.


def test_settings_are_complete_and_json_has_them(vlm, scenes):
    batch = nl.encode(vlm, scenes[:2])
    tokens = batch.tokens
    off = nl.deactivate(vlm, "language.1/3", roles=["visual", "special"], positions=[4, 0, 4])
    assert off.settings == {
        "kind": "deactivate",
        "neurons": ["language.1/3"],
        "value": 0.0,
        "roles": ["special", "visual"],
        "positions": [0, 4],
        "tokens": None,
        "by_sample": None,
    }
    each = nl.set_to(vlm, ["language.1/3", "vision.0/2"], {"language.1/3": 1, "vision.0/2": 2.5})
    assert each.settings["value"] == {"vision.0/2": 2.5, "language.1/3": 1.0}
    by_sample = nl.by_sample(vlm, [each, None])
    assert by_sample.settings["by_sample"] == [each.parts[0].settings, None]
    assert by_sample.neurons == each.neurons
    told = nl.deactivate(vlm, SOME, roles="text", tokens=tokens)
    for made in (off, each, by_sample, told):
        assert json.loads(json.dumps(made.settings)) == made.settings
    others = [
        nl.amplify(vlm, "language.1/3", 0),
        nl.amplify(vlm, "language.1/3", 0, roles="text"),
        nl.amplify(vlm, "language.1/3", 0, positions=[[1], [2]]),
        nl.amplify(vlm, "language.1/3", 0, tokens=tokens),
        nl.amplify(vlm, "language.1/3", 0, tokens=nl.encode(vlm, scenes[2:5]).tokens),
        nl.amplify(vlm, "language.1/4", 0),
        nl.amplify(vlm, "language.1/3", 0.1),
        nl.set_to(vlm, "language.1/3", 0),
        nl.deactivate(vlm, "language.1/3"),
    ]
    assert len({json.dumps(each.settings) for each in others}) == len(others)


def test_its_repr_is_short_and_says_what_is_done(vlm):
    every = [*SOME, nl.NeuronId("vision.0", 1)]
    off = nl.deactivate(vlm, every, roles="visual", positions=[1, 2])
    assert repr(off) == (
        "Intervention(deactivate; 1 vision + 96 language neurons; at visual; at 2 positions)"
    )
    assert repr(nl.set_to(vlm, SOME, 2.5)) == "Intervention(set to 2.5; 96 language neurons)"
    assert "amplify by -2" in repr(nl.amplify(vlm, SOME, -2))
    assert "each to its value" in repr(nl.set_to(vlm, SOME, dict.fromkeys(SOME, 1)))
    assert repr(nl.by_sample(vlm, [off, None])).startswith("Intervention(by sample, 2 samples;")


def test_for_no_sample_at_all_nothing_is_changed(vlm, scenes):
    inputs = nl.encode(vlm, scenes[:2]).inputs
    with torch.no_grad():
        plain = vlm.model(**inputs).logits
        with nl.by_sample(vlm, [None, None]) as none:
            assert torch.equal(vlm.model(**inputs).logits, plain)
    assert none.neurons == ()
    assert "no neurons" in repr(none)


# What is refused.

WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda vlm: nl.deactivate(vlm, "language.9/0"), UnknownNameError, r"language\.9.*language\.0"),
    (lambda vlm: nl.deactivate(vlm, "language.1/384"), UnknownNameError, "0 to 383"),
    (lambda vlm: nl.deactivate(vlm, "language.1/-1"), UnknownNameError, "0 to 383"),
    (lambda vlm: nl.deactivate(vlm, "language.1/e0/1"), UnknownNameError, "dense"),
    (lambda vlm: nl.deactivate(vlm, "language 1 3"), InterventionError, "names no neuron"),
    (lambda vlm: nl.deactivate(vlm, []), InterventionError, "No neurons"),
    (lambda vlm: nl.deactivate(vlm, [3]), InterventionError, "3 is no neuron"),
    (lambda vlm: nl.amplify(vlm, SOME, float("nan")), InterventionError, "finite"),
    (lambda vlm: nl.amplify(vlm, SOME, "2"), InterventionError, "finite number, not '2'"),
    (lambda vlm: nl.set_to(vlm, SOME, float("inf")), InterventionError, "finite"),
    (lambda vlm: nl.set_to(vlm, SOME, None), InterventionError, "finite"),
    (lambda vlm: nl.set_to(vlm, SOME, {}), InterventionError, "no number for 96 of 96"),
    (
        lambda vlm: nl.set_to(vlm, SOME[:1], {SOME[0]: float("nan")}),
        InterventionError,
        "value of language.1/0",
    ),
    (
        lambda vlm: nl.set_to(vlm, SOME[:1], {"language.7/0": 1.0}),
        UnknownNameError,
        r"language\.7",
    ),
    (lambda vlm: nl.deactivate(vlm, SOME, roles="image"), UnknownNameError, "visual, text"),
    (lambda vlm: nl.deactivate(vlm, SOME, roles="pad"), UnknownNameError, "role"),
    (lambda vlm: nl.deactivate(vlm, SOME, roles=nl.Role.PAD), UnknownNameError, "role"),
    (lambda vlm: nl.deactivate(vlm, SOME, roles=[]), InterventionError, "No roles"),
    (lambda vlm: nl.deactivate(vlm, SOME, positions=[]), InterventionError, "whole numbers"),
    (lambda vlm: nl.deactivate(vlm, SOME, positions=[[], []]), InterventionError, "whole numbers"),
    (lambda vlm: nl.deactivate(vlm, SOME, positions=3), InterventionError, "whole numbers"),
    (lambda vlm: nl.deactivate(vlm, SOME, positions=[0.5]), InterventionError, "whole numbers"),
    (lambda vlm: nl.deactivate(vlm, SOME, positions=[True]), InterventionError, "whole numbers"),
    (lambda vlm: nl.deactivate(vlm, SOME, positions=[1, [2]]), InterventionError, "whole numbers"),
    (lambda vlm: nl.deactivate(vlm, SOME, positions="12"), InterventionError, "whole numbers"),
    (lambda vlm: nl.by_sample(vlm, []), InterventionError, "No interventions"),
    (lambda vlm: nl.by_sample(vlm, ["off"]), InterventionError, "Entry 0 is str"),
    (
        lambda vlm: nl.by_sample(vlm, [nl.by_sample(vlm, [nl.deactivate(vlm, SOME)])]),
        InterventionError,
        "tells samples apart itself",
    ),
    (
        lambda vlm: nl.by_sample(vlm, [nl.deactivate(vlm, SOME, positions=[[1]])]),
        InterventionError,
        "tells samples apart itself",
    ),
    (
        lambda vlm: nl.by_sample(vlm, [nl.deactivate(vlm, SOME, tokens={})]),
        InterventionError,
        r"tokens=batch\.tokens",
    ),
    (
        lambda vlm: nl.by_sample(
            vlm, [nl.deactivate(nl.adapt(ZOO["llava"].model()), "language.0/1")]
        ),
        InterventionError,
        "another adapter",
    ),
    (lambda vlm: nl.deactivate(vlm.model, SOME), AdapterError, r"A Llava.*nl\.adapt"),
    (lambda vlm: nl.amplify(SOME, vlm, 2), AdapterError, r"A list was given"),
    (lambda vlm: nl.set_to(vlm.model, SOME, 2), AdapterError, r"nl\.adapt"),
    (lambda vlm: nl.by_sample([None], vlm), AdapterError, r"nl\.adapt"),
    (lambda vlm: nl.random_control(vlm.model, SOME, seed=0), AdapterError, r"nl\.adapt"),
    (
        lambda vlm: nl.deactivate(vlm, SOME, tokens=Batch({}, {}, (), vlm)),
        InterventionError,
        r"tokens is Batch.*tokens=batch\.tokens",
    ),
    (
        lambda vlm: nl.by_sample(vlm, [None], tokens={"language": None}),
        InterventionError,
        "holds NoneType",
    ),
    (lambda vlm: nl.random_control(vlm, [], seed=0), InterventionError, "No neurons"),
    (lambda vlm: nl.random_control(vlm, SOME, seed=0, match="site"), UnknownNameError, "module"),
]


@pytest.mark.parametrize(("make", "kind", "what"), WRONG, ids=range(len(WRONG)))
def test_what_makes_no_sense_is_refused_where_it_is_made(vlm, make, kind, what):
    with pytest.raises(kind, match=what):
        make(vlm)


def test_a_model_compiled_meanwhile_is_refused(vlm, monkeypatch):
    off = nl.deactivate(vlm, SOME)
    monkeypatch.setattr(vlm.model.model.language_model, "_compiled_call_impl", print)
    with pytest.raises(CaptureError, match="compiled"), off:
        pass


def test_a_neuron_that_cannot_change_the_output_is_warned_of():
    run = Run("llava", "language.0")
    inert = [site for site in run.vlm.sites.values() if site.inert]
    assert [site.module for site in inert] == ["vision"]
    with pytest.warns(UserWarning, match=rf"1 of 2 neurons .*{inert[0].name} \(1\)"):
        off = nl.deactivate(run.vlm, [inert[0].neuron(0), run.neurons[0]])
    with pytest.warns(UserWarning, match="changes nothing") as seen:
        none = nl.set_to(run.vlm, inert[0].neuron(3), 2.0)
    assert seen[0].filename == __file__
    assert torch.equal(run.within(none), run.plain)
    assert torch.equal(run.within(off), run.within(nl.deactivate(run.vlm, run.neurons[0])))


# Controls.


def places(vlm: nl.ModelAdapter, neurons: Any, match: str) -> Counter[str]:
    """How many there are where they have to be as many."""
    return Counter(
        {"layer": neuron.site, "module": vlm.site(neuron.site).module, "all": ""}[match]
        for neuron in neurons
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_control_has_as_many_others_and_none_twice(vlm, data):
    every = [site.neuron(i) for site in vlm.sites.values() for i in range(site.width)]
    pick = st.lists(st.sampled_from(every), max_size=60)
    chosen = data.draw(pick.filter(bool))
    exclude = data.draw(pick)
    match = data.draw(st.sampled_from(["layer", "module", "all"]))
    seed = data.draw(st.integers(0, 2**32))
    drawn = nl.random_control(vlm, chosen, seed=seed, match=match, exclude=exclude)
    assert drawn == nl.random_control(vlm, set(chosen), seed=seed, match=match, exclude=exclude)
    assert len(drawn) == len(set(drawn)) == len(set(chosen))
    assert not set(drawn) & (set(chosen) | set(exclude))
    assert places(vlm, drawn, match) == places(vlm, set(chosen), match)


@pytest.mark.parametrize("match", ["layer", "module", "all"])
def test_seeds_give_other_controls_and_every_neuron_has_its_chance(vlm, match):
    drawn = [nl.random_control(vlm, SOME, seed=seed, match=match) for seed in range(60)]
    assert len(set(drawn)) == 60
    count = Counter(neuron for each in drawn for neuron in each)
    pool = [
        neuron
        for site in vlm.sites.values()
        for neuron in map(site.neuron, range(site.width))
        if neuron not in SOME
        and (match != "layer" or site.name == "language.1")
        and (match != "module" or site.module == "language")
    ]
    assert set(count) <= set(pool)
    mean = 60 * len(SOME) / len(pool)
    assert abs(sum(count[n] for n in pool[: len(pool) // 2]) / (mean * (len(pool) // 2)) - 1) < 0.1
    spread = sum((count[n] - mean) ** 2 for n in pool) / len(pool)
    assert 0.7 < spread / (mean * (1 - len(SOME) / len(pool))) < 1.3  # binomial


def test_controls_in_experts_are_of_any_expert_of_the_same_site():
    vlm = nl.adapt(ZOO["qwen3_vl_moe"].model("meta"))
    site = next(site for site in vlm.sites.values() if site.experts)
    chosen = [site.neuron(index, 0) for index in range(site.width)]
    drawn = nl.random_control(vlm, chosen, seed=1)
    assert {neuron.site for neuron in drawn} == {site.name}
    assert len({neuron.expert for neuron in drawn}) == site.experts - 1
    assert len(drawn) == site.width


def test_too_few_neurons_to_draw_from_are_told(vlm):
    many = [vlm.site("language.1").neuron(index) for index in range(200)]
    with pytest.raises(
        InterventionError,
        match=r"200 neurons of language\.1 .* only 184 .*fewer, or match .*'module' or 'all'\.",
    ):
        nl.random_control(vlm, many, seed=0)
    every = [site.neuron(0) for site in vlm.sites.values()]
    everything = [site.neuron(i) for site in vlm.sites.values() for i in range(site.width)]
    with pytest.raises(InterventionError, match=r"as many from\. Choose fewer, or exclude fewer\."):
        nl.random_control(vlm, every, seed=0, match="all", exclude=everything)
    assert len(nl.random_control(vlm, many[:192], seed=0)) == 192
    for exclude in (["language.1/383"], "language.1/383", nl.NeuronId("language.1", 383)):
        with pytest.raises(InterventionError, match="only 183"):
            nl.random_control(vlm, many, seed=0, exclude=exclude)
    assert len(nl.random_control(vlm, many, seed=0, match="module")) == 200


def test_controls_over_layers_leave_out_sites_that_cannot_change_the_output():
    vlm = nl.adapt(ZOO["llava"].model("meta"))
    (inert,) = (site for site in vlm.sites.values() if site.inert)
    other = next(s for s in vlm.select("vision") if not s.inert)
    chosen = [other.neuron(index) for index in range(other.width // 2)]
    for match in ("module", "all"):
        drawn = nl.random_control(vlm, chosen, seed=0, match=match)
        assert inert.name not in {neuron.site for neuron in drawn}
    same = nl.random_control(vlm, [inert.neuron(0)], seed=0)
    assert {neuron.site for neuron in same} == {inert.name}

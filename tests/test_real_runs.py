"""Models as people run them: quantised, offloaded, checkpointed, generating, in half precision.

What is recorded is compared with the test's own hooks on the modules that `zoo` names from the
models' source code, and deactivation with the test's own edits; nothing expected is the library's.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, StoppingCriteria
from transformers.integrations import moe
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Llama4TextExperts
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import neuronlens as nl
from neuronlens import testbed
from neuronlens.activations import Activation
from neuronlens.activations import Routed as RoutedActivations
from neuronlens.errors import AdapterError, CaptureError
from neuronlens.tokens import Role
from zoo import Dense, Entry, Routed, entries

ZOO = entries()
DENSE = ("llava", "qwen2_5_vl", "internvl", "gemma3", "mllama", "blip-2", "idefics3")
ROUTED = ("qwen3_vl_moe", "llama4", "internvl+gpt_oss", "gemma4+moe", "aria")
SOME = (*DENSE, *ROUTED[:3])
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Where a matrix product of other rows stands between the two."""
HALF = {"rtol": 0.05, "atol": 0.1}
"""The same in bfloat16, several layers later."""

Expected = Dense | Routed


@dataclass(frozen=True)
class Run:
    """A model of the zoo with the inputs it is run on."""

    entry: Entry
    model: Any
    inputs: dict[str, Any]

    @property
    def vlm(self) -> nl.ModelAdapter:
        return nl.adapt(self.model)

    def logits(self, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return self.model(**(inputs or self.inputs)).logits

    def recorded(self, sites: Any = None, **inputs: Any) -> nl.ActivationRecorder:
        with nl.ActivationRecorder(self.vlm, sites) as recorder:
            self.logits(**inputs)
        return recorder

    def expected(self, **inputs: Any) -> dict[str, Tensor]:
        """By site name, its activations as rows, from the test's own hooks."""
        kept: dict[Expected, list[Tensor]] = {}
        with own_hooks(self, kept):
            self.logits(**inputs)
        assert set(kept) == set(self.entry.sites)
        return {site_of(self.vlm, site).name: torch.cat(parts) for site, parts in kept.items()}


def load(name: str) -> Run:
    model = ZOO[name].model()
    return Run(ZOO[name], model, ZOO[name].inputs(model, ZOO[name].images()))


def stored(run: Run, folder: Path, **how: Any) -> Run:
    """The same model, saved and loaded as users do."""
    run.model.save_pretrained(folder)
    how = {"attn_implementation": "eager"} | how
    return Run(run.entry, type(run.model).from_pretrained(folder, **how).eval(), run.inputs)


def set_experts(model: nn.Module, implementation: str) -> None:
    """Every part of the model that lets its experts' implementation be chosen."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation(implementation)


def block_of(site: Expected) -> str:
    return site.block if isinstance(site, Routed) else site.before.rpartition(".")[0]


def site_of(vlm: nl.ModelAdapter, expected: Expected) -> nl.NeuronSite:
    """The library's site in the expected one's block."""
    (found,) = (
        site
        for site in vlm.sites.values()
        if (site.module, site.layer) == (expected.module, expected.layer)
        and block_of(expected) in (site.path, site.path.rpartition(".")[0])
        and bool(site.experts) == isinstance(expected, Routed)
    )
    return found


@contextmanager
def own_hooks(run: Run, kept: dict[Expected, list[Tensor]]) -> Iterator[None]:
    """Every site's activations, from what its first projection gives, or its experts take."""

    def keep(site: Expected, block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        with torch.no_grad():
            if isinstance(site, Dense):
                act = site.act(out)
                act = act if act.shape[-1] == site.width else act.movedim(1, -1)
                kept.setdefault(site, []).append(act.reshape(-1, site.width).clone())
                return
            given = site.routing(args, kwargs) if site.routing else (*args, *kwargs.values())
            x = given[0].reshape(-1, given[0].shape[-1])
            chosen = given[1].reshape(len(x), -1)
            sent = {expert: (chosen == expert).any(1) for expert in range(site.experts)}
            acts = {e: site.act(block, x[here], e) for e, here in sent.items() if here.any()}
            (dtype,) = {act.dtype for act in acts.values()}
            dense = torch.full((len(x), site.experts, site.width), float("nan"), dtype=dtype)
            for expert, act in acts.items():
                dense[sent[expert], expert] = act
            kept.setdefault(site, []).append(dense)

    with ExitStack() as stack:
        for site in run.entry.sites:
            module = run.model.get_submodule(site.before if isinstance(site, Dense) else site.block)

            def hook(*call: Any, site: Expected = site) -> None:
                keep(site, *call)

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def own_ablation(
    model: nn.Module, site: Expected, index: int, expert: int | None
) -> Iterator[None]:
    """The neuron's column does not reach the down projection, or is zero in its weights."""
    if isinstance(site, Routed):
        block = model.get_submodule(site.block)
        kept = {name: value.clone() for name, value in block.state_dict().items()}
        site.zero(block, expert, index)
        yield
        block.load_state_dict(kept)
        return

    def silence(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = args[0].clone()
        given[..., index] = 0
        return (given, *args[1:])

    handle = model.get_submodule(site.down).register_forward_pre_hook(silence)
    yield
    handle.remove()


def rows(activation: Activation) -> Tensor:
    if isinstance(activation, RoutedActivations):
        return activation.dense().reshape(-1, *activation.shape[-2:])
    return activation.reshape(-1, activation.shape[-1])


def assert_same(
    kept: Mapping[str, Activation], expected: Mapping[str, Tensor], **close: Any
) -> None:
    """The same sites; the same values at every row."""
    assert set(kept) == set(expected)
    for name, wanted in expected.items():
        within = CLOSE if isinstance(kept[name], RoutedActivations) else EXACT
        torch.testing.assert_close(
            rows(kept[name]),
            wanted,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
            **(within | close),
        )


def loudest(run: Run, expected: Mapping[str, Tensor]) -> Iterator[tuple[Expected, nl.NeuronId]]:
    """A neuron of every site that matters and that the test can edit."""
    for site in run.entry.sites:
        if site.inert or (site.zero if isinstance(site, Routed) else site.down) is None:
            continue
        name = site_of(run.vlm, site).name
        values = expected[name].float().nan_to_num(0).abs().amax(0)
        at = int(values.argmax())
        expert = at // site.width if isinstance(site, Routed) else None
        yield site, nl.NeuronId(name, at % site.width, expert)


def assert_deactivates(
    run: Run, like: Run, expected: Mapping[str, Tensor], rerouted: int = 0, **close: Any
) -> None:
    """As the test's own ablation in `like`; nothing is left of it afterwards.

    At `rerouted` tokens it may be something else: where a later router is nearly undecided, the
    last bit of a 16-bit number sends a token to another expert.
    """
    plain = run.logits()
    tried = 0
    for site, neuron in loudest(like, expected):
        with own_ablation(like.model, site, neuron.index, neuron.expert):
            wanted = like.logits()
        with nl.deactivate(run.vlm, neuron):
            without = run.logits()
        assert torch.equal(run.logits(), plain), neuron
        assert not torch.equal(without, plain), neuron
        within = {"rtol": 1e-3, "atol": 2e-4} if isinstance(site, Routed) else EXACT
        if rerouted and isinstance(site, Routed):
            near = torch.isclose(without, wanted, **(within | close)).all(-1)
            assert (~near).sum() <= rerouted, neuron
            without, wanted = without[near], wanted[near]
        torch.testing.assert_close(
            without, wanted, **(within | close), msg=lambda text, n=neuron: f"{n}: {text}"
        )
        tried += 1
    assert tried >= 4


def texts(inputs: Mapping[str, Any]) -> list[str]:
    """The inputs that have one value per token of the text."""
    shape = inputs["input_ids"].shape
    return [k for k, v in inputs.items() if isinstance(v, Tensor) and v.shape[:2] == shape]


def padded_on(side: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same rows with their padding on one side."""
    moved = dict(inputs)
    for name in texts(inputs):
        parts = [
            (row[mask == 0], row[mask == 1])
            for row, mask in zip(inputs[name], inputs["attention_mask"], strict=True)
        ]
        moved[name] = torch.stack(
            [torch.cat([gap, kept] if side == "left" else [kept, gap]) for gap, kept in parts]
        )
    assert (moved["attention_mask"][:, 0 if side == "left" else -1] == 0).any()
    return moved


# Quantised.


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """bitsandbytes logs every multiplication."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", [n for n in SOME if n != "mllama"])
def test_an_8_bit_model_is_recorded_and_deactivated_as_it_is(name: str, tmp_path: Path) -> None:
    plain = load(name)
    run = stored(
        plain,
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
    )
    down = [s.down for s in run.entry.sites if isinstance(s, Dense)]
    kinds = [type(run.model.get_submodule(path)).__name__ for path in down]
    assert kinds.count("Linear8bitLt") >= 3
    assert run.vlm.sites == plain.vlm.sites
    fingerprint = run.vlm.fingerprint()
    assert fingerprint != plain.vlm.fingerprint()
    expected = run.expected()
    logits = run.logits()
    assert run.vlm.fingerprint() == fingerprint
    assert 0 < (logits - plain.logits()).abs().max() < 0.2 * logits.abs().max()
    with nl.ActivationRecorder(run.vlm, None) as recorder:
        assert torch.equal(run.logits(), logits)
    assert_same(recorder.activations, expected)
    assert_deactivates(run, run, expected)


class Wrapped(nn.Module):
    """As LoRA and some quantisers have it: no subclass of Linear."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside = inside
        self.in_features, self.out_features = inside.in_features, inside.out_features

    @property
    def weight(self) -> nn.Parameter:
        return self.inside.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


@pytest.mark.parametrize("name", [*SOME, "git", "instructblip"])
def test_projections_of_a_class_of_their_own_are_found(name: str) -> None:
    run, plain = load(name), load(name)
    expected = plain.expected()
    for path, module in list(run.model.named_modules()):
        if type(module) is nn.Linear:
            owner, _, key = path.rpartition(".")
            setattr(run.model.get_submodule(owner), key, Wrapped(module))
    assert run.vlm.sites == plain.vlm.sites
    assert_same(run.recorded().activations, expected)
    assert_deactivates(run, plain, expected)


STORAGES = [
    ("qwen3_vl_moe", FP8Experts),
    ("internvl+gpt_oss", Mxfp4GptOssExperts),
    ("llama4", FbgemmFp8Llama4TextExperts),
]


@pytest.mark.parametrize(("name", "stores"), STORAGES, ids=[n for n, _ in STORAGES])
def test_experts_in_a_storage_that_cannot_be_read_are_refused(name: str, stores: Any) -> None:
    run, plain = load(name), load(name)
    for site in run.entry.sites:
        if isinstance(site, Routed):
            owner, _, key = site.block.rpartition(".")
            experts = stores(run.model.config.get_text_config())
            setattr(run.model.get_submodule(owner), key, experts)
    vlm = run.vlm
    assert vlm.sites == plain.vlm.sites
    (routed, *_) = (site for site in vlm.sites.values() if site.experts)
    what = rf"{re.escape(routed.path)}.*{stores.__name__}.*stored as.*dequantised"
    with pytest.raises(AdapterError, match=what), nl.ActivationRecorder(vlm, "language"):
        pass
    with pytest.raises(AdapterError, match=what), nl.deactivate(vlm, routed.neuron(0, 0)):
        pass
    with pytest.raises(CaptureError, match="never ran"), nl.ActivationRecorder(vlm, "vision"):
        pass  # other sites may be recorded


# Offloaded.


def cpu_offload(run: Run, _folder: Path) -> Run:
    accelerate.cpu_offload(run.model, execution_device=torch.device("cpu"))
    return run


def disk_offload(run: Run, folder: Path) -> Run:
    accelerate.disk_offload(run.model, str(folder), execution_device=torch.device("cpu"))
    return run


def device_map(run: Run, folder: Path) -> Run:
    """Half of the model on the disk, by `from_pretrained`."""
    size = sum(p.numel() * p.element_size() for p in run.model.parameters())
    how = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": folder / "off"}
    return stored(run, folder / "model", **how, dtype=torch.float32)


OFFLOADED = [
    ("llava", cpu_offload),
    ("qwen3_vl_moe", cpu_offload),
    ("blip-2", cpu_offload),
    ("llama4", disk_offload),
    ("gemma4+moe", disk_offload),
    ("internvl", disk_offload),
    ("qwen3_vl_moe", device_map),
    ("internvl+gpt_oss", device_map),
    ("mllama", device_map),
    ("qwen2_5_vl", device_map),
]


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # mllama's, of transformers
@pytest.mark.parametrize(
    ("name", "offload"), OFFLOADED, ids=[f"{n}-{way.__name__}" for n, way in OFFLOADED]
)
def test_an_offloaded_model_gives_what_the_plain_one_gives(
    name: str, offload: Callable[[Run, Path], Run], tmp_path: Path
) -> None:
    plain, run = load(name), offload(load(name), tmp_path)
    away = [n for n, p in run.model.named_parameters() if p.is_meta]
    experts = [f"{s.block}.down_proj" for s in run.entry.sites if isinstance(s, Routed)]
    assert away
    assert not experts or set(experts) & set(away)
    expected = plain.expected()
    run.logits()  # accelerate takes tied weights away only then
    away = [n for n, p in run.model.named_parameters() if p.is_meta]
    assert_same(run.recorded().activations, expected)
    assert_deactivates(run, plain, expected)
    assert [n for n, p in run.model.named_parameters() if p.is_meta] == away


@pytest.mark.parametrize("offload", [cpu_offload, device_map])
def test_an_offloaded_model_has_the_fingerprint_and_device_of_the_plain_one(
    offload: Callable[[Run, Path], Run], tmp_path: Path
) -> None:
    plain, run = load("qwen3_vl_moe"), offload(load("qwen3_vl_moe"), tmp_path)
    assert run.vlm.fingerprint() == plain.vlm.fingerprint()
    assert run.vlm.device == plain.vlm.device


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_a_scan_of_an_offloaded_model_writes_what_one_of_the_plain_model_writes(
    bed: testbed.Testbed,
    scenes: list[nl.Sample],
    offload: Callable[[Run, Path], Run],
    tmp_path: Path,
) -> None:
    away = offload(Run(ZOO["llava"], copy.deepcopy(bed.model), {}), tmp_path / "weights").model
    written = []
    for number, model in enumerate((bed.model, away)):
        vlm, out = nl.adapt(model, bed.processor), tmp_path / str(number)
        nl.scan(vlm, scenes[:6], out=out, n=4, batch_size=3)
        files = [*out.rglob("*.safetensors"), out / "samples.jsonl"]
        written.append({path.relative_to(out): path.read_bytes() for path in files})
    assert len(written[0]) == len(nl.adapt(away).sites) + 1
    assert written[0] == written[1]


# Gradient checkpointing.


RENAMED = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)


def trained(name: str) -> Run:
    """A model in training, without dropout."""
    run = load(name)
    for module in run.model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or key == "p"):
                setattr(module, key, 0.0)
    plain = run.logits()
    assert torch.equal(run.model.train()(**run.inputs).logits, plain)
    return run


def gradients(run: Run, inside: Callable[[], Any], after: bool = False) -> dict[str, Tensor]:
    """Of a loss, with the forward (and unless `after`, the backward pass) in a block."""
    run.model.zero_grad()
    with inside():
        loss = run.model(**run.inputs).logits.square().mean()
        if not after:
            loss.backward()
    if after:
        loss.backward()
    return {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["saving", "reentrant"])
@pytest.mark.parametrize("name", [*SOME, "lfm2_vl"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@RENAMED
def test_checkpointing_records_each_token_once_and_recording_moves_no_gradient(
    name: str, reentrant: bool
) -> None:
    run = trained(name)
    expected = run.expected()
    plain = gradients(run, ExitStack)
    run.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert run.model.is_gradient_checkpointing
    checkpointed = gradients(run, ExitStack)
    if not reentrant:
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)
    for after in (False, True):
        recorder = nl.ActivationRecorder(run.vlm, None)
        found = gradients(run, lambda r=recorder: r, after)
        torch.testing.assert_close(found, checkpointed, **EXACT)
        assert_same(recorder.activations, expected)
        assert len(recorder.runs) == 1


@RENAMED
def test_what_is_recomputed_is_not_taken_for_a_part_of_the_next_run() -> None:
    run = trained("llava")
    expected = run.expected()
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    with nl.ActivationRecorder(run.vlm, None) as recorder:
        for _ in range(2):
            run.model(**run.inputs).logits.mean().backward()
    assert len(recorder.runs) == 2
    for kept in recorder.runs:
        assert_same(kept, expected)


class Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.activations: dict[str, Activation] = {}

    def take(self, site: nl.NeuronSite, activation: Activation, _tokens: nl.TokenMap) -> None:
        assert site.name not in self.activations
        copied = activation.copy() if isinstance(activation, RoutedActivations) else activation
        self.activations[site.name] = copied


@RENAMED
@pytest.mark.parametrize("name", ["llava", "qwen3_vl_moe", "llama4"])
def test_a_sink_is_handed_each_site_once_although_it_is_computed_twice(name: str) -> None:
    run, sink = trained(name), Kept()
    expected = run.expected()
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    maps = run.vlm.tokens(run.inputs)
    gradients(run, lambda: nl.record(run.vlm, None, sink, maps))
    assert_same(sink.activations, expected)


@RENAMED
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", SOME)
def test_gradients_of_a_deactivated_model_are_those_of_the_ablated_one(
    name: str, checkpointing: bool
) -> None:
    run = trained(name)
    expected = run.expected()
    chosen = list(loudest(run, expected))
    if checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = gradients(run, ExitStack)
    for site, neuron in chosen:
        found = gradients(run, lambda n=neuron: nl.deactivate(run.vlm, n))
        wanted = gradients(
            run, lambda s=site, n=neuron: own_ablation(run.model, s, n.index, n.expert)
        )
        assert any(not torch.equal(found[key], plain[key]) for key in plain), neuron
        for key, gradient in wanted.items():
            if isinstance(site, Routed) and key.startswith(site.block):
                continue  # zeroed weights have a gradient; silenced neurons give them none
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4)


# Generation.


GENERATING = [name for name in (*SOME, "glm4v_moe") if name != "blip-2"]
WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
NEW = 5


def generate(run: Run, inputs: Mapping[str, Any], **how: Any) -> Any:
    """Greedily, of ordinary words only: untrained models write image tokens and ends, too."""
    role = run.vlm.tokens(inputs)["language"].role
    words = set(inputs["input_ids"][role == Role.PROMPT].tolist())
    size = run.model.config.get_text_config().vocab_size
    how = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW} | how
    banned = [token for token in range(size) if token not in words]
    return run.model.generate(**inputs, suppress_tokens=banned, **how)


def continued(inputs: Mapping[str, Any], out: Tensor) -> dict[str, Any]:
    """The inputs of one forward over what entered the model in `generate()`."""
    more = out.shape[1] - 1 - inputs["input_ids"].shape[1]
    whole = dict(inputs)
    for name in texts(inputs):
        last = inputs[name][:, -1:].expand(-1, more, *inputs[name].shape[2:])
        if name != "cross_attention_mask":
            last = torch.full_like(last, int(name == "attention_mask"))
        whole[name] = torch.cat([inputs[name], last], 1)
    return whole | {"input_ids": out[:, :-1]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATING)
def test_generation_gives_what_one_forward_over_the_sequence_gives(name: str, way: str) -> None:
    run = load(name)
    inputs = padded_on("left", run.inputs)
    plain = generate(run, inputs, **WAYS[way])
    with nl.ActivationRecorder(run.vlm, None) as recorder:
        out = generate(run, inputs, **WAYS[way])
    assert torch.equal(out, plain)
    prompt = inputs["input_ids"].shape[1]
    assert out.shape == (2, prompt + NEW)
    forced = continued(inputs, out)
    expected = run.expected(**forced)
    kept, tokens = recorder.activations, recorder.tokens
    assert set(kept) == set(expected)
    attended = forced["attention_mask"] == 1
    for each, activation in kept.items():
        found, wanted = rows(activation), expected[each]
        if run.vlm.sites[each].stream == "language":
            assert activation.shape[:2] == attended.shape
            found, wanted = found[attended.flatten()], wanted[attended.flatten()]
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-3, atol=1e-4)
    role = tokens["language"].role
    assert (role[:, prompt:] == Role.RESPONSE).all()
    assert torch.equal(role[:, :prompt] == Role.PAD, inputs["attention_mask"] == 0)
    before = run.vlm.tokens(inputs)
    assert torch.equal(role[:, :prompt], before["language"].role)
    for stream, there in before.items():
        if stream != "language":
            assert torch.equal(tokens[stream].role, there.role), stream


@pytest.mark.parametrize("way", ["dynamic cache", "static cache"])
@pytest.mark.parametrize("name", GENERATING)
def test_a_deactivated_model_generates_what_the_ablated_one_generates(name: str, way: str) -> None:
    run = load(name)
    inputs, how = padded_on("left", run.inputs), WAYS[way]
    how = how | {"output_scores": True, "return_dict_in_generate": True}
    plain = torch.stack(generate(run, inputs, **how).scores)
    last = {
        each: found[-1:] if each.startswith("language") else found  # the token that is continued
        for each, found in run.expected(**inputs).items()
    }
    neurons = list(loudest(run, last))
    for site, neuron in (neurons[0], neurons[-1]):
        with own_ablation(run.model, site, neuron.index, neuron.expert):
            wanted = generate(run, inputs, **how)
        with nl.deactivate(run.vlm, neuron):
            without = generate(run, inputs, **how)
        scores = torch.stack(without.scores)
        assert torch.equal(without.sequences, wanted.sequences)
        torch.testing.assert_close(scores, torch.stack(wanted.scores), rtol=1e-3, atol=1e-3)
        changed = (scores - plain).nan_to_num(0).abs().amax((1, 2))
        assert changed[0] > 1e-3, neuron
        assert torch.equal(torch.stack(generate(run, inputs, **how).scores), plain)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "qwen3_vl_moe"])
def test_followed_beams_are_forwards_of_the_returned_sequences(name: str) -> None:
    run = load(name)
    inputs = padded_on("left", run.inputs)
    how = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    how |= {"max_new_tokens": 8, "min_new_tokens": 8}
    with nl.ActivationRecorder(run.vlm, "language") as recorder:
        out = generate(run, inputs, **how)
    assert any(len(set(row.tolist()) - {-1}) > 1 for row in out.beam_indices), "no beam was swapped"
    followed = recorder.follow(out.beam_indices)
    for rank in range(2):  # each sample's best sequence, then each one's second
        forced = continued(inputs, out.sequences[rank::2])
        expected = run.expected(**forced)
        attended = forced["attention_mask"].flatten() == 1
        for each, activation in followed.items():
            found = activation[rank::2].flatten(0, 1)[attended]
            wanted = expected[each][attended]
            torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-3, atol=1e-4)


def test_where_generate_calls_a_part_of_the_model_the_advice_of_the_message_works() -> None:
    run = load("blip-2")
    inputs = padded_on("left", run.inputs)
    with (
        pytest.raises(CaptureError, match="record a forward over the generated ids"),
        nl.ActivationRecorder(run.vlm, None),
    ):
        run.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    out = run.model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(out[:, :-NEW], inputs["input_ids"])
    forced = continued(inputs, out)
    assert_same(run.recorded(**forced).activations, run.expected(**forced))


# Precision and attention.


KINDS = [(torch.bfloat16, "sdpa"), (torch.float16, "eager"), (torch.float32, "sdpa")]
PRECISIONS = [
    (name, dtype, attention)
    for name in SOME
    for dtype, attention in KINDS
    if (name, attention) != ("internvl+gpt_oss", "sdpa")  # which GPT-OSS does not have
]


@pytest.mark.parametrize(
    ("name", "dtype", "attention"), PRECISIONS, ids=["-".join(map(str, p)) for p in PRECISIONS]
)
def test_activations_are_the_models_own_in_every_precision(
    name: str, dtype: torch.dtype, attention: str, tmp_path: Path
) -> None:
    run = stored(load(name), tmp_path, dtype=dtype, attn_implementation=attention)
    set_experts(run.model, "eager")  # torch's grouped product wants other sizes in half precision
    inputs = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in run.inputs.items()
    }
    run = Run(run.entry, run.model, inputs)
    plain = run.logits()
    with nl.ActivationRecorder(run.vlm, None) as recorder:
        assert torch.equal(run.logits(), plain)
    kept = recorder.activations
    assert {kept[site.name].dtype for site in run.vlm.select("language")} == {dtype}
    assert_same(kept, run.expected())  # of the same type too


@pytest.mark.parametrize("name", SOME)
def test_activations_are_the_models_own_under_autocast(name: str) -> None:
    run = load(name)
    set_experts(run.model, "eager")
    # Cast weights are not kept: the test's own ablation edits them.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        plain, expected = run.logits(), run.expected()
        with nl.ActivationRecorder(run.vlm, None) as recorder:
            assert torch.equal(run.logits(), plain)
        assert recorder.activations["vision.0"].dtype == torch.bfloat16
        assert_same(recorder.activations, expected)
        assert_deactivates(run, run, expected, **({} if name in DENSE else HALF | {"rerouted": 1}))


# Batches.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*SOME, "gemma4+moe", "idefics2", "mistral3"])
def test_a_padded_sample_gives_the_activations_it_gives_alone(name: str, side: str) -> None:
    run = load(name)
    inputs = padded_on(side, run.inputs)
    together, images = run.recorded(**inputs), run.entry.images()
    for number in range(2):
        mask = inputs["attention_mask"][number] == 1
        alone = run.entry.inputs(run.model, [images[number]])
        alone |= {key: inputs[key][number : number + 1, mask] for key in texts(inputs)}
        single = run.recorded(**alone)
        assert set(single.activations) == set(together.activations)
        for each, activation in single.activations.items():
            stream = run.vlm.sites[each].stream
            mine, whole = single.tokens[stream], together.tokens[stream]
            at = whole.where(number)
            assert torch.equal(whole.role.flatten()[at], mine.role.flatten()[mine.where(0)])
            assert stream != "language" or len(at) == mask.sum()
            assert len(at) > 0
            torch.testing.assert_close(
                rows(together.activations[each])[at],
                rows(activation)[mine.where(0)],
                equal_nan=True,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda text, each=each: f"{each}: {text}",
            )


# Compiled models, and kernels.


def refused(run: Run, vlm: nl.ModelAdapter, what: str) -> None:
    """By everything that would attach to the model."""
    site = next(iter(vlm.sites.values()))
    blocks = [
        lambda: nl.ActivationRecorder(vlm, None),
        lambda: nl.record(vlm, None, Kept(), vlm.tokens(run.inputs)),
        lambda: nl.deactivate(vlm, nl.NeuronId(site.name, 0)),
    ]
    for block in blocks:
        with pytest.raises(CaptureError, match=what), block():
            run.logits()


COMPILED = {
    "llava": "",
    "qwen3_vl_moe": "model.language_model.layers.1",
    "blip-2": "vision_model.encoder.layers.0",
    "idefics3": "model.text_model.layers.0.mlp",
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_model_compiled_in_part_or_whole_is_refused(name: str) -> None:
    run = load(name)
    vlm = run.vlm
    run.model.get_submodule(COMPILED[name]).compile(backend="eager")
    what = f"{COMPILED[name] or 'as a whole'}.*before torch.compile; compile again afterwards"
    refused(run, vlm, what)
    with pytest.raises(CaptureError, match=what):
        nl.adapt(run.model)
    with pytest.raises(CaptureError, match="as a whole"):
        nl.adapt(torch.compile(load(name).model, backend="eager"))


@pytest.fixture
def compiled_calls() -> Iterator[tuple[Any, list[str]]]:
    """A backend for torch.compile, and a list with an entry for each run of compiled code."""
    torch._dynamo.reset()
    calls: list[str] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append("compiled")
            return graph.forward(*args)

        return run

    yield backend, calls
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about transformers' code
@pytest.mark.parametrize("part", ["", "model.language_model"])
def test_a_forward_that_was_compiled_as_a_function_is_not_missed(
    part: str, compiled_calls: tuple[Any, list[str]]
) -> None:
    """No module is compiled, so nothing can be refused beforehand."""
    backend, calls = compiled_calls
    run, plain = load("llava"), load("llava")
    expected = plain.expected()
    module = run.model.get_submodule(part)
    module.forward = torch.compile(module.forward, backend=backend)
    run.logits()
    assert calls
    assert_same(run.recorded().activations, expected, rtol=1e-4, atol=1e-5)
    sink = Kept()
    with nl.record(run.vlm, None, sink, run.vlm.tokens(run.inputs)):
        run.logits()
    assert_same(sink.activations, expected, rtol=1e-4, atol=1e-5)
    assert_deactivates(run, plain, expected, rtol=1e-4, atol=1e-4)
    calls.clear()
    run.logits()
    assert calls


def bypass(run: Run, path: str) -> None:
    """As a kernel for the whole block: the same numbers, and nothing inside it is called."""
    block = run.model.get_submodule(path)
    block.forward = copy.deepcopy(block).forward


KERNELS = [
    ("llava", "language.1", "model.language_model.layers.1.mlp"),
    ("gemma3", "vision.0", "model.vision_tower.encoder.layers.0.mlp"),
    ("qwen3_vl_moe", "language.1", "model.language_model.layers.1.mlp"),
    ("llama4", "language.1", "language_model.model.layers.1.feed_forward"),
    ("internvl+gpt_oss", "language.0", "model.language_model.layers.0.mlp"),
    ("lfm2_vl", "language.1", "model.language_model.layers.1.feed_forward"),
]


@pytest.mark.parametrize(("name", "site", "path"), KERNELS, ids=[k[0] for k in KERNELS])
def test_a_kernel_that_bypasses_the_activation_is_an_error(name: str, site: str, path: str) -> None:
    run = load(name)
    plain, expected = run.logits(), run.expected()
    inside = {n for n, s in run.vlm.sites.items() if f"{s.path}.".startswith(f"{path}.")}
    assert site in inside
    bypass(run, path)
    assert torch.equal(run.logits(), plain)
    what = rf"never ran: .*{site}.*load the model without kernels"
    vlm = run.vlm
    refusing = [
        lambda: nl.ActivationRecorder(vlm, None),
        lambda: nl.record(vlm, None, Kept(), vlm.tokens(run.inputs)),
        lambda: nl.deactivate(vlm, nl.NeuronId(site, 0, 0 if vlm.sites[site].experts else None)),
    ]
    for block in refusing:
        with pytest.raises(CaptureError, match=what), block():
            run.logits()
    with pytest.raises(CaptureError, match=what), nl.ActivationRecorder(vlm, None):
        generate(run, padded_on("left", run.inputs))
    others = [n for n in vlm.sites if n not in inside]
    kept = run.recorded(others).activations
    assert_same(kept, {n: v for n, v in expected.items() if n not in inside})
    del run.model.get_submodule(path).forward  # as the message says
    assert_same(run.recorded().activations, expected)


@pytest.mark.parametrize("name", ROUTED)
def test_a_kernel_for_the_experts_alone_changes_nothing_or_is_an_error(name: str) -> None:
    run, plain = load(name), load(name)
    expected = plain.expected()
    blocks = [site.block for site in run.entry.sites if isinstance(site, Routed)]
    for path in blocks:
        bypass(run, path)
    assert_same(run.recorded().activations, expected, **CLOSE)
    if name != "llama4":
        assert_deactivates(run, plain, expected)
        return
    (routed,) = (site for site in run.vlm.sites.values() if site.experts)
    for beside in (ExitStack(), nl.ActivationRecorder(run.vlm, None)):
        with (
            pytest.raises(CaptureError, match=rf"{re.escape(routed.name)}.*without kernels"),
            beside,
            nl.deactivate(run.vlm, routed.neuron(0, 0)),
        ):
            run.logits()


# Implementations of routed experts.


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", [n for n in ROUTED if n != "llama4"])
def test_the_implementation_of_the_experts_does_not_matter(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for key in ("batched_mm", "grouped_mm"):
        forward = moe.ALL_EXPERTS_FUNCTIONS[key]

        def spied(*args: Any, key: str = key, forward: Any = forward) -> Tensor:
            calls.append(key)
            return forward(*args)

        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, key, spied)
    plain, run = load(name), load(name)
    set_experts(plain.model, "eager")
    expected = plain.expected()
    assert not calls
    set_experts(run.model, implementation)
    kept = run.recorded().activations
    assert set(calls) == {implementation} - {"eager"}
    assert_same(kept, expected, **CLOSE)
    assert any(isinstance(activation, RoutedActivations) for activation in kept.values())
    assert_deactivates(run, plain, expected, rtol=1e-3, atol=2e-4)


# Modes of autograd, and what is left behind.


def state(model: nn.Module) -> list[Any]:
    """Everything of a model that attaching to it could change."""
    return [
        (
            name,
            type(module),
            module.training,
            sorted(vars(module)),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            list(module._backward_hooks),
            [(key, p.data_ptr(), p._version) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "autograd": torch.enable_grad}


@pytest.mark.parametrize("name", [*SOME, "gemma4+moe"])
def test_every_mode_of_autograd_gives_the_same_and_nothing_is_left(name: str) -> None:
    run = load(name)
    vlm, expected = run.vlm, run.expected()
    before = state(run.model)
    _, neuron = list(loudest(run, expected))[-1]
    without = []
    for mode in MODES.values():
        with nl.ActivationRecorder(vlm, None) as recorder, mode():
            run.model(**run.inputs)
        assert_same(recorder.activations, expected)
        assert not any(rows(each).requires_grad for each in recorder.activations.values())
        assert state(run.model) == before
        with nl.deactivate(vlm, neuron), mode():
            without.append(run.model(**run.inputs).logits.detach().clone())
        assert state(run.model) == before
    assert torch.equal(without[0], without[1])
    assert torch.equal(without[1], without[2])


@pytest.mark.parametrize("name", SOME)
def test_what_is_recorded_beside_a_deactivated_neuron_is_the_ablated_models(name: str) -> None:
    run = load(name)
    for site, neuron in loudest(run, run.expected()):
        with own_ablation(run.model, site, neuron.index, neuron.expert):
            wanted = run.expected()
        del wanted[neuron.site]  # which of its values is seen depends on the order of the blocks
        with nl.deactivate(run.vlm, neuron):
            inside = run.recorded(list(wanted))
        with (
            nl.ActivationRecorder(run.vlm, list(wanted)) as outside,
            nl.deactivate(run.vlm, neuron),
        ):
            run.logits()
        for recorder in (inside, outside):
            assert_same(recorder.activations, wanted, rtol=1e-3, atol=1e-4)


class Stop(StoppingCriteria):
    """Breaks generation off after two tokens."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        self.steps += 1
        if self.steps == 2:
            raise ArithmeticError
        return torch.zeros(2, dtype=torch.bool)


@pytest.mark.parametrize("name", [*GENERATING, "mistral3"])
def test_nothing_is_left_on_a_model_that_broke_off(name: str) -> None:
    run = load(name)
    vlm, expected = run.vlm, run.expected()
    inputs = padded_on("left", run.inputs)
    generate(run, inputs)  # a model may keep something of its own from its first generation
    _, neuron = list(loudest(run, expected))[-1]
    before, plain = state(run.model), run.logits()
    blocks = [lambda: nl.ActivationRecorder(vlm, None), lambda: nl.deactivate(vlm, neuron)]
    for block in blocks:
        with pytest.raises(ArithmeticError), block():
            generate(run, inputs, stopping_criteria=[Stop()])
        assert state(run.model) == before
        last = [s for s in run.entry.sites if s.module == "language"][-1]

        def halt(*_call: Any) -> None:
            raise ArithmeticError

        broken = run.model.get_submodule(block_of(last)).register_forward_hook(halt)
        with pytest.raises(ArithmeticError), block():
            run.logits()
        broken.remove()
        assert state(run.model) == before
    assert torch.equal(run.logits(), plain)
    assert_same(run.recorded().activations, expected)

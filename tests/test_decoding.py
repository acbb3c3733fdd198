"""The last layer's output, decoded, is the model's logits: for every architecture.

The reference is the model: its own logits, for its last layer's output as it is, and for another
state put in its place. Numbers that scale and cap logits are set to values that show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import neuronlens as nl
from neuronlens.adapters.decoding import AFTER, Decoding, decoding_of
from neuronlens.errors import AdapterError
from neuronlens.lens import LogitLens
from zoo import Entry, draw, entries

ZOO = entries()

NONE = {
    "inkling2": r"no function of its last layer's output",
    "pi0": r"has no unembedding",
}
"""Which have no decoding, and what is said."""

KNOBS = {
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
    "lm_head_multiplier": 0.7,
    "output_multiplier": 0.6,
    "final_logit_softcapping": 2.5,
    "logits_soft_cap": 2.5,
    "output_logit_soft_cap": 2.5,
    "logits_mup_width_multiplier": 3.0,
    "unpadded_vocab_size": 77,
    "scale_decoder_outputs": True,
}
"""Numbers of configs that change logits in some model, and values that would be noticed."""


def _turned(config: Any) -> Any:
    """A config with all its knobs turned, whether or not the model uses them."""
    for part in [config, *(v for v in vars(config).values() if hasattr(v, "model_type"))]:
        for name, value in KNOBS.items():
            if name in vars(part):
                setattr(part, name, value)
        if part is not config:
            _turned(part)
    return config


def _entry(name: str) -> Entry:
    entry = ZOO[name]
    return replace(entry, config=lambda: _turned(entry.config()))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The logits of all words: those that a classifier picks its two from."""
    kept: list[Tensor] = []
    picks = type(model).__name__ == "ShieldGemma2ForImageClassification"
    whole = model.model if picks else model
    handle = whole.register_forward_hook(lambda _m, _a, out: kept.append(out.logits))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return kept[0]


@contextmanager
def _listening(model: nn.Module, paths: tuple[str, ...]) -> Iterator[list[tuple[str, Any]]]:
    """The outputs of modules in the order in which they ran."""
    heard: list[tuple[str, Any]] = []

    def keep(path: str) -> Callable[..., None]:
        return lambda _m, _a, out: heard.append((path, out))

    handles = [model.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    yield heard
    for handle in handles:
        handle.remove()


@contextmanager
def _replaced(module: nn.Module, state: Tensor) -> Iterator[None]:
    """The module's output is another one."""

    def swap(_m: Any, _a: Any, out: Any) -> Any:
        return state if isinstance(out, Tensor) else (state, *out[1:])

    handle = module.register_forward_hook(swap)
    yield
    handle.remove()


def _by_hand(name: str, output: Any) -> Tensor:
    """What `Decoding.residual` should give."""
    state = _first(output)
    if name == "gemma3n":
        return torch.stack(list(state), dim=2)  # [stream, batch, token, hidden]
    return state


def _compared(name: str, model: Any, inputs: Mapping[str, Any], a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    if name != "qwen3_vl":
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        return
    # Its DeepStack is as deep as it is: image features are added after the last layer, too.
    image = inputs["input_ids"] == model.config.image_token_id
    torch.testing.assert_close(a[~image], b[~image], rtol=1e-6, atol=1e-6)
    assert not torch.isclose(a[image], b[image]).all(-1).any()


def _layers(name: str, config: Any) -> int:
    """The number of decoder layers by the config."""
    if "+t5" in name:
        return int(config.text_config.num_decoder_layers)
    if name == "florence2":
        return int(config.text_config.decoder_layers)
    if name == "udop":
        return int(config.num_decoder_layers)
    if name == "pix2struct":
        return int(config.text_config.num_layers)
    if name == "pp_formulanet" or name.endswith(("+mbart", "+trocr")):
        return int(getattr(config, "decoder", config.get_text_config()).decoder_layers)
    part = getattr(config, "decoder", None) or config.get_text_config()
    return int(part.num_hidden_layers)


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(NONE)))
def test_the_state_of_the_last_layer_gives_the_models_logits(name: str) -> None:
    entry = _entry(name)
    model = entry.model()
    inputs = entry.inputs(model, entry.images())
    decoding = decoding_of(model)
    assert decoding_of(entry.model("meta")) == decoding
    with _listening(model, decoding.layers) as heard:
        logits = _logits(model, inputs)
    assert [path for path, _ in heard] == list(decoding.layers)  # in this order, each once
    assert len(heard) == _layers(name, model.config) >= 2
    states = [decoding.residual(out) for _, out in heard]
    torch.testing.assert_close(states[-1], _by_hand(name, heard[-1][1]), rtol=0, atol=0)
    with torch.no_grad():
        got, early = (decoding.logits(model, states[i]) for i in (-1, 0))
    _compared(name, model, inputs, got, logits)
    with _replaced(model.get_submodule(decoding.layers[-1]), _first(heard[0][1])):
        _compared(name, model, inputs, early, _logits(model, inputs))
    assert not torch.equal(got, early)
    _lens_agrees(name, nl.adapt(model), inputs, logits)


def _lens_agrees(
    name: str, vlm: nl.ModelAdapter, inputs: Mapping[str, Any], logits: Tensor
) -> None:
    """The logit lens, whose states come by hooks of its own, says at the last layer the same."""
    lens = LogitLens(vlm)
    tokens = vlm.tokens(inputs)[vlm.answer_stream]
    reading = lens.read(inputs, k=lens.words, layers=[-1])
    at = torch.cat([tokens.where(row) for row in range(len(tokens.role))])
    got = torch.zeros(len(at), lens.words)
    got.scatter_(1, torch.tensor(reading.ids[0]), torch.tensor(reading.probabilities[0]))
    want = logits.flatten(0, 1)[at].float().softmax(-1)
    if name == "qwen3_vl":  # see _compared
        text = tokens.role.flatten()[at] != nl.Role.VISUAL
        got, want = got[text], want[text]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(NONE) & set(ZOO)))
def test_where_there_is_no_decoding_the_error_says_why(name: str) -> None:
    model = ZOO[name].model("meta")
    with pytest.raises(AdapterError, match=NONE[name]):
        decoding_of(model)


def test_a_base_model_has_no_decoding() -> None:
    model = ZOO["llava"].model("meta")
    with pytest.raises(AdapterError, match=r"LlavaModel has no unembedding.*AutoModelFor"):
        decoding_of(model.model)


def test_a_norm_of_another_name_is_not_passed_over() -> None:
    model = ZOO["llava"].model("meta")
    stack = model.model.language_model
    stack.last_norm = stack.norm
    del stack.norm
    with pytest.raises(AdapterError, match="has last_norm beside its decoder layers"):
        decoding_of(model)


def test_layers_of_another_name_are_not_guessed() -> None:
    model = ZOO["llava"].model("meta")
    stack = model.model.language_model
    stack.steps = stack.layers
    del stack.layers
    with pytest.raises(AdapterError, match="no list of decoder layers"):
        decoding_of(model)


def test_the_paths_of_a_llava() -> None:
    adapter = nl.adapt(ZOO["llava"].model("meta"))
    assert adapter.decoding == Decoding(
        layers=("model.language_model.layers.0", "model.language_model.layers.1"),
        norm="model.language_model.norm",
        unembedding="lm_head",
        head="lm_head",
        shape=(40,),
    )
    assert adapter.decoding is adapter.decoding


PATHS = {
    "blip": ("text_decoder.bert.encoder.layer", None, "text_decoder.cls.predictions.decoder"),
    "blip-2+t5": (
        "language_model.decoder.block",
        "language_model.decoder.final_layer_norm",
        "language_model.lm_head",
    ),
    "diffusion_gemma": ("model.decoder.layers", "model.decoder.norm", "lm_head"),
    "florence2": ("model.language_model.decoder.layers", None, "lm_head"),
    "git": ("git.encoder.layer", None, "output"),
    "qwen4_exp": ("model.language_model.layers", None, "lm_head"),
    "t5gemma2": ("model.decoder.layers", "model.decoder.norm", "lm_head.out_proj"),
    "vision-encoder-decoder": (
        "decoder.transformer.h",
        "decoder.transformer.ln_f",
        "decoder.lm_head",
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_paths_of_models_unlike_the_rest(name: str) -> None:
    model = ZOO[name].model("meta")
    layers, norm, unembedding = PATHS[name]
    decoding = decoding_of(model)
    assert decoding.layers == tuple(f"{layers}.{i}" for i in range(len(decoding.layers)))
    assert (decoding.norm, decoding.unembedding) == (norm, unembedding)
    assert model.get_submodule(decoding.unembedding) is not None


# Language models that vision-language models may be built on, each with its own head.

_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 2}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
_PLE = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    **_EXPERTS,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        },
    },
    "hyperclovax": {},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"],
    },
    "granitemoeshared": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {**_PLE, "num_kv_shared_layers": 0},
    "gemma4_text": {**_PLE},
    "gemma4_unified_text": {**_PLE},
    "inkling_text": {"num_experts_per_tok": 2},
    "minicpm3": {"num_key_value_heads": 4, "dim_model_base": 16},
    "nanochat": {},
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3},
    "vaultgemma": {},
    "beam": {},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "qk_dim_factor": 1.0, "use_cache": False},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_mamba": {"state_size": 8},
    "t5": _T5,
    "longt5": _T5,
    "umt5": _T5,
    "switch_transformers": _T5,
    "t5gemma": {"encoder": dict(_SMALL), "decoder": dict(_SMALL)},
    "mllama_text_model": {},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8},
    "electra": {"embedding_size": 24},
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 48},
    "deepseek_v4": {},
    "roberta": {},
    "xlm-roberta-xl": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
}


def _language_model(model_type: str) -> Any:
    classes = (
        {"mllama_text_model": "MllamaForCausalLM"}
        | dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
        | dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    own = LANGUAGE_MODELS[model_type]
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    shared = {"vocab_size": 96} if own is _T5 else {k: v for k, v in _SMALL.items() if k in known}
    config = transformers.AutoConfig.for_model(model_type, **(shared | own))
    with torch.device("meta"):
        cls = getattr(transformers, classes[model_type])
        assert sum(p.numel() for p in cls(_turned(config)).parameters()) < 2e6
    torch.manual_seed(0)
    model = cls(config)
    draw(model)
    return model.to(torch.bfloat16).eval()


@pytest.mark.parametrize("model_type", sorted(set(LANGUAGE_MODELS) & set(CONFIG_MAPPING)))
def test_the_head_of_a_language_model_is_known_by_its_own_type(model_type: str) -> None:
    model = _language_model(model_type)
    ids = torch.arange(3, 17).view(2, 7)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    decoding = decoding_of(model)
    with _listening(model, decoding.layers) as heard:
        logits = _logits(model, {"input_ids": ids, **more})
    with torch.no_grad():
        got = decoding.logits(model, decoding.residual(heard[-1][1]))
    # In bfloat16, so that a head that turns to float32 shows.
    torch.testing.assert_close(got, logits)


SCALES = re.compile(
    r"^ +(?:lm_)?logits(?:\[.*?\])? = .*(?: [*/] |tanh|cap\(|\[\.\.\., :)"
    r"|^ +(?:hidden_states|sequence_output) = \S+ [*/] ",
    re.MULTILINE,
)


def test_every_head_of_transformers_that_changes_its_logits_is_listed() -> None:
    types: dict[str, list[str]] = {}
    for mapping in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for model_type, names in mapping.items():
            for each in (names,) if isinstance(names, str) else names:
                types.setdefault(each, []).append(model_type)
    changing = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for source in path.read_text(encoding="utf-8").split("\nclass ")[1:]:
            name = source.partition("(")[0]
            forward = source.partition("    def forward(")[2].partition("\n    def ")[0]
            if name in types and SCALES.search(forward):
                changing |= set(types[name])
    assert len(changing) > 30
    # Which has no decoding: see NONE.
    known = {model_type for each in types.values() for model_type in each}
    assert changing - set(AFTER) == {"inkling2", "inkling2_text"} & known


def test_states_are_turned_into_the_type_of_the_weights() -> None:
    model = ZOO["kosmos-2"].model().to(torch.bfloat16)  # its norm is torch's own
    decoding = decoding_of(model)
    state = torch.randn(3, 40).to(torch.bfloat16)
    with torch.no_grad():
        logits = decoding.logits(model, state)
        assert logits.shape == (3, 160)
        torch.testing.assert_close(decoding.logits(model, state.float()), logits, rtol=0, atol=0)


def test_gradients_reach_the_state() -> None:
    model = ZOO["gemma3n"].model()
    decoding = decoding_of(model)
    state = torch.randn(2, 5, *decoding.shape, requires_grad=True)
    decoding.logits(model, state)[0, 3].logsumexp(-1).backward()
    reached = state.grad.abs().sum((-1, -2)) > 0
    assert reached.nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("name", ["glm5_next", "qwen4_exp", "gemma3n", "llava"])
def test_any_axes_may_come_before_the_state(name: str) -> None:
    model = ZOO[name].model()
    decoding = decoding_of(model)
    state = torch.randn(2, 3, *decoding.shape)
    with torch.no_grad():
        logits = decoding.logits(model, state)
        torch.testing.assert_close(decoding.logits(model, state[1, 2]), logits[1, 2])
        torch.testing.assert_close(decoding.logits(model, state[None]), logits[None])


@pytest.mark.parametrize("name", ["llava", "gemma3n", "qwen4_exp"])
def test_a_state_of_another_shape_is_refused(name: str) -> None:
    model = ZOO[name].model()
    decoding = decoding_of(model)
    with pytest.raises(AdapterError, match=r"given as \[2, 24\].*Decoding\.residual"):
        decoding.logits(model, torch.zeros(2, 24))

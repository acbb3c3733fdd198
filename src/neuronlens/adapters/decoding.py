"""From the residual stream to logits: decoder layers, final norm, unembedding, for any model.

Layers, norm and unembedding are found by structure, in the stack that makes the logits: of an
encoder-decoder it is the decoder, of a model with two stacks (diffusion_gemma) the one that is
unembedded. What follows the unembedding is in no module, so it is listed by model type, in
`AFTER`. The type is that of the module that owns the head: LLaVA's own for LLaVA, the language
model's for InstructBLIP. An owner that is not listed adds nothing, whatever its text config says:
Aya Vision, for one, does not use its Cohere text model's logit_scale.

Models in which a state of the residual stream is more than one vector per token:

| model | output of a layer | to one vector |
|---|---|---|
| gemma3n | [stream, batch, token, hidden] | rescaled projections, averaged |
| glm5_next, deepseek_v4, hy_v4 | [batch, token, stream, hidden] | hc_head |
| qwen4_exp | [batch, token, stream * hidden] | hyper_connection_mixer, which is also the norm |

Models without a decoding:

| model | why |
|---|---|
| pi0 | has no unembedding: it predicts actions, no words |
| inkling2 | its final norm is given an attention over the states between all blocks |
| a base model (LlavaModel) | has no unembedding |

ShieldGemma 2 as a classifier reports two words' logits at the last token; its decoding gives all
words' at every token. Chameleon's decoding gives image words the lowest number, as the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import unwrap
from itertools import takewhile
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuronlens.errors import AdapterError

Layout = Literal["one", "first", "stacked", "wide"]

_LISTS = ("layers", "layer", "block", "blocks", "h")
_NORMS = (
    "norm",
    "final_layernorm",
    "final_layer_norm",
    "final_norm",
    "layer_norm",
    "norm_f",
    "ln_f",
    "ln_out",
    "out_norm",
    "LayerNorm",
    "embedding_norm",
)


@dataclass(frozen=True)
class Decoding:
    """The way from the output of any decoder layer to the model's logits.

    The layers are those of the stack that makes the logits; of an encoder-decoder, the
    decoder's. Paths are dotted, for `model.get_submodule`.

    Attributes:
        layers: Paths of the decoder layers, in order.
        norm: Path of the final norm; None for post-LN decoders, and where `mixer` normalises.
        unembedding: Path of the module that holds the matrix [word, hidden].
        head: Path of the module that is called for the logits: `unembedding`, or one that
            holds it and more (the transform of BERT's and BLIP's heads).
        shape: Last axes of the residual stream: [hidden], or with a model's several streams
            [stream, hidden] or [stream * hidden].
        layout: Where the streams are in a layer's output: there is "one"; on the "first"
            axis; "stacked" before the hidden one; "wide", on the hidden axis.
        mixer: Path of what makes one vector of several streams.
        between: Paths of modules between norm and head (OPT's project_out).
        state_scale: The head is given this times the normed state (T5's d_model ** -0.5).
        scale: Logits are this times the head's output (Cohere's logit_scale, 1 / Granite's
            logits_scaling).
        cap: Logits are cap * tanh(logits / cap) (Gemma's final_logit_softcapping), or None.
        words: The model keeps this many of the head's outputs; None for all.
        masked: Words whose logit the model sets to the lowest number of its type.
        float32: Whether the model turns the head's output into float32.
    """

    layers: tuple[str, ...]
    norm: str | None
    unembedding: str
    head: str
    shape: tuple[int, ...]
    layout: Layout = "one"
    mixer: str | None = None
    between: tuple[str, ...] = ()
    state_scale: float = 1.0
    scale: float = 1.0
    cap: float | None = None
    words: int | None = None
    masked: tuple[int, ...] = ()
    float32: bool = False

    def residual(self, output: object) -> Float[Tensor, "batch token *state"]:
        """The residual stream in what one of `layers` returned, ready for `logits`.

        Models with DeepStack (Qwen3-VL, Granite 4 Vision, ...) add image features to it between
        some layers: at image tokens, the next one is given more than this.
        """
        state = output if isinstance(output, Tensor) else cast(tuple[Tensor, ...], output)[0]
        return state.movedim(0, -2) if self.layout == "first" else state

    def logits(
        self, model: nn.Module, hidden: Float[Tensor, "*axes state"]
    ) -> Float[Tensor, "*axes word"]:
        """The logits the model would give, were `hidden` the output of its last layer.

        The model's own modules are called; gradients flow unless switched off. States in
        another type than the weights' are turned into theirs where a module needs it.

        Args:
            model: The model this was found in.
            hidden: Residual stream after any layer, as `residual` gives it.

        Raises:
            AdapterError: If `hidden` does not end in `shape`.
        """
        if tuple(hidden.shape[-len(self.shape) :]) != self.shape:
            raise AdapterError(
                f"The residual stream was given as {list(hidden.shape)}; its last axes are "
                f"{list(self.shape)} in this model. Take it from a layer's output with "
                "Decoding.residual."
            )
        state = hidden
        if self.mixer is not None:
            state = self._mixed(model.get_submodule(self.mixer), state)
        if self.norm is not None:
            norm = model.get_submodule(self.norm)
            # Own norms compute in float32 whatever they are given; torch's want their weight's.
            state = norm(_fitting(norm, state) if isinstance(norm, nn.LayerNorm) else state)
        for path in self.between:
            state = model.get_submodule(path)(state)
        if self.state_scale != 1:
            state = state * self.state_scale
        logits = model.get_submodule(self.head)(
            _fitting(model.get_submodule(self.unembedding), state)
        )
        if self.float32:
            logits = logits.float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        if self.masked:
            words = torch.tensor(self.masked, device=logits.device)
            logits = logits.index_fill(-1, words, torch.finfo(logits.dtype).min)
        return cast(Tensor, logits[..., : self.words])

    def _mixed(self, mixer: nn.Module, state: Tensor) -> Tensor:
        if self.layout == "first":
            return _unprojected(cast(nn.ModuleList, mixer), state)
        if self.layout == "stacked":  # it counts axes from the front: batch, token, stream
            flat: Tensor = mixer(state.reshape(1, -1, *self.shape))
            return flat.reshape(*state.shape[:-2], -1)
        return cast(Tensor, mixer(state))


def decoding_of(model: nn.Module) -> Decoding:
    """Find a model's decoder layers, final norm and unembedding, and what follows it.

    Nothing is run; a model on the meta device will do.

    Raises:
        AdapterError: If the model has no unembedding, no list of decoder layers, or logits that
            are no function of the last layer's output; the message says which.
    """
    name = type(model).__name__
    words = _unembedding(model)
    found = _stack(model)
    if words is None:
        raise AdapterError(
            f"{name} has no unembedding, so its states have no logits. "
            "Load the whole model, for example with AutoModelForImageTextToText; if this is it, it "
            "does not predict words."
        )
    if found is None:
        raise AdapterError(
            f"{name} has no list of decoder layers by any of the names {', '.join(_LISTS)} where "
            "get_decoder() leads."
        )
    path, stack, layers = found
    if hasattr(stack, "final_input"):
        raise AdapterError(
            f"The logits of {name} are no function of its last layer's output: its final norm is "
            "given an attention over the states between all blocks. One state has no logits."
        )
    owner_path = ".".join(_common(path, words))
    owner: Any = model.get_submodule(owner_path)
    text = owner.config.get_text_config(decoder=True)
    blocks = cast(nn.ModuleList, model.get_submodule(layers))
    decoding = Decoding(
        layers=tuple(f"{layers}.{i}" for i in range(len(blocks))),
        norm=_norm(name, path, stack),
        unembedding=words,
        head=".".join(words.split(".")[: len(_common(path, words)) + 1]),
        shape=(int(text.hidden_size),),
        between=(_join(path, "project_out"),) if _has(stack, "project_out") else (),
    )
    decoding = replace(decoding, **_streams(path, stack, decoding.shape[0]))
    after = AFTER.get(owner.config.model_type)
    if after is None:
        return decoding
    changes = after(owner, text)
    # Modules before the head are named from the head's owner.
    named = tuple(_join(owner_path, each) for each in changes.pop("between", ()))
    return replace(decoding, between=decoding.between + named, **changes)


# Structure.


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _common(a: str, b: str) -> list[str]:
    """The names that two paths begin with alike."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _descent(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, its decoder, and so on to the module that has the layers."""
    paths = {id(module): name for name, module in model.named_modules()}
    module: Any = model
    while module is not None:
        yield paths[id(module)], module
        if any(isinstance(getattr(module, each, None), nn.ModuleList) for each in _LISTS):
            return
        inner = [module.get_decoder()] if hasattr(module, "get_decoder") else []
        prefix = getattr(module, "base_model_prefix", "")
        # BERT's stack is called encoder, and there is no get_decoder() that knows.
        inner += [
            getattr(module, each, None) for each in (prefix, "model", "decoder", "encoder") if each
        ]
        module = next(
            (each for each in inner if isinstance(each, nn.Module) and each is not module), None
        )


def _stack(model: nn.Module) -> tuple[str, nn.Module, str] | None:
    """Path and module that has the decoder layers, and the path of their list."""
    *_, (path, module) = _descent(model)
    for name in _LISTS:
        if isinstance(getattr(module, name, None), nn.ModuleList):
            return path, module, _join(path, name)
    return None


def _unembedding(model: nn.Module) -> str | None:
    """Path of the model's output embeddings; of those of a model in it, if it tells none."""
    *_, (path, _) = _descent(model)
    parts = path.split(".")
    for depth in range(len(parts) + 1):
        module: Any = model.get_submodule(".".join(parts[:depth]))
        if not hasattr(module, "get_output_embeddings"):
            continue
        found = module.get_output_embeddings()
        if found is not None:
            paths: dict[int, str] = {id(each): name for name, each in model.named_modules()}
            return paths[id(found)]
    return None


def _norm(model: str, path: str, stack: nn.Module) -> str | None:
    for name in _NORMS:
        if _has(stack, name):
            return _join(path, name)
    others = [
        name
        for name, child in stack.named_children()
        if "norm" in type(child).__name__.lower() and "emb" not in name
    ]
    if others:
        raise AdapterError(
            f"{model} has {' and '.join(others)} beside its decoder layers; whether one of them "
            f"is the final norm is not known. Known names: {', '.join(_NORMS)}."
        )
    return None


def _streams(path: str, stack: nn.Module, hidden: int) -> dict[str, Any]:
    """How many residual streams there are, where they are, and what makes one of them."""
    config: Any = stack.config if hasattr(stack, "config") else None
    if _has(stack, "altup_unembed_projections"):
        streams, layout, mixer = config.altup_num_inputs, "first", "altup_unembed_projections"
    elif _has(stack, "hc_head"):
        streams, layout, mixer = config.hc_mult, "stacked", "hc_head"
    elif _has(stack, "hyper_connection_mixer"):
        streams, layout, mixer = config.hc_count, "wide", "hyper_connection_mixer"
    else:
        return {}
    shape = (streams * hidden,) if layout == "wide" else (streams, hidden)
    return {"shape": shape, "layout": layout, "mixer": _join(path, mixer)}


def _unprojected(
    projections: nn.ModuleList, state: Float[Tensor, "*axes stream hidden"]
) -> Float[Tensor, "*axes hidden"]:
    """Gemma 3n's streams, each projected and made as long as the first, averaged."""
    first, *others = state.unbind(-2)
    length = first.square().mean(-1, keepdim=True).sqrt()
    vectors = [first]
    for projection, other in zip(projections, others, strict=True):
        vector = projection(other)
        own = vector.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
        vectors.append(vector * length / own)
    return torch.stack(vectors).mean(0)


def _fitting(module: nn.Module, state: Tensor) -> Tensor:
    """The state in the type of the module's weight, unless that is packed (quantised)."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return state.to(weight.dtype)
    return state


# What follows the unembedding.

After = Callable[[Any, Any], dict[str, Any]]
"""From the owner of the head and its text config to the attributes of its `Decoding`."""


def _multiplied(name: str) -> After:
    def after(owner: Any, text: Any) -> dict[str, Any]:
        value = getattr(text, name)
        return {"scale": 1.0 if value is None else float(value)}

    return after


def _divided(name: str) -> After:
    return lambda owner, text: {"scale": 1 / getattr(text, name)}


def _capped(name: str = "final_logit_softcapping", float32: bool = False) -> After:
    # Gemma 1 as PaliGemma's language model has no such number.
    return lambda owner, text: {"cap": getattr(text, name, None), "float32": float32}


def _paligemma(owner: Any, text: Any) -> dict[str, Any]:
    from transformers import PaliGemmaForConditionalGeneration

    # Before transformers 5.23 it capped nothing, whatever its text config says.
    said = unwrap(PaliGemmaForConditionalGeneration.forward).__code__.co_consts
    return _capped()(owner, text) if "final_logit_softcapping" in said else {}


def _t5(when: str) -> After:
    return lambda owner, text: {"state_scale": text.d_model**-0.5 if getattr(text, when) else 1.0}


def _muse(owner: Any, text: Any) -> dict[str, Any]:
    return {"scale": text.output_multiplier, "cap": text.final_logit_softcapping}


def _inkling(owner: Any, text: Any) -> dict[str, Any]:
    scale = 1 / text.logits_mup_width_multiplier
    return {"state_scale": scale, "words": text.unpadded_vocab_size}


def _minicpm3(owner: Any, text: Any) -> dict[str, Any]:
    return {"state_scale": 1 / text.logits_scaling}


def _chameleon(owner: Any, text: Any) -> dict[str, Any]:
    return {"masked": tuple(owner.model.vocabulary_mapping.image_tokens)}


def _after_module(name: str) -> After:
    return lambda owner, text: {"between": (name,)}


def _float32(owner: Any, text: Any) -> dict[str, Any]:
    return {"float32": True}


AFTER: dict[str, After] = {
    **dict.fromkeys(
        ("cohere", "cohere2", "cohere2_moe", "cohere_compass", "cohere_compass_text"),
        _multiplied("logit_scale"),
    ),
    **dict.fromkeys(("hyperclovax", "hyperclovax_vision_v2"), _multiplied("logits_scaling")),
    "falcon_h1": _multiplied("lm_head_multiplier"),
    **dict.fromkeys(
        (
            "granite",
            "granite_swa",
            "granitemoe",
            "granitemoe_swa",
            "granitemoehybrid",
            "granitemoeshared",
            "granite4_vision",
            "granite_docling",
        ),
        _divided("logits_scaling"),
    ),
    **dict.fromkeys(
        (
            "gemma2",
            "gemma3_text",
            "gemma3n",
            "gemma3n_text",
            "gemma4",
            "gemma4_text",
            "gemma4_unified",
            "gemma4_unified_text",
            "mistral_large4",
            "nanochat",
            "t5gemma",
            "t5gemma2",
            "vaultgemma",
        ),
        _capped(),
    ),
    **dict.fromkeys(("beam", "diffusion_gemma"), _capped(float32=True)),
    "paligemma": _paligemma,
    "recurrent_gemma": _capped("logits_soft_cap"),
    "xlstm": _capped("output_logit_soft_cap", float32=True),
    **dict.fromkeys(("muse_glimmer", "muse_spark"), _muse),
    **dict.fromkeys(("t5", "longt5"), _t5("scale_decoder_outputs")),
    **dict.fromkeys(("umt5", "switch_transformers", "udop"), _t5("tie_word_embeddings")),
    **dict.fromkeys(("inkling_mm_model", "inkling_text"), _inkling),
    "minicpm3": _minicpm3,
    "chameleon": _chameleon,
    "electra": _after_module("generator_predictions"),
    **dict.fromkeys(
        ("falcon_mamba", "mamba", "mamba2", "mllama_text_model", "nemotron_h"), _float32
    ),
}
"""By the model type of the head's owner, what it does beside calling the head."""

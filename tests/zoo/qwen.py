"""Qwen-like models: pixel rows in merge-block order, one token for every 2 x 2 patches.

The processor cuts each image into patches and puts the rows of one image after the other into
`pixel_values`; the four rows 4k .. 4k + 3 are the patches that become token k, and
`image_grid_thw` says how many patches each image has. (VideoLLaMA3 merges nothing.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from zoo import Dense, Entry, Images, Routed

PAD, BOS, EOS, IMAGE, VIDEO, START, END, AUDIO, VIDEO_START, VIDEO_END = range(10)
VOCABULARY = 128
FIRST = 20
"""The ids of ordinary text are `FIRST` to `VOCABULARY`."""

PATCH = 4
LANGUAGE, GATED, EXPERT, SHARED, EXPERTS = 48, 56, 20, 28, 6
"""The language model: hidden size, widths of its feed-forward blocks, number of experts."""
VISION, WIDE = 32, 44
"""The vision tower: hidden size and width of its feed-forward blocks."""
MERGED = 4 * VISION
SIZES = ((32, 24), (16, 24))
"""12 and 6 tokens."""

gelu_tanh = partial(F.gelu, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def silu_half(x: Tensor) -> Tensor:
    """Of gate and up projection in one, the gate is the first half."""
    return F.silu(x.chunk(2, -1)[0])


def silu_clamped(x: Tensor) -> Tensor:
    return F.silu(x.clamp(max=LIMIT))


LIMIT = 1.0
"""GLM-5 clamps its gates at 10; here low enough that it happens."""


# ------------------------------------------------------------------------------- inputs


def pixel_rows(
    image: Tensor, merge: int = 2, frames: int = 2, channels_last: bool = False
) -> Tensor:
    """The patches of an image in merge-block order, [patch, channel x frame x height x width]."""
    _, height, width = image.shape
    down, right = height // PATCH // merge, width // PATCH // merge
    cut = (2 * image - 1).reshape(3, down, merge, PATCH, right, merge, PATCH)
    if channels_last:
        cut = cut.permute(1, 4, 2, 5, 3, 6, 0).unsqueeze(7).expand(*[-1] * 7, frames)
    else:
        cut = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5).expand(*[-1] * 5, frames, -1, -1)
    return cut.reshape(down * right * merge**2, -1)


def make_inputs(
    model: Any,
    images: Images,
    *,
    merge: int = 2,
    frames: int = 2,
    channels_last: bool = False,
    markers: bool = True,
    left: bool = True,
    types: bool = True,
    moe_types: bool = False,
    merge_sizes: bool = False,
) -> dict[str, Tensor]:
    """What the processor hands to forward.

    Args:
        markers: Whether the image tokens are between a begin and an end token.
        left: Whether padding is on the left.
        types: Whether the processor returns `mm_token_type_ids`, 1 for image tokens.
        moe_types: Ernie's second kind, 1 also for the begin and end token.
        merge_sizes: VideoLLaMA3's `image_merge_sizes`.
    """
    generator = torch.Generator().manual_seed(5)
    samples, rows, grids = [], [], []
    for i, pictures in enumerate(images):
        ids = [BOS, *torch.randint(FIRST, VOCABULARY, (3 + i,), generator=generator).tolist()]
        for image in pictures:
            _, height, width = image.shape
            rows.append(pixel_rows(image, merge, frames, channels_last))
            grids.append((1, height // PATCH, width // PATCH))
            tokens = [IMAGE] * (len(rows[-1]) // merge**2)
            ids += [START, *tokens, END] if markers else tokens
            ids += torch.randint(FIRST, VOCABULARY, (4 + i,), generator=generator).tolist()
        samples.append(ids)
    longest = max(map(len, samples))
    padding = [[PAD] * (longest - len(ids)) for ids in samples]
    ids = torch.tensor(
        [more + ids if left else ids + more for ids, more in zip(samples, padding, strict=True)]
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.cat(rows),
        "image_grid_thw": torch.tensor(grids),
    }
    if types:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if moe_types:
        marked = (ids == IMAGE) | (ids == START) | (ids == END)
        inputs["moe_mm_token_type_ids"] = marked.long()
    if merge_sizes:
        inputs["image_merge_sizes"] = torch.full((len(grids),), merge)
    return {name: value.to(model.device) for name, value in inputs.items()}


# -------------------------------------------------------------------------------- sites


def expert_act(
    block: nn.Module, x: Tensor, expert: int, act: Callable[[Tensor], Tensor] = F.silu
) -> Tensor:
    gate, _ = F.linear(x, block.gate_up_proj[expert]).chunk(2, -1)
    return act(gate)


def expert_zero(block: nn.Module, expert: int, index: int) -> None:
    with torch.no_grad():
        block.down_proj[expert, :, index] = 0


def expert_routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """All are called as `experts(hidden_states, top_k_index, top_k_weights)`."""
    return args[0], args[1]


def routed(layer: int, block: str, act: Callable[[Tensor], Tensor] = F.silu, **more: Any) -> Routed:
    return Routed(
        more.pop("module", "language"),
        layer,
        block,
        more.pop("experts", EXPERTS),
        more.pop("width", EXPERT),
        act=partial(expert_act, act=act),
        zero=expert_zero,
        routing=expert_routing,
        **more,
    )


def ernie_rows(kind: int) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
    """Text tokens (0) and those of images (1) go to different experts."""

    def rows(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        return (inputs["moe_mm_token_type_ids"].flatten() == kind).nonzero().flatten()

    return rows


def glu(
    layer: int,
    path: str,
    width: int = GATED,
    act: Callable[[Tensor], Tensor] = F.silu,
    module: str = "language",
) -> Dense:
    return Dense(module, layer, f"{path}.gate_proj", act, f"{path}.down_proj", width)


def fused(layer: int, path: str, width: int = GATED) -> Dense:
    return Dense("language", layer, f"{path}.gate_up_proj", silu_half, f"{path}.down_proj", width)


def mlp(
    module: str,
    layer: int,
    path: str,
    names: str,
    act: Callable[[Tensor], Tensor],
    width: int,
) -> Dense:
    """Two Linears, whose names are given with a space between them."""
    first, second = names.split()
    return Dense(module, layer, f"{path}.{first}", act, f"{path}.{second}", width)


MLP = "model.language_model.layers.{}.mlp"


def language_glu() -> tuple[Dense, ...]:
    return tuple(glu(i, MLP.format(i)) for i in range(2))


def language_fused() -> tuple[Dense, ...]:
    return tuple(fused(i, MLP.format(i)) for i in range(2))


def vision_mlps(
    names: str, act: Callable[[Tensor], Tensor], path: str = "model.visual.blocks", n: int = 2
) -> tuple[Dense, ...]:
    return tuple(mlp("vision", i, f"{path}.{i}.mlp", names, act, WIDE) for i in range(n))


def vision_glus(
    path: str = "model.visual.blocks",
    width: int = WIDE,
    act: Callable[[Tensor], Tensor] = F.silu,
) -> tuple[Dense, ...]:
    return tuple(glu(i, f"{path}.{i}.mlp", width, act, "vision") for i in range(2))


def shared_moe() -> tuple[Dense | Routed, ...]:
    """Two layers of routed experts and a shared one that is gated."""
    sites: list[Dense | Routed] = []
    for i in range(2):
        sites.append(glu(i, MLP.format(i) + ".shared_expert", SHARED))
        sites.append(routed(i, MLP.format(i) + ".experts"))
    return tuple(sites)


def dense_then_moe(
    shared: int = 2 * EXPERT, act: Callable[[Tensor], Tensor] = F.silu
) -> tuple[Dense | Routed, ...]:
    """A dense layer, then one of routed and shared experts."""
    return (
        glu(0, MLP.format(0), act=act),
        glu(1, MLP.format(1) + ".shared_experts", shared, act),
        routed(1, MLP.format(1) + ".experts", act),
    )


def merger(path: str = "model.visual.merger", names: str = "mlp.0 mlp.2", layer: int = 0) -> Dense:
    return mlp("projector", layer, path, names, F.gelu, MERGED)


def deepstack(n: int, names: str = "linear_fc1 linear_fc2", of: str = "deepstack_merger_list"):
    """The mergers of the first `n` vision layers run before the last one's."""
    paths = [f"model.visual.{of}.{i}" for i in range(n)] + ["model.visual.merger"]
    return tuple(merger(path, names, i) for i, path in enumerate(paths))


def glm_merger(act: Callable[[Tensor], Tensor] = F.silu, width: int = WIDE) -> tuple[Dense, ...]:
    """`act1(norm(proj x))` goes into the gate and the up projection of a gated block."""
    path = "model.visual.merger"
    return (
        Dense("projector", 0, f"{path}.post_projection_norm", F.gelu, None, LANGUAGE),
        glu(1, path, width, act, "projector"),
    )


# ------------------------------------------------------------------------------ configs

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": LANGUAGE,
    "intermediate_size": GATED,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
TOWER = {
    "depth": 2,
    "hidden_size": VISION,
    "intermediate_size": WIDE,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": LANGUAGE,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}


def rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": list(sections),
        **more,
    }


def config(
    model_type: str, text: Mapping[str, Any], vision: Mapping[str, Any], **more: Any
) -> Callable[[], Any]:
    """A function that makes the config."""

    def make() -> Any:
        return AutoConfig.for_model(
            model_type, text_config=dict(text), vision_config=dict(vision), **more
        )

    return make


QWEN2 = {**TEXT, "rope_parameters": rope(2, 2, 2)}
QWEN2_5_TOWER = {**TOWER, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
"""Windows of 2 x 2 tokens in the first layer; the second sees everything."""
QWEN3 = {**TEXT, "head_dim": 16, "rope_parameters": rope(4, 2, 2, mrope_interleaved=True)}
QWEN3_TOWER = {
    **TOWER,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0],
}
MOE = {
    "moe_intermediate_size": EXPERT,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}
HYBRID = {
    **TEXT,
    "head_dim": 24,
    "rope_parameters": rope(1, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25),
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
PLAIN_TOWER = {key: v for key, v in QWEN3_TOWER.items() if key != "deepstack_visual_indexes"}
SHARED_MOE = {
    "moe_intermediate_size": EXPERT,
    "shared_expert_intermediate_size": SHARED,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
}


AUDIO_TOWER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "n_window": 4,
    "output_dim": LANGUAGE,
}
"""It is built and never runs."""
GLM = {**TEXT, "rope_parameters": rope(1, 1, 1, partial_rotary_factor=0.5)}
GLM_TOWER = {**TOWER, "image_size": 6 * PATCH}
GLM_MOE = {
    "moe_intermediate_size": EXPERT,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
}
GLM4V = (*vision_glus(width=LANGUAGE), *glm_merger(), *language_fused())
"""The width of the vision tower's blocks is its `out_hidden_size`, not its `intermediate_size`."""


def entry(
    name: str,
    cls: str,
    make: Callable[[], Any],
    sites: tuple[Dense | Routed, ...],
    inputs: Mapping[str, Any] | None = None,
    mixers: tuple[str, ...] = (r"model\.visual\.blocks\.\d+\.attn",),
    note: str = "",
    sizes: tuple[tuple[int, int], ...] = SIZES,
    first: str = "model.language_model.layers.0",
    prepare: Callable[[nn.Module], None] | None = None,
) -> Entry:
    return Entry(
        name=name,
        cls=cls,
        config=make,
        sizes=sizes,
        inputs=partial(make_inputs, **(inputs or {})),
        sites=sites,
        first=first,
        spatial="region",
        mixers=mixers,
        note=note,
        prepare=prepare,
    )


def sdpa(model: Any) -> None:
    """Qwen4-Exp's eager attention gives NaN at padding before transformers 5.23."""
    model.set_attn_implementation("sdpa")


def omni(entry: Entry) -> Entry:
    """The thinkers: transformers 5.20 has no model around their parts, which are its own."""
    if hasattr(transformers, "Qwen2_5OmniThinkerModel"):
        return entry

    def path(named: str) -> str:
        return named.replace("model.visual", "visual").replace("model.language_model", "model")

    sites = tuple(
        replace(site, before=path(site.before), down=site.down and path(site.down))
        if isinstance(site, Dense)
        else replace(site, block=path(site.block))
        for site in entry.sites
    )
    mixers = tuple(pattern.replace(r"model\.visual", "visual") for pattern in entry.mixers)
    return replace(entry, sites=sites, first=path(entry.first), mixers=mixers)


FC = "linear_fc1 linear_fc2"
DEEPSTACK = "vision features are added again to the hidden states after the first language layer"

ENTRIES = (
    entry(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        config(
            "qwen2_vl",
            QWEN2,
            # hidden_size is that of the language model
            {
                "depth": 2,
                "embed_dim": VISION,
                "hidden_size": LANGUAGE,
                "mlp_ratio": 2,
                "num_heads": 2,
                "patch_size": PATCH,
            },
            **IDS,
        ),
        (
            *(
                mlp("vision", i, f"model.visual.blocks.{i}.mlp", "fc1 fc2", quick_gelu, 2 * VISION)
                for i in range(2)
            ),
            merger(),
            *language_glu(),
        ),
    ),
    entry(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        config("qwen2_5_vl", QWEN2, QWEN2_5_TOWER, **IDS),
        (*vision_glus(), merger(), *language_glu()),
        note="in the vision tower rows are in window order",
    ),
    entry(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        config(
            "qwen3_vl",
            QWEN3,
            {**QWEN3_TOWER, "depth": 3, "deepstack_visual_indexes": [0, 1]},
            **IDS,
        ),
        (*vision_mlps(FC, gelu_tanh, n=3), *deepstack(2), *language_glu()),
        note="vision features are added again to the hidden states after each language layer",
    ),
    entry(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        config("qwen3_vl_moe", {**QWEN3, **MOE}, QWEN3_TOWER, **IDS),
        (
            *vision_mlps(FC, gelu_tanh),
            *deepstack(1),
            glu(0, MLP.format(0)),
            routed(1, MLP.format(1) + ".experts"),
        ),
        note=DEEPSTACK,
    ),
    entry(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        config("qwen3_5", HYBRID, PLAIN_TOWER, **IDS),
        (*vision_mlps(FC, gelu_tanh), merger(names=FC), *language_glu()),
        note="layer 0 is linear attention, layer 1 attention",
    ),
    entry(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        config(
            "qwen3_5_moe",
            {**HYBRID, **SHARED_MOE},
            PLAIN_TOWER,
            **IDS,
        ),
        (
            *vision_mlps(FC, gelu_tanh),
            merger(names=FC),
            *shared_moe(),
        ),
        note="layer 0 is linear attention, layer 1 attention",
    ),
    entry(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        config(
            "qwen4_exp",
            {
                **HYBRID,
                **SHARED_MOE,
                "layer_types": ["linear_attention", "indexed_attention"],
                "hc_count": 3,
                "hc_lowrank": 10,
                "ple_layer_ids": [1],
                "ple_embed_dim": 16,
                "ngram_size": 3,
                "heads_per_ngram": 2,
                "ngram_vocab_size_base": 50,
                "make_ngram_vocab_size_divisible_by": 8,
                "split_ngram_parts": 1,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 16,
                "indexer_compress_ratio": 4,
            },
            PLAIN_TOWER,
            **IDS,
        ),
        (*vision_mlps(FC, gelu_tanh), merger(names=FC), *shared_moe()),
        prepare=sdpa,
        note="hidden states are three residual streams side by side, [batch, token, 3 x hidden]",
    ),
    omni(
        entry(
            "qwen2_5_omni_thinker",
            "Qwen2_5OmniThinkerForConditionalGeneration",
            config(
                "qwen2_5_omni_thinker",
                QWEN2,
                QWEN2_5_TOWER,
                audio_config=AUDIO_TOWER,
                audio_token_id=AUDIO,
                **IDS,
            ),
            (*vision_glus(), merger(), *language_glu()),
            {"types": False},
            note="in the vision tower rows are in window order",
        )
    ),
    omni(
        entry(
            "qwen3_omni_moe_thinker",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            config(
                "qwen3_omni_moe_thinker",
                {**QWEN3, **MOE},
                QWEN3_TOWER,
                audio_config={
                    **AUDIO_TOWER,
                    "n_window_infer": 8,
                    "conv_chunksize": 8,
                    "downsample_hidden_size": 8,
                },
                audio_token_id=AUDIO,
                **IDS,
            ),
            (
                *vision_mlps(FC, gelu_tanh),
                *deepstack(1, "mlp.0 mlp.2", "merger_list"),
                glu(0, MLP.format(0)),
                routed(1, MLP.format(1) + ".experts"),
            ),
            {"types": False},
            note=DEEPSTACK,
        )
    ),
    entry(
        "cohere_compass",
        "CohereCompassForConditionalGeneration",
        config(
            "cohere_compass",
            {
                **TEXT,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 8,
                "logit_scale": 0.25,
                "rope_parameters": {"sliding_attention": rope(2, 2, 2), "full_attention": None},
            },
            QWEN3_TOWER,
            **IDS,
        ),
        (*vision_mlps(FC, gelu_tanh), *deepstack(1), *language_glu()),
        note=DEEPSTACK,
    ),
    entry(
        "cosmos3_omni",
        "Cosmos3OmniForConditionalGeneration",
        config(
            "cosmos3_omni",
            {**QWEN3, "model_type": "qwen3_vl_text"},
            {**QWEN3_TOWER, "model_type": "qwen3_vl_vision"},
            **IDS,
        ),
        (*vision_mlps(FC, gelu_tanh), *deepstack(1), *language_glu()),
        note=DEEPSTACK,
    ),
    entry(
        "cosmos3_edge",
        "Cosmos3EdgeForConditionalGeneration",
        config(
            "cosmos3_edge",
            {**QWEN2, "head_dim": 12},
            {
                "hidden_size": VISION,
                "intermediate_size": WIDE,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": PATCH,
                "num_patches": 36,
            },
            projector_hidden_size=72,
            **IDS,
        ),
        (
            *vision_mlps("fc1 fc2", gelu_tanh, "model.visual.encoder.layers"),
            mlp("projector", 0, "model.projector", FC, F.gelu, 72),
            *(mlp("language", i, MLP.format(i), "fc1 fc2", relu2, GATED) for i in range(2)),
        ),
        {"frames": 1, "channels_last": True, "left": False},
        (r"model\.visual\.encoder\.layers\.\d+\.self_attn",),
        note="pixel rows are [height, width, channel]",
    ),
    entry(
        "exaone4_5",
        "Exaone4_5_ForConditionalGeneration",
        config(
            "exaone4_5",
            {
                **TEXT,
                "model_type": "exaone4",
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 8,
            },
            {**QWEN2_5_TOWER, "num_key_value_heads": 1},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        (*vision_glus(), merger(), *language_glu()),
        {"types": False, "left": False},
        note="in the vision tower rows are in window order",
    ),
    entry(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        config(
            "hyperclovax_vision_v2",
            {
                **TEXT,
                "model_type": "hyperclovax",
                "embedding_multiplier": 3.0,
                "logits_scaling": 0.5,
                "residual_multiplier": 0.8,
                "attention_multiplier": 0.2,
            },
            {**QWEN2_5_TOWER, "model_type": "qwen2_5_vl_vision", "out_hidden_size": 36},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        (
            *vision_glus("model.vision_model.blocks"),
            merger("model.vision_model.merger"),
            *language_glu(),
        ),
        {"types": False, "left": False},
        (r"model\.vision_model\.blocks\.\d+\.attn",),
        note="in the vision tower rows are in window order; a Linear follows its merger",
    ),
    entry(
        "video_llama_3",
        "VideoLlama3ForConditionalGeneration",
        config(
            "video_llama_3",
            {**TEXT, "model_type": "qwen2"},
            {
                "hidden_size": VISION,
                "intermediate_size": WIDE,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": PATCH,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        (
            *vision_mlps("fc1 fc2", gelu_tanh, "model.vision_model.encoder.layers"),
            mlp("projector", 0, "model.projector.readout", "0 2", F.gelu, LANGUAGE),
            *language_glu(),
        ),
        {"merge": 1, "frames": 1, "markers": False, "types": False, "merge_sizes": True},
        (r"model\.vision_model\.encoder\.layers\.\d+\.self_attn",),
        note="one token per patch; how many patches are merged is an input, image_merge_sizes",
        sizes=((16, 12), (8, 12)),
    ),
    entry(
        "glm4v",
        "Glm4vForConditionalGeneration",
        config("glm4v", GLM, GLM_TOWER, **GLM_IDS),
        GLM4V,
    ),
    entry(
        "glm46v",
        "Glm46VForConditionalGeneration",
        config(
            "glm46v",
            {**GLM, "model_type": "glm4v_text"},
            {**GLM_TOWER, "model_type": "glm4v_vision"},
            **GLM_IDS,
        ),
        GLM4V,
    ),
    entry(
        "glmga",
        "Glm46VForConditionalGeneration",
        config(
            "glmga",
            {**GLM, "model_type": "glm4v_text"},
            {**GLM_TOWER, "model_type": "glm4v_vision"},
            **GLM_IDS,
        ),
        GLM4V,
    ),
    entry(
        "glm_ocr",
        "GlmOcrForConditionalGeneration",
        config("glm_ocr", QWEN2, GLM_TOWER, **GLM_IDS),
        (*vision_glus(), *glm_merger(width=3 * LANGUAGE), *language_fused()),
    ),
    entry(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        config("glm4v_moe", {**GLM, **GLM_MOE, "first_k_dense_replace": 1}, GLM_TOWER, **GLM_IDS),
        (*vision_glus(width=LANGUAGE), *glm_merger(), *dense_then_moe()),
    ),
    entry(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        config(
            "glm5_next",
            {
                **TEXT,
                **GLM_MOE,
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 12,
                "v_head_dim": 10,
                "qk_nope_head_dim": 14,
                "index_topk": 8,
                "index_head_dim": 8,
                "index_n_heads": 2,
                "index_kpool": 2,
                "linear_head_dim": 8,
                "linear_num_heads": 3,
                "hc_mult": 3,
                "swiglu_limit": LIMIT,
                "layer_types": ["linear_attention", "indexed_attention"],
                "mlp_layer_types": ["dense", "sparse"],
            },
            {**GLM_TOWER, "projection_intermediate_size": 52, "swiglu_limit": LIMIT},
            **GLM_IDS,
        ),
        (
            *vision_glus(act=silu_clamped),
            *glm_merger(silu_clamped, 52),
            *dense_then_moe(act=silu_clamped),
        ),
        first="model.language_model.layers.0.input_layernorm",
        note="hidden states are three residual streams, [batch, token, 3, hidden]; gates and up "
        "projections are clamped before they are activated and multiplied",
    ),
    entry(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        config(
            "ernie4_5_vl_moe",
            {
                **TEXT,
                "rope_parameters": rope(2, 2, 2),
                "moe_intermediate_size": [EXPERT, 12],
                "moe_k": 2,
                "moe_num_experts": EXPERTS,
                "moe_num_shared_experts": 2,
                "mlp_layer_types": ["dense", "sparse"],
            },
            {key: v for key, v in TOWER.items() if key != "out_hidden_size"},
            **GLM_IDS,
        ),
        (
            *vision_mlps("fc1 fc2", quick_gelu, "model.vision_tower.blocks"),
            merger("model.resampler_model.spatial_linear", "fc1 fc2", 0),
            merger("model.resampler_model.temporal_linear", "fc1 fc2", 1),
            glu(0, MLP.format(0)),
            glu(1, MLP.format(1) + ".shared_experts", 2 * EXPERT),
            routed(1, MLP.format(1) + ".text_moe.experts", rows=ernie_rows(0)),
            routed(1, MLP.format(1) + ".vision_moe.experts", width=12, rows=ernie_rows(1)),
        ),
        {"frames": 1, "moe_types": True},
        (r"model\.vision_tower\.blocks\.\d+\.attn",),
        note="text tokens are routed to one set of experts, image tokens and the begin and end "
        "of an image to another",
    ),
    entry(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        config(
            "dots3_note",
            {
                **TEXT,
                **GLM_MOE,
                "shared_experts_intermediate_size": SHARED,
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 12,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 8,
                "v_head_dim": 10,
                "head_dim": 12,
                "index_topk": 8,
                "index_head_dim": 8,
                "index_n_heads": 2,
                "sliding_window": 8,
                "layer_types": ["indexed_attention", "sliding_attention"],
                "swa_num_attention_heads": 2,
                "swa_num_key_value_heads": 2,
                "swa_q_lora_rank": 16,
                "swa_kv_lora_rank": 20,
                "swa_head_dim": 16,
                "swa_qk_nope_head_dim": 12,
                "swa_v_head_dim": 10,
            },
            {
                "hidden_size": VISION,
                "intermediate_size": WIDE,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": PATCH,
                "moe_intermediate_size": 16,
                "mlp_layer_types": ["dense", "sparse"],
                "per_layer_config": {1: {"num_local_experts": 5, "num_experts_per_tok": 2}},
                "adapter_in_dim": VISION,
                "adapter_out_dim": LANGUAGE,
            },
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "feature_size": 8,
                "downsample_hidden_size": 8,
                "adapter_input_size": 16,
                "adapter_out_dim": LANGUAGE,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
        ),
        (
            glu(0, "model.vision_tower.blocks.0.mlp", WIDE, module="vision"),
            routed(
                1, "model.vision_tower.blocks.1.mlp.experts", module="vision", experts=5, width=16
            ),
            merger("model.vision_tower.merger"),
            *dense_then_moe(2 * SHARED),
        ),
        {"frames": 1, "types": False, "left": False},
        (r"model\.vision_tower\.blocks\.\d+\.attn",),
        note="the vision tower has routed experts too",
    ),
)

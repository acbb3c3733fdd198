"""Towers that take images of any size as rows of patches in image order, one token per 2x2 cell.

Rows are in raster order and the model does the grouping, unlike in Qwen2-VL; lfm3_vl and
minimax_m3_vl are the exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import Dense, Entry, Images, Routed

PATCH = 4
VOCAB, IMAGE, VIDEO, AUDIO = 190, 180, 181, 182
START, END, CONTENT, WORD, THUMBNAIL = 183, 184, 185, 99, 186
CELLS = {(1, n): 170 + n for n in range(1, 10)}  # <|img_row_1_col_n|>
TANH = partial(F.gelu, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def words(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 160, (count,), generator=generator).tolist()


def batch(model: Any, pieces: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """Each piece between words: 3 before it and 4 after in even samples, 5 and 6 in odd ones."""
    rows = []
    for n, piece in enumerate(pieces):
        more = 2 * (n % 2)
        rows.append(torch.tensor([*words(n, 3 + more), *piece, *words(1000 + n, 4 + more)]))
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for n, row in enumerate(rows):
        here = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[n, here], mask[n, here] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    return {key: value.to(model.device) for key, value in inputs.items()}


# How an image becomes rows: `images` are in [0, 1], the inputs in [-1, 1].


def raster(image: Tensor) -> Tensor:
    """Patches row by row: [patch, channel, y, x]."""
    cut = (2 * image - 1).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH)


def flat(image: Tensor) -> Tensor:
    """Patches row by row, flattened (channel, y, x)."""
    return raster(image).flatten(1)


def channels_last(image: Tensor) -> Tensor:
    """Patches row by row, flattened (y, x, channel)."""
    return raster(image).permute(0, 2, 3, 1).flatten(1)


def frames_first(image: Tensor) -> Tensor:
    """Patches row by row, flattened (frame, channel, y, x): the image is both frames."""
    return flat(image).repeat(1, 2)


def blocks(image: Tensor) -> Tensor:
    """Patches 4 by 4, each 2x2 cell after the other, flattened (channel, frame, y, x)."""
    height, width = image.shape[1] // PATCH, image.shape[2] // PATCH
    rows = raster(image).view(height // 2, 2, width // 2, 2, 3, 1, PATCH, PATCH)
    return rows.transpose(1, 2).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(height * width, -1)


def grids(images: list[Tensor]) -> Tensor:
    return torch.tensor([[1, i.shape[1] // PATCH, i.shape[2] // PATCH] for i in images])


def inputs_of(
    rows: Callable[[Tensor], Tensor],
    before: tuple[int, ...] = (START,),
    after: tuple[int, ...] = (END,),
    types: bool = False,
    side: str = "left",
    tokens: Callable[[int, int], int] = lambda height, width: height * width,
    grid: str = "image_grid_thw",
) -> Callable[[Any, Images], dict[str, Any]]:
    """Inputs of models with packed rows; `tokens` of an image from its cells."""

    def inputs(model: Any, images: Images) -> dict[str, Any]:
        thw = grids([image for sample in images for image in sample])
        counts = iter([tokens(h // 2, w // 2) for _, h, w in thw.tolist()])
        pieces = []
        for sample in images:
            pieces.append([t for _ in sample for t in [*before, *[IMAGE] * next(counts), *after]])
        made = batch(model, pieces, side)
        if types:
            made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int()
        pixels = torch.cat([rows(image) for sample in images for image in sample])
        shape = thw if grid == "image_grid_thw" else thw[:, 1:]
        return {**made, "pixel_values": pixels.to(model.device), grid: shape.to(model.device)}

    return inputs


# Sites.


def stack(
    module: str,
    path: str,
    layers: Iterable[int],
    before: str,
    down: str,
    act: Callable[[Tensor], Tensor],
    width: int,
) -> tuple[Dense, ...]:
    return tuple(
        Dense(module, n, f"{path}.{n}.{before}", act, f"{path}.{n}.{down}", width) for n in layers
    )


def projector(
    path: str, before: str, down: str, act: Callable[[Tensor], Tensor], width: int, layer: int = 0
) -> Dense:
    return Dense("projector", layer, f"{path}.{before}", act, f"{path}.{down}", width)


def silu_gate(block: nn.Module, x: Tensor, expert: int) -> Tensor:
    return F.silu(F.linear(x, block.gate_up_proj[expert]).chunk(2, -1)[0])


def relu2_up(block: nn.Module, x: Tensor, expert: int) -> Tensor:
    return relu2(F.linear(x, block.up_proj[expert]))


def clamped(gate: Tensor) -> Tensor:
    gate = gate.clamp(max=LIMIT)
    return gate * torch.sigmoid(1.702 * gate)


def clamped_half(gate_up: Tensor) -> Tensor:
    return clamped(gate_up.chunk(2, -1)[0])


def clamped_gate(block: nn.Module, x: Tensor, expert: int) -> Tensor:
    return clamped_half(F.linear(x, block.gate_up_proj[expert]))


@torch.no_grad()
def zero_down(block: nn.Module, expert: int, index: int) -> None:
    block.down_proj[expert, :, index] = 0


def routed(
    layer: int, block: str, width: int, act: Callable[[nn.Module, Tensor, int], Tensor] = silu_gate
) -> Routed:
    """4 experts, called with (rows, experts, weights)."""
    return Routed("language", layer, block, 4, width, act, zero_down, lambda a, k: (a[0], a[1]))


SILU = ("mlp.gate_proj", "mlp.down_proj", F.silu)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB}


# kimi_k25


def kimi() -> Any:
    text = transformers.DeepseekV3Config(
        **SPECIAL,
        hidden_size=40,
        intermediate_size=52,
        moe_intermediate_size=20,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_mtp_layers=0,
    )
    vision = {
        "patch_size": PATCH,
        "pos_emb_height": 5,
        "pos_emb_width": 5,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "intermediate_size": 36,
    }
    return transformers.Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=24,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


KIMI = Entry(
    name="kimi_k25",
    cls="Kimi_K25ForConditionalGeneration",
    config=kimi,
    sizes=((24, 16), (16, 32)),
    # <|media_begin|>image<|media_content|><|media_pad|>..<|media_end|>
    inputs=inputs_of(raster, before=(START, WORD, CONTENT)),
    sites=(
        *stack("vision", "model.vision_tower.layers", (0, 1), "mlp.fc1", "mlp.fc2", TANH, 36),
        projector("model.mm_projector", "in_proj", "out_proj", F.gelu, 96),
        *stack("language", "model.language_model.layers", (0,), *SILU, 52),
        routed(1, "model.language_model.layers.1.mlp.experts", 20),
        *stack(
            "language",
            "model.language_model.layers",
            (1,),
            "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.down_proj",
            F.silu,
            20,
        ),
    ),
    first="model.language_model.layers.0",
    spatial="region",
    mixers=(r"model\.vision_tower\.layers\.\d+\.attn",),
    note="Image tokens are embedded as id 0 before the image features replace them.",
)


# paddleocr_vl


def paddleocr() -> Any:
    text = {
        **SPECIAL,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 20,
        "patch_size": PATCH,
    }
    return transformers.PaddleOCRVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


PADDLEOCR = Entry(
    name="paddleocr_vl",
    cls="PaddleOCRVLForConditionalGeneration",
    config=paddleocr,
    sizes=((24, 16), (16, 32)),
    inputs=inputs_of(raster, types=True),
    sites=(
        *stack(
            "vision",
            "model.visual.vision_model.encoder.layers",
            (0, 1),
            "mlp.fc1",
            "mlp.fc2",
            TANH,
            36,
        ),
        projector("model.projector", "linear_1", "linear_2", F.gelu, 96),
        *stack("language", "model.language_model.layers", (0, 1), *SILU, 56),
    ),
    first="model.language_model.layers.0",
    spatial="region",
    mixers=(r"model\.visual\.vision_model\.encoder\.layers\.\d+\.self_attn",),
    note="The projector runs once per image.",
)


# hunyuan_vl


def hunyuan() -> Any:
    text = {
        **SPECIAL,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            **ROPE,
            "rope_type": "xdrope",
            "alpha": 1000.0,
            "factor": 1.0,
            "xdrope_section": [2, 2, 2, 2],
        },
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "out_hidden_size": 40,
        "text_hidden_size": 40,
        "patch_size": PATCH,
        "max_image_size": 24,
    }
    return transformers.HunYuanVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        im_newline_id=CONTENT,
    )


HUNYUAN = Entry(
    name="hunyuan_vl",
    cls="HunYuanVLForConditionalGeneration",
    config=hunyuan,
    sizes=((24, 16), (16, 32)),
    # The placeholders are: begin, cells of a row and a newline for each row, end.
    inputs=inputs_of(flat, types=True, tokens=lambda height, width: height * (width + 1) + 2),
    sites=(
        *stack("vision", "model.vision_tower.layers", (0, 1), "mlp.fc1", "mlp.fc2", F.gelu, 36),
        # Channels come first in its output: [1, width, row, column].
        projector("model.vision_tower.patch_merger", "proj_conv", "proj_out", F.gelu, 48),
        *stack("language", "model.language_model.layers", (0, 1), *SILU, 56),
    ),
    first="model.language_model.layers.0",
    spatial="region",
    mixers=(r"model\.vision_tower\.layers\.\d+\.self_attn",),
    note="The first, the last, and after each row one placeholder are learned markers without "
    "image; the projector runs once per image, its activation is channels-first.",
)


# muse_glimmer and muse_spark


def muse_vision() -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,  # window attention, then full attention
        "num_attention_heads": 2,
        "patch_size": PATCH,
        "pos_emb_height": 4,  # windows of 4x4 patches: rows are permuted inside the tower
        "pos_emb_width": 4,
        "max_position_embeddings": 16,
    }


def muse_text() -> dict[str, Any]:
    return {
        **SPECIAL,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 12,
        "rope_parameters": ROPE,
    }


def muse_glimmer() -> Any:
    return transformers.MuseGlimmerConfig(
        text_config={**muse_text(), "intermediate_size": 56, "num_hidden_layers": 2},
        vision_config=muse_vision(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        out_hidden_size=96,
        projector_hidden_size=44,
    )


def muse_spark() -> Any:
    text = {
        **muse_text(),
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_hidden_size": 28,
        "moe_intermediate_size": 20,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    audio = {
        "patch_sizes": [4, 2],
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": 40,
    }
    return transformers.MuseSparkConfig(
        text_config=text,
        vision_config=muse_vision(),
        audio_config=audio,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        out_hidden_size=96,
        projector_hidden_size=44,
    )


def muse(
    name: str, cls: str, config: Callable[[], Any], language: tuple[Dense | Routed, ...]
) -> Entry:
    return Entry(
        name=name,
        cls=cls,
        config=config,
        sizes=((32, 24), (24, 16)),
        inputs=inputs_of(frames_first),
        sites=(
            *stack("vision", "model.vision_tower.layers", (0, 1), "mlp.fc1", "mlp.fc2", F.gelu, 36),
            # One act module, called twice: act(fc2(act(fc1(x)))).
            projector("model", "vision_adapter.fc1", "vision_adapter.fc2", F.gelu, 44),
            projector("model", "vision_adapter.fc2", "vision_projection", F.gelu, 44, 1),
            *language,
        ),
        first="model.language_model.layers.0",
        spatial="region",
        mixers=(r"model\.vision_tower\.layers\.\d+\.attn",),
        note="Rows inside the vision tower are in order of attention windows; image tokens are "
        "embedded as id 0 before the image features replace them.",
    )


GLIMMER = muse(
    "muse_glimmer",
    "MuseGlimmerForConditionalGeneration",
    muse_glimmer,
    stack("language", "model.language_model.layers", (0, 1), *SILU, 56),
)
SPARK = muse(
    "muse_spark",
    "MuseSparkForConditionalGeneration",
    muse_spark,
    (
        *stack("language", "model.language_model.layers", (0,), *SILU, 56),
        routed(1, "model.language_model.layers.1.mlp.experts", 20),
    ),
)


# lfm2_vl: images of up to 6 tokens are one row of pixel_values; larger ones are cut into tiles of
# 16x16 pixels (4 tokens each) and a thumbnail follows. Every row is padded to 24 patches.

TILE, MOST = 16, 24


def lfm2_config(text: Any) -> Any:
    vision = transformers.Siglip2VisionConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=PATCH,
        num_patches=16,
        vision_use_head=False,
    )
    return transformers.Lfm2VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        projector_hidden_size=44,
    )


def lfm2() -> Any:
    return lfm2_config(
        transformers.Lfm2Config(
            **SPECIAL,
            hidden_size=40,
            intermediate_size=72,  # of which the model makes 2 / 3, in steps of 8: 48
            block_multiple_of=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        )
    )


def lfm2_moe() -> Any:
    return lfm2_config(
        transformers.Lfm2MoeConfig(
            **SPECIAL,
            hidden_size=40,
            intermediate_size=52,
            moe_intermediate_size=20,
            num_hidden_layers=2,
            num_dense_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            layer_types=["conv", "full_attention"],
        )
    )


def lfm2_views(image: Tensor) -> tuple[list[Tensor], list[list[int]]]:
    """What the vision tower sees of an image, and the tokens of each of these views."""

    def tokens(view: Tensor) -> list[int]:
        return [IMAGE] * (view.shape[1] // 8 * (view.shape[2] // 8))

    height, width = image.shape[1:]
    if height * width <= 6 * 8 * 8:
        return [image], [tokens(image)]
    tiles = list(image.split(TILE, 2))  # one row of tiles
    pieces = [[CELLS[1, n], *tokens(tile)] for n, tile in enumerate(tiles, 1)]
    thumbnail = F.avg_pool2d(image, 2)  # real use resizes the original image instead
    return [*tiles, thumbnail], [*pieces, [THUMBNAIL, *tokens(thumbnail)]]


def lfm2_inputs(model: Any, images: Images) -> dict[str, Any]:
    views, pieces = [], []
    for sample in images:
        piece = []
        for image in sample:
            seen, tokens = lfm2_views(image)
            views.extend(seen)
            piece.extend([START, *[t for view in tokens for t in view], END])
        pieces.append(piece)
    shapes = grids(views)[:, 1:]
    rows = [F.pad(channels_last(v), (0, 0, 0, MOST - len(channels_last(v)))) for v in views]
    mask = torch.arange(MOST) < shapes.prod(1, keepdim=True)
    return {
        **batch(model, pieces),
        "pixel_values": torch.stack(rows).to(model.device),
        "pixel_attention_mask": mask.int().to(model.device),
        "spatial_shapes": shapes.to(model.device),
    }


def lfm2_entry(
    name: str, config: Callable[[], Any], language: tuple[Dense | Routed, ...], note: str
) -> Entry:
    return Entry(
        name=name,
        cls="Lfm2VlForConditionalGeneration",
        config=config,
        sizes=((16, 24), (64, 16)),  # one view; four tiles and a thumbnail
        inputs=lfm2_inputs,
        sites=(
            *stack(
                "vision",
                "model.vision_tower.encoder.layers",
                (0, 1),
                "mlp.fc1",
                "mlp.fc2",
                TANH,
                36,
            ),
            projector("model.multi_modal_projector", "linear_1", "linear_2", F.gelu, 44),
            *language,
        ),
        first="model.language_model.layers.0",
        spatial="region",
        mixers=(r"model\.vision_tower\.encoder\.layers\.\d+\.self_attn",),
        note="Rows of the vision tower beyond a view's patches are padding; the projector runs "
        "once per view (tile, thumbnail or whole image). " + note,
    )


LFM = ("feed_forward.w1", "feed_forward.w2", F.silu)
LFM2 = lfm2_entry(
    "lfm2_vl",
    lfm2,
    stack("language", "model.language_model.layers", (0, 1), *LFM, 48),
    "The language model's activation is a function, not a module.",
)
LFM2_MOE = lfm2_entry(
    "lfm2_vl+lfm2_moe",
    lfm2_moe,
    (
        *stack("language", "model.language_model.layers", (0,), *LFM, 52),
        routed(1, "model.language_model.layers.1.feed_forward.experts", 20),
    ),
    "The language model's activation is a function, not a module.",
)


# lfm3_vl


def lfm3() -> Any:
    text = transformers.Lfm3Config(
        **SPECIAL,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        conv_L_cache=3,
        sliding_window=12,
        layer_types=["conv", "sliding_attention", "full_attention"],
    )
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "patch_size": PATCH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": ["conv", "full_attention"],
    }
    return transformers.Lfm3VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        projector_hidden_size=44,
    )


LFM3 = Entry(
    name="lfm3_vl",
    cls="Lfm3VlForConditionalGeneration",
    config=lfm3,
    sizes=((24, 16), (16, 32)),
    inputs=inputs_of(blocks),
    sites=(
        *stack("vision", "model.vision_tower.layers", (0, 1), *LFM, 36),
        projector("model.multi_modal_projector", "linear_1", "linear_2", F.gelu, 44),
        *stack("language", "model.language_model.layers", (0, 1, 2), *LFM, 56),
    ),
    first="model.language_model.layers.0",
    spatial="region",
    mixers=(r"model\.vision_tower\.layers\.\d+\.(self_attn|conv)",),
    note="Activations of the vision tower and the language model are functions, not modules; "
    "the vision tower mixes neighbouring patches by convolutions as well as by attention.",
)


# nemotron_h_omni


def nemotron() -> Any:
    text = transformers.NemotronHConfig(
        **SPECIAL,
        hidden_size=40,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=52,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        n_shared_experts=1,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=28,
        num_experts_per_tok=2,
    )
    vision = transformers.RadioConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=1.5,
        patch_size=PATCH,
        image_size=32,
        max_img_size=32,
        num_cls_tokens=3,
        num_registers=2,
        video_temporal_patch_size=2,
    )
    audio = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "num_mel_bins": 16,
        "subsampling_conv_channels": 8,
        "projection_hidden_size": 12,
        "projection_bias": False,
    }
    return transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        vision_hidden_size=24,
        projector_hidden_size=44,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )


NEMOTRON = Entry(
    name="nemotron_h_omni",
    cls="NemotronH_Omni_Reasoning_V3",
    config=nemotron,
    sizes=((24, 16), (16, 32)),
    inputs=inputs_of(flat, grid="image_grid_hw"),
    sites=(
        *stack("vision", "vision_model.encoder.layer", (0, 1), "mlp.fc1", "mlp.fc2", F.gelu, 36),
        projector("multi_modal_projector", "linear_1", "linear_2", relu2, 44),
        routed(1, "language_model.model.layers.1.mixer.experts", 20, relu2_up),
        *stack(
            "language",
            "language_model.model.layers",
            (1,),
            "mixer.shared_experts.up_proj",
            "mixer.shared_experts.down_proj",
            relu2,
            28,
        ),
        *stack(
            "language",
            "language_model.model.layers",
            (3,),
            "mixer.up_proj",
            "mixer.down_proj",
            relu2,
            52,
        ),
    ),
    first="language_model.model.layers.0",
    spatial="region",
    mixers=(r"vision_model\.encoder\.layer\.\d+\.attention",),
    note="A layer of the language model is a mixer (Mamba or attention) or a feed-forward block, "
    "not both; rows of the vision tower begin with class and register tokens for each image.",
)


# minimax_m3_vl

LIMIT = 0.8


def minimax() -> Any:
    text = {
        **SPECIAL,
        "hidden_size": 40,
        "intermediate_size": 20,
        "dense_intermediate_size": 52,
        "shared_intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": LIMIT,  # 7 in real use: low enough here to be reached
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": PATCH,
    }
    return transformers.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=44,
    )


MINIMAX = Entry(
    name="minimax_m3_vl",
    cls="MiniMaxM3SparseForConditionalGeneration",
    config=minimax,
    sizes=((24, 16), (16, 32)),
    # Padded on the right: its sparse attention counts blocks of keys from the first position.
    inputs=inputs_of(blocks, side="right"),
    sites=(
        *stack("vision", "model.vision_tower.layers", (0, 1), "mlp.fc1", "mlp.fc2", F.gelu, 36),
        projector("model.multi_modal_projector", "linear_1", "linear_2", F.gelu, 44),
        projector("model.multi_modal_projector", "merge_linear_1", "merge_linear_2", F.gelu, 44, 1),
        *stack(
            "language",
            "model.language_model.layers",
            (0,),
            "mlp.gate_up_proj",
            "mlp.down_proj",
            clamped_half,
            52,
        ),
        routed(1, "model.language_model.layers.1.mlp.experts", 20, clamped_gate),
        *stack(
            "language",
            "model.language_model.layers",
            (1,),
            "mlp.shared_experts.gate_up_proj",
            "mlp.shared_experts.down_proj",
            clamped_half,
            28,
        ),
    ),
    first="model.language_model.layers.0",
    spatial="region",
    mixers=(r"model\.vision_tower\.layers\.\d+\.self_attn",),
    note="The language model's activation is written out, gate * sigmoid(1.702 * gate) with the "
    "gate clamped, and gates up + 1; the first block of the projector runs on patches, the "
    "second on image tokens.",
)


ENTRIES = (
    KIMI,
    PADDLEOCR,
    HUNYUAN,
    GLIMMER,
    SPARK,
    LFM2,
    LFM2_MOE,
    LFM3,
    NEMOTRON,
    MINIMAX,
)

"""Models that take images at their native size: Pixtral, MiniCPM, Gemma 4, Inkling, Molmo 2."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import Dense, Entry, Images, Routed

# Token ids of every model of this file; text has ids 40..89.
PAD, BOS, EOS, IMAGE, BREAK, END, START, VIDEO, AUDIO = range(9)
SLICE, SLICE_END, NEWLINE, ID, ID_END, DIGIT = range(10, 16)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

gelu_tanh = partial(F.gelu, approximate="tanh")


# ------------------------------------------------------------------------------------- sites


def plain(module: str, path: str, layers: int, width: int, act: Any, names: str) -> list[Dense]:
    """`layers` blocks of two Linears; `names` are "fc1 fc2"."""
    first, second = names.split()
    return [
        Dense(module, n, f"{path}.{n}.{first}", act, f"{path}.{n}.{second}", width)
        for n in range(layers)
    ]


def glu(
    module: str, path: str, layer: int, width: int, act: Any, stack: str = "", **more: Any
) -> Dense:
    """A block of gate_proj, up_proj and down_proj; `path` is the block."""
    before, down = f"{path}.gate_proj", f"{path}.down_proj"
    return Dense(module, layer, before, act, down, width, stack=stack, **more)


def routed(path: str, layer: int, experts: int, width: int, act: Any, **more: Any) -> Routed:
    """Experts with a fused gate_up_proj [expert, gate then up, hidden], called with their inputs
    and indices."""

    def value(block: Any, x: Tensor, expert: int) -> Tensor:
        return act(F.linear(x, block.gate_up_proj[expert][:width]))

    def routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return args[0], args[1]

    return Routed(
        "language", layer, path, experts, width, value, zero_down, routing=routing, **more
    )


def zero_down(block: Any, expert: int, index: int) -> None:
    with torch.no_grad():
        block.down_proj[expert, :, index] = 0


# ------------------------------------------------------------------------------------ inputs


def flat(images: Images) -> list[Tensor]:
    return [image for sample in images for image in sample]


def tokens(images: Images, spans: Sequence[Sequence[int]], left: bool = True) -> dict[str, Tensor]:
    """Ids and mask of text with one span of image tokens for every image, padded on one side.

    The text of a sample depends on the size of its first image only.
    """
    rows, queue = [], list(spans)
    for sample in images:
        height, width = sample[0].shape[-2:]
        seed = 7 * width + 5 * height
        words = [40 + (seed + 17 * n) % 50 for n in range(12)]
        row = [BOS, *words[: 2 + seed % 3]]
        for n in range(len(sample)):
            row += [*queue.pop(0), words[n]]
        rows.append([*row, *words[5 : 8 + seed % 4]])
    length = max(map(len, rows))
    device = images[0][0].device
    ids = torch.full((len(rows), length), PAD, device=device)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(len(row))
        ids[n, place] = torch.tensor(row, device=device)
        mask[n, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def normal(image: Tensor, mean: Any = 0.5, std: Any = 0.5) -> Tensor:
    """The image as the processor normalizes it."""
    mean, std = image.new_tensor(mean), image.new_tensor(std)
    return (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def cut(image: Tensor, size: int) -> Tensor:
    """Patches [row, column, y, x, channel]."""
    channels, height, width = image.shape
    grid = image.reshape(channels, height // size, size, width // size, size)
    return grid.permute(1, 3, 2, 4, 0)


def pad_to(image: Tensor, height: int, width: int, value: float = 0.0) -> Tensor:
    """Pad at the bottom and on the right."""
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=value)


# ---------------------------------------------------------- Pixtral: mistral3, large 4, LightOn


def pixtral_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Images padded to one size; a token is 2 x 2 patches of 4 x 4 pixels, in raster order.

    PixtralProcessor ends each row of tokens by [IMG_BREAK] and the last by [IMG_END];
    LightOnOcrProcessor writes nothing but image tokens.
    """
    marks = model.config.model_type != "lighton_ocr"
    sizes = [image.shape[-2:] for image in flat(images)]
    high, wide = (max(size[axis] for size in sizes) for axis in (0, 1))
    spans = []
    for height, width in sizes:
        span = ([IMAGE] * (width // 8) + [BREAK] * marks) * (height // 8)
        spans.append([*span[:-1], END] if marks else span)
    pixels = [pad_to(normal(i, CLIP_MEAN, CLIP_STD), high, wide) for i in flat(images)]
    # Large 4 scales queries by their position, so that padding on the left would change them.
    left = model.config.model_type != "mistral_large4"
    return {
        **tokens(images, spans, left),
        "pixel_values": torch.stack(pixels),
        "image_sizes": torch.tensor([list(size) for size in sizes], device=pixels[0].device),
    }


def pixtral_vision(act: str) -> dict[str, Any]:
    return {
        "model_type": "pixtral",
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 64,
        "hidden_act": act,
    }


def mistral3_config() -> Any:
    text = {
        "model_type": "mistral",
        "vocab_size": 100,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": None,
        "pad_token_id": PAD,
    }
    return hf.Mistral3Config(
        text_config=text,
        vision_config=pixtral_vision("gelu"),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def mistral_large4_config() -> Any:
    text = {
        "model_type": "mistral_large4_text",
        "vocab_size": 100,
        "hidden_size": 40,
        "intermediate_size": 56,
        "moe_intermediate_size": 20,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 5,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "no_rope_layers": [1, 0],
        "pad_token_id": PAD,
    }
    return hf.MistralLarge4Config(
        text_config=text, vision_config=pixtral_vision("silu"), image_token_index=IMAGE
    )


def lighton_config() -> Any:
    text = {
        "model_type": "qwen3",
        "vocab_size": 100,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": PAD,
    }
    return hf.LightOnOcrConfig(
        text_config=text, vision_config=pixtral_vision("silu"), image_token_id=IMAGE
    )


def pixtral(
    name: str, cls: str, config: Any, act: Any, tower: str, projector: str, moe: bool = False
) -> Entry:
    tower, projector = f"model.{tower}", f"model.{projector}"
    text = "model.language_model.layers"
    sites: list[Dense | Routed] = [
        glu("vision", f"{tower}.transformer.layers.{n}.feed_forward", n, 36, act) for n in range(2)
    ]
    first, second = f"{projector}.linear_1", f"{projector}.linear_2"
    sites += [
        Dense("projector", 0, first, F.gelu, second, 40),
        glu("language", f"{text}.0.mlp", 0, 56, F.silu),
    ]
    if moe:
        sites += [
            routed(f"{text}.1.mlp.experts", 1, 5, 20, F.silu),
            glu("language", f"{text}.1.mlp.shared_experts", 1, 40, F.silu),
        ]
    else:
        sites.append(glu("language", f"{text}.1.mlp", 1, 56, F.silu))
    return Entry(
        name=name,
        cls=cls,
        config=config,
        sizes=((24, 16), (16, 32)),
        inputs=pixtral_inputs,
        sites=tuple(sites),
        first=f"{text}.0",
        spatial="region",
        mixers=(re.escape(f"{tower}.transformer.layers") + r"\.\d+\.attention",),
        note="The vision tower sees all images as one sequence of patches, batch size 1.",
    )


# ----------------------------------------------------------------------------------- MiniCPM


def even(length: float, divisor: int) -> int:
    """`length` rounded to a multiple of `divisor`, at least one."""
    return max(round(length / divisor) * divisor, divisor)


def minicpm_size(height: int, width: int, unit: int, scale: int) -> tuple[int, int]:
    """Height and width after a resize to about `scale` ** 2 pixels."""
    ratio = width / height
    high = int(scale / math.sqrt(ratio))
    return even(high, unit), even(int(high * ratio), unit)


def minicpm_grid(height: int, width: int, scale: int) -> tuple[int, int]:
    """Rows and columns of slices; (0, 0) for an image that is not sliced."""
    count = min(math.ceil(height * width / scale**2), 9)
    grids = [
        (rows, n // rows)
        for n in (count - 1, count, count + 1)
        if 1 < n <= 9
        for rows in range(1, n + 1)
        if n % rows == 0
    ]
    if count <= 1:
        return 0, 0
    return min(grids, key=lambda g: abs(math.log(width / height) - math.log(g[1] / g[0])))


def minicpm_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Patches of 4 x 4 pixels, side by side in one strip [1, 3, 4, 4 x patches].

    An image of more than 2 x 2 tokens gives an overview, resized to about that many pixels
    (averaged here, bicubic in the processor), then its slices of about that size in raster order;
    the tokens of each crop are in raster order.
    """
    side = 2 if model.config.downsample_mode == "4x" else 4
    unit, scale = 4 * side, 8 * side
    strips, sizes, spans = [], [], []
    for image in map(normal, flat(images)):
        height, width = image.shape[-2:]
        rows, columns = minicpm_grid(height, width, scale)
        crops = [image]
        if rows:
            small = minicpm_size(height, width, unit, scale)
            crops = [F.interpolate(image[None], small, mode="area")[0]]
            high, wide = height // rows, width // columns
            crops += [
                image[:, y : y + high, x : x + wide]
                for y in range(0, height, high)
                for x in range(0, width, wide)
            ]
        counts = []
        for crop in crops:
            grid = crop.shape[-2] // 4, crop.shape[-1] // 4
            strips.append(cut(crop, 4).permute(4, 2, 0, 1, 3).reshape(3, 4, -1))
            sizes.append(grid)
            counts.append(grid[0] * grid[1] // side**2)
        span = [ID, DIGIT, ID_END, START, *[IMAGE] * counts[0], END]
        for n, count in enumerate(counts[1:]):
            span += [NEWLINE] * (n > 0 and n % columns == 0)
            span += [SLICE, *[IMAGE] * count, SLICE_END]
        spans.append(span)
    made: dict[str, Any] = {
        **tokens(images, spans),
        "pixel_values": torch.cat(strips, -1)[None],
        "target_sizes": torch.tensor(sizes, dtype=torch.int32, device=strips[0].device),
    }
    if model.config.model_type == "minicpmv4_7":
        made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).long()
    return made


def minicpm_config(cls: str, mode: str, **more: Any) -> Any:
    text = {
        "model_type": "qwen3_5_text",
        "vocab_size": 100,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "pad_token_id": PAD,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
    }
    return getattr(hf, cls)(
        text_config=text,
        vision_config=vision,
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        downsample_mode=mode,
        **more,
    )


def minicpm(name: str, cls: str, mode: str, **more: Any) -> Entry:
    tower, text = "model.vision_tower", "model.language_model.layers"
    window, merger = f"{tower}.vit_merger", "model.merger.mlp.0"
    sites: list[Dense | Routed] = [
        *plain("vision", f"{tower}.encoder.layers", 2, 36, gelu_tanh, "mlp.fc1 mlp.fc2")
    ]
    linears = f"{merger}.linear_1", f"{merger}.linear_2"
    if mode == "16x":
        inner = f"{window}.linear_1", f"{window}.linear_2"
        sites.append(Dense("projector", 0, inner[0], gelu_tanh, inner[1], 144))
        sites.append(Dense("projector", 1, linears[0], F.gelu, linears[1], 96))
        note = "Between vision layers 0 and 1, vit_merger merges 2 x 2 patches: projector layer 0. "
    else:
        sites.append(Dense("projector", 0, linears[0], F.gelu, linears[1], 96))
        note = "vit_merger does not run: downsample_mode is 4x. "
    sites += [glu("language", f"{text}.{n}.mlp", n, 56, F.silu) for n in range(2)]
    return Entry(
        name=name,
        cls=f"{cls}ForConditionalGeneration",
        config=partial(minicpm_config, f"{cls}Config", mode, **more),
        sizes=((48, 16), (96, 64)) if mode == "16x" else ((24, 8), (48, 32)),
        inputs=minicpm_inputs,
        sites=tuple(sites),
        first=f"{text}.0",
        spatial="region",
        mixers=(r"model\.vision_tower\..*\.self_attn",),
        note=note + "merger.mlp.0 runs once for each crop (overview or slice), in order.",
    )


MARKERS = {
    "image_start_id": START,
    "image_end_id": END,
    "slice_start_id": SLICE,
    "slice_end_id": SLICE_END,
    "newline_id": NEWLINE,
}


# ----------------------------------------------------------------------------------- Gemma 4

SOFT = 6
"""Image tokens that the processor pads each image's patches to."""


def gemma_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Patches in raster order, [image, 54, 48], padded by zeros at position (-1, -1).

    A token is 3 x 3 patches of 4 x 4 pixels; in gemma4_unified the processor merges them into one
    patch [image, 6, 432].
    """
    unified = model.config.model_type == "gemma4_unified"
    size, length = (12, SOFT) if unified else (4, SOFT * 9)
    pixels, positions, spans = [], [], []
    for image in flat(images):
        patches = cut(image, size)
        rows, columns = patches.shape[:2]
        missing = length - rows * columns
        pixels.append(F.pad(patches.flatten(2).flatten(0, 1), (0, 0, 0, missing)))
        x, y = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
        grid = torch.stack([x, y], -1).flatten(0, 1).to(image.device)
        positions.append(F.pad(grid, (0, 0, 0, missing), value=-1))
        soft = rows * columns // (1 if unified else 9)
        spans.append([START, *[IMAGE] * soft, END])
    made = tokens(images, spans)
    made |= {
        "mm_token_type_ids": (made["input_ids"] == IMAGE).long(),
        "pixel_values": torch.stack(pixels),
        "image_position_ids": torch.stack(positions),
    }
    if model.config.model_type == "diffusion_gemma":
        # Not from the processor: the canvas that the first step of `generate` denoises.
        wide = made["input_ids"].new_tensor([sample[0].shape[-1] for sample in images])
        step = torch.arange(5, device=wide.device)
        made["decoder_input_ids"] = 40 + (wide[:, None] + 17 * step) % 50
        made["decoder_attention_mask"] = F.pad(made["attention_mask"], (0, 5), value=1)
    return made


def gemma_text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 100,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "pad_token_id": PAD,
        "final_logit_softcapping": 30.0,
        **more,
    }


def gemma_vision(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma4_vision",
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 64,
        **more,
    }


GEMMA_IDS = {"boi_token_id": START, "eoi_token_id": END, "image_token_id": IMAGE}
GEMMA_OTHER = {
    "video_token_id": VIDEO,
    "audio_token_id": AUDIO,
    "boa_token_id": 17,
    "eoa_token_index": 18,
}
GEMMA_MOE = {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 20}


def gemma4_config() -> Any:
    """Like E2B: embeddings for each layer, the last layer shares keys and is twice as wide."""
    text = gemma_text(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_kv_shared_layers=1,
        use_double_wide_mlp=True,
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=8,
    )
    vision = gemma_vision(use_clipped_linears=True)
    return hf.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, **GEMMA_IDS, **GEMMA_OTHER
    )


def gemma4_moe_config() -> Any:
    """Like 26B-A4B: experts next to the MLP of each layer, image tokens see each other."""
    text = gemma_text(
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        use_bidirectional_attention="vision",
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        **GEMMA_MOE,
    )
    return hf.Gemma4Config(
        text_config=text,
        vision_config=gemma_vision(),
        audio_config=None,
        **GEMMA_IDS,
        **GEMMA_OTHER,
    )


def gemma4_unified_config() -> Any:
    vision = {
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "mm_embed_dim": 24,
        "output_proj_dims": 24,
        "mm_posemb_size": 64,
    }
    return hf.Gemma4UnifiedConfig(
        text_config=gemma_text(),
        vision_config=vision,
        audio_config=None,
        **GEMMA_IDS,
        **GEMMA_OTHER,
    )


def diffusion_gemma_config() -> Any:
    """Not tied, unlike the checkpoints: ties share every weight of the two text stacks."""
    text = gemma_text(sliding_window=64, num_global_key_value_heads=1, **GEMMA_MOE)
    return hf.DiffusionGemmaConfig(
        text_config=text,
        vision_config=gemma_vision(),
        canvas_length=5,
        tie_word_embeddings=False,
        **GEMMA_IDS,
    )


def clip_gates(model: nn.Module) -> None:
    """Give the gates of the vision tower limits that values reach, as checkpoints have."""
    for name, buffer in model.named_buffers():
        if name.endswith("gate_proj.output_max"):
            buffer.fill_(0.8)
        if name.endswith("gate_proj.output_min"):
            buffer.fill_(-0.8)


def gemma_tower(tower: str) -> list[Dense]:
    """The gate's `Gemma4ClippableLinear` may clamp, so its own output is what is activated."""
    blocks = [f"{tower}.encoder.layers.{n}.mlp" for n in range(2)]
    return [
        Dense("vision", n, f"{block}.gate_proj", gelu_tanh, f"{block}.down_proj.linear", 36)
        for n, block in enumerate(blocks)
    ]


def gemma_layers(
    path: str, widths: Sequence[int], stack: str = "", experts: int = 0, last: bool = True
) -> list[Dense | Routed]:
    """`last`: whether the feed-forward of the last layer reaches the logits."""
    sites: list[Dense | Routed] = []
    for n, width in enumerate(widths):
        more = {"stack": stack, "inert": n == len(widths) - 1 and not last}
        sites.append(glu("language", f"{path}.{n}.mlp", n, width, gelu_tanh, **more))
        if experts:
            sites.append(routed(f"{path}.{n}.experts", n, experts, 20, gelu_tanh, **more))
    return sites


def gemma(name: str, cls: str, config: Any, sites: list[Any], **more: Any) -> Entry:
    tower = "model.encoder" if name == "diffusion_gemma" else "model"
    options: dict[str, Any] = {
        "first": f"{tower}.language_model.layers.0",
        "mixers": (re.escape(f"{tower}.vision_tower.encoder.layers") + r"\.\d+\.self_attn",),
        **more,
    }
    return Entry(
        name=name,
        cls=cls,
        config=config,
        sizes=((36, 24), (12, 48)),
        inputs=gemma_inputs,
        sites=tuple(sites),
        spatial="region",
        **options,
    )


# ----------------------------------------------------------------------------------- Inkling


def inkling_inputs(model: Any, images: Images) -> dict[str, Any]:
    """One patch of 5 x 5 pixels per token, in raster order, twice (two frames in time).

    The processor always makes `width // 5 + 1` columns, so the last column is padding only where
    the width is a multiple of 5: placeholders without an image.
    """
    pixels, spans = [], []
    for image in flat(images):
        rows, columns = -(-image.shape[1] // 5), image.shape[2] // 5 + 1
        image = pad_to(image, rows * 5, columns * 5, -1 / 255)
        patches = cut(normal(image, CLIP_MEAN, CLIP_STD), 5).flatten(0, 1)
        pixels.append(patches[:, None].repeat(1, 2, 1, 1, 1))
        spans.append([IMAGE] * rows * columns)
    return {**tokens(images, spans), "pixel_values": torch.cat(pixels)}


def inkling_text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 100,
        "unpadded_vocab_size": 96,
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 12,
        "sliding_window_size": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "moe_intermediate_size": 20,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **more,
    }


def inkling_config() -> Any:
    text = inkling_text(
        mlp_layer_types=["dense", "sparse"],
        intermediate_size=56,
        n_shared_experts=2,
        logits_mup_width_multiplier=1.0,
    )
    return hf.InklingConfig(
        text_config=text,
        vision_config={"patch_size": 5, "num_hidden_layers": 3},
        audio_config={"n_mel_bins": 2, "mel_vocab_size": 4},
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        image_bos_token_id=START,
        audio_bos_token_id=17,
    )


@cache
def shared_gate() -> Tensor:
    """Gate weights of the shared experts, [expert, neuron, hidden]: every model has the same."""
    block: Any = inkling().model().get_submodule("model.language_model.layers.1.mlp.shared_experts")
    return block.gate_proj.detach()


def shared_experts(x: Tensor) -> Tensor:
    return F.silu(torch.einsum("bth,enh->bten", x, shared_gate().to(x))).flatten(2)


def inkling() -> Entry:
    tower, text = "model.vision_tower.encoder_layers", "model.language_model.layers"

    return Entry(
        name="inkling_mm_model",
        cls="InklingForConditionalGeneration",
        config=inkling_config,
        sizes=((13, 8), (10, 20)),
        inputs=inkling_inputs,
        sites=(
            # GELU of a norm of the projection; what follows layer 1 folds the two frames into one.
            Dense("vision", 0, f"{tower}.0.layer_norm", F.gelu, f"{tower}.1.projection", 128),
            Dense("vision", 1, f"{tower}.1.layer_norm", F.gelu, None, 128),
            glu("language", f"{text}.0.mlp", 0, 56, F.silu),
            routed(f"{text}.1.mlp.experts", 1, 5, 20, F.silu),
            # Every token runs through both experts; 3-D weights without a Linear.
            Dense("language", 1, f"{text}.1.post_attention_layernorm", shared_experts, None, 40),
        ),
        first=f"{text}.0",
        spatial="region",
        note="If the image is a multiple of the patch wide, the last column of tokens is padding.",
    )


def inkling2_inputs(model: Any, images: Images) -> dict[str, Any]:
    """One patch of 8 x 8 pixels per token in raster order; the model cuts it into 2 x 2."""
    pixels, grids = [], []
    for image in flat(images):
        rows, columns = -(-image.shape[1] // 8), -(-image.shape[2] // 8)
        image = normal(pad_to(image, rows * 8, columns * 8, -1 / 255))
        pixels.append(cut(image, 8).flatten(0, 1))
        grids.append([1, rows, columns])
    return {
        **tokens(images, [[IMAGE] * math.prod(grid) for grid in grids]),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.tensor(grids, device=pixels[0].device),
    }


def inkling2_config() -> Any:
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "posemb_grid_size": 4,
        "projection_hidden_dim": 52,
        "text_hidden_size": 40,
    }
    text = inkling_text(n_layers_per_attn_res_block=2)
    return hf.Inkling2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)


def softcapped_swiglu(block: Any, x: Tensor, expert: int) -> Tensor:
    """Inkling2SoftcappedSwiGLU: its output is the whole product."""
    gate, up = F.linear(x, block.gate_up_proj[expert]).chunk(2, -1)
    return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)


def inkling2() -> Entry:
    tower, text = "model.vision_tower", "model.language_model.layers"
    merger = f"{tower}.merger.linear_1", f"{tower}.merger.linear_2"
    return Entry(
        name="inkling2",
        cls="Inkling2ForConditionalGeneration",
        config=inkling2_config,
        sizes=((24, 16), (13, 30)),
        inputs=inkling2_inputs,
        sites=(
            *plain("vision", f"{tower}.layers", 2, 36, F.gelu, "mlp.fc1 mlp.fc2"),
            Dense("projector", 0, merger[0], F.gelu, merger[1], 52),
            *(
                replace(routed(f"{text}.{n}.mlp.experts", n, 5, 20, F.silu), act=softcapped_swiglu)
                for n in range(2)
            ),
        ),
        first=f"{text}.0",
        spatial="region",
        mixers=(r"model\.vision_tower\.layers\.\d+\.self_attn",),
        note=(
            "The experts' act_fn takes gate and up and returns what down_proj takes, so both kinds "
            "of neuron are the same."
        ),
    )


# ----------------------------------------------------------------------------------- Molmo 2

MOLMO = {"image": 102, "column": 103, "start": 100, "end": 101, "small": 104}


def molmo_pool(grid: Tensor) -> tuple[Tensor, int, int]:
    """2 x 2 windows of patch numbers, -1 beyond the last row and column; rows, columns."""
    rows, columns = -(-grid.shape[0] // 2), -(-grid.shape[1] // 2)
    grid = F.pad(grid, (0, columns * 2 - grid.shape[1], 0, rows * 2 - grid.shape[0]), value=-1)
    windows = grid.reshape(rows, 2, columns, 2).transpose(1, 2).reshape(-1, 4)
    return windows, rows, columns


def molmo_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Crops of 7 x 7 patches of 4 x 4 pixels, [crop, 49, 48], patches in raster order.

    The first crop is the whole image, made smaller (averaged here; the processor interpolates, so
    that some pixels count for nothing); the others overlap by 2 patches, of which each
    neighbour's outer one is not used. A token pools 2 x 2 patches of a crop or of the image,
    fewer at the right and the bottom; the tokens of the small image come first.
    """
    crops, pooling, grids, counts, spans = [], [], [], [], []
    for image in map(normal, flat(images)):
        device = image.device
        tall, wide = ((length // 4 - 2) // 5 for length in image.shape[-2:])
        tiles = [F.interpolate(image[None], (28, 28), mode="area")[0]]
        tiles += [
            image[:, 20 * y : 20 * y + 28, 20 * x : 20 * x + 28]
            for y in range(tall)
            for x in range(wide)
        ]
        number = torch.full((tall * 5 + 2, wide * 5 + 2), -1, device=device)
        for n in range(tall * wide):
            y, x = divmod(n, wide)
            top, left = y > 0, x > 0
            bottom, right = 7 - (y < tall - 1), 7 - (x < wide - 1)
            patches = torch.arange(49, device=device).view(7, 7) + 49 * (n + 1)
            part = patches[top:bottom, left:right]
            number[5 * y + top : 5 * y + bottom, 5 * x + left : 5 * x + right] = part
        small = molmo_pool(torch.arange(49, device=device).view(7, 7))
        large = molmo_pool(number)
        start = 49 * sum(counts)
        for windows, _, _ in (small, large):
            pooling.append(torch.where(windows >= 0, windows + start, windows))
        grids.append([*small[1:], *large[1:]])
        counts.append(len(tiles))
        crops += [cut(tile, 4).flatten(2).flatten(0, 1) for tile in tiles]
        span = []
        for first, (_, rows, columns) in ((MOLMO["small"], small), (MOLMO["start"], large)):
            row = [MOLMO["image"]] * columns + [MOLMO["column"]]
            span += [first, *row * rows, MOLMO["end"]]
        spans.append(span)
    made = tokens(images, spans)
    device = crops[0].device
    return {
        **made,
        # The processor counts all markers of an image as image.
        "mm_token_type_ids": (made["input_ids"] >= 100).long(),
        "pixel_values": torch.stack(crops),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor(grids, device=device),
        "image_num_crops": torch.tensor(counts, device=device),
    }


def molmo_config() -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "image_size": [28, 28],
        "patch_size": 4,
        **heads,
    }
    adapter = {
        "vision_feature_layer": [1, 0],
        "hidden_size": 24,
        "intermediate_size": 52,
        "text_hidden_size": 40,
        **heads,
    }
    text = {
        "vocab_size": 100,
        "additional_vocab_size": 8,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
    }
    return hf.Molmo2Config(
        vision_config=vision,
        adapter_config=adapter,
        text_config=text,
        image_start_token_id=MOLMO["start"],
        low_res_image_start_token_id=MOLMO["small"],
        image_end_token_id=MOLMO["end"],
        image_patch_id=MOLMO["image"],
        frame_start_token_id=105,
        frame_end_token_id=106,
    )


def molmo() -> Entry:
    tower, text = "model.vision_tower.layers", "model.language_model.layers"
    projector = "model.multi_modal_projector.image_projector"
    return Entry(
        name="molmo2",
        cls="Molmo2ForConditionalGeneration",
        config=molmo_config,
        sizes=((48, 28), (28, 68)),
        inputs=molmo_inputs,
        sites=(
            *plain("vision", tower, 2, 36, gelu_tanh, "mlp.fc1 mlp.fc2"),
            glu("projector", projector, 0, 52, F.silu),
            *(glu("language", f"{text}.{n}.mlp", n, 56, F.silu) for n in range(2)),
        ),
        first=f"{text}.0",
        spatial="region",
        mixers=(r"model\.vision_tower\.layers\.\d+\.self_attn",),
        note=(
            "Image features are added to the embedding of the placeholder. mm_token_type_ids "
            "marks column, start and end tokens too. Crops overlap; the first is the whole image."
        ),
    )


# ----------------------------------------------------------------------------------- entries

GEMMA_TEXT = "model.language_model.layers"
STACKS: dict[str, Callable[[], list[Dense | Routed]]] = {
    "gemma4": lambda: [
        *gemma_tower("model.vision_tower"),
        *gemma_layers(GEMMA_TEXT, (56, 56, 112)),
    ],
    "gemma4+moe": lambda: [
        *gemma_tower("model.vision_tower"),
        *gemma_layers(GEMMA_TEXT, (56, 56), experts=5),
    ],
    "gemma4_unified": lambda: gemma_layers(GEMMA_TEXT, (56, 56)),
    "diffusion_gemma": lambda: [
        *gemma_tower("model.encoder.vision_tower"),
        *gemma_layers("model.encoder.language_model.layers", (56, 56), experts=5, last=False),
        glu(
            "language",
            "model.decoder.self_conditioning",
            0,
            56,
            gelu_tanh,
            stack="self_conditioning",
            inert=True,
        ),
        *gemma_layers("model.decoder.layers", (56, 56), stack="decoder", experts=5),
    ],
}

ENTRIES = (
    pixtral(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        mistral3_config,
        F.gelu,
        "vision_tower",
        "multi_modal_projector",
    ),
    pixtral(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        mistral_large4_config,
        F.silu,
        "vision_tower",
        "multi_modal_projector",
        moe=True,
    ),
    pixtral(
        "lighton_ocr",
        "LightOnOcrForConditionalGeneration",
        lighton_config,
        F.silu,
        "vision_encoder",
        "vision_projection",
    ),
    minicpm("minicpm_ocr", "MiniCPMOcr", "4x"),
    minicpm("minicpmv4_6", "MiniCPMV4_6", "16x"),
    minicpm("minicpmv4_7", "MiniCPMV4_7", "16x", **MARKERS),
    gemma(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        gemma4_config,
        STACKS["gemma4"](),
        prepare=clip_gates,
        note=(
            "Patches are padded to one number per image. Layers that share keys and values see "
            "only the last tokens if forward gets logits_to_keep. Like E2B."
        ),
    ),
    gemma(
        "gemma4+moe",
        "Gemma4ForConditionalGeneration",
        gemma4_moe_config,
        STACKS["gemma4+moe"](),
        note="Patches are padded to one number per image. Like 26B-A4B.",
    ),
    gemma(
        "gemma4_unified",
        "Gemma4UnifiedForConditionalGeneration",
        gemma4_unified_config,
        STACKS["gemma4_unified"](),
        mixers=(),
        note="No vision tower.",
    ),
    gemma(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        diffusion_gemma_config,
        STACKS["diffusion_gemma"](),
        note=(
            "The text encoder reads the image, and only its keys and values reach the decoder, "
            "whose tokens are the canvas; without decoder_input_ids the canvas is random. "
            "Checkpoints tie the weights of both. Self-conditioning is zero in the first step."
        ),
    ),
    inkling2(),
    inkling(),
    molmo(),
)

"""Models that cut an image into tiles, that see it through convolutions, or as bare patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from zoo import Dense, Entry, Images, Routed, taken

# Token ids: ordinary text lies in [TEXT, IMAGE), everything above IMAGE is a marker.
PAD, BOS, EOS, TEXT, IMAGE, VOCAB = 0, 1, 2, 10, 100, 160
START, END, GLOBAL, LINE, LINES, TILE_END = range(IMAGE + 1, IMAGE + 7)
CELL = IMAGE + 10  # the marker of tile n is CELL + n, of row r and column c CELL + 6 * r + c

tanh_gelu = partial(F.gelu, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


def silu_of_second_half(x: Tensor) -> Tensor:
    return F.silu(x.chunk(2, dim=-1)[1])


# ---------------------------------------------------------------------------- text and pixels


def words(number: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randint(TEXT, IMAGE, (length,), generator=generator).tolist()


def prompts(model: Any, images: Sequence[list[int]], side: str = "left") -> dict[str, Any]:
    """BOS, some words, the tokens of the image, some words; padded to one length."""
    rows = []
    for number, image in enumerate(images):
        before, after = words(2 * number, 3 + number % 3), words(2 * number + 1, 6 - number % 3 * 2)
        rows.append([BOS, *before, *image, *after])
    return padded(model, rows, side)


def padded(model: Any, rows: Sequence[list[int]], side: str) -> dict[str, Any]:
    longest = max(map(len, rows))
    ids, seen = [], []
    for row in rows:
        pad = longest - len(row)
        left, right = (pad, 0) if side == "left" else (0, pad)
        ids.append([PAD] * left + row + [PAD] * right)
        seen.append([0] * left + [1] * len(row) + [0] * right)
    device = model.device
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(seen, device=device),
    }


def normal(model: Any, image: Tensor) -> Tensor:
    return (image.to(model.device) - 0.5) / 0.5


def resized(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image[None], (height, width), mode="area")[0]


def cut(image: Tensor, tile: int) -> tuple[Tensor, int, int]:
    """The tiles of an image, row by row [tile, 3, size, size], and their rows and columns."""
    rows, columns = image.shape[1] // tile, image.shape[2] // tile
    parts = image.reshape(3, rows, tile, columns, tile).permute(1, 3, 0, 2, 4)
    return parts.reshape(rows * columns, 3, tile, tile), rows, columns


def with_thumbnail(image: Tensor, tile: int) -> tuple[Tensor, int, int]:
    """Tiles row by row, then the whole image at the size of one tile, unless it is one."""
    tiles, rows, columns = cut(image, tile)
    if rows * columns > 1:
        tiles = torch.cat([tiles, resized(image, tile, tile)[None]])
    return tiles, rows, columns


Markup = Callable[[int, int], list[int]]


def tile_inputs(
    markup: Markup, tile: int, side: str = "left"
) -> Callable[[Any, Images], dict[str, Any]]:
    """All tiles of all samples in one flat pixel_values [tile, 3, size, size].

    An image's rows of pixel_values: its tiles from the top left, row by row, then its
    thumbnail, if it has more than one tile.
    """

    def inputs(model: Any, images: Images) -> dict[str, Any]:
        pixels, ids = [], []
        for sample in images:
            ids.append([])
            for image in sample:
                tiles, rows, columns = with_thumbnail(normal(model, image), tile)
                pixels.append(tiles)
                ids[-1] += markup(rows, columns)
        return {**prompts(model, ids, side), "pixel_values": torch.cat(pixels)}

    return inputs


def padded_tile_inputs(
    markup: Markup, tile: int, side: str, mask: str
) -> Callable[[Any, Images], dict[str, Any]]:
    """pixel_values [sample, most tiles, 3, size, size]: missing tiles are zeros.

    The tiles of a sample are those of `tile_inputs`; pixel_attention_mask is per pixel or
    per tile.
    """

    def inputs(model: Any, images: Images) -> dict[str, Any]:
        pixels, ids = [], []
        for sample in images:
            tiles, row = [torch.zeros(0, 3, tile, tile, device=model.device)], []
            for image in sample:
                parts, rows, columns = with_thumbnail(normal(model, image), tile)
                tiles.append(parts)
                row += markup(rows, columns)
            pixels.append(torch.cat(tiles))
            ids.append(row)
        sequence = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        real = sequence([torch.ones(len(p), dtype=torch.bool, device=model.device) for p in pixels])
        if mask == "pixel":
            real = real[:, :, None, None].expand(-1, -1, tile, tile).long()
        return {
            **prompts(model, ids, side),
            "pixel_values": sequence(pixels),
            "pixel_attention_mask": real,
        }

    return inputs


# ------------------------------------------------------------------------------------- sites


def blocks(
    module: str, path: str, names: str, layers: Sequence[int], width: int, act: Any, stack: str = ""
) -> tuple[Dense, ...]:
    """One site per layer; `names` are those of the first and the last Linear."""
    before, down = names.split()
    return tuple(
        Dense(
            module, i, f"{path}.{i}.{before}", act, f"{path}.{i}.{down}", width=width, stack=stack
        )
        for i in layers
    )


def vision(path: str, width: int, act: Any, names: str = "mlp.fc1 mlp.fc2", stack: str = "") -> Any:
    return blocks("vision", path, names, range(2), width, act, stack)


def glu(path: str, width: int, layers: Sequence[int] = range(2), mlp: str = "mlp") -> Any:
    names = f"{mlp}.gate_proj {mlp}.down_proj"
    return blocks("language", path, names, layers, width, F.silu)


def projector(path: str, width: int, act: Any, layer: int = 0) -> Dense:
    before, down = f"{path}.linear_1", f"{path}.linear_2"
    return Dense("projector", layer, before, act, down, width=width)


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return args[0], args[1]


def fused_silu(block: nn.Module, x: Tensor, expert: int) -> Tensor:
    """gate_up_proj [expert, gates then ups, hidden]."""
    return F.silu((x @ block.gate_up_proj[expert].T).chunk(2, dim=-1)[0])


def zero_fused(block: nn.Module, expert: int, index: int) -> None:
    """down_proj [expert, hidden, neuron]."""
    block.down_proj.data[expert, :, index] = 0


def transposed_silu(block: nn.Module, x: Tensor, expert: int) -> Tensor:
    """gate_up_proj [expert, hidden, gates then ups]."""
    return F.silu((x @ block.gate_up_proj[expert]).chunk(2, dim=-1)[0])


def zero_transposed(block: nn.Module, expert: int, index: int) -> None:
    """down_proj [expert, neuron, hidden]."""
    block.down_proj.data[expert, index, :] = 0


def interleaved_swiglu(block: nn.Module, x: Tensor, expert: int) -> Tensor:
    """gate_up_proj [expert, hidden, gate and up in turn], with a bias and a clamp."""
    both = x @ block.gate_up_proj[expert] + block.gate_up_proj_bias[expert]
    gate = both[..., ::2].clamp(max=7.0)
    return gate * torch.sigmoid(1.702 * gate)


def experts(layer: int, path: str, width: int, act: Any = fused_silu, **given: Any) -> Routed:
    kept = {"zero": zero_fused, "routing": arguments, "experts": 4} | given
    return Routed("language", layer, f"{path}.{layer}.mlp.experts", width=width, act=act, **kept)


# ---------------------------------------------------- aya_vision, cohere2_vision (Cohere2 text)

IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT_SIZE = {"vocab_size": VOCAB, "hidden_size": 40, "num_hidden_layers": 2, **IDS, **HEADS}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}
COHERE = {**TEXT_SIZE, "model_type": "cohere2", "intermediate_size": 56}
PIXELS = 4  # tokens of one tile: 4 x 4 patches, 2 x 2 to one token


def aya_config() -> Any:
    return transformers.AyaVisionConfig(
        vision_config=dict(SIGLIP),
        text_config=dict(COHERE),
        image_token_index=IMAGE,
        alignment_intermediate_size=52,
    )


def aya_markup(rows: int, columns: int) -> list[int]:
    """START, (TILE_n, tokens) for each tile, TILE_GLOBAL, tokens of the thumbnail, END."""
    tiles = rows * columns if rows * columns > 1 else 0
    ids = [START]
    for n in range(tiles):
        ids += [CELL + n, *[IMAGE] * PIXELS]
    return [*ids, GLOBAL, *[IMAGE] * PIXELS, END]


def cohere_config() -> Any:
    return transformers.Cohere2VisionConfig(
        vision_config=dict(SIGLIP),
        text_config=dict(COHERE),
        image_token_id=IMAGE,
        alignment_intermediate_size=52,
    )


def cohere_markup(rows: int, columns: int) -> list[int]:
    """START, (tokens, LINE) for each tile and the thumbnail, END."""
    tiles = rows * columns + (rows * columns > 1)
    return [START, *([IMAGE] * PIXELS + [LINE]) * tiles, END]


def cohere_sites() -> tuple[Any, ...]:
    return (
        *vision("model.vision_tower.encoder.layers", 36, tanh_gelu),
        projector("model.multi_modal_projector", 26, silu_of_second_half),
        *glu("model.language_model.layers", 56),
    )


COHERE_MIXERS = (r"model\.vision_tower\.encoder\.layers\.\d+\.self_attn",)


# ------------------------------------------------- idefics3, smolvlm, granite_docling (SmolVLM)

IDEFICS_VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
LLAMA = {**TEXT_SIZE, "model_type": "llama", "intermediate_size": 56}


def idefics_config(cls: str) -> Callable[[], Any]:
    return lambda: getattr(transformers, cls)(
        vision_config=dict(IDEFICS_VISION),
        text_config=dict(LLAMA),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def idefics_markup(rows: int, columns: int) -> list[int]:
    """<fake><row_r_col_c>tokens for each tile, LINE after a row, <fake><global-img>tokens<fake>.

    START stands for <fake_token_around_image>; the last of the line ends is a double one.
    """
    ids = []
    if rows * columns > 1:
        for r in range(rows):
            for c in range(columns):
                ids += [START, CELL + 6 * r + c, *[IMAGE] * PIXELS]
            ids.append(LINE if r + 1 < rows else LINES)
    return [*ids, START, GLOBAL, *[IMAGE] * PIXELS, START]


def docling_config() -> Any:
    return transformers.GraniteDoclingConfig(
        vision_config=dict(
            IDEFICS_VISION,
            num_hidden_layers=3,
            out_hidden_size=40,
            scale_factor=2,
            deepstack_visual_indexes=[0, 1],
        ),
        text_config=dict(TEXT_SIZE, intermediate_size=56, num_hidden_layers=3),
        image_token_id=IMAGE,
        pad_token_id=PAD,
        density_router_hidden_size=10,
    )


def docling_markup(rows: int, columns: int) -> list[int]:
    """As idefics3, but a single tile is <fake><row_1_col_1>tokens LINE, without a thumbnail."""
    if rows * columns > 1:
        return idefics_markup(rows, columns)
    return [START, CELL, *[IMAGE] * PIXELS, LINE]


DOCLING = "model.vision_model.connector"


# ------------------------------------------------------------ internvl and qianfan_ocr (InternViT)

INTERN_VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN2 = {**TEXT_SIZE, "model_type": "qwen2", "intermediate_size": 56}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 12}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "mlp_only_layers": [0],
}
GPT_OSS = {
    **TEXT_SIZE,
    "model_type": "gpt_oss",
    "intermediate_size": 44,
    "head_dim": 12,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def intern_config(cls: str, text: dict[str, Any]) -> Callable[[], Any]:
    return lambda: getattr(transformers, cls)(
        vision_config=dict(INTERN_VISION),
        text_config=dict(text),
        image_token_id=IMAGE,
        image_seq_length=PIXELS,
    )


def intern_markup(rows: int, columns: int) -> list[int]:
    """START, the tokens of all tiles and of the thumbnail without anything between them, END."""
    tiles = rows * columns + (rows * columns > 1)
    return [START, *[IMAGE] * PIXELS * tiles, END]


INTERN_LAYERS = "model.language_model.layers"
INTERN_PROJECTOR = projector("model.multi_modal_projector", 40, F.gelu)
INTERN_TOWER = vision("model.vision_tower.encoder.layer", 36, F.gelu)
QIANFAN_TOWER = vision("model.vision_tower.layers", 36, F.gelu)


def intern(
    name: str,
    text: dict[str, Any],
    language: tuple[Any, ...],
    sizes: tuple[tuple[int, int], ...],
    cls: str = "InternVL",
) -> Entry:
    layers = "encoder\\.layer" if cls == "InternVL" else "layers"
    return Entry(
        name=name,
        cls=f"{cls}ForConditionalGeneration",
        config=intern_config(f"{cls}Config", text),
        sizes=sizes,
        inputs=tile_inputs(intern_markup, 16),
        sites=(
            *(INTERN_TOWER if cls == "InternVL" else QIANFAN_TOWER),
            INTERN_PROJECTOR,
            *language,
        ),
        first="model.language_model.layers.0",
        spatial="region",
        mixers=(rf"model\.vision_tower\.{layers}\.\d+\.attention",),
    )


# ------------------------------------------------------------------------------------- llama4


def llama4_config() -> Any:
    return transformers.Llama4Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 64,  # also the width of four patches, as in the real ones
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 28,
            "projector_input_dim": 28,
            "projector_output_dim": 28,
        },
        text_config={
            **TEXT_SIZE,
            "head_dim": 10,
            "intermediate_size": 36,
            "intermediate_size_mlp": 56,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def llama4_markup(rows: int, columns: int) -> list[int]:
    """START, tokens of each tile with LINE between columns and LINES after rows, GLOBAL, ..., END.

    LINE is <|tile_x_separator|>, LINES <|tile_y_separator|>, GLOBAL <|image|>; the placeholder
    is <|patch|>.
    """
    ids = [START]
    if rows * columns > 1:
        for _ in range(rows):
            ids += [*([*[IMAGE] * PIXELS, LINE] * columns)[:-1], LINES]
    return [*ids, GLOBAL, *[IMAGE] * PIXELS, END]


def llama4_routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The input is [expert x token, hidden], already scaled by the score: zeros if not routed."""
    x = args[0].reshape(4, -1, args[0].shape[-1])
    return x.sum(0), x.abs().sum(-1).argmax(0)[:, None]


LLAMA4_LAYERS = "language_model.model.layers"
LLAMA4_SITES = (
    *vision("vision_model.model.layers", 64, F.gelu),
    Dense(
        "projector",
        0,
        "vision_model.vision_adapter.mlp.fc1",
        F.gelu,
        "vision_model.vision_adapter.mlp.fc2",
        width=28,
    ),
    Dense(
        "projector",
        1,
        "vision_model.vision_adapter.mlp.fc2",
        F.gelu,
        "multi_modal_projector.linear_1",
        width=28,
    ),
    *glu(LLAMA4_LAYERS, 56, [0], "feed_forward"),
    *glu(LLAMA4_LAYERS, 36, [1], "feed_forward.shared_expert"),
    Routed(
        "language",
        1,
        f"{LLAMA4_LAYERS}.1.feed_forward.experts",
        experts=4,
        width=36,
        act=transposed_silu,
        zero=zero_transposed,
        routing=llama4_routing,
    ),
)


# ----------------------------------------------------------------- got_ocr2, pp_chart2table (SAM)

SAM = {
    "hidden_size": 24,
    "output_channels": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 5,
    "global_attn_indexes": [1],
    "mlp_dim": 36,
}
SAM_NAMES = "mlp.lin1 mlp.lin2"


def got_config(cls: str) -> Callable[[], Any]:
    return lambda: getattr(transformers, cls)(
        vision_config=dict(SAM),
        text_config=dict(QWEN2),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


def got_inputs(model: Any, images: Images) -> dict[str, Any]:
    """<img>, 16 tokens for 16 x 16 patches, </img>; the whole image, squared, as pixel_values."""
    flat = [normal(model, image) for sample in images for image in sample]
    ids = [[START, *[IMAGE] * 16, END] * len(sample) for sample in images]
    return {**prompts(model, ids), "pixel_values": torch.stack(flat)}


def got(name: str, config: str) -> Entry:
    return Entry(
        name=name,
        cls="GotOcr2ForConditionalGeneration",
        config=got_config(config),
        sizes=((64, 64), (64, 64)),
        inputs=got_inputs,
        sites=(
            *vision("model.vision_tower.layers", 36, F.gelu, SAM_NAMES),
            *glu("model.language_model.layers", 56),
        ),
        first="model.language_model.layers.0",
        spatial="region",
        mixers=(r"model\.vision_tower\.layers\.\d+\.attn",),
        overlap=True,
        note="A 3 x 3 convolution and two of stride 2 stand between patches and image tokens.",
    )


# --------------------------------- step3p7, unlimited_ocr, deepseek_ocr2: a global view and tiles
# The tiles go through the tower in a second run, after the global views of all samples; in the
# language model the tiles of an image come before its global view.

TILE, VIEW = 32, 48  # pixels of a tile and of the global view; both have patches of 4 pixels


def tiles_beside_view(image: Tensor) -> tuple[Tensor, int, int]:
    """The tiles; none for an image that fits into the global view."""
    if max(image.shape[1:]) <= VIEW:
        return image.new_zeros(0, 3, TILE, TILE), 0, 0
    return cut(image, TILE)


def step_config() -> Any:
    return transformers.Step3p7Config(
        vision_config={
            "hidden_size": 24,
            "mlp_ratio": 1.5,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": VIEW,
            "patch_size": 4,
            "max_position_embeddings": 144,
        },
        text_config={
            **TEXT_SIZE,
            "num_hidden_layers": 3,
            "head_dim": 12,
            "intermediate_size": 56,
            "moe_intermediate_size": 28,
            "share_expert_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_router_scaling_factor": 3.0,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "swiglu_limits": [0.0, 0.0, 0.5],  # the last layers of the real one are clamped
            "swiglu_limits_shared": [0.0, 0.0, 0.6],
        },
        image_token_id=IMAGE,
    )


def step_inputs(model: Any, images: Images) -> dict[str, Any]:
    """pixel_values: the global view of each image, squeezed to a square.

    pixel_values_local: the tiles of all images, row by row; an image that fits into the
    global view has none.
    """
    views, tiles, counts, ids = [], [], [], []
    for sample in images:
        row: list[int] = []
        for image in sample:
            pixels = normal(model, image)
            views.append(resized(pixels, VIEW, VIEW))
            parts, rows, columns = tiles_beside_view(pixels)
            tiles.append(parts)
            counts.append(len(parts))
            for r in range(rows):
                row += [GLOBAL, *[IMAGE] * 4, TILE_END] * columns
                row += [LINE] if r + 1 < rows else []
            row += [START, *[IMAGE] * 9, END]
        ids.append(row)
    made = {
        **prompts(model, ids),
        "pixel_values": torch.stack(views),
        "num_local_patches": torch.tensor(counts, device=model.device),
    }
    if sum(counts):
        made["pixel_values_local"] = torch.cat(tiles)
    return made


STEP_LAYERS = "model.language_model.layers"


def on_gray(image: Tensor) -> Tensor:
    """The global view: the longer side shrunk to VIEW, the rest filled with gray on both sides."""
    height, width = image.shape[1:]
    scale = VIEW / max(height, width)
    small = resized(image, round(height * scale), round(width * scale))
    high, wide = VIEW - small.shape[1], VIEW - small.shape[2]
    top, left = high // 2, wide // 2
    return F.pad(small, (left, wide - left, top, high - top))


def view_and_tiles(
    model: Any, images: Images, tokens: Callable[[int, int], int]
) -> tuple[dict[str, Any], list[int], list[list[int]]]:
    """pixel_values: the global view of each image, centred on a gray square.

    pixel_values_local: the tiles of all images, row by row; an image not larger than the
    global view has none.
    """
    views, tiles, counts, grids, ids = [], [], [], [], []
    for sample in images:
        ids.append([])
        for image in sample:
            pixels = normal(model, image)
            views.append(on_gray(pixels))
            parts, rows, columns = tiles_beside_view(pixels)
            tiles.append(parts)
            counts.append(len(parts))
            grids.append([columns, rows] if rows else [1, 1])
            ids[-1] += [IMAGE] * tokens(rows, columns)
    made = {**prompts(model, ids), "pixel_values": torch.stack(views)}
    if sum(counts):
        made["pixel_values_local"] = torch.cat(tiles)
    return made, counts, grids


OCR_TEXT = {
    **TEXT_SIZE,
    "num_key_value_heads": 4,
    "intermediate_size": 56,
    "moe_intermediate_size": 28,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense", "sparse"],
}
OCR_SAM = {**SAM, "image_size": VIEW, "downsample_channels": [22, 32]}
OCR_LAYERS = "model.language_model.layers"
OCR_LANGUAGE = (
    *glu(OCR_LAYERS, 56, [0]),
    *glu(OCR_LAYERS, 56, [1], "mlp.shared_experts"),
    experts(1, OCR_LAYERS, 28),
)
OCR_SAM_SITES = vision("model.vision_tower.sam_encoder.layers", 36, F.gelu, SAM_NAMES, "sam")


def unlimited_config() -> Any:
    return transformers.UnlimitedOcrConfig(
        vision_config={
            "sam_config": dict(OCR_SAM),
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 44,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
        },
        text_config=dict(OCR_TEXT),
        image_token_id=IMAGE,
    )


def unlimited_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Placeholders also stand for a newline after each row of tokens and a separator at the end.

    First the tokens of all tiles together, row by row of the whole image (2 x 2 of a tile), then
    those of the global view (3 x 3).
    """
    made, counts, grids = view_and_tiles(
        model, images, lambda rows, columns: 2 * rows * (2 * columns + 1) + 3 * 4 + 1
    )
    return {**made, "num_local_patches": counts, "patches_grid": grids}


def deepseek_config() -> Any:
    return transformers.DeepseekOcr2Config(
        vision_config={
            "sam_config": dict(OCR_SAM),
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 44,
                "num_hidden_layers": 2,
                **HEADS,
            },
        },
        text_config=dict(OCR_TEXT),
        image_token_id=IMAGE,
    )


def deepseek_inputs(model: Any, images: Images) -> dict[str, Any]:
    """144 queries for each tile, 144 for the global view, a separator.

    The number of queries is fixed in the model (144, or 256 for more than 144 cells). The real
    views have as many cells as queries; here they have 4 and 9, so that it runs in no time.
    """
    made, counts, _ = view_and_tiles(model, images, lambda rows, cols: 144 * (rows * cols + 1) + 1)
    return {**made, "num_local_patches": torch.tensor(counts, device=model.device)}


# --------------------------------------------------------------------------------------- fuyu


def fuyu_config() -> Any:
    return transformers.FuyuConfig(
        text_config={
            "model_type": "persimmon",
            **TEXT_SIZE,
            "num_attention_heads": 5,
            "intermediate_size": 56,
        },
        patch_size=6,
        image_size=30,
        image_token_id=IMAGE,
        **IDS,
    )


def fuyu_inputs(model: Any, images: Images) -> dict[str, Any]:
    """The image comes first: its patches row by row, LINE after each row, BOS, text.

    pixel_values (image_patches before transformers 5.21) [patch, 6 x 6 x 3]: the patches of all
    images, channels last.
    """
    rows, patches = [], []
    for number, sample in enumerate(images):
        row: list[int] = []
        for image in sample:
            parts, high, wide = cut(normal(model, image), 6)
            patches.append(parts.permute(0, 2, 3, 1).flatten(1))
            row += ([IMAGE] * wide + [LINE]) * high
        rows.append([*row, BOS, *words(number, 5 + 2 * (number % 3)), END])
    return {
        **padded(model, rows, "left"),
        taken(model, "pixel_values", "image_patches"): torch.cat(patches),
    }


ENTRIES = (
    Entry(
        name="aya_vision",
        cls="AyaVisionForConditionalGeneration",
        config=aya_config,
        sizes=((48, 32), (16, 32)),
        inputs=tile_inputs(aya_markup, 16),
        sites=cohere_sites(),
        first="model.language_model.layers.0",
        spatial="region",
        mixers=COHERE_MIXERS,
    ),
    Entry(
        name="cohere2_vision",
        cls="Cohere2VisionForConditionalGeneration",
        config=cohere_config,
        sizes=((16, 16), (32, 48)),
        inputs=tile_inputs(cohere_markup, 16),
        sites=cohere_sites(),
        first="model.language_model.layers.0",
        spatial="region",
        mixers=COHERE_MIXERS,
    ),
    *(
        Entry(
            name=name,
            cls=f"{cls}ForConditionalGeneration",
            config=idefics_config(f"{cls}Config"),
            sizes=sizes,
            inputs=padded_tile_inputs(idefics_markup, 16, side, "pixel"),
            sites=(
                *vision("model.vision_model.encoder.layers", 36, tanh_gelu),
                *glu("model.text_model.layers", 56),
            ),
            first="model.text_model.layers.0",
            spatial="region",
            mixers=(r"model\.vision_model\.encoder\.layers\.\d+\.self_attn",),
        )
        for name, cls, sizes, side in (
            ("idefics3", "Idefics3", ((48, 32), (16, 32)), "right"),
            ("smolvlm", "SmolVLM", ((16, 16), (48, 32)), "left"),
        )
    ),
    Entry(
        name="granite_docling",
        cls="GraniteDoclingForConditionalGeneration",
        config=docling_config,
        sizes=((32, 48), (16, 16)),
        inputs=padded_tile_inputs(docling_markup, 16, "left", "tile"),
        sites=(
            *blocks(
                "vision",
                "model.vision_model.encoder.layers",
                "mlp.fc1 mlp.fc2",
                range(3),
                36,
                tanh_gelu,
            ),
            *(
                projector(f"{DOCLING}.coarse.deepstack_mergers.{i}", 40, F.gelu, layer=i)
                for i in range(2)
            ),
            # Activated by a function, after a LayerNorm.
            Dense("projector", 2, f"{DOCLING}.ln_mid", F.gelu, f"{DOCLING}.mlp_fc2", width=40),
            *glu("model.text_model.layers", 56, range(3)),
        ),
        first="model.text_model.layers.0",
        spatial="region",
        mixers=(r"model\.vision_model\.encoder\.layers\.\d+\.self_attn",),
        note=(
            "Image features are added again at the image tokens after the first layers "
            "(DeepStack). The connector's fine path does not run; its density router does, and "
            "is no feed-forward block."
        ),
    ),
    intern("internvl", QWEN2, glu(INTERN_LAYERS, 56), ((48, 32), (16, 16))),
    intern(
        "internvl+gpt_oss",
        GPT_OSS,
        tuple(
            experts(i, INTERN_LAYERS, 44, interleaved_swiglu, zero=zero_transposed)
            for i in range(2)
        ),
        ((32, 16), (16, 48)),
    ),
    intern(
        "internvl+qwen3_moe",
        QWEN3_MOE,
        (*glu(INTERN_LAYERS, 56, [0]), experts(1, INTERN_LAYERS, 28)),
        ((32, 32), (48, 16)),
    ),
    intern("qianfan_ocr", QWEN3, glu(INTERN_LAYERS, 56), ((16, 16), (32, 48)), "QianfanOCR"),
    Entry(
        name="llama4",
        cls="Llama4ForConditionalGeneration",
        config=llama4_config,
        sizes=((48, 32), (16, 16)),
        inputs=tile_inputs(llama4_markup, 16),
        sites=LLAMA4_SITES,
        first="language_model.model.layers.0",
        spatial="region",
        mixers=(r"vision_model\.model\.layers\.\d+\.self_attn",),
        note="The class token comes last in the vision tower. Every expert runs on every token.",
    ),
    got("got_ocr2", "GotOcr2Config"),
    got("pp_chart2table", "PPChart2TableConfig"),
    Entry(
        name="step3p7",
        cls="Step3p7ForConditionalGeneration",
        config=step_config,
        sizes=((96, 64), (48, 48)),
        inputs=step_inputs,
        sites=(
            *vision("model.vision_model.layers", 36, quick_gelu),
            *glu(STEP_LAYERS, 56, [0]),
            *glu(STEP_LAYERS, 32, [1], "mlp.shared_experts"),
            # Its gate and up projections are clamped before the down projection.
            Dense(
                "language",
                2,
                f"{STEP_LAYERS}.2.mlp.shared_experts.gate_proj",
                F.silu,
                None,
                width=32,
            ),
            experts(1, STEP_LAYERS, 28),
            experts(2, STEP_LAYERS, 28),
        ),
        first="model.language_model.layers.0",
        spatial="region",
        mixers=(r"model\.vision_model\.layers\.\d+\.self_attn",),
        overlap=True,
        note=(
            "The vision tower runs twice: over the global views, then over the tiles, whose "
            "tokens come first. Gate and up of the last layers are clamped after the activation."
        ),
    ),
    Entry(
        name="unlimited_ocr",
        cls="UnlimitedOcrForConditionalGeneration",
        config=unlimited_config,
        sizes=((96, 64), (48, 36)),
        inputs=unlimited_inputs,
        sites=(
            *OCR_SAM_SITES,
            *vision("model.vision_tower.vision_encoder.encoder.layers", 44, quick_gelu),
            *OCR_LANGUAGE,
        ),
        first="model.language_model.layers.0",
        spatial="region",
        mixers=(
            r"model\.vision_tower\.sam_encoder\.layers\.\d+\.attn",
            r"model\.vision_tower\.vision_encoder\.encoder\.layers\.\d+\.self_attn",
        ),
        overlap=True,
        note=(
            "The vision tower (SAM, then CLIP) runs twice: over the global views, then over the "
            "tiles, whose tokens come first. The global view is padded to a square."
        ),
    ),
    Entry(
        name="deepseek_ocr2",
        cls="DeepseekOcr2ForConditionalGeneration",
        config=deepseek_config,
        sizes=((64, 32), (48, 36)),
        inputs=deepseek_inputs,
        sites=(
            *OCR_SAM_SITES,
            *vision(
                "model.vision_tower.vision_encoder.layers",
                44,
                F.silu,
                "mlp.gate_proj mlp.down_proj",
            ),
            *OCR_LANGUAGE,
        ),
        first="model.language_model.layers.0",
        spatial="queries",
        note=(
            "The vision tower (SAM, then a causal encoder with learned queries behind the "
            "patches) runs twice: over the global views, then over the tiles."
        ),
    ),
    Entry(
        name="fuyu",
        cls="FuyuForCausalLM",
        config=fuyu_config,
        sizes=((24, 18), (12, 30)),
        inputs=fuyu_inputs,
        sites=blocks(
            "language",
            "model.language_model.layers",
            "mlp.dense_h_to_4h mlp.dense_4h_to_h",
            range(2),
            56,
            relu2,
        ),
        first="model.language_model.layers.0",
        spatial="region",
        note="There is no vision tower: one Linear makes a token of a patch.",
    ),
)

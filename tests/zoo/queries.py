"""Models whose image tokens are learned queries, or that only cross-attend to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.idefics.configuration_idefics import (
    IdeficsPerceiverConfig,
    IdeficsVisionConfig,
)
from transformers.models.idefics2.configuration_idefics2 import (
    Idefics2PerceiverConfig,
    Idefics2VisionConfig,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig, Kosmos2VisionConfig
from transformers.models.kosmos2_5.configuration_kosmos2_5 import (
    Kosmos2_5TextConfig,
    Kosmos2_5VisionConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from zoo import Dense, Entry, Images, Routed

gelu_tanh = partial(F.gelu, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# --- Text --------------------------------------------------------------------------------------

LOW, HIGH = 20, 140
"""Ids of ordinary words; special ids lie below and above."""


def words(count: int, sample: int) -> list[int]:
    """`count` ordinary ids, other ones for each sample."""
    return [LOW + (17 * sample + 7 * k) % (HIGH - LOW) for k in range(count)]


def spoken(sample: int, shortest: int = 4) -> list[int]:
    """What is said in a sample: neighbours differ in length."""
    return words(shortest + (2 * sample) % 5, sample)


def padded(rows: Sequence[Sequence[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        left, right = (gap, 0) if side == "left" else (0, gap)
        ids.append([pad] * left + list(row) + [pad] * right)
        mask.append([0] * left + [1] * len(row) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask)


def on(model: Any, **inputs: Tensor) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in inputs.items()}


# --- Sites -------------------------------------------------------------------------------------


def blocks(
    module: str,
    path: str,
    layers: int | Iterable[int],
    width: int,
    act: Callable[[Tensor], Tensor],
    before: str,
    down: str | None,
    **more: Any,
) -> tuple[Dense, ...]:
    """One site for each layer, whose number stands for `{}` in `path`."""
    chosen = range(layers) if isinstance(layers, int) else layers
    return tuple(
        Dense(
            module,
            k,
            f"{path.format(k)}.{before}",
            act,
            f"{path.format(k)}.{down}" if down else None,
            width,
            **more,
        )
        for k in chosen
    )


mlp = partial(blocks, before="fc1", down="fc2")
glu = partial(blocks, before="gate_proj", down="down_proj")
t5_glu = partial(blocks, before="wi_0", down="wo")


# --- BLIP-2, InstructBLIP ----------------------------------------------------------------------

BLIP_IMAGE = 150


def blip_text(kind: str) -> Any:
    if kind == "opt":
        return tf.OPTConfig(
            vocab_size=160,
            hidden_size=40,
            ffn_dim=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=40,
        )
    if kind == "llama":  # Vicuna
        return tf.LlamaConfig(
            vocab_size=160,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    return tf.T5Config(  # Flan-T5
        vocab_size=160,
        d_model=40,
        d_kv=8,
        d_ff=56,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


def blip_config(prefix: str, text: str, **more: Any) -> Any:
    vision = getattr(tf, f"{prefix}VisionConfig")(
        hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
    )
    # Cross-attention every other layer, as in the checkpoints: layer 0 has it, layer 1 does not.
    qformer = getattr(tf, f"{prefix}QFormerConfig")(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        cross_attention_frequency=2,
    )
    return getattr(tf, f"{prefix}Config")(
        vision_config=vision,
        qformer_config=qformer,
        text_config=blip_text(text),
        num_query_tokens=5,
        **more,
    )


def blip_inputs(model: Any, images: Images, *, frames: int = 0) -> dict[str, Any]:
    """The processor pads the text first and puts the image tokens in front of everything."""
    config = model.config
    kind = config.text_config.model_type
    bos, eos, pad, side = {
        "opt": ([2], [], 1, "right"),
        "llama": ([1], [], 0, "left"),
        "t5": ([], [1], 0, "right"),
    }[kind]
    said = [spoken(sample) for sample in range(len(images))]
    ids, mask = padded([bos + row + eos for row in said], pad, side)
    queries = torch.full((len(images), config.num_query_tokens * max(1, frames)), BLIP_IMAGE)
    inputs = {
        "input_ids": torch.cat([queries, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(queries), mask], 1),
    }
    pixels = torch.stack([sample[0] for sample in images])
    if frames:  # a video that brightens: frame k is the image times (k + 1) / frames
        bright = (torch.arange(frames, device=pixels.device) + 1) / frames
        pixels = pixels[:, None] * bright[None, :, None, None, None]
    inputs["pixel_values"] = pixels
    if config.model_type != "blip-2":  # [CLS] text [SEP] of BERT, padded on the right
        ids, mask = padded([[5, *row, 6] for row in said], 0, "right")
        inputs["qformer_input_ids"], inputs["qformer_attention_mask"] = ids, mask
    if kind == "t5":  # what the decoder has said so far
        answer = [[0, *words(3, sample + 5)] for sample in range(len(images))]
        inputs["decoder_input_ids"] = torch.tensor(answer)
    return on(model, **inputs)


def blip_language(kind: str) -> tuple[Dense, ...]:
    if kind == "opt":
        return mlp("language", "language_model.model.decoder.layers.{}", 2, 72, F.relu)
    if kind == "llama":
        return glu("language", "language_model.model.layers.{}.mlp", 2, 56, F.silu)
    encoder = "language_model.encoder.block.{}.layer.1.DenseReluDense"
    decoder = "language_model.decoder.block.{}.layer.2.DenseReluDense"
    return t5_glu("language", encoder, 2, 56, gelu_tanh) + t5_glu(
        "language", decoder, 2, 56, gelu_tanh, stack="decoder"
    )


def blip(name: str, prefix: str, text: str, note: str, frames: int = 0) -> Entry:
    layer = "qformer.encoder.layer.{}"
    qformer = blocks(
        "qformer", layer, 2, 48, F.gelu, "intermediate_query.dense", "output_query.dense"
    )
    if prefix != "Blip2":  # the instruction runs beside the queries, which read it in attention
        said = partial(blocks, "qformer", layer, width=48, act=F.gelu, before="intermediate.dense")
        qformer += said(layers=[0], down="output.dense", stack="text")
        qformer += said(layers=[1], down="output.dense", stack="text", inert=True)
    token = "video_token_index" if frames else "image_token_index"
    return Entry(
        name,
        f"{prefix}ForConditionalGeneration",
        partial(blip_config, prefix, text, **{token: BLIP_IMAGE}),
        ((12, 12), (12, 12)),
        partial(blip_inputs, frames=frames),
        mlp("vision", "vision_model.encoder.layers.{}.mlp", 2, 64, F.gelu)
        + qformer
        + blip_language(text),
        {
            "opt": "language_model.model.decoder.layers.0",
            "llama": "language_model.model.layers.0",
            "t5": "language_model.encoder.block.0",
        }[text],
        "queries",
        (r"vision_model\.encoder\.layers\.\d+\.self_attn",),
        note=note,
    )


FRONT = "Image tokens stand before the text and its padding, so that left padding is in between."


# --- Aria --------------------------------------------------------------------------------------


def aria_config() -> Any:
    return tf.AriaConfig(
        vision_config=Idefics3VisionConfig(
            hidden_size=24,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        text_config=AriaTextConfig(
            vocab_size=160,
            hidden_size=40,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            moe_num_experts=6,
            moe_topk=2,
            moe_num_shared_experts=2,
        ),
        projector_patch_to_query_dict={4: 3, 16: 6},  # by patches of the canvas
        image_token_index=9,
    )


def corner(images: Sequence[Tensor], width: int, height: int, fill: float = 0.0) -> list[Tensor]:
    """Each image in the top left of a canvas."""
    sizes = [(width - image.shape[-1], height - image.shape[-2]) for image in images]
    return [
        F.pad(image, (0, w, 0, h), value=fill) for image, (w, h) in zip(images, sizes, strict=True)
    ]


def aria_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Padded to a square with black, which is -1 after normalization; left padding."""
    side = model.config.vision_config.image_size
    flat = [sample[0] for sample in images]
    begin, end = [147], [148]  # <fim_prefix> <fim_suffix>, around 6 x <|img|>
    rows = [[1, *words(2, k + 3), *begin, *[9] * 6, *end, *spoken(k)] for k in range(len(images))]
    ids, mask = padded(rows, 2, "left")
    shown = corner([torch.ones_like(image[0]) for image in flat], side, side)
    return on(
        model,
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.stack(corner(flat, side, side, -1.0)),
        pixel_mask=torch.stack(shown).bool(),
    )


def aria_act(block: nn.Module, x: Tensor, expert: int) -> Tensor:
    return F.silu((x @ block.gate_up_proj[expert]).chunk(2, -1)[0])


def aria_zero(block: nn.Module, expert: int, index: int) -> None:
    block.down_proj.data[expert, index] = 0  # [experts, width, hidden]


def aria_routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    names = ("hidden_states", "top_k_index", "top_k_weights")
    named = dict(zip(names, args, strict=False)) | kwargs
    return named["hidden_states"], named["top_k_index"]


ARIA = Entry(
    "aria",
    "AriaForConditionalGeneration",
    aria_config,
    ((16, 12), (8, 16)),
    aria_inputs,
    (
        *mlp("vision", "model.vision_tower.encoder.layers.{}.mlp", 2, 64, gelu_tanh),
        Dense(
            "projector",
            0,
            "model.multi_modal_projector.feed_forward.linear_in",
            gelu_tanh,
            "model.multi_modal_projector.feed_forward.linear_out",
            40,
        ),
        *glu("language", "model.language_model.layers.{}.mlp.shared_experts", 2, 56, F.silu),
        *(
            Routed(
                "language",
                k,
                f"model.language_model.layers.{k}.mlp.experts",
                6,
                28,
                aria_act,
                aria_zero,
                aria_routing,
            )
            for k in range(2)
        ),
    ),
    "model.language_model.layers.0",
    "queries",
    (r"model\.vision_tower\.encoder\.layers\.\d+\.self_attn",),
    note="Expert weights are stored [experts, in, out]. The canvas is padded at bottom and right.",
)


# --- Idefics2 ----------------------------------------------------------------------------------

IDEFICS2_IMAGE, IDEFICS2_FAKE, IDEFICS2_LATENTS = 151, 150, 3


def idefics2_config() -> Any:
    return tf.Idefics2Config(
        vision_config=Idefics2VisionConfig(
            hidden_size=24,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=24,
            patch_size=4,
        ),
        perceiver_config=Idefics2PerceiverConfig(
            hidden_size=40,
            resampler_n_latents=IDEFICS2_LATENTS,
            resampler_depth=2,
            resampler_n_heads=4,
            resampler_head_dim=12,
            num_key_value_heads=2,
        ),
        text_config=tf.MistralConfig(
            vocab_size=160,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        ),
        image_token_id=IDEFICS2_IMAGE,
    )


def idefics2_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Split in four: top left, top right, bottom left, bottom right, and the whole image.

    Each is put in the top left of a canvas as large as the largest image of the batch.
    """
    width = max(sample[0].shape[-1] for sample in images)
    height = max(sample[0].shape[-2] for sample in images)
    pixels, masks = [], []
    for sample in images:
        h, w = sample[0].shape[-2] // 2, sample[0].shape[-1] // 2
        top, bottom = sample[0][:, :h], sample[0][:, h:]
        parts = [half[..., side] for half in (top, bottom) for side in (slice(w), slice(w, None))]
        parts.append(sample[0])
        pixels.append(torch.stack(corner(parts, width, height)))
        shown = corner([torch.ones_like(part[0]) for part in parts], width, height)
        masks.append(torch.stack(shown).long())
    image = [*[IDEFICS2_IMAGE] * IDEFICS2_LATENTS, IDEFICS2_FAKE]
    rows = [
        [1, *words(2, k + 3), IDEFICS2_FAKE, *image * 5, *spoken(k)] for k in range(len(images))
    ]
    ids, mask = padded(rows, 0, "left")
    return on(
        model,
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.stack(pixels),
        pixel_attention_mask=torch.stack(masks),
    )


IDEFICS2 = Entry(
    "idefics2",
    "Idefics2ForConditionalGeneration",
    idefics2_config,
    ((24, 16), (16, 24)),
    idefics2_inputs,
    (
        *mlp("vision", "model.vision_model.encoder.layers.{}.mlp", 2, 64, gelu_tanh),
        Dense(
            "projector",
            0,
            "model.connector.modality_projection.gate_proj",
            F.silu,
            "model.connector.modality_projection.down_proj",
            56,
        ),
        *glu("qformer", "model.connector.perceiver_resampler.layers.{}.mlp", 2, 160, F.silu),
        *glu("language", "model.text_model.layers.{}.mlp", 2, 56, F.silu),
    ),
    "model.text_model.layers.0",
    "queries",
    (r"model\.vision_model\.encoder\.layers\.\d+\.self_attn",),
    note="Five groups of queries: each quarter of the image, then the whole image. The projector"
    " runs before the resampler, on every patch.",
)


# --- Idefics -----------------------------------------------------------------------------------

IDEFICS_FAKE, IDEFICS_IMAGE = 160, 161


def idefics_config() -> Any:
    return tf.IdeficsConfig(
        vocab_size=160,
        additional_vocab_size=2,  # <fake_token_around_image>, <image>
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=True,
        alpha_type="float",
        use_resampler=True,
        max_position_embeddings=64,
        vision_config=IdeficsVisionConfig(
            embed_dim=24,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=12,
            patch_size=4,
        ),
        perceiver_config=IdeficsPerceiverConfig(
            use_resampler=True,
            resampler_n_latents=5,
            resampler_depth=2,
            resampler_n_heads=4,
            resampler_head_dim=10,
            qk_layer_norms_perceiver=True,
        ),
    )


def idefics_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Tokens before the image do not see it, and neither does left padding."""
    shown = [IDEFICS_FAKE, IDEFICS_IMAGE, IDEFICS_FAKE]
    rows = [[1, *words(2, k + 3), *shown, *spoken(k)] for k in range(len(images))]
    ids, mask = padded(rows, 0, "left")
    return on(
        model,
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.stack([sample[0][None] for sample in images]),
        image_attention_mask=(ids == IDEFICS_IMAGE).long().cumsum(1)[..., None],
    )


IDEFICS = Entry(
    "idefics",
    "IdeficsForVisionText2Text",
    idefics_config,
    ((12, 12), (12, 12)),
    idefics_inputs,
    (
        *mlp("vision", "model.vision_model.encoder.layers.{}.mlp", 2, 64, F.gelu),
        *blocks("qformer", "model.perceiver_resampler.blocks.{}.1", 2, 96, F.relu, "fc", "c_proj"),
        *glu("language", "model.layers.{}.mlp", 4, 56, F.silu),
        *glu("language", "model.gated_cross_attn_layers.{}.mlp", 2, 56, F.silu, stack="cross"),
    ),
    "model.gated_cross_attn_layers.0",
    "none",
    (r"model\.vision_model\.encoder\.layers\.\d+\.self_attn",),
    note="Cross-attention block k runs before layer k x cross_layer_interval, so the stream carries"
    " the image from before layer 0 on: at text positions from the image token on, not as tokens.",
)


# --- Kosmos-2 ----------------------------------------------------------------------------------


def kosmos2_config() -> Any:
    return tf.Kosmos2Config(
        vision_config=Kosmos2VisionConfig(
            hidden_size=24,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=12,
            patch_size=4,
        ),
        text_config=Kosmos2TextConfig(
            vocab_size=160,
            max_position_embeddings=64,
            embed_dim=40,
            layers=2,
            ffn_dim=72,
            attention_heads=4,
        ),
        latent_query_num=5,
    )


def kosmos2_inputs(model: Any, images: Images) -> dict[str, Any]:
    """<s> <image> 4 5 6 7 8 </image> text: the image's ids are the first ones after <unk>."""
    queries = model.config.latent_query_num
    image = [150, *range(4, 4 + queries), 151]
    rows = [[0, *image, *spoken(k)] for k in range(len(images))]
    places = [[0, 0, *[1] * queries, 0, *[0] * len(spoken(k))] for k in range(len(images))]
    ids, mask = padded(rows, 1, "left")
    return on(
        model,
        input_ids=ids,
        attention_mask=mask,
        image_embeds_position_mask=padded(places, 0, "left")[0],
        pixel_values=torch.stack([sample[0] for sample in images]),
    )


KOSMOS2 = Entry(
    "kosmos-2",
    "Kosmos2ForConditionalGeneration",
    kosmos2_config,
    ((12, 12), (12, 12)),
    kosmos2_inputs,
    (
        *mlp("vision", "vision_model.model.encoder.layers.{}.mlp", 2, 64, quick_gelu),
        *mlp("language", "text_model.model.layers.{}.ffn", 2, 72, F.gelu, down=None),
    ),
    "text_model.model.layers.0",
    "queries",
    (r"vision_model\.model\.encoder\.layers\.\d+\.self_attn",),
    note="Image tokens have ids of ordinary words: only image_embeds_position_mask tells them."
    " A LayerNorm stands between the activation and its down projection.",
)


# --- Kosmos-2.5 --------------------------------------------------------------------------------

KOSMOS25_PATCHES = 20


def kosmos25_config() -> Any:
    return tf.Kosmos2_5Config(
        vision_config=Kosmos2_5VisionConfig(
            hidden_size=24,
            patch_embed_hidden_size=48,
            intermediate_size=64,
            head_dim=6,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_num_patches=32,
        ),
        text_config=Kosmos2_5TextConfig(
            vocab_size=160,
            max_position_embeddings=64,
            embed_dim=40,
            layers=2,
            ffn_dim=72,
            attention_heads=4,
        ),
        latent_query_num=5,
    )


def flattened_patches(image: Tensor, patch: int, most: int) -> Tensor:
    """Rows [row, column, pixels (y, x, channel)], counted from 1; padding rows are zero."""
    rows, columns = image.shape[-2] // patch, image.shape[-1] // patch
    pixels = image.reshape(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).flatten(2)
    row = torch.arange(1, rows + 1).to(image)[:, None, None].expand(rows, columns, 1)
    column = torch.arange(1, columns + 1).to(image)[None, :, None].expand(rows, columns, 1)
    flat = torch.cat([row, column, pixels], -1).flatten(0, 1)
    return F.pad(flat, (0, 0, 0, most - len(flat)))


def kosmos25_inputs(model: Any, images: Images) -> dict[str, Any]:
    """<s> <image> 5 x <s> </image> text: the placeholder id is that of <s>."""
    queries = model.config.latent_query_num
    rows = [[0, 150, *[0] * queries, 151, *spoken(k)] for k in range(len(images))]
    ids, mask = padded(rows, 1, "right")
    places = [0, -1, *[1] * queries, -1]
    places += [0] * (ids.shape[1] - len(places))
    flat = [sample[0] for sample in images]
    patches = torch.stack([flattened_patches(image, 4, KOSMOS25_PATCHES) for image in flat])
    return on(
        model,
        input_ids=ids,
        attention_mask=mask,
        image_embeds_position_mask=torch.tensor(places).expand(len(images), -1),
        flattened_patches=patches,
        width=torch.tensor([image.shape[-1] for image in flat]),
        height=torch.tensor([image.shape[-2] for image in flat]),
    )


KOSMOS25 = Entry(
    "kosmos-2.5",
    "Kosmos2_5ForConditionalGeneration",
    kosmos25_config,
    ((16, 20), (24, 12)),  # 20 patches; 18 and two rows of padding
    kosmos25_inputs,
    (
        *t5_glu("vision", "vision_model.encoder.layer.{}.mlp", 2, 64, gelu_tanh),
        *mlp("language", "text_model.model.layers.{}.ffn", 2, 72, F.gelu, down=None),
    ),
    "text_model.model.layers.0",
    "queries",
    (r"vision_model\.encoder\.layer\.\d+\.attention",),
    note="Image tokens have the id of <s>, which also begins the text: only"
    " image_embeds_position_mask == 1 tells them (its -1 are <image> and </image>). A LayerNorm"
    " stands between the activation and its down projection.",
)


# --- Mllama ------------------------------------------------------------------------------------

MLLAMA_TILES = 4


def mllama_config() -> Any:
    return tf.MllamaConfig(
        vision_config=MllamaVisionConfig(
            hidden_size=24,
            intermediate_size=64,
            num_hidden_layers=3,
            num_global_layers=2,
            attention_heads=4,
            image_size=12,
            patch_size=4,
            max_num_tiles=MLLAMA_TILES,
            intermediate_layers_indices=[0, 1],
            vision_output_dim=24 * 3,
        ),
        text_config=MllamaTextConfig(
            vocab_size=160,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            cross_attention_layers=[1],
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=4,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        image_token_index=160,  # one past the vocabulary of the head, as in the checkpoints
    )


def mllama_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Tiles of the canvas from left to right, top to bottom, then tiles of zeros.

    The canvas is the image padded at bottom and right to whole tiles, with black, which is -1
    after normalization.
    """
    vision = model.config.vision_config
    tile = vision.image_size
    pixels, shapes = [], []
    for sample in images:
        down, across = (ceil_div(size, tile) for size in sample[0].shape[-2:])
        (canvas,) = corner([sample[0]], across * tile, down * tile, -1.0)
        tiles = canvas.reshape(3, down, tile, across, tile).permute(1, 3, 0, 2, 4).flatten(0, 1)
        pixels.append(F.pad(tiles, (0, 0) * 3 + (0, MLLAMA_TILES - len(tiles)))[None])
        shapes.append([down, across])
    rows = [[*words(2, k + 3), 160, *spoken(k)] for k in range(len(images))]
    ids, mask = padded([[1, *row] for row in rows], 4, "left")
    count = torch.tensor([down * across for down, across in shapes])
    real = (torch.arange(MLLAMA_TILES) < count[:, None]).long()
    seen = (ids == 160).long().cumsum(1)  # from the image token on
    return on(
        model,
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.stack(pixels),
        aspect_ratio_ids=torch.tensor(
            [[vision.supported_aspect_ratios.index(shape) + 1] for shape in shapes]
        ),
        aspect_ratio_mask=real[:, None],
        cross_attention_mask=seen[:, :, None, None] * real[:, None, None],
    )


def ceil_div(size: int, unit: int) -> int:
    return -(-size // unit)


MLLAMA = Entry(
    "mllama",
    "MllamaForConditionalGeneration",
    mllama_config,
    ((24, 12), (8, 36)),  # one row of two tiles; three tiles above each other, padded on the right
    mllama_inputs,
    (
        *mlp("vision", "model.vision_model.transformer.layers.{}.mlp", 3, 64, F.gelu),
        *mlp(
            "vision",
            "model.vision_model.global_transformer.layers.{}.mlp",
            2,
            64,
            F.gelu,
            stack="global",
        ),
        *glu("language", "model.language_model.layers.{}.mlp", [0, 2], 56, F.silu),
        *glu(
            "language",
            "model.language_model.layers.{}.mlp",
            [1],
            56,
            F.silu,
            conditional="a cross-attention layer is skipped where no image was given",
        ),
    ),
    "model.language_model.layers.0",
    "none",
    (r"model\.vision_model\.(global_)?transformer\.layers\.\d+\.self_attn",),
    note="Vision rows are tiles x (class + patches, padded to a multiple of 8), padding tiles"
    " included.",
)


ENTRIES = (
    ARIA,
    blip("blip-2", "Blip2", "opt", FRONT),
    blip("blip-2+t5", "Blip2", "t5", FRONT + " They are in the encoder."),
    blip("instructblip", "InstructBlip", "llama", FRONT),
    blip("instructblip+t5", "InstructBlip", "t5", FRONT + " They are in the encoder."),
    blip(
        "instructblipvideo",
        "InstructBlipVideo",
        "llama",
        FRONT + " Four frames: vision and Q-Former have samples x frames as their batch.",
        frames=4,
    ),
    IDEFICS2,
    IDEFICS,
    KOSMOS2,
    KOSMOS25,
    MLLAMA,
)

"""Architectures that fit no other group: cross-attention, VQ codes, prefixes, encoder-decoders.

Special ids are below 40, words from 40 to 119. Pixel values are normalised with mean and standard
deviation 1/2 everywhere, whatever the checkpoint's own are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from zoo import Dense, Entry, Images, Routed

VOCAB = 120
PAD, BOS, EOS, IMAGE, BEGIN, END, WRAP, END_FRAME, NEWLINE, SEP = range(10)

gelu_tanh = partial(F.gelu, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def words(seed: int, count: int) -> list[int]:
    """Ordinary text: the same ids for the same seed."""
    return [40 + (17 * seed + 11 * k + 5 * k * k) % 80 for k in range(count)]


def pixels(images: Images) -> Tensor:
    return torch.stack([image for sample in images for image in sample]) * 2 - 1


def batch(
    rows: list[list[int]], pad: int = PAD, left: bool = False, prefix: str = ""
) -> dict[str, Tensor]:
    """Token ids and attention mask of `rows`, padded."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap, ones = [pad] * (width - len(row)), [1] * len(row)
        ids.append(gap + row if left else row + gap)
        mask.append([0] * len(gap) + ones if left else ones + [0] * len(gap))
    return {
        f"{prefix}input_ids": torch.tensor(ids),
        f"{prefix}attention_mask": torch.tensor(mask),
    }


def wrapped(count: int, lengths: tuple[int, int], pad: int = PAD, **options: Any) -> dict[str, Any]:
    """Samples of plain text between BOS and EOS, of `lengths` in turn."""
    rows = [[BOS, *words(i, lengths[i % 2]), EOS] for i in range(count)]
    return batch(rows, pad, **options)


def started(count: int, start: list[int], pad: int = PAD) -> dict[str, Any]:
    """Token ids of a decoder: its start ids, then the answer so far."""
    rows = [[*start, *words(50 + i, (4, 2)[i % 2])] for i in range(count)]
    return batch(rows, pad, prefix="decoder_")


def mlps(
    module: str,
    path: str,
    act: Callable[[Tensor], Tensor],
    width: int,
    names: tuple[str, str] = ("fc1", "fc2"),
    layers: int = 2,
    **options: Any,
) -> tuple[Dense, ...]:
    """Sites of `layers` equal blocks; `{}` in `path` is the layer."""
    before, down = names
    return tuple(
        Dense(
            module,
            layer,
            f"{path.format(layer)}.{before}",
            act,
            f"{path.format(layer)}.{down}",
            width,
            **options,
        )
        for layer in range(layers)
    )


def quieter(pattern: str, model: nn.Module) -> None:
    """Shrinks the residual branches that mix neighbours, so that each cell keeps to itself."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(pattern, name):
                parameter.mul_(0.05)


GLU = ("gate_proj", "down_proj")
T5_GLU = ("wi_0", "wo")
BERT = ("intermediate.dense", "output.dense")


# BLIP: the text decoder attends to the image from its first layer on.


def blip_config() -> Any:
    return tf.BlipConfig(
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=40,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=WRAP,
            sep_token_id=EOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        vision_config=dict(
            hidden_size=24,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        projection_dim=16,
        image_text_hidden_size=16,
    )


def blip_inputs(model: Any, images: Images) -> dict[str, Any]:
    return {"pixel_values": pixels(images), **wrapped(len(images), (6, 3))}


BLIP = Entry(
    name="blip",
    cls="BlipForConditionalGeneration",
    config=blip_config,
    sizes=((16, 16), (16, 16)),
    inputs=blip_inputs,
    sites=(
        *mlps("vision", "vision_model.encoder.layers.{}.mlp", F.gelu, 44),
        *mlps("language", "text_decoder.bert.encoder.layer.{}", F.gelu, 72, BERT),
    ),
    first="text_decoder.bert.encoder.layer.0",
    spatial="none",
    mixers=(r"vision_model\.encoder\.layers\.\d+\.self_attn",),
    note="The image is only in the keys and values of the cross-attention.",
)


# Chameleon and Emu3: the image becomes discrete codes, which are ordinary tokens.


CODES = 512


def tokenizer_like(model: nn.Module) -> None:
    """Gives the image tokenizer local features and a codebook of features that do occur."""
    quieter(r"vqmodel\.encoder\..*\.(conv2|proj_out|out_proj)\.", model)
    book = model.model.vqmodel.quantize.embedding.weight
    seen: list[Tensor] = []
    hook = model.model.vqmodel.quantize.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].movedim(-3, -1).flatten(0, -2))
    )
    noise = torch.rand(16, 3, 24, 24, generator=torch.Generator().manual_seed(2)).to(book) * 2 - 1
    with torch.no_grad():
        if "emu3" in model.config.model_type:
            model.model.vqmodel.encode(noise, torch.tensor([[24, 24]] * 16))
        else:
            model.model.vqmodel.encode(noise)
        book.copy_(seen[0][:: len(seen[0]) // CODES][:CODES])
    hook.remove()


def letters(number: int) -> str:
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))


def chameleon_config() -> Any:
    codes = {f"IMGIMG{letters(code)}Z": VOCAB + code for code in range(CODES)}
    return tf.ChameleonConfig(
        vocab_size=VOCAB + CODES,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        vocabulary_map={"<image>": IMAGE, "<racm3:break>": BEGIN, "<eoss>": END, **codes},
        vq_config=dict(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=8,
            resolution=24,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
        ),
    )


def chameleon_inputs(model: Any, images: Images) -> dict[str, Any]:
    rows = [
        [BOS, *words(i, 3), BEGIN, *[IMAGE] * 36, END, *words(9 + i, (7, 4)[i % 2]), SEP]
        for i in range(len(images))
    ]
    return {"pixel_values": pixels(images), **batch(rows, left=True)}


CHAMELEON = Entry(
    name="chameleon",
    cls="ChameleonForConditionalGeneration",
    config=chameleon_config,
    sizes=((24, 24), (24, 24)),
    inputs=chameleon_inputs,
    sites=mlps("language", "model.layers.{}.mlp", F.silu, 72, GLU),
    first="model.layers.0",
    spatial="region",
    mixers=(r"model\.vqmodel\.encoder\.mid\.attn_1\.proj_out",),
    overlap=True,
    note=(
        "Image tokens are one of a few discrete codes, so a change of pixels may change none of "
        "them, and there is no gradient. GroupNorm sees the whole image. The logits of all image "
        "codes are set to the smallest float."
    ),
    prepare=tokenizer_like,
)


def emu3_config() -> Any:
    codes = {f"<|visual token {code:06d}|>": VOCAB + code for code in range(CODES)}
    return tf.Emu3Config(
        text_config=dict(
            vocab_size=VOCAB + CODES,
            hidden_size=40,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        vq_config=dict(
            codebook_size=CODES,
            embed_dim=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[1],
            hidden_size=32,
            num_attention_heads=1,
        ),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": NEWLINE, **codes},
    )


def emu3_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Images of several sizes are padded on the right and below to the largest.

    A row of codes is followed by one more placeholder, which becomes the end of line.
    """
    factor = 2
    flat = [image for sample in images for image in sample]
    height, width = (max(image.shape[axis] for image in flat) for axis in (1, 2))
    padded = [
        F.pad(image * 2 - 1, (0, width - image.shape[2], 0, height - image.shape[1]))
        for image in flat
    ]
    rows = []
    for i, image in enumerate(flat):
        h, w = image.shape[1] // factor, image.shape[2] // factor
        size = [30 + h, 20, 30 + w]  # "h*w"
        cells = [IMAGE] * (h * (w + 1))
        picture = [BEGIN, *size, WRAP, *cells, END_FRAME, END]
        rows.append([BOS, *words(i, 3), *picture, *words(9 + i, (7, 4)[i % 2])])
    return {
        "pixel_values": torch.stack(padded),
        "image_sizes": torch.tensor([list(image.shape[1:]) for image in flat]),
        **batch(rows, left=True),
    }


EMU3 = Entry(
    name="emu3",
    cls="Emu3ForConditionalGeneration",
    config=emu3_config,
    sizes=((12, 8), (8, 16)),
    inputs=emu3_inputs,
    sites=mlps("language", "model.text_model.layers.{}.mlp", F.silu, 72, GLU),
    first="model.text_model.layers.0",
    spatial="region",
    mixers=(
        r"model\.vqmodel\.encoder\.down_block\.down\.\d+\.attn\.\d+",
        r"model\.vqmodel\.encoder\.middle_block\.attn_1",
    ),
    overlap=True,
    note=(
        "Image tokens are discrete codes, as in Chameleon; the last placeholder of each row is "
        "the end of line, which no pixel can change."
    ),
    prepare=tokenizer_like,
)


# Evolla: the "image" is a protein, read as structure-aware tokens.


def evolla_config() -> Any:
    return tf.EvollaConfig(
        protein_encoder_config=dict(
            vocab_size=40,
            mask_token_id=4,
            pad_token_id=1,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=44,
            max_position_embeddings=64,
        ),
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        aligner_ffn_mult=2,
        aligner_num_add_layers=1,
        resampler_depth=2,
        resampler_dim_head=8,
        resampler_heads=2,
        resampler_num_latents=5,
        resampler_ff_mult=2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def evolla_inputs(model: Any, images: Images) -> dict[str, Any]:
    count = len(images)
    proteins = [
        [0, *[5 + (3 * i + 7 * k) % 33 for k in range((9, 6)[i % 2])], 2] for i in range(count)
    ]
    return {
        **batch(proteins, pad=1, prefix="protein_"),
        **batch([[BOS, *words(i, (8, 5)[i % 2])] for i in range(count)], left=True),
    }


EVOLLA = Entry(
    name="evolla",
    cls="EvollaForProteinText2Text",
    config=evolla_config,
    sizes=((8, 8), (8, 8)),
    inputs=evolla_inputs,
    sites=(
        *mlps("vision", "model.protein_encoder.model.encoder.layer.{}", F.gelu, 44, BERT),
        *mlps(
            "qformer",
            "model.protein_encoder.sequence_compressor_resampler.layers.{}.1",
            F.gelu,
            48,
        ),
        *mlps("language", "model.layers.{}.mlp", F.silu, 72, GLU),
        Dense(
            "language",
            1,
            "model.layers.1.adapter.ff.fc1",
            F.gelu,
            "model.layers.1.adapter.ff.fc2",
            80,
        ),
    ),
    first="model.layers.0",
    spatial="none",
    note="No image: its inputs ignore the images. The protein encoder stands for the vision part.",
)


# Florence-2: a convolutional DaViT, image tokens first in the encoder of a BART.


def florence2_config() -> Any:
    return tf.Florence2Config(
        text_config=dict(
            model_type="bart",
            vocab_size=VOCAB,
            d_model=40,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=2,
            encoder_ffn_dim=72,
            decoder_ffn_dim=56,
            max_position_embeddings=64,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        ),
        vision_config=dict(
            depths=[1, 1, 2, 1],
            embed_dim=[8, 12, 16, 24],
            num_heads=[2, 2, 4, 4],
            num_groups=[2, 2, 4, 4],
            window_size=3,
            projection_dim=40,
            max_temporal_embeddings=4,
            max_position_embeddings=8,
        ),
        image_token_id=IMAGE,
    )


def florence2_inputs(model: Any, images: Images) -> dict[str, Any]:
    rows = [[*[IMAGE] * 17, 0, *words(i, (8, 5)[i % 2]), 2] for i in range(len(images))]
    answer = started(len(images), [2, 0], pad=1)
    return {"pixel_values": pixels(images), **batch(rows, pad=1), **answer}


def florence2_sites() -> tuple[Dense, ...]:
    """A block has two: one behind attention over windows, one behind attention over channels."""
    found: list[Dense] = []
    for stage, (depth, width) in enumerate(zip((1, 1, 2, 1), (32, 48, 64, 96), strict=True)):
        for block in range(depth):
            for half in ("spatial_block", "channel_block"):
                path = f"model.vision_tower.blocks.{stage}.{block}.{half}.ffn"
                site = Dense("vision", len(found) // 2, f"{path}.fc1", F.gelu, f"{path}.fc2", width)
                found.append(site)
    text = "model.language_model"
    return (
        *found,
        *mlps("language", text + ".encoder.layers.{}", F.gelu, 72),
        *mlps("language", text + ".decoder.layers.{}", F.gelu, 56, stack="decoder"),
    )


FLORENCE2 = Entry(
    name="florence2",
    cls="Florence2ForConditionalGeneration",
    config=florence2_config,
    sizes=((128, 128), (128, 128)),
    inputs=florence2_inputs,
    sites=florence2_sites(),
    first="model.language_model.encoder.layers.0",
    spatial="region",
    mixers=(
        r"model\.vision_tower\.blocks\..*\.window_attn",
        r"model\.vision_tower\.blocks\..*\.channel_attn",
        r"model\.vision_tower\.blocks\..*\.conv[12]",
    ),
    overlap=True,
    note="The first image token is the mean of all cells; depthwise convolutions mix neighbours.",
)


# GIT: the image stands before the text, without placeholders.


def git_config() -> Any:
    return tf.GitConfig(
        vision_config=dict(
            hidden_size=24,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        vocab_size=VOCAB,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=72,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def git_inputs(model: Any, images: Images) -> dict[str, Any]:
    return {"pixel_values": pixels(images), **wrapped(len(images), (7, 4))}


GIT = Entry(
    name="git",
    cls="GitForCausalLM",
    config=git_config,
    sizes=((16, 16), (16, 16)),
    inputs=git_inputs,
    sites=(
        *mlps("vision", "git.image_encoder.vision_model.encoder.layers.{}.mlp", quick_gelu, 44),
        *mlps("language", "git.encoder.layer.{}", F.gelu, 72, BERT),
    ),
    first="git.encoder.layer.0",
    spatial="region",
    mixers=(r"git\.image_encoder\.vision_model\.encoder\.layers\.\d+\.self_attn",),
    note=(
        "17 image positions (class token, then the grid) stand before the ids of each sample, "
        "also in the logits; the class token sees no region of its own."
    ),
)


# Mistral 4: text only.


def mistral4_config() -> Any:
    return tf.Mistral4Config(
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=72,
        moe_intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=12,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 256,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def mistral4_inputs(model: Any, images: Images) -> dict[str, Any]:
    return batch([[BOS, *words(i, (9, 6)[i % 2])] for i in range(len(images))], left=True)


def expert_act(block: nn.Module, x: Tensor, expert: int) -> Tensor:
    return F.silu(F.linear(x, block.gate_up_proj[expert]).chunk(2, dim=-1)[0])


def expert_zero(block: nn.Module, expert: int, index: int) -> None:
    block.down_proj[expert, :, index] = 0


MISTRAL4 = Entry(
    name="mistral4",
    cls="Mistral4ForCausalLM",
    config=mistral4_config,
    sizes=((8, 8), (8, 8)),
    inputs=mistral4_inputs,
    sites=(
        *mlps("language", "model.layers.{}.mlp", F.silu, 72, GLU, layers=1),
        Routed("language", 1, "model.layers.1.mlp.experts", 4, 20, expert_act, expert_zero),
        Dense(
            "language",
            1,
            "model.layers.1.mlp.shared_experts.gate_proj",
            F.silu,
            "model.layers.1.mlp.shared_experts.down_proj",
            20,
        ),
    ),
    first="model.layers.0",
    spatial="none",
    note="Text only: its inputs ignore the images.",
)


# Pix2Struct: patches carry their own row and column; the text is the decoder's.


def pix2struct_config() -> Any:
    return tf.Pix2StructConfig(
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=40,
            d_kv=10,
            d_ff=72,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            pad_token_id=PAD,
            eos_token_id=1,
            decoder_start_token_id=PAD,
        ),
        vision_config=dict(
            hidden_size=40,
            patch_embed_hidden_size=48,
            d_ff=44,
            d_kv=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            seq_len=24,
        ),
    )


def pix2struct_inputs(model: Any, images: Images) -> dict[str, Any]:
    """A row of `flattened_patches` is row and column from 1, then the patch, channels last.

    The processor also normalises each image by its own mean and deviation; that is left out, so
    that a change of pixels stays where it is.
    """
    side, limit = 4, 20
    patches = []
    for image in (image for sample in images for image in sample):
        _, height, width = image.shape
        rows, columns = height // side, width // side
        cells = (image * 2 - 1).unfold(1, side, side).unfold(2, side, side)
        cells = cells.permute(1, 2, 3, 4, 0).reshape(rows * columns, side * side * 3)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        place = torch.stack([y.flatten() + 1, x.flatten() + 1], dim=1).to(cells)
        patches.append(F.pad(torch.cat([place, cells], dim=1), (0, 0, 0, limit - rows * columns)))
    stacked = torch.stack(patches)
    return {
        "flattened_patches": stacked,
        "attention_mask": (stacked.sum(dim=-1) != 0).float(),
        **started(len(images), [PAD]),
    }


PIX2STRUCT = Entry(
    name="pix2struct",
    cls="Pix2StructForConditionalGeneration",
    config=pix2struct_config,
    sizes=((20, 16), (12, 24)),
    inputs=pix2struct_inputs,
    sites=(
        *mlps("vision", "encoder.encoder.layer.{}.mlp", gelu_tanh, 44, T5_GLU),
        *mlps("language", "decoder.layer.{}.mlp.DenseReluDense", gelu_tanh, 72, T5_GLU),
    ),
    first="decoder.layer.0",
    spatial="none",
    mixers=(r"encoder\.encoder\.layer\.\d+\.attention",),
    note=(
        "The pixels are `flattened_patches`, `attention_mask` is that of the patches, and the "
        "text is `decoder_input_ids`; there are no `input_ids`."
    ),
)


# PP-FormulaNet: a SAM-like tower with a convolutional, linear projector.


def pp_formulanet_config() -> Any:
    return tf.PPFormulaNetConfig(
        text_config=dict(
            vocab_size=VOCAB,
            max_position_embeddings=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_ffn_dim=72,
            decoder_attention_heads=4,
            d_model=40,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        ),
        vision_config=dict(
            hidden_size=24,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=4,
            window_size=3,
            global_attn_indexes=[1],
            mlp_dim=44,
            post_conv_in_channels=16,
            post_conv_mid_channels=20,
            post_conv_out_channels=28,
            decoder_hidden_size=40,
        ),
    )


def decoder_inputs(start: list[int], pad: int, model: Any, images: Images) -> dict[str, Any]:
    """Only the decoder has text: its start ids and the answer so far."""
    return {"pixel_values": pixels(images), **started(len(images), start, pad)}


PP_FORMULANET = Entry(
    name="pp_formulanet",
    cls="PPFormulaNetForConditionalGeneration",
    config=pp_formulanet_config,
    sizes=((64, 64), (64, 64)),
    inputs=partial(decoder_inputs, [2, 0], 1),
    sites=(
        *mlps("vision", "model.encoder.layers.{}.mlp", F.gelu, 44, ("lin1", "lin2")),
        *mlps("language", "model.decoder.layers.{}", F.gelu, 72),
    ),
    first="model.decoder.layers.0",
    spatial="none",
    mixers=(r"model\.encoder\.layers\.\d+\.attn",),
    overlap=True,
    note="The image is only in the keys and values of the cross-attention.",
)


# T5Gemma 2: image tokens in the encoder; the decoder attends to both at once.


def t5gemma2_config() -> Any:
    text = dict(
        vocab_size=VOCAB,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    encoder = tf.T5Gemma2EncoderConfig(
        text_config=dict(**text, intermediate_size=72),
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=24,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            vision_use_head=False,
        ),
        mm_tokens_per_image=16,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        image_token_index=IMAGE,
    )
    return tf.T5Gemma2Config(
        encoder=encoder.to_dict(),
        decoder=dict(**text, intermediate_size=56),
        image_token_index=IMAGE,
    )


def t5gemma2_inputs(model: Any, images: Images) -> dict[str, Any]:
    picture = [NEWLINE, BEGIN, *[IMAGE] * 16, END, NEWLINE]
    rows = [[BOS, *words(i, 3), *picture, *words(9 + i, (7, 4)[i % 2])] for i in range(len(images))]
    text = batch(rows, left=True)
    return {
        "pixel_values": pixels(images),
        "token_type_ids": (text["input_ids"] == IMAGE).long(),
        **text,
        **started(len(images), [BOS]),
    }


T5GEMMA2 = Entry(
    name="t5gemma2",
    cls="T5Gemma2ForConditionalGeneration",
    config=t5gemma2_config,
    sizes=((32, 32), (32, 32)),
    inputs=t5gemma2_inputs,
    sites=(
        *mlps("vision", "model.encoder.vision_tower.encoder.layers.{}.mlp", gelu_tanh, 44),
        *mlps("language", "model.encoder.text_model.layers.{}.mlp", gelu_tanh, 72, GLU),
        *mlps("language", "model.decoder.layers.{}.mlp", gelu_tanh, 56, GLU, stack="decoder"),
    ),
    first="model.encoder.text_model.layers.0",
    spatial="region",
    mixers=(r"model\.encoder\.vision_tower\.encoder\.layers\.\d+\.self_attn",),
)


# UDOP: each patch is added to the words that lie on it; the other patches follow the text.


def udop_config() -> Any:
    return tf.UdopConfig(
        vocab_size=VOCAB,
        d_model=40,
        d_kv=10,
        d_ff=72,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        max_2d_position_embeddings=32,
        image_size=16,
        patch_size=4,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )


def udop_inputs(model: Any, images: Images) -> dict[str, Any]:
    """A prompt without places, then the words of the page with their boxes, then the end.

    Boxes are from 0 to 1, which is what the model's code takes them for.
    """
    rows, boxes = [], []
    for i in range(len(images)):
        prompt, page = words(i, 3), words(9 + i, (6, 4)[i % 2])
        rows.append([*prompt, EOS, *page, EOS])
        places = [((1 + 3 * k + i) % 4, (k + i) % 4) for k in range(len(page))]
        corners = [[x / 4, y / 4, (x + 0.9) / 4, (y + 0.8) / 4] for x, y in places]
        boxes.append([*[[0.0] * 4] * 3, [1.0] * 4, *corners, [1.0] * 4])
    width = max(map(len, rows))
    boxes = [row + [[0.0] * 4] * (width - len(row)) for row in boxes]
    return {
        "pixel_values": pixels(images),
        "bbox": torch.tensor(boxes),
        **batch(rows),
        **started(len(images), [PAD]),
    }


UDOP = Entry(
    name="udop",
    cls="UdopForConditionalGeneration",
    config=udop_config,
    sizes=((16, 16), (16, 16)),
    inputs=udop_inputs,
    sites=(
        *mlps("language", "encoder.block.{}.layer.1.DenseReluDense", F.relu, 72, ("wi", "wo")),
        *mlps(
            "language",
            "decoder.block.{}.layer.2.DenseReluDense",
            F.relu,
            72,
            ("wi", "wo"),
            stack="decoder",
        ),
    ),
    first="encoder.block.0",
    spatial="region",
    note=(
        "A patch is added to the words whose box's centre is on it; the remaining patches follow "
        "the text, in order, and zeros fill up. Tokens without a place take the first patch out "
        "of the sequence, end tokens the last one, although they are not added to them."
    ),
)


# Vision encoder-decoder: any vision model with any decoder that has cross-attention.

VIT = dict(
    model_type="vit",
    hidden_size=24,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
    pooler_output_size=24,
)
DEIT = {**VIT, "model_type": "deit"}
SWIN = dict(
    model_type="donut-swin",
    image_size=[32, 24],
    patch_size=2,
    embed_dim=12,
    depths=[1, 2],
    num_heads=[2, 4],
    window_size=3,
)
GPT2 = dict(
    model_type="gpt2",
    vocab_size=VOCAB,
    n_positions=64,
    n_embd=40,
    n_layer=2,
    n_head=4,
    n_inner=72,
    bos_token_id=EOS,
    eos_token_id=EOS,
)
BERT_DECODER = dict(
    model_type="bert",
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=72,
    max_position_embeddings=64,
)
TROCR = dict(
    model_type="trocr",
    vocab_size=VOCAB,
    d_model=40,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=72,
    max_position_embeddings=64,
    cross_attention_hidden_size=24,
)
MBART = dict(
    model_type="mbart",
    vocab_size=VOCAB,
    d_model=24,
    encoder_layers=2,
    encoder_ffn_dim=20,
    encoder_attention_heads=4,
    decoder_layers=2,
    decoder_ffn_dim=72,
    decoder_attention_heads=4,
    max_position_embeddings=64,
    scale_embedding=True,
    add_final_layer_norm=True,
)


def pair_config(encoder: dict[str, Any], decoder: dict[str, Any]) -> Any:
    return tf.VisionEncoderDecoderConfig(
        encoder=dict(encoder), decoder=dict(decoder, is_decoder=True, add_cross_attention=True)
    )


VIT_SITES = mlps("vision", "encoder.layers.{}.mlp", F.gelu, 44)
VIT_MIXER = r"encoder\.layers\.\d+\.attention"
SWIN_SITES = tuple(
    Dense(
        "vision",
        layer,
        f"encoder.encoder.layers.{stage}.blocks.{block}.intermediate.dense",
        F.gelu,
        f"encoder.encoder.layers.{stage}.blocks.{block}.output.dense",
        width,
    )
    for layer, (stage, block, width) in enumerate(((0, 0, 48), (1, 0, 96), (1, 1, 96)))
)


def pair(
    name: str,
    encoder: dict[str, Any],
    decoder: dict[str, Any],
    path: str,
    act: Callable[[Tensor], Tensor],
    names: tuple[str, str],
    first: str,
    start: list[int],
    pad: int,
) -> Entry:
    swin = encoder is SWIN
    size = (24, 32) if swin else (16, 16)
    return Entry(
        name=name,
        cls="VisionEncoderDecoderModel",
        config=partial(pair_config, encoder, decoder),
        sizes=(size, size),
        inputs=partial(decoder_inputs, start, pad),
        sites=(
            *(SWIN_SITES if swin else VIT_SITES),
            *mlps("language", path, act, 72, names),
        ),
        first=first,
        spatial="none",
        mixers=(r"encoder\.encoder\..*\.attention" if swin else VIT_MIXER,),
        note="The image is only in the keys and values of the cross-attention.",
    )


# As nlpconnect/vit-gpt2-image-captioning, TrOCR, Donut, and the default of the config class.
GPT2_PATH = "decoder.transformer.h"
PAIRS = (
    pair(
        "vision-encoder-decoder",
        VIT,
        GPT2,
        GPT2_PATH + ".{}.mlp",
        gelu_tanh,
        ("c_fc", "c_proj"),
        GPT2_PATH + ".0",
        [EOS],
        EOS,
    ),
    pair(
        "vision-encoder-decoder+bert",
        VIT,
        BERT_DECODER,
        "decoder.bert.encoder.layer.{}",
        F.gelu,
        BERT,
        "decoder.bert.encoder.layer.0",
        [BOS],
        PAD,
    ),
    pair(
        "vision-encoder-decoder+trocr",
        VIT,
        TROCR,
        "decoder.model.decoder.layers.{}",
        F.gelu,
        ("fc1", "fc2"),
        "decoder.model.decoder.layers.0",
        [2],
        1,
    ),
    pair(
        "vision-encoder-decoder+trocr-small",
        DEIT,
        TROCR,
        "decoder.model.decoder.layers.{}",
        F.gelu,
        ("fc1", "fc2"),
        "decoder.model.decoder.layers.0",
        [2],
        1,
    ),
    pair(
        "vision-encoder-decoder+mbart",
        SWIN,
        MBART,
        "decoder.model.decoder.layers.{}",
        F.gelu,
        ("fc1", "fc2"),
        "decoder.model.decoder.layers.0",
        [2],
        1,
    ),
)

ENTRIES = (
    BLIP,
    CHAMELEON,
    EMU3,
    EVOLLA,
    FLORENCE2,
    GIT,
    MISTRAL4,
    PIX2STRUCT,
    PP_FORMULANET,
    T5GEMMA2,
    UDOP,
    *PAIRS,
)

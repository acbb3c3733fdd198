"""LLaVA and its like, and the Gemma family: placeholders that are the cells of a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from zoo import Dense, Entry, Images, taken

PAD, BOS, EOS, BREAK = 0, 1, 2, 9
WORDS = (10, 90)
IMAGE, BEGIN, END, VIDEO, VOCABULARY = 95, 96, 97, 98, 104

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

Act = Callable[[Tensor], Tensor]
Blocks = Sequence[Sequence[int]]

gelu_tanh: Act = partial(F.gelu, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# Inputs.


def normal(image: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(each)[:, None, None].to(image) for each in statistics)
    return (image - mean) / std


def flat(images: Images) -> list[Tensor]:
    return [image for row in images for image in row]


def words(number: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(*WORDS, (count,), generator=generator).tolist()


def prompts(
    blocks: Blocks, side: Literal["left", "right"] = "left", lead: bool = True
) -> dict[str, Tensor]:
    """BOS, words, the tokens of the sample's images, words; padded to the longest.

    Without `lead` the images come first and BOS follows them.
    """
    rows = []
    for number, block in enumerate(blocks):
        before = [BOS, *words(number, 2 + number % 3)] if lead else []
        after = words(100 + number, 5 + 2 * (number % 2))
        rows.append([*before, *block, *([] if lead else [BOS]), *after])
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pad, ones = [PAD] * (longest - len(row)), [1] * len(row)
        ids.append(pad + row if side == "left" else row + pad)
        mask.append(pad + ones if side == "left" else ones + pad)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def on(model: Any, **inputs: Tensor) -> dict[str, Tensor]:
    """Where the model is, in the type it computes in."""
    like = next(model.parameters())
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def plain(
    tokens: Sequence[int],
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = HALF,
    *,
    side: Literal["left", "right"] = "left",
    lead: bool = True,
    pixels: Sequence[str] = ("pixel_values",),
    types: bool = False,
) -> Callable[[Any, Images], dict[str, Any]]:
    """One square image after the other, each with these tokens; `types` marks the image's."""

    def inputs(model: Any, images: Images) -> dict[str, Any]:
        text = prompts([list(tokens) * len(row) for row in images], side, lead)
        if types:
            text["token_type_ids"] = (text["input_ids"] == IMAGE).long()
        return on(
            model,
            **text,
            **{
                taken(model, *pixels): torch.stack(
                    [normal(image, statistics) for image in flat(images)]
                )
            },
        )

    return inputs


# Configs and sites.


def llm(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    } | more


def tower(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    } | more


def glu(
    module: str,
    path: str,
    act: Act,
    width: int,
    layers: int = 2,
    name: str = "mlp",
    inert: tuple[int, ...] = (),
    **more: Any,
) -> tuple[Dense, ...]:
    return tuple(
        Dense(
            module,
            layer,
            f"{path}.{layer}.{name}.gate_proj",
            act,
            f"{path}.{layer}.{name}.down_proj",
            width,
            inert=layer in inert,
            **more,
        )
        for layer in range(layers)
    )


def mlp(
    module: str,
    path: str,
    act: Act,
    width: int = 36,
    layers: int = 2,
    names: tuple[str, str] = ("mlp.fc1", "mlp.fc2"),
    inert: tuple[int, ...] = (),
    **more: Any,
) -> tuple[Dense, ...]:
    return tuple(
        Dense(
            module,
            layer,
            f"{path}.{layer}.{names[0]}",
            act,
            f"{path}.{layer}.{names[1]}",
            width,
            inert=layer in inert,
            **more,
        )
        for layer in range(layers)
    )


def projector(path: str, first: str = "linear_1", last: str = "linear_2", width: int = 40) -> Dense:
    return Dense("projector", 0, f"{path}.{first}", F.gelu, f"{path}.{last}", width)


LLAMA = glu("language", "model.language_model.layers", F.silu, 56)
CLIP_ONE_LEFT_OUT = mlp("vision", "model.vision_tower.encoder.layers", quick_gelu, inert=(1,))
SIGLIP = mlp("vision", "model.vision_tower.encoder.layers", gelu_tanh)
PROJECTOR = projector("model.multi_modal_projector")
FIRST = "model.language_model.layers.0"
TOWER_ATTENTION = (r"model\.vision_tower\..*\.self_attn",)

# LLaVA: a fixed square, a token per patch. With vision_feature_layer = -2 the last layer of
# the tower runs for nothing.


def llava_config() -> Any:
    return transformers.LlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config=llm("llama"),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


LLAVA = Entry(
    name="llava",
    cls="LlavaForConditionalGeneration",
    config=llava_config,
    sizes=((16, 16), (16, 16)),
    inputs=plain([IMAGE] * 16, CLIP),
    sites=(*CLIP_ONE_LEFT_OUT, PROJECTOR, *LLAMA),
    first=FIRST,
    spatial="region",
    mixers=TOWER_ATTENTION,
)


def vipllava_config() -> Any:
    return transformers.VipLlavaConfig(
        vision_config=tower("clip_vision_model", num_hidden_layers=3),
        text_config=llm("llama"),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layers=[-2, 1],  # from 5.23 on an alias of vision_feature_layer
    )


VIPLLAVA = Entry(
    name="vipllava",
    cls="VipLlavaForConditionalGeneration",
    config=vipllava_config,
    sizes=((16, 16), (16, 16)),
    inputs=plain([IMAGE] * 16, CLIP, side="right"),
    sites=(
        *mlp("vision", "model.vision_tower.encoder.layers", quick_gelu, layers=3, inert=(2,)),
        PROJECTOR,
        *LLAMA,
    ),
    first=FIRST,
    spatial="region",
    mixers=TOWER_ATTENTION,
    note="Several layers of the tower are read side by side; those after the last are inert.",
)


def video_llava_config() -> Any:
    return transformers.VideoLlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config=llm("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        vision_feature_layer=-2,
    )


VIDEO_LLAVA = Entry(
    name="video_llava",
    cls="VideoLlavaForConditionalGeneration",
    config=video_llava_config,
    sizes=((16, 16), (16, 16)),
    inputs=plain([IMAGE] * 16, CLIP, pixels=("pixel_values", "pixel_values_images")),
    sites=(
        *mlp("vision", "model.image_tower.encoder.layers", quick_gelu, inert=(1,)),
        PROJECTOR,
        *LLAMA,
    ),
    first=FIRST,
    spatial="region",
    mixers=(r"model\.image_tower\..*\.self_attn",),
    note="The tower of videos is a second one and does not run for images.",
)

# LLaVA-NeXT and its like: the image is resized into a canvas of tiles with its aspect ratio
# kept, padded, and cut. `images` are images that already have the size which the canvas wants,
# so that resizing changes nothing. Rows of pixel_values of one image: the whole image squeezed
# into a square, then the tiles of the canvas in reading order; images with fewer tiles are
# filled up with zeros. Rows and columns of tokens that lie in the padding are left out; each
# row of tokens is followed by a newline, whose id is the image's.

SIDE = 16
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
ANYRES_SIZES = ((32, 20), (16, 48))


def cut(canvas: Tensor) -> Tensor:
    """Tiles in reading order."""
    pieces = canvas.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)
    return pieces.permute(1, 2, 0, 3, 4).flatten(0, 1)


def tiles(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    rows, columns = select_best_resolution((height, width), PINPOINTS)
    base = F.interpolate(image[None], (SIDE, SIDE), mode="area")
    left, top = (columns - width) // 2, (rows - height) // 2
    canvas = F.pad(image, (left, columns - width - left, top, rows - height - top))
    return torch.cat([base, cut(canvas)])


def anyres_count(size: tuple[int, int], per_side: int, most: int = 0) -> int:
    """Tokens of an image: the base tile, the rows of the canvas, a newline after each row."""
    height, width = size
    rows, columns = (
        edge // SIDE * per_side for edge in select_best_resolution((height, width), PINPOINTS)
    )
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    shrink = (rows * columns / (most * per_side**2)) ** 0.5 if most else 0
    if shrink > 1.1:
        rows, columns = int(rows // shrink), int(columns // shrink)
    return per_side**2 + rows * (columns + 1)


def padded(image: Tensor) -> Tensor:
    """The whole image as one tile, with its aspect ratio kept."""
    height, width = image.shape[-2:]
    square = image.new_tensor(HALF[0])[:, None, None].repeat(1, max(height, width), 1)
    square = square.repeat(1, 1, max(height, width))
    top, left = (max(height, width) - height) // 2, (max(height, width) - width) // 2
    square[:, top : top + height, left : left + width] = image
    return F.interpolate(square[None], (SIDE, SIDE), mode="area")


def anyres(
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    per_side: int = 4,
    most: int = 0,
    onevision: bool = False,
) -> Callable[[Any, Images], dict[str, Any]]:
    """With `onevision`, images that are not alone in their sample are not tiled."""

    def inputs(model: Any, images: Images) -> dict[str, Any]:
        blocks, cuts = [], []
        for row in images:
            count = 0
            for image in row:
                if onevision and len(row) > 1:
                    cuts.append(normal(padded(image), statistics))
                    count += per_side**2 + 1
                else:
                    cuts.append(normal(tiles(image), statistics))
                    count += anyres_count(tuple(image.shape[-2:]), per_side, most)
            blocks.append([IMAGE] * count)
        longest = max(map(len, cuts))
        pixels = [F.pad(each, (0, 0) * 3 + (0, longest - len(each))) for each in cuts]
        counts = torch.tensor([len(row) for row in images if row])
        return on(
            model,
            **prompts(blocks),
            pixel_values=torch.stack(pixels),
            image_sizes=torch.tensor([image.shape[-2:] for image in flat(images)]),
            **({"batch_num_images": counts} if onevision else {}),
        )

    return inputs


ANYRES_NOTE = (
    "Placeholders of newlines (one after each row of tokens) see no image. The base tile comes "
    "first; rows and columns in the padding are left out, and the outermost kept ones may lie "
    "in it partly."
)


def llava_next_config() -> Any:
    return transformers.LlavaNextConfig(
        vision_config=tower("clip_vision_model"),
        text_config=llm("mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


LLAVA_NEXT = Entry(
    name="llava_next",
    cls="LlavaNextForConditionalGeneration",
    config=llava_next_config,
    sizes=ANYRES_SIZES,
    inputs=anyres(CLIP),
    sites=(*CLIP_ONE_LEFT_OUT, PROJECTOR, *LLAMA),
    first=FIRST,
    spatial="region",
    mixers=TOWER_ATTENTION,
    note=ANYRES_NOTE,
)


def llava_next_video_config() -> Any:
    return transformers.LlavaNextVideoConfig(
        vision_config=tower("clip_vision_model"),
        text_config=llm("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


LLAVA_NEXT_VIDEO = Entry(
    name="llava_next_video",
    cls="LlavaNextVideoForConditionalGeneration",
    config=llava_next_video_config,
    sizes=ANYRES_SIZES,
    inputs=anyres(CLIP),
    sites=(*CLIP_ONE_LEFT_OUT, PROJECTOR, *LLAMA),
    first=FIRST,
    spatial="region",
    mixers=TOWER_ATTENTION,
    note=ANYRES_NOTE,
)


def llava_onevision_config(aspect: str = "anyres_max_9") -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=llm("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=aspect,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


LLAVA_ONEVISION = tuple(
    Entry(
        name=name,
        cls="LlavaOnevisionForConditionalGeneration",
        config=partial(llava_onevision_config, f"anyres_max_{most}"),
        sizes=ANYRES_SIZES,
        inputs=anyres(HALF, most=most, onevision=True),
        sites=(*SIGLIP, PROJECTOR, *LLAMA),
        first=FIRST,
        spatial="region",
        mixers=TOWER_ATTENTION,
        note=f"{ANYRES_NOTE} Canvases of more than vision_aspect_ratio's number of tiles have "
        "their grid of tokens shrunk bilinearly.",
    )
    for name, most in (("llava_onevision", 9), ("llava_onevision+shrunk", 1))
)


def granite4_vision_config() -> Any:
    return transformers.Granite4VisionConfig(
        # The head that pools (vision_use_head) runs by default, and is a pooler: no site.
        vision_config=tower(
            "siglip_vision_model",
            hidden_size=64,
            intermediate_size=72,
            image_size=SIDE,
            patch_size=2,
        ),
        text_config=llm(
            "granite4_vision_text",
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=6,
            embedding_multiplier=3.0,
            residual_multiplier=0.6,
            attention_multiplier=0.3,
            logits_scaling=2.0,
        ),
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        deepstack_layer_map=[[-2, 1], [-1, 0]],
        spatial_vision_layer=-1,
        spatial_target_layers=[2, 3, 4, 5],
    )


GRANITE4_VISION = Entry(
    name="granite4_vision",
    cls="Granite4VisionForConditionalGeneration",
    config=granite4_vision_config,
    sizes=ANYRES_SIZES,
    inputs=anyres(HALF),
    sites=(
        *mlp("vision", "model.vision_tower.encoder.layers", gelu_tanh, 72),
        *(
            Dense(
                "qformer",
                layer,
                f"model.{path}.qformer.encoder.layer.0.intermediate_query.dense",
                F.gelu,
                f"model.{path}.qformer.encoder.layer.0.output_query.dense",
                48,
            )
            for layer, path in enumerate(
                [
                    *(f"layerwise_projectors.{number}" for number in range(2)),
                    *(f"spatial_projectors.{number}" for number in range(4)),
                ]
            )
        ),
        *glu("language", "model.language_model.layers", F.silu, 44, 6),
    ),
    first=FIRST,
    spatial="region",
    mixers=(
        *TOWER_ATTENTION,
        r"model\.(layerwise|spatial)_projectors\..*\.(cross)?attention\.attention",
    ),
    note=f"{ANYRES_NOTE} Each token is a query of a Q-Former over its window of the tile, added "
    "to the mean of its cell (or, before later layers, to one corner of it).",
)

# DeepSeek-VL: the image is resized with its aspect ratio kept and padded to a square; `images`
# are squares.


def deepseek_vl_config() -> Any:
    return transformers.DeepseekVLConfig(
        vision_config=tower("siglip_vision_model", hidden_act="gelu", vision_use_head=False),
        text_config=llm("llama"),
        image_token_id=IMAGE,
    )


DEEPSEEK_VL = Entry(
    name="deepseek_vl",
    cls="DeepseekVLForConditionalGeneration",
    config=deepseek_vl_config,
    sizes=((16, 16), (16, 16)),
    inputs=plain([IMAGE] * 16, CLIP),
    sites=(
        *mlp("vision", "model.vision_model.encoder.layers", F.gelu),
        projector("model.aligner", "linear1", "linear2"),
        *LLAMA,
    ),
    first=FIRST,
    spatial="region",
    mixers=(r"model\.vision_model\..*\.self_attn",),
)


def deepseek_vl_hybrid_config() -> Any:
    return transformers.DeepseekVLHybridConfig(
        vision_config=tower(
            "siglip_vision_model", hidden_act="gelu", vision_use_head=False, image_size=24
        ),
        high_res_vision_config=tower(
            "sam_vision_model",
            hidden_size=16,
            mlp_dim=28,
            output_channels=8,
            image_size=64,
            window_size=5,
            global_attn_indexes=[0],
        ),
        text_config=llm("llama"),
        image_token_id=IMAGE,
    )


def deepseek_vl_hybrid_inputs(model: Any, images: Images) -> dict[str, Any]:
    """`images` have the size of the high-resolution tower; the other gets them made smaller."""
    high = torch.stack(flat(images))
    low = F.interpolate(high, (24, 24), mode="area")
    return on(
        model,
        **prompts([[IMAGE] * 36 * len(row) for row in images]),
        pixel_values=normal(low, CLIP),
        high_res_pixel_values=normal(high, CLIP),
    )


DEEPSEEK_VL_HYBRID = Entry(
    name="deepseek_vl_hybrid",
    cls="DeepseekVLHybridForConditionalGeneration",
    config=deepseek_vl_hybrid_config,
    sizes=((64, 64), (64, 64)),
    inputs=deepseek_vl_hybrid_inputs,
    sites=(
        *mlp("vision", "model.vision_model.encoder.layers", F.gelu),
        *mlp(
            "vision",
            "model.high_res_vision_model.vision_encoder.layers",
            F.gelu,
            28,
            names=("mlp.lin1", "mlp.lin2"),
            stack="high_res",
        ),
        # What is activated is two projections side by side (high resolution first), the output
        # of no module; so the activation module itself is looked at.
        Dense("projector", 0, "model.aligner.act", lambda x: x, "model.aligner.proj", 40),
        *LLAMA,
    ),
    first=FIRST,
    spatial="region",
    mixers=(r"model\.vision_model\..*\.self_attn", r"model\.high_res_vision_model\..*\.attn"),
    overlap=True,
    note="Two towers see the image, at two resolutions. The convolutions after the second see "
    "neighbours. The first half of the projector's neurons comes from the second tower.",
)

# Janus.


def janus_config() -> Any:
    vision = tower("janus_vision_model", mlp_ratio=1.5, projection_dim=40, num_image_tokens=16)
    del vision["intermediate_size"]
    return transformers.JanusConfig(
        vision_config=vision,
        text_config=llm("llama"),
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 12,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 40,
            "image_token_embed_dim": 40,
        },
        image_token_id=IMAGE,
    )


JANUS = Entry(
    name="janus",
    cls="JanusForConditionalGeneration",
    config=janus_config,
    sizes=((16, 16), (16, 16)),
    inputs=plain([BEGIN, *[IMAGE] * 16, END], HALF),
    sites=(
        *mlp("vision", "model.vision_model.encoder.layers", F.gelu),
        projector("model.aligner", "fc1", "hidden_layers.0"),
        *LLAMA,
    ),
    first=FIRST,
    spatial="region",
    mixers=(r"model\.vision_model\..*\.self_attn",),
    note="What makes images (VQ-VAE, generation head) does not run.",
)

# Ovis2: tiles in reading order, before them the whole image squeezed into a square if there is
# more than one. A token is the mean of a visual vocabulary, weighted by a softmax over 2x2
# patches. `images` are the canvas of tiles.

START, GRID, COLUMN, ROW, STOP = 98, 99, 100, 101, 102


def ovis2_config() -> Any:
    return transformers.Ovis2Config(
        vision_config=tower(
            "ovis2_vision", patch_size=2, hidden_stride=2, vocab_size=48, hidden_size=24
        ),
        text_config=llm("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, GRID, COLUMN, ROW, STOP],
        vocab_size=VOCABULARY,
        hidden_size=40,
    )


def ovis2_inputs(model: Any, images: Images) -> dict[str, Any]:
    blocks: list[list[int]] = []
    for row in images:
        block: list[int] = []
        for image in row:
            rows, columns = (edge // SIDE for edge in image.shape[-2:])
            block += [START, *[IMAGE] * 16, GRID]
            for tile in range(rows * columns if rows * columns > 1 else 0):
                block += [COLUMN] * (tile % columns > 0)
                block += [ROW] * (tile > 0 and tile % columns == 0)
                block += [IMAGE] * 16
            block.append(STOP)
        blocks.append(block)
    return on(model, **prompts(blocks), pixel_values=normal(whole_and_tiles(images), CLIP))


def whole_and_tiles(images: Images) -> Tensor:
    """Of every image: all of it as one tile, if it has several, then its tiles as they are read."""
    pixels = []
    for image in flat(images):
        if max(image.shape) > SIDE:
            pixels.append(F.interpolate(image[None], (SIDE, SIDE), mode="area"))
        pixels.append(cut(image))
    return torch.cat(pixels)


OVIS2 = Entry(
    name="ovis2",
    cls="Ovis2ForConditionalGeneration",
    config=ovis2_config,
    sizes=((48, 32), (16, 16)),
    inputs=ovis2_inputs,
    sites=(
        *glu("vision", "model.vision_tower.transformer.encoder.layers", F.silu, 36, name="ffn"),
        *LLAMA,
    ),
    first=FIRST,
    spatial="region",
    mixers=(r"model\.vision_tower\..*\.attention",),
    note="There is no projector: a token is a mean of visual words.",
)

# PaliGemma: the image is first, everything sees everything.


def paligemma_text(kind: str, **more: Any) -> dict[str, Any]:
    act = "gelu_pytorch_tanh"
    text = llm(kind, head_dim=8, num_key_value_heads=1, hidden_activation=act, hidden_act=act)
    return text | more


PALIGEMMA_VISION = tower("siglip_vision_model", vision_use_head=False)


def paligemma_config(kind: str = "gemma", **more: Any) -> Any:
    return transformers.PaliGemmaConfig(
        vision_config=PALIGEMMA_VISION,
        text_config=paligemma_text(kind, **more),
        image_token_index=IMAGE,
        vocab_size=VOCABULARY,
        projection_dim=40,
        hidden_size=40,
    )


def paligemma_inputs(model: Any, images: Images) -> dict[str, Any]:
    """Its processor adds labels, too: those of a text without a suffix are to be ignored."""
    found = plain([IMAGE] * 16, lead=False)(model, images)
    ids = found["input_ids"]
    return found | {"token_type_ids": ids * 0, "labels": torch.full_like(ids, -100)}


GEMMA = glu("language", "model.language_model.layers", gelu_tanh, 56)
PALIGEMMA = tuple(
    Entry(
        name=name,
        cls="PaliGemmaForConditionalGeneration",
        config=config,
        sizes=((16, 16), (16, 16)),
        inputs=paligemma_inputs,
        sites=(*SIGLIP, *GEMMA),
        first=FIRST,
        spatial="region",
        mixers=TOWER_ATTENTION,
        note="The projector is linear. The prompt is not causal: image tokens see the text.",
    )
    for name, config in (
        ("paligemma", paligemma_config),
        (
            "paligemma+gemma2",
            partial(
                paligemma_config,
                "gemma2",
                sliding_window=12,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"],
            ),
        ),
    )
)

# Gemma 3: patches are averaged, 2 x 2 here.


def gemma3_config(kind: str = "Gemma3Config") -> Any:
    config = getattr(transformers, kind)(
        vision_config=tower("siglip_vision_model", vision_use_head=False, image_size=32),
        text_config=llm(
            "gemma3_text",
            head_dim=8,
            sliding_window=12,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    config.yes_token_index, config.no_token_index = 30, 31
    return config


GEMMA_IMAGE = [BREAK, BEGIN, *[IMAGE] * 16, END, BREAK]

GEMMA3 = Entry(
    name="gemma3",
    cls="Gemma3ForConditionalGeneration",
    config=gemma3_config,
    sizes=((32, 32), (32, 32)),
    inputs=plain(GEMMA_IMAGE, types=True),
    sites=(*SIGLIP, *GEMMA),
    first=FIRST,
    spatial="region",
    mixers=TOWER_ATTENTION,
    note="The projector is linear. Image tokens see each other whatever their order.",
)

SHIELDGEMMA2 = (
    # What AutoModelForImageTextToText makes of its config.
    Entry(
        name="shieldgemma2",
        cls="Gemma3ForConditionalGeneration",
        config=partial(gemma3_config, "ShieldGemma2Config"),
        sizes=((32, 32), (32, 32)),
        inputs=plain(GEMMA_IMAGE, types=True),
        sites=(*SIGLIP, *GEMMA),
        first=FIRST,
        spatial="region",
        mixers=TOWER_ATTENTION,
    ),
    # What its checkpoint names as its class: the same, one level down.
    Entry(
        name="shieldgemma2+classifier",
        cls="ShieldGemma2ForImageClassification",
        config=partial(gemma3_config, "ShieldGemma2Config"),
        sizes=((32, 32), (32, 32)),
        inputs=plain(GEMMA_IMAGE, types=True),
        sites=(
            *mlp("vision", "model.model.vision_tower.encoder.layers", gelu_tanh),
            *glu("language", "model.model.language_model.layers", gelu_tanh, 56),
        ),
        first="model.model.language_model.layers.0",
        spatial="region",
        mixers=(r"model\.model\.vision_tower\..*\.self_attn",),
        note="Its logits are those of two words, after the last token.",
    ),
)

# Perception LM: the whole image squeezed into a square, then its tiles in reading order; 2 x 2
# patches are averaged after the projector. `images` are the canvas of tiles; all images of a
# batch have the same number of tiles, or their processor cannot stack them.


def perception_lm_config() -> Any:
    return transformers.PerceptionLMConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 24,
                "depth": 2,
                "num_heads": 2,
                "mlp_ratio": 1.5,
                "patch_size": 4,
                "img_size": [SIDE, SIDE],
                "ref_feat_shape": [4, 4],
                "init_values": 0.1,
                "global_pool": "",
                "use_post_transformer_norm": False,
            },
        },
        text_config=llm("llama"),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def perception_lm_inputs(model: Any, images: Images) -> dict[str, Any]:
    pixels = [
        torch.cat([F.interpolate(image[None], (SIDE, SIDE), mode="area"), cut(image)])
        for image in flat(images)
    ]
    blocks = [
        [IMAGE] * sum(4 * (1 + image.shape[1] * image.shape[2] // SIDE**2) for image in row)
        for row in images
    ]
    return on(model, **prompts(blocks), pixel_values=normal(torch.stack(pixels), HALF))


PERCEPTION_LM = Entry(
    name="perception_lm",
    cls="PerceptionLMForConditionalGeneration",
    config=perception_lm_config,
    sizes=((32, 16), (16, 32)),
    inputs=perception_lm_inputs,
    sites=(
        *mlp("vision", "model.vision_tower.timm_model.blocks", F.gelu),
        PROJECTOR,
        *LLAMA,
    ),
    first=FIRST,
    spatial="region",
    mixers=(r"model\.vision_tower\.timm_model\.blocks\.\d+\.attn",),
    note="The projector sees [patch, tile, hidden]: the first axis is not the tiles.",
)

# FastVLM: convolutions down to a grid of cells, channels first.


def fast_vlm_config() -> Any:
    return transformers.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 64,
            "model_args": {
                "inference_mode": True,
                "layers": [1, 2, 1, 1],
                "embed_dims": [8, 8, 16, 32],
                "mlp_ratios": [2, 3, 2, 2],
                "se_downsamples": [False] * 4,
                "downsamples": [False, True, True, True],
                "token_mixers": ["repmixer", "repmixer", "repmixer", "attention"],
            },
        },
        text_config=llm("qwen2"),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


FAST_VLM = Entry(
    name="fast_vlm",
    cls="FastVlmForConditionalGeneration",
    config=fast_vlm_config,
    sizes=((128, 128), (128, 128)),
    inputs=plain([IMAGE] * 16, ((0.0,) * 3, (1.0,) * 3)),
    sites=(
        *(
            Dense(
                "vision",
                layer,
                f"model.vision_tower.timm_model.stages.{block}.mlp.fc1",
                F.gelu,
                f"model.vision_tower.timm_model.stages.{block}.mlp.fc2",
                width,
            )
            for layer, (block, width) in enumerate(
                [
                    ("0.blocks.0", 16),
                    ("1.blocks.0", 24),
                    ("1.blocks.1", 24),
                    ("2.blocks.0", 32),
                    ("3.blocks.0", 64),
                ]
            )
        ),
        PROJECTOR,
        *LLAMA,
    ),
    first=FIRST,
    spatial="region",
    mixers=(r"model\.vision_tower\.timm_model\.stages\.3\.blocks\.\d+\.token_mixer",),
    overlap=True,
    note="The tower is mostly convolutions, [image, neuron, row, column], on finer grids than "
    "the tokens' in its first stages. Activations between its convolutions are none of a "
    "feed-forward block.",
)

# Gemma 3n.

GEMMA3N_WIDTHS = 48, 48, 56
MOBILENET = "model.vision_tower.timm_model"


def gemma3n_config() -> Any:
    from timm.models._efficientnet_builder import decode_arch_def

    blocks = decode_arch_def(
        [
            ["er_r1_k3_s2_e2_c16"],
            ["uir_r1_a3_k3_s2_e2_c16", "uir_r1_a3_k0_s1_e2_c16"],
            ["uir_r1_a3_k3_s2_e2_c24", "mqa_r1_k3_h2_v2_s1_d8_c24", "uir_r1_a0_k0_s1_e2_c24"],
            ["uir_r1_a3_k3_s2_e2_c32", "mqa_r1_k3_h2_s1_d8_c32", "uir_r1_a0_k0_s1_e2_c32"],
        ]
    )
    return transformers.Gemma3nConfig(
        vision_config={
            "model_type": "gemma3n_vision",
            "architecture": "mobilenetv5_300m_enc",
            "model_args": {
                "block_args": blocks,
                "stem_size": 8,
                "msfa_output_resolution": 4,
            },
            "hidden_size": 2048,
            "vocab_size": 4,
            "vocab_offset": 104,
        },
        audio_config={
            "vocab_size": 4,
            "vocab_offset": 108,
            "hidden_size": 16,
            "input_feat_size": 8,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 4],
        },
        text_config=llm(
            "gemma3n_text",
            vocab_size=112,
            vocab_size_per_layer_input=104,
            head_dim=8,
            num_hidden_layers=3,
            intermediate_size=list(GEMMA3N_WIDTHS),
            activation_sparsity_pattern=[0.8, 0.0, 0.0],
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            sliding_window=12,
            num_kv_shared_layers=1,
            hidden_size_per_layer_input=6,
            altup_num_inputs=2,
            laurel_rank=4,
        ),
        vision_soft_tokens_per_image=16,
        boi_token_id=100,
        eoi_token_id=104,
        image_token_id=105,
        boa_token_id=101,
        eoa_token_id=108,
        audio_token_id=109,
    )


def sparse(gate: Tensor, share: float = 0.8) -> Tensor:
    """Only what is above the normal quantile of its token passes."""
    quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor(share)).to(gate)
    spread = gate.std(-1, keepdim=True, unbiased=False)
    return gelu_tanh(F.relu(gate - gate.mean(-1, keepdim=True) - spread * quantile))


def gemma3n_inputs(model: Any, images: Images) -> dict[str, Any]:
    image = [BREAK, 100, *[105] * 16, 104, BREAK]
    text = prompts([image * len(row) for row in images])
    kinds = (text["input_ids"] == 105).long()
    return on(model, **text, token_type_ids=kinds, pixel_values=torch.stack(flat(images)))


GEMMA3N = Entry(
    name="gemma3n",
    cls="Gemma3nForConditionalGeneration",
    config=gemma3n_config,
    sizes=((128, 128), (128, 128)),
    inputs=gemma3n_inputs,
    sites=(
        # The blocks of its MobileNet that widen and narrow each cell by itself, the activation
        # in between following a norm. Those with a convolution in the middle are no MLP.
        *(
            Dense(
                "vision",
                layer,
                f"{MOBILENET}.{block}.pw_exp.bn.drop",
                gelu_tanh,
                f"{MOBILENET}.{block}.pw_proj.conv",
                width,
            )
            for layer, (block, width) in enumerate(
                [("blocks.1.1", 32), ("blocks.2.2", 48), ("blocks.3.2", 64), ("msfa.ffn", 112)]
            )
        ),
        *(
            Dense(
                "language",
                layer,
                f"model.language_model.layers.{layer}.mlp.gate_proj",
                gelu_tanh if layer else sparse,
                f"model.language_model.layers.{layer}.mlp.down_proj",
                width,
            )
            for layer, width in enumerate(GEMMA3N_WIDTHS)
        ),
    ),
    first=f"{FIRST}.input_layernorm",  # of the stream that layers read
    spatial="region",
    mixers=(r"model\.vision_tower\.timm_model\.blocks\.\d+\.\d+\.attn",),
    overlap=True,
    note="Hidden states are [stream, batch, token, hidden]: four streams side by side (two "
    "here), of which layers read the first. The projector is linear. The first layers' gates "
    "are thinned out before the activation.",
)

# pi0: PaliGemma, whose keys and values an action expert reads. `state` comes from the
# processor; `noise` and `timestep` would be drawn in forward if they were not given.

STATE, ACTIONS, CHUNK = 4, 5, 3


def pi0_config() -> Any:
    return transformers.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": paligemma_text("gemma"),
            "vision_config": PALIGEMMA_VISION,
            "image_token_index": VOCABULARY,  # as in the checkpoint, beyond the embeddings
            "vocab_size": VOCABULARY,
            "projection_dim": 40,
            "hidden_size": 40,
        },
        dit_config=paligemma_text("gemma", hidden_size=32, intermediate_size=44),
        chunk_size=CHUNK,
        max_state_dim=STATE,
        max_action_dim=ACTIONS,
    )


def pi0_inputs(model: Any, images: Images) -> dict[str, Any]:
    """The images of a sample are its cameras."""
    generator = torch.Generator().manual_seed(2)
    cameras = max(map(len, images))
    pixels = torch.zeros(len(images), cameras, 3, SIDE, SIDE)
    seen = torch.zeros(len(images), cameras, dtype=torch.bool)
    for number, row in enumerate(images):
        for camera, image in enumerate(row):
            pixels[number, camera], seen[number, camera] = normal(image, HALF), True
    return on(
        model,
        **prompts([[VOCABULARY] * SIDE * len(row) for row in images], "right", lead=False),
        pixel_values=pixels,
        pixel_attention_mask=seen,
        state=torch.randn(len(images), STATE, generator=generator),
        noise=torch.randn(len(images), CHUNK, ACTIONS, generator=generator),
        timestep=torch.rand(len(images), generator=generator),
    )


PI0 = Entry(
    name="pi0",
    cls="PI0ForConditionalGeneration",
    config=pi0_config,
    sizes=((16, 16), (16, 16)),
    inputs=pi0_inputs,
    sites=(
        *mlp("vision", "model.vlm.vision_tower.encoder.layers", gelu_tanh),
        *glu("language", "model.vlm.language_model.layers", gelu_tanh, 56, inert=(1,)),
        *glu("action", "model.dit.layers", gelu_tanh, 44),
        Dense(
            "action",
            0,
            "embed_action_time.action_time_mlp_in",
            F.silu,
            "embed_action_time.action_time_mlp_out",
            32,
            stack="time",
        ),
    ),
    first="model.vlm.language_model.layers.0",
    spatial="region",
    mixers=(r"model\.vlm\.vision_tower\..*\.self_attn",),
    note="Its logits are velocities of actions. Of the language model only keys and values are "
    "read, so the feed-forward block of its last layer is inert.",
)

ENTRIES = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_NEXT_VIDEO,
    *LLAVA_ONEVISION,
    VIPLLAVA,
    VIDEO_LLAVA,
    GRANITE4_VISION,
    DEEPSEEK_VL,
    DEEPSEEK_VL_HYBRID,
    JANUS,
    OVIS2,
    *PALIGEMMA,
    GEMMA3,
    *SHIELDGEMMA2,
    PERCEPTION_LM,
    FAST_VLM,
    GEMMA3N,
    PI0,
)

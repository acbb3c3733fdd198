"""LLaVA's and its like's processors, and the Gemma family's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from real import Real
from zoo import llava

ZOO = {entry.name: entry for entry in llava.ENTRIES}
BASE = {"<pad>": llava.PAD, "<s>": llava.BOS, "</s>": llava.EOS}
WORDS = ["what", "is", "this", "a", "small", "photo"]
LLAVA = {"<image>": llava.IMAGE, "<video>": llava.VIDEO}
SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[2 * edge for edge in edges] for edges in llava.PINPOINTS]


def tokenizer(special: Mapping[str, int], add_bos: bool = True, **named: str) -> Any:
    """Words with spaces between them, and special tokens with the ids the tiny model has."""
    fixed = BASE | dict(special)
    ids = fixed | {word: 40 + n for n, word in enumerate(WORDS)} | {"<unk>": 39}
    ids |= {f"<{n}>": n for n in range(max(ids.values())) if n not in ids.values()}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in fixed])
    if add_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", llava.BOS)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named,
    )


def clip(side: int = SIDE) -> Any:
    return hf.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def llava_1_5() -> Any:
    return hf.LlavaProcessor(
        image_processor=clip(),
        tokenizer=tokenizer(LLAVA),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def video_llava() -> Any:
    return hf.VideoLlavaProcessor(
        image_processor=hf.VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        video_processor=hf.VideoLlavaVideoProcessor(),
        tokenizer=tokenizer(LLAVA),
        patch_size=4,
    )


def anyres(cls: str, **settings: Any) -> Any:
    """A processor of tiles of 32 x 32 pixels."""
    return getattr(hf, cls)(
        image_processor=hf.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size=SQUARE,
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=tokenizer(LLAVA),
        **settings,
    )


def llava_next() -> Any:
    return anyres(
        "LlavaNextProcessor",
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next_video() -> Any:
    return anyres(
        "LlavaNextVideoProcessor",
        video_processor=hf.LlavaNextVideoVideoProcessor(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def granite4_vision() -> Any:
    return anyres(
        "Granite4VisionProcessor",
        patch_size=2,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
    )


def llava_onevision(most: int) -> Callable[[], Any]:
    return lambda: hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(
            size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        video_processor=hf.LlavaOnevisionVideoProcessor(),
        tokenizer=tokenizer(LLAVA, add_bos=False),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
    )


def deepseek_vl() -> Any:
    return hf.DeepseekVLProcessor(
        image_processor=hf.DeepseekVLImageProcessor(size=SQUARE, min_size=4),
        tokenizer=tokenizer(LLAVA, image_token="<image>"),
        num_image_tokens=64,
    )


def deepseek_vl_hybrid() -> Any:
    return hf.DeepseekVLHybridProcessor(
        image_processor=hf.DeepseekVLHybridImageProcessor(
            size=SQUARE,
            high_res_size={"height": 96, "width": 96},
            min_size=4,
        ),
        tokenizer=tokenizer(LLAVA, image_token="<image>"),
        num_image_tokens=64,
    )


def janus() -> Any:
    marks = {"<image>": llava.IMAGE, "<boi>": llava.BEGIN, "<eoi>": llava.END}
    return hf.JanusProcessor(
        image_processor=hf.JanusImageProcessor(size=SQUARE, min_size=4),
        tokenizer=tokenizer(marks, image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"),
        num_image_tokens=64,
    )


def ovis2() -> Any:
    marks = {
        "<IMG_ATOM>": llava.IMAGE,
        "<image>": llava.END,
        "<IMG_START>": llava.START,
        "<IMG_GRID>": llava.GRID,
        "<IMG_COL>": llava.COLUMN,
        "<IMG_ROW>": llava.ROW,
        "<IMG_END>": llava.STOP,
    }
    return hf.Ovis2Processor(
        image_processor=hf.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=6),
        tokenizer=tokenizer(marks, add_bos=False),
        image_seq_length=64,
    )


def perception_lm() -> Any:
    return hf.PerceptionLMProcessor(
        video_processor=hf.PerceptionLMVideoProcessor(),
        image_processor=hf.PerceptionLMImageProcessor(tile_size=SIDE, max_num_tiles=6),
        tokenizer=tokenizer(LLAVA, image_token="<image>", video_token="<video>"),
        patch_size=4,
        pooling_ratio=2,
    )


def paligemma() -> Any:
    image_processor = hf.SiglipImageProcessor(size=SQUARE)
    image_processor.image_seq_length = 64
    marks = {"<image>": llava.IMAGE, "\n": llava.BREAK}
    words = tokenizer(marks, add_bos=False, image_token="<image>")
    # The processor adds words for places in the image; the tiny model has no room for them.
    words.add_tokens = lambda *_: 0
    return hf.PaliGemmaProcessor(image_processor=image_processor, tokenizer=words)


def gemma3() -> Any:
    marks = {
        "<image_soft_token>": llava.IMAGE,
        "<start_of_image>": llava.BEGIN,
        "<end_of_image>": llava.END,
        "\n\n": llava.BREAK,
    }
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size={"height": 64, "width": 64}),
        tokenizer=tokenizer(
            marks,
            image_token="<image_soft_token>",
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
        ),
        image_seq_length=64,
    )


def larger(config: Any) -> None:
    """Twice the side in pixels and tokens, so that photos are not made too small."""
    vision = getattr(config, "vision_config", None)
    if getattr(vision, "model_args", None):
        vision.model_args |= {"img_size": [SIDE, SIDE], "ref_feat_shape": [8, 8]}
    elif hasattr(config, "high_res_vision_config"):
        vision.image_size, config.high_res_vision_config.image_size = SIDE, 96
    else:
        vision.image_size *= 2
    if getattr(config, "image_grid_pinpoints", None):
        config.image_grid_pinpoints = PINPOINTS
    if hasattr(config, "mm_tokens_per_image"):
        config.mm_tokens_per_image = 64
    config.text_config.max_position_embeddings = 1024


def real(name: str, processor: Callable[[], Any], **settings: Any) -> Real:
    entry = ZOO[name]
    settings = {"margin": 6.0, "mixers": entry.mixers, "first": entry.first} | settings

    def build() -> tuple[Any, Any]:
        config = entry.config()
        larger(config)
        return replace(entry, config=lambda: config).model(), processor()

    return Real(name=name, build=build, **settings)


REAL = (
    real("llava", llava_1_5),
    real("vipllava", llava_1_5),
    real("video_llava", video_llava),
    real("llava_next", llava_next),
    real("llava_next_video", llava_next_video),
    real("llava_onevision", llava_onevision(9)),
    real("llava_onevision+shrunk", llava_onevision(1)),
    real("granite4_vision", granite4_vision),
    real("deepseek_vl", deepseek_vl),
    # The convolutions behind the finer tower see far beyond a token's box: only the other one.
    real(
        "deepseek_vl_hybrid",
        deepseek_vl_hybrid,
        margin=11.0,
        mixers=(*ZOO["deepseek_vl_hybrid"].mixers, r"model\.high_res_vision_proj"),
    ),
    real("janus", janus),
    real("ovis2", ovis2, margin=14.0),
    real("perception_lm", perception_lm),
    real("paligemma", paligemma),
    real("gemma3", gemma3),
)

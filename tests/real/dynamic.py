"""Kimi's, PaddleOCR's, HunYuan's, Muse's, LFM's, Nemotron's and MiniMax's processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl

from real import Real
from zoo import Entry, dynamic

IDS = {"<pad>": 0, "<s>": 1, "</s>": 2}
WORDS = ["what", "is", "this", "a", "small", "photo", "image", "0", "1"]
EDGES = {"shortest_edge": 16 * 16, "longest_edge": 48 * 40}


def tokenizer(special: Mapping[str, int], **named: str) -> Any:
    """Words with spaces between them, and special tokens with the ids the tiny models have."""
    fixed = IDS | dict(special)
    ids = fixed | {word: 20 + n for n, word in enumerate(WORDS)} | {"<unk>": 3}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in fixed])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named,
    )


def kimi() -> Any:
    marks = {
        "<|media_pad|>": dynamic.IMAGE,
        "<|kimi_k25_video_placeholder|>": dynamic.VIDEO,
        "<|media_begin|>": dynamic.START,
        "<|media_content|>": dynamic.CONTENT,
        "<|media_end|>": dynamic.END,
    }
    # 150 x 100 is made smaller to keep to 250 patches, and then filled up.
    images = hf.Kimi_K25ImageProcessor(patch_size=4, max_patches=250)
    return hf.Kimi_K25Processor(images, tokenizer(marks), hf.Kimi_K25VideoProcessor())


def paddleocr() -> Any:
    marks = {
        "<|IMAGE_PLACEHOLDER|>": dynamic.IMAGE,
        "<|IMAGE_START|>": dynamic.START,
        "<|IMAGE_END|>": dynamic.END,
    }
    return hf.PaddleOCRVLProcessor(
        hf.PaddleOCRVLImageProcessor(patch_size=4, size=EDGES),
        tokenizer(marks, image_token="<|IMAGE_PLACEHOLDER|>"),
    )


def hunyuan() -> Any:
    named = {"image_token": "<img>", "image_start_token": "<start>", "image_end_token": "<end>"}
    marks = {"<img>": dynamic.IMAGE, "<start>": dynamic.START, "<end>": dynamic.END}
    return hf.HunYuanVLProcessor(
        hf.HunYuanVLImageProcessor(patch_size=4, size=EDGES), tokenizer(marks, **named)
    )


def muse(cls: Any, **more: Any) -> Any:
    marks = {
        "<|patch|>": dynamic.IMAGE,
        "<|video|>": dynamic.VIDEO,
        "<|image_start|>": dynamic.START,
        "<|image_end|>": dynamic.END,
        "<|audio|>": dynamic.AUDIO,
    }
    return cls(
        image_processor=hf.MuseGlimmerImageProcessor(patch_size=4, max_image_tokens=30),
        video_processor=hf.MuseGlimmerVideoProcessor(),
        tokenizer=tokenizer(marks),
        **more,
    )


def lfm2() -> Any:
    rows = {f"<|img_row_{r}_col_{c}|>": 90 + 10 * r + c for r in range(1, 6) for c in range(1, 6)}
    marks = {
        "<image>": dynamic.IMAGE,
        "<|image_start|>": dynamic.START,
        "<|image_end|>": dynamic.END,
        "<|img_thumbnail|>": dynamic.THUMBNAIL,
    }
    images = hf.Lfm2VlImageProcessor(
        encoder_patch_size=4, tile_size=16, min_image_tokens=2, max_image_tokens=6
    )
    return hf.Lfm2VlProcessor(images, tokenizer(marks | rows))


def lfm3() -> Any:
    marks = {
        "<|image_pad|>": dynamic.IMAGE,
        "<|video_pad|>": dynamic.VIDEO,
        "<|vision_start|>": dynamic.START,
        "<|vision_end|>": dynamic.END,
    }
    return hf.Lfm3VlProcessor(
        hf.Qwen2VLImageProcessor(patch_size=4, size=EDGES),
        tokenizer(marks),
        hf.Qwen3VLVideoProcessor(),
    )


def nemotron() -> Any:
    marks = {"<image>": dynamic.IMAGE, "<img>": dynamic.START, "</img>": dynamic.END}
    try:
        sound = hf.ParakeetFeatureExtractor()
    except ImportError:  # it needs librosa before transformers 5.23; nothing is heard here
        sound = hf.WhisperFeatureExtractor()
    return hf.NemotronH_Omni_Reasoning_V3Processor(
        image_processor=hf.NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=4, min_num_patches=16, max_num_patches=120
        ),
        video_processor=hf.NemotronH_Omni_Reasoning_V3VideoProcessor(),
        tokenizer=tokenizer(marks),
        feature_extractor=sound,
    )


def minimax() -> Any:
    marks = {
        "]<]image[>[": dynamic.IMAGE,
        "]<]video[>[": dynamic.VIDEO,
        "]<]start of image[>[": dynamic.START,
        "]<]end of image[>[": dynamic.END,
    }
    return hf.MiniMaxM3VLProcessor(
        hf.MiniMaxM3VLImageProcessor(patch_size=4, size=EDGES),
        tokenizer(marks),
        hf.MiniMaxM3VLVideoProcessor(),
    )


def real(entry: Entry, processor: Callable[[], Any], several: bool = True) -> Real:
    """The zoo's model of the family with its processor."""
    return Real(
        name=entry.name,
        build=lambda: (entry.model(), processor()),
        first=entry.first,
        mixers=entry.mixers,
        several=several,
    )


def tells_images_apart() -> bool:
    """Before transformers 5.23, all images of a forward see each other in MiniMax-M3's tower."""
    attention = modeling_minimax_m3_vl.MiniMaxM3VLVisionAttention
    return "cu_seqlens" in signature(attention.forward).parameters


REAL = (
    real(dynamic.KIMI, kimi),
    real(dynamic.PADDLEOCR, paddleocr),
    real(dynamic.HUNYUAN, hunyuan),
    real(dynamic.GLIMMER, lambda: muse(hf.MuseGlimmerProcessor)),
    real(
        dynamic.SPARK,
        lambda: muse(hf.MuseSparkProcessor, feature_extractor=hf.MuseSparkFeatureExtractor()),
    ),
    real(dynamic.LFM2, lfm2),
    real(dynamic.LFM3, lfm3),
    real(dynamic.NEMOTRON, nemotron),
    real(dynamic.MINIMAX, minimax, several=tells_images_apart()),
)

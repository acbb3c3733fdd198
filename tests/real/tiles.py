"""The processors of models that cut an image into tiles, or see it through convolutions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from real import Real, usually
from zoo import tiles

ZOO = {entry.name: entry for entry in tiles.ENTRIES}
LARGER = {"got_ocr2": 128, "pp_chart2table": 128}
"""Convolutions reach a whole token further: there have to be enough of them."""
SQUARE = {"height": 16, "width": 16}
CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE
{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SMOL = """\
<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:\
{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\
{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
LLAMA = """\
<s>{% for message in messages %}<|header_start|>{{ message['role'] }}<|header_end|>

{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|eot|>{% endfor %}\
{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>

{% endif %}"""


def tokenizer(marks: Sequence[str], side: str = "left", **named: str) -> Any:
    """Byte-level, as theirs, so that line breaks are tokens; `named` are attributes."""
    special = ["<pad>", "<s>", "</s>", *marks, "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["what is this a small photo\n\nof some thing"] * 3, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        padding_side=side,
        extra_special_tokens=named,
    )


def of(family: str, cls: str) -> Any:
    """A class of one of the files of a family."""
    kind = "image_" if "ImageProcessor" in cls else "video_" if "VideoProcessor" in cls else ""
    return getattr(
        importlib.import_module(f"transformers.models.{family}.{kind}processing_{family}"), cls
    )


def build(
    name: str, placeholder: str, tokens: Callable[[], Any], processor: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """The tiny model of the zoo with the tokenizer's ids, and its processor."""
    words = tokens()
    config = ZOO[name].config()
    if name in LARGER:
        config.vision_config.image_size = LARGER[name]
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id = len(words), words.pad_token_id
    setattr(
        config,
        "image_token_index" if hasattr(config, "image_token_index") else "image_token_id",
        words.convert_tokens_to_ids(placeholder),
    )
    return replace(ZOO[name], config=lambda: config).model(), processor(words)


def real(
    name: str,
    placeholder: str,
    marks: Sequence[str],
    processor: Callable[[Any], Any],
    named: Mapping[str, str] = {},
    **more: Any,
) -> Real:
    entry = ZOO[name]
    words = partial(tokenizer, [placeholder, *marks], **named)
    make = partial(build, name, placeholder, words, processor)
    return Real(name, make, entry.first, entry.mixers, **more)


def crops(**more: Any) -> Any:
    """GOT-OCR 2's, as most use it: up to twelve tiles of 16 x 16 pixels."""
    return of("got_ocr2", "GotOcr2ImageProcessor")(size=SQUARE, crop_to_patches=True, **more)


def aya(words: Any) -> Any:
    return of("aya_vision", "AyaVisionProcessor")(
        crops(),
        words,
        patch_size=4,
        img_size=16,
        downsample_factor=2,
        chat_template=CHATML.replace("IMAGE\n", "<image>"),
    )


def cohere(words: Any) -> Any:
    images = of("cohere2_vision", "Cohere2VisionImageProcessor")(size=SQUARE, patch_size=2)
    return of("cohere2_vision", "Cohere2VisionProcessor")(
        images, words, chat_template=CHATML.replace("IMAGE\n", "<image>")
    )


def internvl(words: Any) -> Any:
    return of("internvl", "InternVLProcessor")(
        crops(),
        words,
        of("internvl", "InternVLVideoProcessor")(),
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>"),
    )


def qianfan(words: Any) -> Any:
    return of("qianfan_ocr", "QianfanOCRProcessor")(
        crops(),
        words,
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )


def idefics(family: str, cls: str, words: Any) -> Any:
    """Tiles of 16 x 16 pixels of an image of up to 64 x 64."""
    images = of(family, f"{cls}ImageProcessor")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 16}
    )
    parts = [images, words]
    if family == "smolvlm":
        module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
        # It insists on a package that only writes out the numbers of video frames.
        module.num2words = module.num2words or str
        parts.append(of(family, "SmolVLMVideoProcessor")())
    return of(family, f"{cls}Processor")(*parts, image_seq_len=4, chat_template=SMOL)


def docling(words: Any) -> Any:
    images = of("granite_docling", "GraniteDoclingImageProcessor")(size=SQUARE)
    return of("granite_docling", "GraniteDoclingProcessor")(
        images, words, image_seq_len=4, chat_template=SMOL
    )


def got(words: Any) -> Any:
    processor = of("got_ocr2", "GotOcr2Processor")(
        of("got_ocr2", "GotOcr2ImageProcessor")(size={"height": 128, "width": 128}), words
    )
    return usually(processor, num_image_tokens=64)


def chart(words: Any) -> Any:
    """Its template writes as many placeholders as there are tokens."""
    return of("pp_chart2table", "PPChart2TableProcessor")(
        of("pp_chart2table", "PPChart2TableImageProcessor")(size={"height": 128, "width": 128}),
        words,
        chat_template=CHATML.replace("IMAGE", f"<img>{'<imgpad>' * 64}</img>"),
    )


def step(words: Any) -> Any:
    images = of("step3p7", "Step3p7ImageProcessor")(
        size={"height": 48, "width": 48}, patch_size=32, vision_patch_size=4
    )
    return of("step3p7", "Step3p7Processor")(
        images, words, chat_template=CHATML.replace("IMAGE\n", "<im_patch>")
    )


def unlimited(words: Any) -> Any:
    images = of("unlimited_ocr", "UnlimitedOcrImageProcessor")(
        size={"height": 128, "width": 128}, tile_size=64, max_patches=8
    )
    return of("unlimited_ocr", "UnlimitedOcrProcessor")(images, words, patch_size=4)


def deepseek(words: Any) -> Any:
    """144 queries whatever the size, which its processor would count from 48 / 1 / 4."""
    images = of("deepseek_ocr2", "DeepseekOcr2ImageProcessor")(
        size={"height": 48, "width": 48}, tile_size=48
    )
    return of("deepseek_ocr2", "DeepseekOcr2Processor")(images, words, patch_size=1)


def llama4(words: Any) -> Any:
    return of("llama4", "Llama4Processor")(
        of("llama4", "Llama4ImageProcessor")(size=SQUARE),
        words,
        patch_size=4,
        chat_template=LLAMA,
    )


ROWS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
IDEFICS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *ROWS]
INTERN = ["<img>", "</img>", "<image>", "<video>"]
INTERN_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

REAL: tuple[Real, ...] = (
    real(
        "aya_vision",
        "<|IMG_PATCH|>",
        ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL"],
        aya,
        template=True,
    ),
    real(
        "cohere2_vision",
        "<image>",
        ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"],
        cohere,
        {
            "image_token": "<image>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        template=True,
    ),
    real("internvl", "<IMG_CONTEXT>", INTERN, internvl, INTERN_NAMES, template=True),
    real("qianfan_ocr", "<IMG_CONTEXT>", INTERN, qianfan, INTERN_NAMES, template=True),
    real(
        "idefics3",
        "<image>",
        IDEFICS,
        partial(idefics, "idefics3", "Idefics3"),
        template=True,
        margin=5.0,
    ),
    real(
        "smolvlm",
        "<image>",
        IDEFICS,
        partial(idefics, "smolvlm", "SmolVLM"),
        template=True,
        margin=5.0,
    ),
    real("granite_docling", "<image>", IDEFICS, docling, template=True),
    real(
        "llama4",
        "<|patch|>",
        [
            *("<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>"),
            *("<|tile_y_separator|>", "<|header_start|>", "<|header_end|>", "<|eot|>"),
        ],
        llama4,
        template=True,
    ),
    real("got_ocr2", "<imgpad>", ["<img>", "</img>"], got, several=False, margin=10.0),
    real(
        "pp_chart2table",
        "<imgpad>",
        ["<img>", "</img>"],
        chart,
        template=True,
        margin=10.0,
    ),
    real(
        "step3p7",
        "<im_patch>",
        ["<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"],
        step,
        template=True,
        margin=8.0,
    ),
    real("unlimited_ocr", "<image>", [], unlimited, margin=14.0),
    real("deepseek_ocr2", "<image>", [], deepseek, spatial="queries"),
)

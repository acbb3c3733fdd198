"""Qwen-VL and its like: images of any size, a token for each block of neighbouring patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from real import Real
from zoo import qwen

ZOO = {entry.name: entry for entry in qwen.ENTRIES}
CANVAS = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
"""Fewest and most pixels of a processed image."""

QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
GLM = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>")
COMPASS = ("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>")
ERNIE = ("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>")
DOTS = ("<|imgpad|>", "<|video_pad|>", "<|img|>", "<|endofimg|>")

QWEN_CHAT = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GLM_CHAT = """\
[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>
{% for part in message['content'] %}{% if part['type'] == 'image' %}\
<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def tokenizer(marks: tuple[str, ...], named: Mapping[str, str]) -> Any:
    """Byte-level, as Qwen's; the special tokens have the ids that the zoo's configs have."""
    image, video, begin, end = marks
    special = [
        *("<|endoftext|>", "<|bos|>", "<|eos|>", image, video, begin, end, "<|audio|>"),
        *("<|begin_of_video|>", "<|end_of_video|>", "<|im_start|>", "<|im_end|>"),
        *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|audio_start|>", "<|audio_end|>"),
    ]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["what is this a small photo of some thing"] * 3, trainer)
    assert made.token_to_id(image) == qwen.IMAGE
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|endoftext|>",
        eos_token="<|eos|>",
        additional_special_tokens=special[3:],
        padding_side="left",
        model_specific_special_tokens=dict(named),
    )


def build(
    name: str,
    processor: str,
    images: str,
    videos: str,
    marks: tuple[str, ...] = QWEN,
    chat: str | None = None,
    settings: Mapping[str, Any] = {},
    named: Mapping[str, str] = {},
    audio: str = "",
) -> tuple[Any, Any]:
    """The tiny model and its processor, of which only the sizes are smaller than by default."""

    tokens = tokenizer(marks, named)
    config = ZOO[name].config()
    config.get_text_config().vocab_size = len(tokens)
    config.get_text_config().bos_token_id = None
    model = replace(ZOO[name], config=lambda: config).model()
    parts = {
        "image_processor": getattr(transformers, images)(
            **{"patch_size": qwen.PATCH, "size": CANVAS, **settings}
        ),
        "video_processor": getattr(transformers, videos)(patch_size=qwen.PATCH),
        "tokenizer": tokens,
        "chat_template": chat,
    }
    if audio:
        parts["feature_extractor"] = getattr(transformers, audio)()
    return model, getattr(transformers, processor)(**parts)


def real(name: str, *classes: str, **more: Any) -> Real:
    """The one of that name in the zoo, with its processor's classes."""
    make: Callable[[], Any] = partial(build, name, *classes, **more)
    return Real(name, make, ZOO[name].first, ZOO[name].mixers, template="chat" in more)


IMAGES = ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
IMAGES_3 = ("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor")
NAMED = {"image_token": QWEN[0], "video_token": QWEN[1], "audio_token": "<|audio|>"} | {
    "vision_bos_token": QWEN[2],
    "vision_eos_token": QWEN[3],
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
"""The names under which the Omni models' processors look for special tokens."""
NAMED_ERNIE = {
    "image_token": ERNIE[0],
    "video_token": ERNIE[1],
    "image_start_token": ERNIE[2],
    "image_end_token": ERNIE[3],
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}

REAL: tuple[Real, ...] = (
    real("qwen2_vl", "Qwen2VLProcessor", *IMAGES, chat=QWEN_CHAT),
    real("qwen2_5_vl", "Qwen2_5_VLProcessor", *IMAGES),
    real("qwen3_vl", "Qwen3VLProcessor", *IMAGES_3, chat=QWEN_CHAT),
    real("qwen3_5", "Qwen3VLProcessor", *IMAGES_3),
    real(
        "glm4v",
        "Glm4vProcessor",
        "Glm4vImageProcessor",
        "Glm4vVideoProcessor",
        marks=GLM,
        chat=GLM_CHAT,
    ),
    real("glm46v", "Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor", marks=GLM),
    real(
        "glm5_next",
        "Glm5NextProcessor",
        "Glm5NextImageProcessor",
        "Glm5NextVideoProcessor",
        marks=GLM,
        settings={"min_image_tokens": 4, "max_image_tokens": 64, "size": {"longest_edge": 1}},
    ),
    real(
        "cosmos3_edge",
        "Cosmos3EdgeProcessor",
        "Cosmos3EdgeImageProcessor",
        "Cosmos3EdgeVideoProcessor",
    ),
    real(
        "cohere_compass",
        "CohereCompassProcessor",
        "CohereCompassImageProcessor",
        "CohereCompassVideoProcessor",
        marks=COMPASS,
    ),
    real("exaone4_5", "Exaone4_5_Processor", *IMAGES),
    real("hyperclovax_vision_v2", "HyperCLOVAXVisionV2Processor", *IMAGES),
    real(
        "video_llama_3",
        "VideoLlama3Processor",
        "VideoLlama3ImageProcessor",
        "VideoLlama3VideoProcessor",
        settings={"size": {"shortest_edge": 64, "longest_edge": 32 * 32}},
    ),
    real(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeProcessor",
        "Ernie4_5_VLMoeImageProcessor",
        "Ernie4_5_VLMoeVideoProcessor",
        marks=ERNIE,
        named=NAMED_ERNIE,
    ),
    real(
        "dots3_note",
        "Dots3NoteProcessor",
        *IMAGES,
        marks=DOTS,
        settings={"temporal_patch_size": 1},
        audio="Dots3NoteFeatureExtractor",
    ),
    real(
        "qwen2_5_omni_thinker",
        "Qwen2_5OmniProcessor",
        *IMAGES,
        audio="WhisperFeatureExtractor",
        named=NAMED,
    ),
    real(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeProcessor",
        *IMAGES,
        audio="WhisperFeatureExtractor",
        named=NAMED,
    ),
)

"""Learned queries and cross-attention with their real processors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from real import Real, usually
from zoo.queries import ENTRIES, KOSMOS25_PATCHES

ZOO = {entry.name: entry for entry in ENTRIES}
WORDS = ("what", "is", "this", "a", "small", "photo", "User:", "Assistant:", "user", "assistant")
UNKNOWN, FIRST = 3, 20


def tokenizer(size: int, special: dict[str, int], text: str = "<s> $A", **more: Any) -> Any:
    """Whole words at ids from 20 on, special tokens where the model's config has them."""
    names = {i: f"<filler_{i}>" for i in range(size)}
    names |= {FIRST + i: word for i, word in enumerate(WORDS)}
    names |= {i: name for name, i in ({"<unk>": UNKNOWN} | special).items()}
    backend = Tokenizer(WordLevel({name: i for i, name in names.items()}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single=text, special_tokens=[(n, i) for n, i in special.items() if n in text]
    )
    made = tf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **more)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def small(cls: type, width: int, height: int, **more: Any) -> Any:
    return cls(size={"height": height, "width": width}, **more)


# --- BLIP --------------------------------------------------------------------------------------


def blip(name: str) -> tuple[Any, Any]:
    model = ZOO[name].model()
    kind = model.config.text_config.model_type
    image = {"<video>" if name == "instructblipvideo" else "<image>": 150}
    words = {
        "opt": partial(
            tokenizer,
            160,
            image | {"</s>": 2, "<pad>": 1},
            "</s> $A",
            bos_token="</s>",
            eos_token="</s>",
            pad_token="<pad>",
        ),
        "llama": partial(
            tokenizer,
            160,
            image | {"<s>": 1, "</s>": 2, "[PAD]": 0},
            bos_token="<s>",
            eos_token="</s>",
            pad_token="[PAD]",
            padding_side="left",
        ),
        "t5": partial(
            tokenizer,
            160,
            image | {"</s>": 1, "<pad>": 0},
            "$A </s>",
            eos_token="</s>",
            pad_token="<pad>",
        ),
    }[kind]()
    pictures = small(tf.BlipImageProcessor, 12, 12)
    if name.startswith("blip-2"):
        return model, tf.Blip2Processor(pictures, words, num_query_tokens=5)
    bert = tokenizer(
        160,
        {"[CLS]": 5, "[SEP]": 6, "[PAD]": 0},
        "[CLS] $A [SEP]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
    )
    if name == "instructblipvideo":
        videos = small(tf.InstructBlipVideoVideoProcessor, 12, 12)
        return model, tf.InstructBlipVideoProcessor(videos, words, bert, num_query_tokens=5)
    return model, tf.InstructBlipProcessor(pictures, words, bert, num_query_tokens=5)


def blip_real(name: str) -> Real:
    return Real(name, partial(blip, name), ZOO[name].first, several=False, spatial="queries")


# --- Idefics2 ----------------------------------------------------------------------------------

IDEFICS2_TEMPLATE = """{% for message in messages %}{{ message['role'].capitalize() }}\
{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def idefics2(split: bool) -> tuple[Any, Any]:
    special = {
        "<s>": 1,
        "</s>": 2,
        "<pad>": 0,
        "<fake_token_around_image>": 150,
        "<image>": 151,
        "<end_of_utterance>": 152,
    }
    words = tokenizer(
        160, special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    pictures = tf.Idefics2ImageProcessor(
        size={"shortest_edge": 8, "longest_edge": 24}, do_image_splitting=split
    )
    processor = tf.Idefics2Processor(
        pictures, words, image_seq_len=3, chat_template=IDEFICS2_TEMPLATE
    )
    return ZOO["idefics2"].model(), processor


# --- Mllama ------------------------------------------------------------------------------------

MLLAMA_TEMPLATE = """{{ bos_token }}{% for message in messages %}<|start_header_id|> \
{{ message['role'] }} <|end_header_id|>
{% for line in message['content'] %}{% if line['type'] == 'image' %}{{ '<|image|>' }}\
{% else %}{{ line['text'] }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|> assistant <|end_header_id|>
{% endif %}"""


def mllama() -> tuple[Any, Any]:
    special = {
        "<|begin_of_text|>": 1,
        "<|end_of_text|>": 2,
        "<|pad|>": 4,
        "<|python_tag|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eot_id|>": 8,
        "<|image|>": 160,
    }
    words = tokenizer(
        161,
        special,
        "<|begin_of_text|> $A",
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|pad|>",
        padding_side="left",
    )
    pictures = small(tf.MllamaImageProcessor, 12, 12, max_image_tiles=4)
    processor = tf.MllamaProcessor(pictures, words, chat_template=MLLAMA_TEMPLATE)
    return ZOO["mllama"].model(), processor


# --- The others --------------------------------------------------------------------------------


def idefics() -> tuple[Any, Any]:
    special = {
        "<s>": 1,
        "</s>": 2,
        "<pad>": 0,
        "<fake_token_around_image>": 160,
        "<image>": 161,
    }
    words = tokenizer(
        162, special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    pictures = tf.IdeficsImageProcessor(image_size=12)
    return ZOO["idefics"].model(), tf.IdeficsProcessor(pictures, words, image_size=12)


def aria() -> tuple[Any, Any]:
    """Its image processor knows two sizes only: the smaller one, and few large patches."""
    entry = ZOO["aria"]
    config = entry.config()
    config.vision_config.image_size, config.vision_config.patch_size = 490, 70
    config.projector_patch_to_query_dict = {49: 6}
    special = {"<s>": 1, "</s>": 2, "<|img|>": 9}
    words = tokenizer(
        160,
        special,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|img|>"},
    )
    pictures = tf.AriaImageProcessor(max_image_size=490)
    processor = tf.AriaProcessor(pictures, words, size_conversion={490: 6})
    return replace(entry, config=lambda: config).model(), usually(processor, max_image_size=490)


def kosmos2() -> tuple[Any, Any]:
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 150, "</image>": 151}
    tags = "doc chunk line phrase /phrase object /object /delimiter_of_multi_objects/ grounding"
    for number, tag in enumerate(tags.split()):
        special[f"</{tag}>" if number < 3 else f"<{tag}>"] = 9 + number
    words = tokenizer(
        160, special, "<s> $A </s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    pictures = tf.CLIPImageProcessor(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
    )
    processor = tf.Kosmos2Processor(pictures, words, num_patch_index_tokens=0)
    return ZOO["kosmos-2"].model(), usually(processor, num_image_tokens=5)


def kosmos25() -> tuple[Any, Any]:
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 150, "</image>": 151}
    words = tokenizer(
        160,
        special,
        "$A",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={
            "boi_token": "<image>",
            "eoi_token": "</image>",
            "image_token": "<s>",
        },
    )
    pictures = tf.Kosmos2_5ImageProcessor(
        patch_size={"height": 4, "width": 4}, max_patches=KOSMOS25_PATCHES
    )
    processor = tf.Kosmos2_5Processor(pictures, words, num_image_tokens=5)
    return ZOO["kosmos-2.5"].model(), usually(processor, max_patches=KOSMOS25_PATCHES)


REAL: tuple[Real, ...] = (
    blip_real("blip-2"),
    blip_real("blip-2+t5"),
    blip_real("instructblip"),
    blip_real("instructblip+t5"),
    blip_real("instructblipvideo"),
    Real(
        "idefics2",
        partial(idefics2, True),
        ZOO["idefics2"].first,
        template=True,
        spatial="queries",
    ),
    Real("idefics2 whole", partial(idefics2, False), ZOO["idefics2"].first, spatial="queries"),
    Real("mllama", mllama, ZOO["mllama"].first, template=True, spatial="none"),
    Real("mllama plain", mllama, ZOO["mllama"].first, spatial="none"),
    Real("idefics", idefics, ZOO["idefics"].first, spatial="none"),
    Real("aria", aria, ZOO["aria"].first, spatial="queries"),
    Real("kosmos-2", kosmos2, ZOO["kosmos-2"].first, several=False, spatial="queries"),
    Real("kosmos-2.5", kosmos25, ZOO["kosmos-2.5"].first, several=False, spatial="queries"),
)

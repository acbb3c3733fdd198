"""The testbed's model before training: a small, genuine LLaVA, its tokenizer and processor."""

from __future__ import annotations

from typing import Any, Final

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from neuronlens.testbed.world import COLOURS, NUMBERS, SHAPES, SIZE, SIZES, TEXTURES

PATCH: Final = 8
PATCHES: Final = (SIZE // PATCH) ** 2

SPECIAL: Final = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
WORDS: Final = (
    *("user:", "assistant:", "the", "image", "shows", "a", "and", ",", ".", "on", "background"),
    *("is", "are", "there", "object", "objects", "left", "of", "above", "below"),
    *("describe", "what", "colour", "shape", "size", "how", "many", "?"),
    *(*COLOURS, *SHAPES, *SIZES, *TEXTURES, *NUMBERS),
)

CHAT_TEMPLATE: Final = """\
<bos>
{%- for message in messages %} {{ message['role'] }}:
  {%- if message['content'] is string %} {{ message['content'] }}
  {%- else %}
    {%- for part in message['content'] if part['type'] == 'image' %} <image>{% endfor %}
    {%- for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}
  {%- endif %}
  {%- if message['role'] == 'assistant' %} <eos>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %} assistant:{% endif %}"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; `<image>` is split off wherever it stands."""
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def processor() -> LlavaProcessor:
    """The processor a LLaVA of this shape has; images of any size are resized and cropped."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def config() -> LlavaConfig:
    """About 1.2 million parameters; 256 x 3 + 128 + 384 x 4 neurons."""
    ids = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
        max_position_embeddings=256,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
    )
    llava: Any = LlavaConfig
    made: LlavaConfig = llava(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
    )
    return made


def untrained(seed: int = 0) -> LlavaForConditionalGeneration:
    """The same model with random weights: the control every finding stands beside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config()).eval()
        return model

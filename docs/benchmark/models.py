"""Models with random weights, and photographs and texts of no meaning: only their sizes count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import neuronlens as nl

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "x", "<image>")
IMAGE = SPECIAL.index("<image>")
TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")

MIDDLE: dict[str, Any] = {
    "vision": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "text": {
        "vocab_size": 4000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "vision_feature_layer": -1,
}
"""A LLaVA of which a forward takes about a second."""

SEVEN_BILLION: dict[str, Any] = {
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 768,
    },
    "text": {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "vision_feature_layer": -2,
}
"""LLaVA-1.5-7B."""


@dataclass(frozen=True)
class Shape:
    """What a ratio depends on beside the machine.

    Attributes:
        neurons: By module.
        sites: How many.
        hidden: Width of the language stream.
        vocabulary: Of the logits.
        visual, text: Tokens of a sample.
        dtype: Of weights and activations.
    """

    neurons: dict[str, int]
    sites: int
    hidden: int
    vocabulary: int
    visual: int
    text: int
    dtype: str

    @classmethod
    def of(cls, adapter: nl.ModelAdapter, sample: nl.Sample) -> Shape:
        """The shape of a model and its samples."""
        neurons: dict[str, int] = {}
        for site in adapter.sites.values():
            neurons[site.module] = neurons.get(site.module, 0) + site.neurons
        role = nl.encode(adapter, [sample]).tokens["language"].role
        visual = int((role == nl.Role.VISUAL).sum())
        text = adapter.model.config.get_text_config()
        return cls(
            neurons,
            len(adapter.sites),
            text.hidden_size,
            text.vocab_size,
            visual,
            int((role != nl.Role.PAD).sum()) - visual,
            str(adapter.dtype).removeprefix("torch."),
        )

    def __str__(self) -> str:
        listed = ", ".join(f"{module} {count:,}" for module, count in self.neurons.items())
        return (
            f"{self.sites} sites, {sum(self.neurons.values()):,} neurons ({listed}), hidden size "
            f"{self.hidden:,}, vocabulary {self.vocabulary:,}, {self.dtype}; samples of "
            f"{self.visual} visual and {self.text} other tokens"
        )


def random_llava(
    size: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nl.ModelAdapter:
    """A LLaVA of that size with its processor; the weights are made on the device."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **size["vision"]),
        text_config=LlamaConfig(pad_token_id=0, **size["text"]),
        image_token_index=IMAGE,
        vision_feature_layer=size["vision_feature_layer"],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    return nl.adapt(model.eval(), _processor(size["text"]["vocab_size"]))


def _processor(vocabulary: int) -> LlavaProcessor:
    words = (*SPECIAL, *(f"w{number}" for number in range(vocabulary - len(SPECIAL))))
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def photographs(folder: Path, count: int) -> list[nl.Sample]:
    """Samples of 640 x 480 JPEG files, pieces of photographs, with texts of 15 and 80 words."""
    return list(_photographs(folder, count))


def _photographs(folder: Path, count: int) -> Iterator[nl.Sample]:
    import skimage.data

    whole = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    rng = np.random.default_rng(0)

    def words(many: int) -> str:
        return " ".join(f"w{rng.integers(3000)}" for _ in range(many))

    for number in range(count):
        photograph = whole[number % len(whole)]
        width = int(rng.integers(200, min(photograph.width, photograph.height * 4 // 3)))
        height = width * 3 // 4
        x = int(rng.integers(photograph.width - width + 1))
        y = int(rng.integers(photograph.height - height + 1))
        path = folder / f"{number:05}.jpg"
        piece = photograph.crop((x, y, x + width, y + height)).resize((640, 480))
        piece.save(path, quality=90)
        yield nl.Sample(f"photograph-{number}", (path,), words(15), words(80))

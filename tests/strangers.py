"""Vision-language models nobody registered, with names and nesting of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from zoo import draw

IMAGE, PAD, VOCABULARY = 5, 0, 60


class SelfAttention(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.wqkv = nn.Linear(width, 3 * width)
        self.wo = nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.wqkv(x).chunk(3, -1)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        if self.causal:
            seen = seen.tril()
        seen = seen[None] if mask is None else seen[None] & mask[:, None].bool()
        seen = seen | torch.eye(x.shape[1], dtype=torch.bool)
        weight = (q @ k.transpose(1, 2) / 4).masked_fill(~seen, -1e4).softmax(-1)
        return self.wo(weight @ v)


# As InternVL-chat: feed_forward.w1/w2/w3 in InternLM2, mlp1 as the projector, a CLS token.


class W123(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class TwoLayer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class InternLayer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, causal=True)
        self.feed_forward = W123(width, inner)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        x = hidden_states + self.attention(self.attention_norm(hidden_states), mask)
        return x + self.feed_forward(self.ffn_norm(x))


class EyeLayer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.attn, self.mlp = SelfAttention(width, causal=False), TwoLayer(width, inner)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class InternChatConfig(PretrainedConfig):
    model_type = "internvl_chat_of_the_tests"


class InternChat(PreTrainedModel):
    config_class = InternChatConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        eyes = nn.Module()
        eyes.patch = nn.Conv2d(3, 12, 4, 4)
        eyes.cls = nn.Parameter(torch.zeros(1, 1, 12))
        eyes.inner = nn.ModuleDict({"layers": nn.ModuleList([EyeLayer(12, 20) for _ in range(2)])})
        self.vision_model = eyes
        self.mlp1 = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 28), nn.GELU(), nn.Linear(28, 16))
        tongue = nn.Module()
        tongue.tok_embeddings = nn.Embedding(VOCABULARY, 16)
        tongue.layers = nn.ModuleList([InternLayer(16, 24) for _ in range(2)])
        tongue.norm, tongue.output = nn.LayerNorm(16), nn.Linear(16, VOCABULARY, bias=False)
        self.language_model = tongue
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.tok_embeddings

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        x = self.language_model.tok_embeddings(input_ids)
        if pixel_values is not None:
            eyes = self.vision_model
            cells = eyes.patch(pixel_values)
            h, w = cells.shape[-2:]
            tokens = cells.flatten(2).transpose(1, 2)
            tokens = torch.cat([eyes.cls.expand(len(tokens), 1, -1), tokens], 1)
            for layer in eyes.inner["layers"]:
                tokens = layer(tokens)
            grid = tokens[:, 1:].reshape(-1, h // 2, 2, w // 2, 2, 12)
            merged = grid.transpose(2, 3).reshape(len(tokens), h * w // 4, 48)
            x = x.masked_scatter((input_ids == IMAGE)[..., None], self.mlp1(merged))
        for layer in self.language_model.layers:
            x = layer(x, attention_mask)
        return CausalLMOutput(logits=self.language_model.output(self.language_model.norm(x)))


# As the first Qwen-VL: transformer.h, mlp.w1/w2/c_proj with a functional SiLU, and learned
# queries that look at the whole image.


class QMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(width, inner, bias=False)
        self.c_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QBlock(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), SelfAttention(width, causal=True)
        self.ln_2, self.mlp = nn.LayerNorm(width), QMLP(width, inner)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        x = hidden_states + self.attn(self.ln_1(hidden_states), mask)
        return x + self.mlp(self.ln_2(x))


class FirstQwenConfig(PretrainedConfig):
    model_type = "first_qwen_of_the_tests"


class FirstQwen(PreTrainedModel):
    config_class = FirstQwenConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        trunk = nn.Module()
        trunk.wte = nn.Embedding(VOCABULARY, 16)
        trunk.h = nn.ModuleList([QBlock(16, 24) for _ in range(2)])
        trunk.ln_f = nn.LayerNorm(16)
        trunk.visual = nn.Module()
        trunk.visual.conv1 = nn.Conv2d(3, 12, 4, 4)
        trunk.visual.transformer = nn.Module()
        trunk.visual.transformer.resblocks = nn.ModuleList([EyeLayer(12, 20) for _ in range(2)])
        trunk.visual.queries = nn.Parameter(torch.zeros(3, 12))
        trunk.visual.attn_pool = nn.MultiheadAttention(12, 2, batch_first=True)
        trunk.visual.proj = nn.Linear(12, 16)
        self.transformer = trunk
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        trunk = self.transformer
        x = trunk.wte(input_ids)
        if pixel_values is not None:
            tokens = trunk.visual.conv1(pixel_values).flatten(2).transpose(1, 2)
            for block in trunk.visual.transformer.resblocks:
                tokens = block(tokens)
            queries = trunk.visual.queries.expand(len(tokens), -1, -1)
            pooled, _ = trunk.visual.attn_pool(queries, tokens, tokens)
            x = x.masked_scatter((input_ids == IMAGE)[..., None], trunk.visual.proj(pooled))
        for block in trunk.h:
            x = block(x, attention_mask)
        return CausalLMOutput(logits=self.lm_head(trunk.ln_f(x)))


def intern_chat() -> InternChat:
    model = InternChat(InternChatConfig()).eval()
    draw(model)
    return model


def first_qwen() -> FirstQwen:
    model = FirstQwen(FirstQwenConfig()).eval()
    draw(model)
    return model


def inputs(images: Tensor, per_image: int) -> dict[str, Tensor]:
    """A batch of one image per sample; the second text is shorter and padded on the left."""
    rows = []
    for number in range(len(images)):
        text = [7, 8, *[IMAGE] * per_image, 9, 10, 11]
        text = text if number == 0 else text[1:]
        rows.append([PAD] * (len(text) < per_image + 5) + text)
    ids = torch.tensor(rows)
    return {"input_ids": ids, "pixel_values": images, "attention_mask": (ids != PAD).long()}

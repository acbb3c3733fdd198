"""How a forward goes on from the one before: what tells steps of generation from new sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from neuronlens.adapters.base import ModelAdapter
from neuronlens.tokens import Role


def attended(mask: Any, ids: Int[Tensor, "batch token"], done: int) -> Int[Tensor, "batch token"]:
    """1 where a token is attended to, 0 where it is padding.

    A static cache comes with one mask per query, boolean or additive: padding is what no
    query sees.
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()))
    if not isinstance(mask, Tensor):
        return torch.ones_like(ids)
    if mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > -1
        mask = seen.any(1).any(1)
    there: Tensor = mask[:, done : done + ids.shape[1]].to(ids.dtype)
    return there


def cached_tokens(inputs: Mapping[str, Any]) -> int:
    """How many tokens a forward continues."""
    cache = inputs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0


def repeats(before: Int[Tensor, "batch token"], now: Int[Tensor, "batch longer"]) -> bool:
    """Whether `now` is `before` with one token more: a step of generation without a cache."""
    if now.shape[0] != before.shape[0] or now.shape[1] != before.shape[1] + 1:
        return False
    return bool((now[:, :-1] == before).all())


def generated_roles(
    adapter: ModelAdapter, ids: Int[Tensor, "batch token"]
) -> Int[Tensor, "batch token"]:
    """RESPONSE, or SPECIAL for the tokenizer's special tokens."""
    role = adapter.text_roles(ids)
    role[role == Role.PROMPT] = Role.RESPONSE
    return role

"""What answers depend on beside the weights, the prompt and the way of generating."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from neuronlens.adapters import ModelAdapter
from neuronlens.evaluate.answers import generation_configs

_NO_SETTING: Final = {"_commit_hash", "name_or_path", "transformers_version"}
"""What objects of transformers tell of themselves that changes no answer."""


_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


def settings_of(adapter: ModelAdapter) -> dict[str, str]:
    """Digests of the processor's and the model's own settings, and the floating-point type.

    On which side a tokenizer pads is none: evaluations choose it by themselves.
    """
    processor = adapter.processor
    tokenizer = processor.tokenizer
    template = getattr(processor, "chat_template", None) or getattr(
        tokenizer, "chat_template", None
    )
    return {
        "image_processor": _digest(_told(getattr(processor, "image_processor", None))),
        "tokenizer": _digest(
            [type(tokenizer).__name__, len(tokenizer), tokenizer.special_tokens_map]
        ),
        "chat_template": _digest(template),
        "generation_config": _digest(
            [_kept(each.to_diff_dict()) for each in generation_configs(adapter.model)]
        ),
        "dtype": str(adapter.dtype),
        # Last, because it has the image processor in it: a difference is named by its first.
        "processor": _digest([type(processor).__name__, _told(processor)]),
    }


def versions() -> dict[str, str]:
    """Of the libraries that compute the answers."""
    return {name: version(name) for name in ("torch", "transformers")}


def _told(part: Any) -> dict[str, object]:
    """What a part of a processor tells of itself; nothing if it does not."""
    tell = getattr(part, "to_dict", None)
    return _kept(tell()) if callable(tell) else {}


def _kept(settings: Mapping[str, object]) -> dict[str, object]:
    return {
        name: _kept(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _NO_SETTING
    }


def _digest(told: object) -> str:
    # An object without a text of its own tells its address, which is another in each process.
    text = json.dumps(told, sort_keys=True, default=lambda each: _ADDRESS.sub("", str(each)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

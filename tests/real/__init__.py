"""Real processors, built offline: their own classes with a small tokenizer and a small canvas."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zoo import entries


@dataclass(frozen=True)
class Real:
    """A model with the processor it is really used with.

    Attributes:
        name: Of the family, as in the zoo.
        build: Makes the tiny model (weights drawn as in `zoo.Entry.model`) and its processor.
        first: Path of the first layer of the language stack with the image tokens.
        mixers: As in `zoo.Entry`: regular expressions of the modules to silence for box tests.
        several: Whether one sample may have several images.
        template: Whether to encode with the processor's chat template.
        margin: How far, in processed pixels, resampling and the tower's convolutions reach.
        spatial: As in `zoo.Entry`.
        prompt, response: Text of the samples; every word is one the tokenizer knows.
    """

    name: str
    build: Callable[[], tuple[Any, Any]]
    first: str
    mixers: tuple[str, ...] = ()
    several: bool = True
    template: bool = False
    margin: float = 3.0
    spatial: str = "region"
    prompt: str = "what is this"
    response: str = "a small photo"


def usually(processor: Any, **images: Any) -> Any:
    """The processor, which from now on processes images like this if it is not told otherwise.

    Transformers 5.23 made attributes of what was in the class of the processor's arguments.
    """
    home = vars(sys.modules[type(processor).__module__])
    arguments = home.get(f"{type(processor).__name__}Kwargs")
    earlier = getattr(arguments, "_defaults", {}).get("images_kwargs")
    for name, value in images.items():
        if earlier is not None:
            earlier[name] = value
        elif hasattr(processor, name):
            setattr(processor, name, value)
        else:
            processor.images_kwargs = {**processor.images_kwargs, name: value}
    return processor


GROUPS = ("qwen", "dynamic", "native", "llava", "tiles", "queries", "odd")


def reals() -> dict[str, Real]:
    """Every one by name, of the architectures that this release of transformers has."""
    found: dict[str, Real] = {}
    for group in GROUPS:
        for real in importlib.import_module(f"real.{group}").REAL:
            if real.name.split(" ")[0] in entries():
                found[real.name] = real
    return dict(sorted(found.items()))

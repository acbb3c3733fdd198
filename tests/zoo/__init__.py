"""Tiny random models of every architecture, and what is true of them by their source code.

An `Entry` says how a model is built from its config, how images become its inputs, and where
its feed-forward activations are. It is written from the model's source, not from the library:
the tests compare the two.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

Images = Sequence[Sequence[Tensor]]
"""Per sample, images [3, height, width] at the size the model's processor would give them."""


@dataclass(frozen=True)
class Dense:
    """One feed-forward activation that every token runs through.

    Attributes:
        module: "vision", "projector", "qformer", "language" or "action".
        layer: Number of the block within its module (and stack).
        before: Path of the module whose output is activated, usually the gate or first Linear.
        act: From the output of `before` to the act_fn output, written out (F.silu, a half of a
            fused projection, a clamp, ...).
        down: Path of the Linear or convolution that takes the (gated) activation; None where
            something else stands between, such as a LayerNorm or a clamp of the product.
        stack: Distinguishes two stacks of one module, such as "decoder" or "text".
        inert: It runs, and cannot change the logits.
        conditional: Why it may not run in every forward; "" if it always does.
        width: Neurons.
    """

    module: str
    layer: int
    before: str
    act: Callable[[Tensor], Tensor]
    down: str | None
    width: int
    stack: str = ""
    inert: bool = False
    conditional: str = ""


@dataclass(frozen=True)
class Routed:
    """One routed feed-forward block: each token runs through some of the experts.

    Attributes:
        module, layer, stack, inert, width: As in `Dense`; `width` is per expert.
        experts: How many.
        block: Path of the module that holds the 3-D weights of all experts.
        act: `(block, x [row, hidden], expert) -> [row, width]`, the act_fn output of one expert
            from its weights, written out.
        zero: `(block, expert, index) -> None`, zeroes one column of its down projection.
        routing: `(args, kwargs)` of the block's forward -> `(x [row, hidden], experts [row, k])`:
            which rows came in, and which experts each was sent to.
        rows: `(model, inputs) -> [row]`, the flat position (batch x token) of each row, if only
            some tokens come in; None where all do, in order.
    """

    module: str
    layer: int
    block: str
    experts: int
    width: int
    act: Callable[[nn.Module, Tensor, int], Tensor]
    zero: Callable[[nn.Module, int, int], None] | None
    routing: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Tensor, Tensor]] | None = None
    rows: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
    stack: str = ""
    inert: bool = False


@dataclass(frozen=True)
class Entry:
    r"""One architecture.

    Attributes:
        name: As in `MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES`; "a+b" with text backbone b.
        cls: Name of the model class in transformers.
        config: Builds its tiny config.
        sizes: Width and height of the images of each sample of the test batch (two samples, of
            one image each, of different sizes where the architecture allows it, not square where
            it allows it).
        inputs: Images -> keyword arguments of forward, as the real processor would make them:
            text of different lengths, so that one sample is padded, image tokens, pixel_values
            patchified as the processor does. Works for any number of samples >= 1.
        sites: Every feed-forward activation that runs for these inputs.
        first: Path of the first layer of the language stack whose tokens are the image tokens:
            its (first) input `hidden_states` is looked at to see which tokens depend on pixels.
        spatial: "region" if each image token sees one region, "queries" if image tokens are
            learned queries, "none" if no token of the language stack depends on the image before
            the first layer.
        mixers: Dotted-path regular expressions of the modules whose outputs have to be zeroed so
            that in the vision part (and projector) no token sees another one, such as
            r"model\.vision_tower\..*\.self_attn". Their output's first tensor is zeroed.
        overlap: Whether convolutions see neighbours, so that regions are only approximate.
        note: What a user should know: limits, surprises.
        prepare: Changes the model after its weights were drawn, if it must.
    """

    name: str
    cls: str
    config: Callable[[], Any]
    sizes: tuple[tuple[int, int], ...]
    inputs: Callable[[Any, Images], dict[str, Any]]
    sites: tuple[Dense | Routed, ...]
    first: str
    spatial: Literal["region", "queries", "none"]
    mixers: tuple[str, ...] = ()
    overlap: bool = False
    note: str = ""
    prepare: Callable[[nn.Module], None] | None = None

    def model(self, device: str = "cpu") -> Any:
        """The model, untrained but with weights large enough that everything matters."""
        cls = getattr(transformers, self.cls)
        with torch.device(device):
            torch.manual_seed(0)
            model = cls._from_config(self.config(), attn_implementation="eager")
        if device != "meta":
            draw(model)
            if self.prepare:
                self.prepare(model)
        return model.eval()

    def images(self, seed: int = 0) -> list[list[Tensor]]:
        """Random images of `sizes`, one per sample."""
        generator = torch.Generator().manual_seed(seed)
        return [[torch.rand(3, h, w, generator=generator)] for w, h in self.sizes]


def draw(model: nn.Module) -> None:
    """Draw every weight from a normal distribution scaled to its fan-in; no gate stays shut."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim >= 2 and "embed" not in name:
                takes = parameter[0].numel()
                if parameter.ndim == 3:  # experts: neither axis is known to be the input's
                    takes = math.sqrt(takes)
                parameter.copy_(noise / math.sqrt(max(1, takes)) * 1.5)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * 0.5)
            elif parameter.ndim == 1 and bool((parameter == 1).all()):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)


def taken(model: nn.Module, *names: str) -> str:
    """The first of these names that forward has an argument of: some were renamed."""
    arguments = inspect.signature(type(model).forward).parameters
    return next(name for name in names if name in arguments)


GROUPS = ("qwen", "dynamic", "native", "llava", "tiles", "queries", "odd")


def entries() -> dict[str, Entry]:
    """Every entry by name, of the architectures that this release of transformers has."""
    found: dict[str, Entry] = {}
    for group in GROUPS:
        for entry in importlib.import_module(f"zoo.{group}").ENTRIES:
            assert entry.name not in found, entry.name
            if hasattr(transformers, entry.cls):
                found[entry.name] = entry
    return dict(sorted(found.items()))

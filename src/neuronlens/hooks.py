"""Attaching to a model, and letting go again: the only file that registers hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuronlens.errors import CaptureError

OutputHook = Callable[[str, Tensor], Tensor | None]
CallHook = Callable[[dict[str, Any]], None]


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: OutputHook) -> Iterator[set[str]]:
    """Show `hook` the output of each module, for the length of the block.

    A hook that returns None only looks; one that returns a tensor replaces the output.
    All hooks are gone when the block ends, however it ends. The block receives the names
    that have not run yet.

    Raises:
        CaptureError: If the block ended well but some module never ran, for example
            because a fused kernel took its place.
    """
    unseen = set(modules)

    def call(name: str, _module: nn.Module, _args: object, out: Tensor) -> Tensor | None:
        unseen.discard(name)
        return hook(name, out)

    with ExitStack() as attached:
        for name, module in modules.items():
            attached.callback(module.register_forward_hook(partial(call, name)).remove)
        yield unseen
    if unseen:
        raise CaptureError(
            f"{len(unseen)} of {len(modules)} hooked modules never ran: "
            f"{', '.join(sorted(unseen)[:8])}{', ...' if len(unseen) > 8 else ''}. "
            "Call the whole model, with an image, inside the block."
        )


@contextmanager
def watched(model: nn.Module, before: CallHook, after: Callable[[], None]) -> Iterator[None]:
    """Call `before` with the named arguments of every call of `model`, and `after` it.

    `after` is not called when the forward raises.
    """
    signature = inspect.signature(model.forward)

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before(dict(signature.bind_partial(*args).arguments) | kwargs)

    def leave(_module: nn.Module, _args: object, _out: object) -> None:
        after()

    with ExitStack() as attached:
        attached.callback(model.register_forward_pre_hook(enter, with_kwargs=True).remove)
        attached.callback(model.register_forward_hook(leave).remove)
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run whatever would compile itself (generation with a static cache) as plain Python.

    Compiled code does not see hooks that were added after its first call.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model whose hooks might silently not fire.

    Raises:
        CaptureError: If `model` or a module in it was given to `torch.compile`.
    """
    for name, module in model.named_modules():
        is_wrapper = hasattr(module, "_orig_mod")
        if is_wrapper or getattr(module, "_compiled_call_impl", None) is not None:
            raise CaptureError(
                f"The model is compiled ({'module ' + repr(name) if name else 'as a whole'}), and "
                "compiled code ignores hooks that are added later. Give neuronlens the model "
                "before torch.compile; compile again afterwards."
            )

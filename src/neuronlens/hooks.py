"""Attaching to a model, and letting go again: the only file that registers hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuronlens.errors import CaptureError

OutputHook = Callable[[str, Tensor], Tensor | None]
CallHook = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Call:
    """One call of a module: what it was given and, once it has run, what it gave."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any = None


@dataclass(frozen=True)
class Point:
    """Where to attach, and what to do there.

    Attributes:
        module: The module to attach to.
        hook: Called with every call; what it returns, if not None, replaces the module's
            first input (`before`) or its output.
        before: Whether to look at the call before it runs.
        call: Which of the module's calls within a forward is meant, from 0.
        calls: How often the module is called in each forward.
    """

    module: nn.Module
    hook: Callable[[Call], Any]
    before: bool = False
    call: int = 0
    calls: int = 1


@contextmanager
def attached(
    points: Mapping[str, Sequence[Point]], may_be_left_out: Container[str] = ()
) -> Iterator[set[str]]:
    """Attach at every point for the length of the block.

    All hooks are gone when the block ends, however it ends. The block receives the names
    that have not run yet.

    Args:
        points: By name, where to attach.
        may_be_left_out: Names that are not missed if they never ran.

    Raises:
        CaptureError: If the block ended well but some point never ran, for example because
            a fused kernel took the module's place.
    """
    waiting = {(name, i) for name, several in points.items() for i in range(len(several))}
    unseen = set(points)

    with ExitStack() as stack:
        for name, several in points.items():
            for i, point in enumerate(several):
                stack.callback(_attach(point, (name, i), waiting, unseen))
        yield unseen
    missing = {name for name, _ in waiting if name not in may_be_left_out}
    if missing:
        raise CaptureError(
            f"{len(missing)} of {len(points)} hooked modules never ran: "
            f"{', '.join(sorted(missing)[:8])}{', ...' if len(missing) > 8 else ''}. "
            "Call the whole model, with an image, inside the block. If it was, a fused kernel "
            "took their place: load the model without kernels."
        )


def _attach(
    point: Point, key: tuple[str, int], waiting: set[tuple[str, int]], unseen: set[str]
) -> Callable[[], None]:
    count = 0

    def is_meant() -> bool:
        nonlocal count
        mine = count % point.calls == point.call
        count += 1
        if mine:
            waiting.discard(key)
            unseen.discard(key[0])
        return mine

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = point.hook(Call(module, args, kwargs)) if is_meant() else None
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): new}

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return point.hook(Call(module, args, kwargs, out)) if is_meant() else None

    if point.before:
        return point.module.register_forward_pre_hook(enter, with_kwargs=True).remove
    return point.module.register_forward_hook(leave, with_kwargs=True).remove


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: OutputHook) -> Iterator[set[str]]:
    """Show `hook` the output of each module, for the length of the block.

    A hook that returns None only looks; one that returns a tensor replaces the output.
    The rest is as in `attached`.
    """

    def point(name: str, module: nn.Module) -> Point:
        return Point(module, lambda call: hook(name, call.out))

    with attached({name: [point(name, module)] for name, module in modules.items()}) as unseen:
        yield unseen


def recomputing() -> bool:
    """Whether autograd is running a checkpointed block once more, in a backward pass."""
    return torch._C._current_graph_task_id() != -1


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
def overheard(model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Write down the images `generate()` encodes before it calls the model.

    It calls `get_image_features` of the base model, which is no module; so the instance is
    given a method of that name that listens, and loses it when the block ends.

    Args:
        model: The model.
        inputs: Takes the named arguments.
    """
    base: Any = getattr(model, "base_model", model)
    depth = 0

    def listening(method: Any) -> Any:
        @functools.wraps(method)
        def listen(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:  # some encode a video by calling the method for images
                bound = inspect.signature(method).bind_partial(*args, **kwargs).arguments
                named = bound | bound.pop("kwargs", {})
                inputs.update(
                    {k: v for k, v in named.items() if isinstance(v, (Tensor, list, tuple))}
                )
            depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                depth -= 1

        return listen

    with ExitStack() as stack:
        for name in ("get_image_features", "get_video_features"):
            method = getattr(base, name, None)
            if method is not None and name not in vars(base):
                vars(base)[name] = listening(method)
                stack.callback(vars(base).pop, name, None)
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

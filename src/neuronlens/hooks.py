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


def is_only_ours(call: Call) -> bool:
    """Whether a hook may write into a call's output, instead of into a copy of it.

    Not where autograd may need it, where it is what the module was given, where another hook
    has seen it, or where a module inside gave it.
    """
    out: Tensor = call.out
    if out.requires_grad or out.is_inference() != torch.is_inference_mode_enabled():
        return False
    given = [each for each in (*call.args, *call.kwargs.values()) if isinstance(each, Tensor)]
    here = out.untyped_storage().data_ptr()
    if any(each.untyped_storage().data_ptr() == here for each in given):
        return False
    hooks = len(call.module._forward_hooks) + len(nn.modules.module._global_forward_hooks)
    return out.is_contiguous() and hooks <= 1 and next(call.module.children(), None) is None


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
            "took their place: load the model without kernels. Or is the adapter of another model?"
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

    It calls `get_image_features` of the base model.

    Args:
        model: The model.
        inputs: Takes the named arguments.
    """
    base: Any = getattr(model, "base_model", model)

    def hear(named: dict[str, Any]) -> None:
        inputs.update({k: v for k, v in named.items() if isinstance(v, (Tensor, list, tuple))})

    with ExitStack() as stack:
        for name in ("get_image_features", "get_video_features"):
            stack.enter_context(_listening(base, name, hear))
        yield


@contextmanager
def generating(model: nn.Module, before: CallHook, after: Callable[[], None]) -> Iterator[None]:
    """Call `before` with the named arguments of every `generate()`, and `after` it has ended."""
    with _listening(model, "generate", before, after):
        yield


class _Listeners:
    """Who listens to the calls of one method: what to do before, and after."""

    def __init__(self, method: Callable[..., Any], own: object = None) -> None:
        self.own = own
        """What the instance had under the name, if it was not its class's."""
        self.all: list[tuple[CallHook, Callable[[], None]]] = []
        self.depth = 0
        self._method = method

    def call(self, *args: Any, **kwargs: Any) -> Any:
        told = []
        if self.depth == 0:  # some encode a video by calling the method for images
            signature = inspect.signature(self._method)
            named = dict(signature.bind_partial(*args, **kwargs).arguments)
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    named |= named.pop(parameter.name, {})
            told = list(self.all)
            for before, _ in told:
                before(dict(named))
        self.depth += 1
        try:
            return self._method(*args, **kwargs)
        finally:
            self.depth -= 1
            for _, after in told:
                after()


_listened: dict[tuple[int, str], _Listeners] = {}
"""By object and name of the method, who listens at the moment."""


@contextmanager
def _listening(
    owner: Any, name: str, before: CallHook, after: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Listen to a method that is no module.

    The instance is given a method of that name, and loses it when nobody listens any more. One
    that had a method of its own already has that one again.
    """
    key = id(owner), name
    if key not in _listened:
        method = getattr(owner, name, None)
        if method is None:
            yield
            return
        listeners = _listened[key] = _Listeners(method, vars(owner).get(name))

        @functools.wraps(method)
        def listen(*args: Any, **kwargs: Any) -> Any:
            return listeners.call(*args, **kwargs)

        vars(owner)[name] = listen
    mine = before, after
    _listened[key].all.append(mine)
    try:
        yield
    finally:
        _listened[key].all.remove(mine)
        if not _listened[key].all:
            own = _listened.pop(key).own
            if own is None:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = own


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

"""What segmenters ask of a model, whoever made it: a name, a place, numbers that are numbers."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from neuronlens.errors import MissingExtraError, SegmenterError


def describe(model: nn.Module, settings: str) -> str:
    """Names a model by its class, origin, dtype, weights and how its inputs are made.

    The weights enter as 64 values of every parameter, so two checkpoints of one architecture
    have two names. They are read once: a model must not be changed afterwards.

    Args:
        model: The model.
        settings: Everything else its answers depend on.
    """
    digest = hashlib.sha256(settings.encode())
    dtype = None
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        dtype = dtype or str(parameter.dtype).removeprefix("torch.")
        if not parameter.is_meta:  # offloaded: only its shape is at hand
            flat = parameter.detach().flatten()
            step = max(1, len(flat) // 64)
            digest.update(flat[::step][:64].to("cpu", torch.float32).numpy().tobytes())
    origin = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    origin = "/".join(Path(origin).parts[-2:])  # of a folder, not where in the system it lies
    parts = [type(model).__name__, origin, dtype or "", digest.hexdigest()[:16]]
    return ", ".join(part for part in parts if part)


def require_eval(model: nn.Module) -> None:
    """Refuse a model in training mode: its dropout would make the masks random.

    Raises:
        SegmenterError: If any part of it is in training mode.
    """
    if any(module.training for module in model.modules()):
        raise SegmenterError(
            f"{type(model).__name__} is in training mode, in which its answers are random. "
            "Call model.eval() first."
        )


def require_torchvision(what: str) -> None:
    """Refuse to go on without torchvision, before transformers says it less clearly.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if find_spec("torchvision") is None:
        raise MissingExtraError("torchvision", "segment", what)


def share(name: str, value: float) -> float:
    """A threshold, which must lie from 0 to 1.

    Raises:
        SegmenterError: If it does not.
    """
    if not 0 <= value <= 1:
        raise SegmenterError(f"{name}={value} is compared with probabilities: give 0 to 1.")
    return value


def at_least_one(name: str, value: int) -> int:
    """A batch size.

    Raises:
        SegmenterError: If nothing fits into a batch.
    """
    if value < 1:
        raise SegmenterError(f"{name}={value}; it must be at least 1.")
    return value


def finite(tensor: Tensor, model: nn.Module) -> Tensor:
    """The tensor in float32, or an error: NaN would read as "nothing found".

    Raises:
        SegmenterError: If it holds NaN or infinities.
    """
    if not torch.isfinite(tensor).all():
        raise SegmenterError(
            f"{type(model).__name__} in {tensor.dtype} gave numbers that are not finite. "
            "Load it in torch.float32."
        )
    return tensor.float()


def settle(model: nn.Module, device: torch.device | str | None) -> None:
    """Bring a model just loaded to its device, by default the first GPU if there is one."""
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.eval()

"""Whether a device has kernels that do with a site in one launch what else takes many."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch

KEPT = 8
"""How many of a sample's largest activations a kernel has registers for."""

LISTED = 2048
"""How long the lists of top samples are that a kernel holds."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_log = logging.getLogger("neuronlens.scan")


def kernels_for(
    device: torch.device, dtype: torch.dtype, keep: int, n: int = 1
) -> ModuleType | None:
    """The module of kernels, or None where the device or the sizes are not for them.

    Args:
        device: Of the activations and statistics.
        dtype: Likewise.
        keep: How many of the largest activations are kept per sample, at most.
        n: How many top samples per neuron.
    """
    if dtype not in _DTYPES or keep > KEPT or n > LISTED:
        return None
    return _kernels_on(device)


@cache
def _kernels_on(device: torch.device) -> ModuleType | None:
    if device.type != "cuda":
        return None
    try:
        from neuronlens.running import kernels

        kernels.try_out(device)
    except ImportError:  # torch for GPUs comes with Triton, except on Windows
        return None
    except Exception as error:  # noqa: BLE001 - Triton needs a C compiler, and says so in many ways
        _log.warning("Triton cannot compile kernels here, so the scan is slower: %s", error)
        return None
    return kernels

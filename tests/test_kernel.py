from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from neuronlens.running.fused import KEPT, LISTED, kernels_for

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda:99")  # there is none, so that what needs one raises
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton comes with torch for GPUs"
)


@needs_triton
def test_the_kernels_find_to_the_bit_what_is_found_without_them():
    """Interpreted, and so without a GPU; on one: `kernel_cases.py cuda 0 60`."""
    given = {
        **os.environ,
        "TRITON_INTERPRET": "1",  # before Triton is imported
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
    }
    ran = subprocess.run(
        [sys.executable, "tests/programs/kernel_cases.py", "cpu", "0", "24"],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "24 cases\n", ran.stdout + ran.stderr


@needs_triton
def test_a_device_for_which_nothing_can_be_compiled_has_no_kernels_and_says_why(caplog):
    with caplog.at_level(logging.WARNING, "neuronlens.scan"):
        for _ in range(2):
            assert kernels_for(GPU, torch.float32, 5, 50) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "Triton cannot compile kernels here, so the scan is slower"
    )


def test_a_cpu_has_no_kernels():
    assert kernels_for(torch.device("cpu"), torch.float32, 5, 50) is None


@pytest.mark.parametrize(
    ("dtype", "keep", "n"),
    [(torch.float64, 5, 50), (torch.float32, KEPT + 1, 50), (torch.float32, 5, LISTED + 1)],
    ids=["double precision", "more than are kept", "longer lists"],
)
def test_what_does_not_fit_into_the_kernels_is_done_without_them(monkeypatch, dtype, keep, n):
    monkeypatch.setattr("neuronlens.running.fused._kernels_on", lambda device: pytest)
    assert kernels_for(GPU, torch.float32, KEPT, LISTED) is pytest
    assert kernels_for(GPU, dtype, keep, n) is None

"""What tests share: one small trained model, one untrained, a few scenes."""

from __future__ import annotations

import os

# Two torch processes with two threads each on two cores slow each other a hundredfold.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from transformers.utils import logging

import neuronlens as nl
from neuronlens import testbed

logging.disable_progress_bar()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bed() -> testbed.Testbed:
    return testbed.load()


@pytest.fixture(scope="session")
def vlm(bed) -> nl.ModelAdapter:
    return nl.adapt(bed.model, bed.processor)


@pytest.fixture(scope="session")
def untrained_vlm(bed) -> nl.ModelAdapter:
    return nl.adapt(testbed.untrained(), bed.processor)


@pytest.fixture(scope="session")
def scenes() -> list[nl.Sample]:
    return testbed.scenes(24, seed=5)


@pytest.fixture(scope="session")
def atlas(vlm, scenes, tmp_path_factory) -> nl.Atlas:
    return nl.scan(vlm, scenes, out=tmp_path_factory.mktemp("scan") / "atlas", n=20, batch_size=6)

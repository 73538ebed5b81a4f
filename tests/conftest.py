"""What every test stands on: the installed package, Triton's interpreter where there is no GPU, no lucky memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Tests see the installed package only. With the root on the path, our folder kernels/ would be taken for the optional
# package of that name which transformers and diffusers look for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

_executed = {"kernels": 0}


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty gives NaN (or the largest integer): a kernel that leaves a part of its output unwritten fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.outcome != "skipped" and report.nodeid.startswith("tests/kernels/"):
        _executed["kernels"] += 1


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"kernel tests executed: {_executed['kernels']}")

"""Shared by all tests: no network, Triton's interpreter where there is no GPU, skips with their reason."""

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import operations
import pytest

try:
    import torch

    CUDA = torch.cuda.is_available()
except ImportError:
    CUDA = False
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


NEEDS = {
    "cuda": (CUDA, "needs a CUDA device; none is here"),
    "vllm": (importlib.util.find_spec("vllm"), "needs vLLM; it is not installed here"),
    "mlx": (importlib.util.find_spec("mlx_lm"), "needs mlx-lm; it is not installed here"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        for marker, (here, reason) in NEEDS.items():
            if marker in item.keywords and not here:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    if operations.done:
        each = ", ".join(f"{number:,} on {what}" for what, number in operations.done.items())
        terminalreporter.write_line(f"{operations.done.total():,} random operations: {each}")

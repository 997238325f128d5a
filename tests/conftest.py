"""Shared by all tests: no network, Triton's interpreter where there is no GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

try:
    import torch

    CUDA = torch.cuda.is_available()
except ImportError:
    CUDA = False
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device; none is here")
    for item in items:
        if "cuda" in item.keywords and not CUDA:
            item.add_marker(skip)

"""First calls of kernels, which compile them, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def make_together(calls: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Make each call in a thread of its own, on the caller's stream, and wait for all; what one raises is raised.

    Triton compiles outside Python's lock, but builds a kernel's graph before that inside: the first calls first, so together
    they take little longer than the slowest if that is the first. In Triton's interpreter, one by one.
    """
    if device.type != "cuda":
        for call in calls:
            call()
        return
    stream = torch.cuda.current_stream(device)

    def make(call: Callable[[], None]) -> None:
        with torch.cuda.stream(stream):
            call()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)  # seconds: nobody else's turn while a graph is built
    try:
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(make, call) for call in calls]:
                done.result()
    finally:
        sys.setswitchinterval(interval)

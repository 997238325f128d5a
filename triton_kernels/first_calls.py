"""First calls of kernels, which compile them, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

HEAD_START = 0.3  # seconds


def make_together(calls: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Make each call in a thread of its own, on the caller's stream, and wait for all; what one raises is raised.

    Triton compiles outside Python's lock, but builds a kernel's graph before that inside. The first call builds its own
    alone, so together they take little longer than the slowest if that is the first. In Triton's interpreter, one by one.
    """
    if device.type != "cuda":
        for call in calls:
            call()
        return
    stream = torch.cuda.current_stream(device)

    def make(call: Callable[[], None]) -> None:
        with torch.cuda.stream(stream):
            call()

    with ThreadPoolExecutor() as pool:
        first, *others = calls
        made = [pool.submit(make, first)]
        wait(made, HEAD_START)
        made += [pool.submit(make, call) for call in others]
        for done in made:
            done.result()

"""How launches follow each other: on Hopper and later the next one starts while this one ends."""

from __future__ import annotations

import functools

import torch
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait", "launches_early"]


@functools.lru_cache(None)
def launches_early(device: torch.device) -> bool:
    """Whether programmatic dependent launch is to be had: a kernel then waits in gdc_wait, not before its start."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9

"""Which masks a model got from our caches: these say no more than the cache itself knows."""

from __future__ import annotations

import weakref
from collections import deque

import mlx.core as mx

_recent: deque[tuple[weakref.ref, int | None]] = deque(maxlen=16)  # a model makes one or two a step


def remember(mask, window_size: int | None):
    """Note that make_mask returned this mask for this sliding window; returns the mask."""
    if isinstance(mask, mx.array):
        _recent.append((weakref.ref(mask), window_size))
    return mask


def sliding_window(mask) -> tuple[bool, int | None]:
    """(whether the mask is one of ours, untouched by the model; its sliding window, if it has one)."""
    if mask is None or isinstance(mask, str):
        return True, None
    for ref, window_size in reversed(_recent):
        if ref() is mask:
            return True, window_size
    return False, None

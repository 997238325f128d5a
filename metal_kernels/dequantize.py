"""Slots -> dense keys and values, for prefill."""

from __future__ import annotations

import mlx.core as mx

from ..core.kv_format import KVFormat
from . import codec, launch, tables
from .store import SIMDGROUPS, vectors_at_once


def dequantize(slots: mx.array, length: int, fmt: KVFormat, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The first `length` tokens of slots [batch, kv_heads, capacity, slot_words], in the basis of the codes.

    Returns keys and values [batch, kv_heads, length, head_dim]; queries and outputs are turned instead of them.
    """
    if not launch.available():
        return tuple(x.astype(dtype) for x in codec.load(slots[:, :, :length], fmt))
    batch, heads, capacity = slots.shape[:3]
    shape = (batch, heads, length, fmt.head_dim)
    keys, values = launch.launch(
        "dequantize",
        {"slots": slots, "tables": tables.decoding(fmt), "sizes": tables.numbers(length, capacity, batch * heads)},
        {"keys": (shape, dtype), "values": (shape, dtype)},
        {"T": dtype, **launch.template(fmt), "SG": SIMDGROUPS},
        (-(-length // (SIMDGROUPS * vectors_at_once(fmt.head_dim))), batch * heads, 1),
        SIMDGROUPS,
    )
    return keys, values

"""New tokens -> slots."""

from __future__ import annotations

import mlx.core as mx

from ..core.kv_format import KVFormat
from . import codec, launch, tables

SIMDGROUPS = 4


def lanes(head_dim: int, coordinates: int = 16) -> int:
    """Lanes of a simdgroup that work on one vector, so many coordinates each (Lanes in common.metal)."""
    return 1 << (head_dim // coordinates - 1).bit_length()


def vectors_at_once(head_dim: int) -> int:
    """Vectors that a simdgroup of 32 lanes works on."""
    return 32 // lanes(head_dim)


def store(keys: mx.array, values: mx.array, fmt: KVFormat) -> mx.array:
    """Rotate, quantize and pack: [batch, kv_heads, tokens, head_dim] -> uint32 [batch, kv_heads, tokens, slot_words]."""
    if not launch.available():
        return codec.store(keys, values, fmt)
    return launch.traced(_store, (fmt, keys.shape), keys, values)


def _store(plan: tuple, keys: mx.array, values: mx.array) -> mx.array:
    fmt, _ = plan
    count = keys.size // fmt.head_dim
    (slots,) = launch.launch(
        "store",
        {"keys": keys, "values": values, "tables": tables.encoding(fmt), "count": tables.numbers(count)},
        {"slots": ((*keys.shape[:3], codec.slot_words(fmt)), mx.uint32)},
        {"T": keys.dtype, **launch.template(fmt), "SG": SIMDGROUPS},
        (-(-count // (SIMDGROUPS * vectors_at_once(fmt.head_dim))), 1, 1),
        SIMDGROUPS,
    )
    return slots

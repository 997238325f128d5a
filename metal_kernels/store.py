"""New tokens -> slots."""

from __future__ import annotations

import mlx.core as mx

from ..core.kv_format import KVFormat
from . import codec, launch, tables

SIMDGROUPS = 4


def vectors_at_once(head_dim: int) -> int:
    """Vectors that a simdgroup of 32 lanes works on, each in a power of two of lanes (Lanes in common.metal)."""
    return 32 >> (head_dim // 16 - 1).bit_length()


def store(keys: mx.array, values: mx.array, fmt: KVFormat) -> mx.array:
    """Rotate, quantize and pack: [batch, kv_heads, tokens, head_dim] -> uint32 [batch, kv_heads, tokens, slot_words]."""
    if not launch.available():
        return codec.store(keys, values, fmt)
    return launch.traced(_store, (fmt, keys.shape, False), keys, values)[0]


def store_and_join(keys: mx.array, values: mx.array, fmt: KVFormat) -> tuple[mx.array, mx.array]:
    """What store gives, and keys and values as they came, [batch, 2 kv_heads, tokens, head_dim], by the same launch."""
    if not launch.available():
        return codec.store(keys, values, fmt), mx.concatenate([keys, values], 1)
    return launch.traced(_store, (fmt, keys.shape, True), keys, values)


def _store(plan: tuple[KVFormat, tuple[int, ...], bool], keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    fmt, (batch, heads, tokens, head_dim), join = plan
    count = batch * heads * tokens
    slots, joined = launch.launch(
        "store",
        {"keys": keys, "values": values, "tables": tables.encoding(fmt), "sizes": tables.numbers(count, heads * tokens)},
        {
            "slots": ((batch, heads, tokens, codec.slot_words(fmt)), mx.uint32),
            "joined": ((batch, 2 * heads, tokens, head_dim) if join else (1,), keys.dtype),
        },
        {"T": keys.dtype, **launch.template(fmt), "SG": SIMDGROUPS, "JOIN": int(join)},
        (-(-count // (SIMDGROUPS * vectors_at_once(head_dim))), 1, 1),
        SIMDGROUPS,
    )  # fmt: skip
    return slots, joined

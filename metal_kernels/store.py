"""New tokens -> slots."""

from __future__ import annotations

import mlx.core as mx

from ..core.kv_format import KVFormat
from . import codec


def store(keys: mx.array, values: mx.array, fmt: KVFormat) -> mx.array:
    """Rotate, quantize and pack: [batch, kv_heads, tokens, head_dim] -> uint32 [batch, kv_heads, tokens, slot_words]."""
    return codec.store(keys, values, fmt)

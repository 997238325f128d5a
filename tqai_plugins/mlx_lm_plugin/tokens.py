"""What update_and_fetch hands to a model in place of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..core.kv_format import KVFormat
from .key_mean import KeyMean


class Tokens(NamedTuple):
    """All tokens of a layer after an update; the arrays are the cache's own, with their spare room.

    Every row ends at column `length`; row b begins at column padding[b]. `exact` arrays hold keys in the first half
    of axis 1 and values in the second.
    """

    fmt: KVFormat
    dtype: mx.Dtype
    slots: mx.array  # uint32 [batch, kv_heads, capacity, slot_words]
    length: int
    new: int  # tokens of this update, the last ones
    window: int  # a query reads so many newest tokens exactly, itself included
    recent: mx.array | None  # [batch, 2 kv_heads, count, head_dim]: columns length - count to length, as a ring
    ring: int  # place of the oldest in `recent`
    sinks: mx.array | None  # [batch, 2 kv_heads, sink_tokens, head_dim]: first tokens of each row
    rows: mx.array  # tables.rows of padding, and the first column of which `recent` holds more than room
    mean: KeyMean | None = None  # what keys were less before they were coded

    @property
    def recent_count(self) -> int:
        """Tokens in `recent`."""
        return 0 if self.recent is None else self.recent.shape[2]

    @property
    def sink_count(self) -> int:
        """Tokens in `sinks`."""
        return 0 if self.sinks is None else self.sinks.shape[2]


class Operand:
    """Keys or values as the model holds them: codes, which only attention can read."""

    __slots__ = ("tokens",)
    ndim = 4

    def __init__(self, tokens: Tokens):
        self.tokens = tokens

    @property
    def shape(self) -> tuple[int, ...]:
        """[batch, kv_heads, tokens, head_dim] of the keys or values that this stands for."""
        slots = self.tokens.slots
        return (slots.shape[0], slots.shape[1], self.tokens.length, self.tokens.fmt.head_dim)

    @property
    def dtype(self) -> mx.Dtype:
        """Of the keys or values that this stands for."""
        return self.tokens.dtype

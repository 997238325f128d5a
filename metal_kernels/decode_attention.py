"""Attention of one new token of every sequence over slots and the exact tokens that lie over them."""

from __future__ import annotations

import math

import mlx.core as mx

from ..core.kv_format import KVFormat
from . import launch, tables
from .store import lanes

HEADS_AT_ONCE = 4  # query heads that share a reading of the slots, a power of two
TOKENS_AT_ONCE = 4  # tokens that lanes take at once, a power of two
NUMBERS = 64  # of queries and sums, each in a lane's registers
THREADGROUPS = 528  # four on each of an H100's 132 multiprocessors, all there at once
MERGE_SIMDGROUPS = 16


def decode_attention(
    queries: mx.array,
    slots: mx.array,
    length: int,
    fmt: KVFormat,
    rows: mx.array,
    *,
    scale: float,
    recent: mx.array | None = None,
    ring: int = 0,
    sinks: mx.array | None = None,
    first: int = 0,
    extra: mx.array | None = None,
    bias: mx.array | None = None,
    splits: int | None = None,
) -> mx.array:
    """queries [batch, q_heads, 1, head_dim] -> the same shape.

    slots uint32 [batch, kv_heads, capacity, slot_words], of which `length` columns are filled; the newest is the
    query's own. recent [batch, 2 kv_heads, count, head_dim]: the newest columns exactly, as a ring whose oldest lies
    at `ring`; sinks [batch, 2 kv_heads, count, head_dim]: the first tokens of each sequence; keys in the first half.
    rows int32 [2, batch]: first column of each sequence, and the first that `recent` really holds. Columns before
    `first` are not seen (sliding window). extra [q_heads]: logits without a value, or None. bias float32
    [batch, q_heads, length]: what scores of codes gain, by their place in their sequence, times log2(e), or None.
    splits: threadgroups that share a head's codes; by default as many as fill the machine.
    """
    batch, q_heads, _, head_dim = queries.shape
    heads = slots.shape[1]
    group = q_heads // heads
    coordinates = 8 if head_dim <= 256 else 16
    across = lanes(head_dim, coordinates)  # lanes of one vector
    together = min(HEADS_AT_ONCE, across, NUMBERS // 2 // coordinates, 1 << (group - 1).bit_length())
    tokens = min(TOKENS_AT_ONCE, across // together)
    blocks = -(-group // together)
    simdgroups = max(1, min(4, 4096 // (together * head_dim)))  # 16 KiB of threadgroup memory
    exact = recent is not None or sinks is not None
    if splits is None:
        at_once = simdgroups * 32 // across * tokens
        splits = max(1, min(-(-length // at_once), THREADGROUPS // (batch * heads * blocks) - exact))
    dtype = next((x.dtype for x in (recent, sinks) if x is not None), queries.dtype)
    none = tables.nothing(dtype)
    counts = [0 if x is None else x.shape[2] for x in (recent, sinks)]
    parts = splits + exact
    sums, stats = launch.launch(
        "decode_attention",
        {
            "q": queries, "slots": slots, "recent": none if recent is None else recent,
            "sinks": none if sinks is None else sinks,
            "tables": tables.attention(fmt, scale * math.log2(math.e)),
            "bias": tables.nothing(mx.float32) if bias is None else bias,
            "sizes": tables.numbers(length, splits, slots.shape[2], counts[0], ring, counts[1], first, heads, batch),
            "rows": rows,
        },
        {"sums": ((batch, q_heads, parts, head_dim), mx.float32), "stats": ((batch, q_heads, parts, 2), mx.float32)},
        {
            "T": queries.dtype, "E": dtype, **launch.template(fmt), "GROUP": group,
            "G": together, "U": tokens, "PER": coordinates, "SG": simdgroups, "EXACT": int(exact),
            "BIAS": int(bias is not None),
        },
        (parts, heads * blocks, batch),
        simdgroups,
    )  # fmt: skip
    return merge(sums, stats, fmt, splits, exact, extra, queries.dtype)


def merge(
    sums: mx.array, stats: mx.array, fmt: KVFormat, splits: int, exact: bool, extra: mx.array | None, dtype: mx.Dtype
) -> mx.array:
    """sums [batch, q_heads, parts, head_dim] and stats [.., 2] of decode_attention -> [batch, q_heads, 1, head_dim]."""
    batch, q_heads, _, head_dim = sums.shape
    logits = tables.attention(fmt, 1.0) if extra is None else extra.astype(mx.float32) * math.log2(math.e)
    simdgroups = min(MERGE_SIMDGROUPS, 4096 // head_dim)  # 16 KiB of threadgroup memory
    (out,) = launch.launch(
        "merge",
        {
            "sums": sums, "stats": stats, "tables": tables.attention(fmt, 1.0), "extra": logits,
            "sizes": tables.numbers(splits, q_heads),
        },
        {"out": ((batch, q_heads, 1, head_dim), dtype)},
        {"T": dtype, "D": head_dim, "SG": simdgroups, "EXACT": int(exact), "SINKS": int(extra is not None)},
        (q_heads, batch, 1),
        simdgroups,
    )  # fmt: skip
    return out

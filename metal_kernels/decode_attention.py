"""Attention of one new token of every sequence over slots and the exact tokens that lie over them."""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx

from ..core.kv_format import KVFormat
from . import launch, tables

SIMDGROUPS = 4
TOKENS_AT_ONCE = SIMDGROUPS * 2 * launch.TILE  # of a threadgroup
THREADGROUPS = 396  # three on each of an H100's 132 multiprocessors: more cost more to begin, end and merge than they save
MERGE_SIMDGROUPS = 8


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
    rows: as tables.rows makes them, of the first column of each sequence and the first that `recent` really holds. Columns before
    `first` are not seen (sliding window). extra [q_heads]: logits without a value, or None. bias float32
    [batch, q_heads, length or more]: what scores of codes gain, by their place in their sequence, times log2(e), or None.
    splits: threadgroups that share a head's codes; by default as many as fill the machine.
    """
    batch, q_heads, _, _ = queries.shape
    _, heads, capacity, _ = slots.shape
    exact, counts = recent is not None or sinks is not None, [0 if x is None else x.shape[2] for x in (recent, sinks)]
    positions = 0 if bias is None else bias.shape[2]
    if splits is None:
        most = THREADGROUPS // (batch * heads * _blocks(q_heads // heads)) - exact
        splits = max(1, min(-(-length // TOKENS_AT_ONCE), most))
    sizes = tables.numbers(length, splits, capacity, counts[0], ring, counts[1], first, positions)
    plan = _Plan(fmt, scale, splits, queries.shape, slots.shape, *counts, positions)
    return launch.traced(_attend, plan, queries, slots, sizes, rows, recent, sinks, extra, bias)


def _blocks(group: int) -> int:
    """Threadgroups that the query heads of a KV head take: rows of the matrix unit's tiles."""
    return -(-group // launch.TILE)


class _Plan(NamedTuple):
    """What launches depend on: the same for all layers of a step, and mostly for the next step."""

    fmt: KVFormat
    scale: float
    splits: int
    queries: tuple[int, ...]
    slots: tuple[int, ...]
    recent: int
    sinks: int
    positions: int  # of the bias


def _attend(plan: _Plan, queries, slots, sizes, rows, recent, sinks, extra, bias) -> mx.array:
    fmt, splits = plan.fmt, plan.splits
    batch, q_heads, _, head_dim = queries.shape
    heads = slots.shape[1]
    exact = recent is not None or sinks is not None
    dtype = next((x.dtype for x in (recent, sinks) if x is not None), queries.dtype)
    none = tables.nothing(dtype)
    parts = splits + exact
    sums, stats = launch.launch(
        "decode_attention",
        {
            "q": queries, "slots": slots, "recent": none if recent is None else recent,
            "sinks": none if sinks is None else sinks,
            "tables": tables.attention(fmt, plan.scale * math.log2(math.e)),
            "bias": tables.nothing(mx.float32) if bias is None else bias, "sizes": sizes, "rows": rows,
        },
        {"sums": ((batch, q_heads, parts, head_dim), mx.float32), "stats": ((batch, q_heads, parts, 2), mx.float32)},
        {
            "T": queries.dtype, "E": dtype, **launch.template(fmt), "GROUP": q_heads // heads,
            "SG": SIMDGROUPS, "EXACT": int(exact), "BIAS": int(bias is not None),
        },
        (parts, heads * _blocks(q_heads // heads), batch),
        SIMDGROUPS,
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
            "sizes": tables.numbers(splits),
        },
        {"out": ((batch, q_heads, 1, head_dim), dtype)},
        {"T": dtype, "D": head_dim, "SG": simdgroups, "EXACT": int(exact), "SINKS": int(extra is not None)},
        (q_heads, batch, 1),
        simdgroups,
    )  # fmt: skip
    return out

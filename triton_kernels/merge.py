"""Combine splits by log-sum-exp, rotate back and write the model's dtype: the end of attention where splits are few,
else the launch after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tqai_plugins.core.kv_format import RECENT_PAGE_TOKENS, SCALE_DENOMINATOR

from . import device_tables
from .rotation import rotate_back

TILE = RECENT_PAGE_TOKENS  # tokens that attention reads at a time
MERGED_SPLITS = 16  # up to so many are merged by the program that is done last, more by a launch of their own
LANES = 128  # splits of a row that a program reads at a time
WARPS = 8


@triton.jit
def shares(length, num_splits, window, query_len, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """How a sequence is split: the first tile that is seen, tiles a split, and the splits that have any, at least one."""
    first = 0
    if WINDOW:
        first = tl.maximum(length - query_len - window + 1, 0) // TILE
    tiles = tl.cdiv(length, TILE) - first
    each = tl.maximum(tl.cdiv(tiles, num_splits), 1)
    return first, each, tl.maximum(tl.cdiv(tiles, each), 1)


@triton.jit
def _combine(
    partial, lse, row, valid, top, num_splits, splits,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):
    """Of each row its first `splits` of num_splits under the largest log-sum-exp, no less than `top` [ROWS]: the sum of
    weighted results [ROWS, DP], the sum of weights [ROWS], and that log-sum-exp [ROWS], base 2."""
    d = tl.arange(0, DP)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for first in range(0, splits, LANES):
        split = first + tl.arange(0, LANES)
        at = row[:, None] * num_splits + split[None, :]
        inside = valid[:, None] & (split < splits)[None, :]
        e = tl.load(lse + at, mask=inside, other=-1e30)
        part = tl.load(
            partial + at[:, :, None] * D + d[None, None, :], mask=inside[:, :, None] & (d < D)[None, None, :], other=0.0
        )
        new_top = tl.maximum(top, tl.max(e, 1))
        # 0 for a split that saw no token, NaN for one that saw a flagged vector.
        w = tl.where(e != e, e, tl.where(e > -1e29, tl.exp2(e - new_top[:, None]), 0.0))
        decay = tl.exp2(top - new_top)
        top = new_top
        total = total * decay + tl.sum(w, 1)
        acc = acc * decay[:, None] + tl.sum(part * w[:, :, None], 1)
    return acc, total, top


@triton.jit
def finish(
    partial, lse, row, valid, num_splits, splits, out_ptr, out_stride, sinks, lse_out, signs,
    NUM_Q_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    SINKS: tl.constexpr, LSE_OUT: tl.constexpr, SCALE_DENOMINATOR: tl.constexpr,
):
    """Write the results of (token, query head) rows [ROWS], int64, once all of their splits are there."""
    d = tl.arange(0, DP)
    sign = tl.load(signs + d)
    top = tl.full([ROWS], -1e30, tl.float32)
    if SINKS:
        sink = tl.load(sinks + row % NUM_Q_HEADS, mask=valid, other=0.0) * 1.4426950408889634
        top = sink
    acc, total, top = _combine(partial, lse, row, valid, top, num_splits, splits, D, DP, ROWS, LANES)
    if SINKS:
        total += tl.exp2(sink - top)
    if LSE_OUT:
        tl.store(lse_out + row, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)
    y = rotate_back(acc * (1.0 / SCALE_DENOMINATOR / tl.where(total == 0, 1.0, total))[:, None], sign, D, DP)
    out = out_ptr + (row // NUM_Q_HEADS) * out_stride + (row % NUM_Q_HEADS) * D
    tl.store(out[:, None] + d[None, :], y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["num_splits", "window", "query_len"], do_not_specialize_on_alignment=["seq_lens"])
def _merge_kernel(
    partial, lse, seq_lens, out_ptr, sinks, lse_out, signs, num_splits, window, query_len, out_stride,
    NUM_Q_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    MERGED_SPLITS: tl.constexpr, LANES: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, LSE_OUT: tl.constexpr,
    SCALE_DENOMINATOR: tl.constexpr,
):
    length = tl.load(seq_lens + tl.program_id(0) // (query_len * NUM_Q_HEADS))
    _, _, splits = shares(length, num_splits, window, query_len, WINDOW, TILE)
    if splits > MERGED_SPLITS:
        row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
        finish(partial, lse, row, row >= 0, num_splits, splits, out_ptr, out_stride, sinks, lse_out, signs,
               NUM_Q_HEADS, D, DP, 1, LANES, SINKS, LSE_OUT, SCALE_DENOMINATOR)


def merge(
    partial: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    num_splits: int,
    *,
    query_len: int = 1,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    lse_out: torch.Tensor | None = None,
) -> None:
    """Of sequences with tokens in more than MERGED_SPLITS splits merge partial float32 [rows, num_splits, head_dim], in units of
    1 / SCALE_DENOMINATOR, with lse float32 [rows, num_splits] (base 2) into output [tokens, q_heads, head_dim], rows being
    (token, query head) pairs in the rotated basis.

    seq_lens int32 [sequences], query_len tokens of each; the rest as for decode_attention. lse_out float32 [tokens,
    q_heads], natural.
    """
    num_tokens, num_q_heads, head_dim = output.shape
    rows = num_tokens * num_q_heads
    if rows == 0:
        return
    padded = triton.next_power_of_2(head_dim)
    _merge_kernel[(rows,)](
        partial, lse, seq_lens, output, lse if sinks is None else sinks, lse if lse_out is None else lse_out,
        device_tables.signs(head_dim, padded, output.device), num_splits, sliding_window or 0, query_len, output.stride(0),
        num_q_heads, head_dim, padded, TILE, MERGED_SPLITS, LANES, sliding_window is not None, sinks is not None,
        lse_out is not None, SCALE_DENOMINATOR, num_warps=WARPS,
    )

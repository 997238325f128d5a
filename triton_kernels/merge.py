"""Combine splits by log-sum-exp, rotate back and write the model's dtype: the launch after attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device_tables

PARTS = 32  # partial results a program reads at a time: some rows times some of their splits
WARPS = 4
# Numbers of splits for which the kernel is compiled; others share theirs.
MERGE_VARIANTS = (1, 2, 4, 8, 16, 32, 64, 128)


@triton.jit
def _load_parts(
    partial, lse, row, valid, split, num_splits, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Of each row some splits: log-sum-exp [ROWS, LANES] and results [ROWS * LANES, DP]."""
    d = tl.arange(0, DP)
    at = row[:, None] * num_splits + split[None, :]
    inside = valid[:, None] & (split < num_splits)[None, :]
    e = tl.load(lse + at, mask=inside, other=-1e30)
    part = tl.load(
        partial + tl.reshape(at, [ROWS * LANES])[:, None] * D + d[None, :],
        mask=tl.reshape(inside, [ROWS * LANES])[:, None] & (d < D)[None, :], other=0.0,
    )
    return e, part


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge_kernel(
    partial, lse, out_ptr, sinks, lse_out, hadamard, norms, num_rows, num_splits, out_stride, value_unit,
    NUM_Q_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHUNKS: tl.constexpr, SINKS: tl.constexpr, LSE_OUT: tl.constexpr,
):
    # ROWS (token, query head) rows; lane i of a row adds up splits i, i + LANES, ... Rotating back is
    # linear, so the lanes are rotated by one matrix product and only then added.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = row < num_rows
    lane = tl.arange(0, LANES)
    d = tl.arange(0, DP)
    # Asked for before the matrix, whose way into shared memory waits for it; later parts before those here are used.
    e, part = _load_parts(partial, lse, row, valid, lane, num_splits, D, DP, ROWS, LANES)
    matrix = tl.load(hadamard + d[:, None] * DP + d[None, :])
    norm = tl.load(norms + d)
    top = tl.full([ROWS], -1e30, tl.float32)
    if SINKS:
        sink = tl.load(sinks + row % NUM_Q_HEADS, mask=valid, other=0.0) * 1.4426950408889634
        top = sink
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS * LANES, DP], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        next_e, next_part = e, part
        if chunk + 1 < CHUNKS:
            split = (chunk + 1) * LANES + lane
            next_e, next_part = _load_parts(partial, lse, row, valid, split, num_splits, D, DP, ROWS, LANES)
        new_top = tl.maximum(top, tl.max(e, 1))
        # 0 for a split that saw no token, NaN for one that saw a flagged vector.
        w = tl.where(e != e, e, tl.where(e > -1e29, tl.exp2(e - new_top[:, None]), 0.0))
        if CHUNKS > 1:
            decay = tl.exp2(top - new_top)
            total *= decay
            acc *= tl.reshape(tl.broadcast_to(decay[:, None], [ROWS, LANES]), [ROWS * LANES])[:, None]
        top = new_top
        total += tl.sum(w, 1)
        acc += part * tl.reshape(w, [ROWS * LANES])[:, None]
        e, part = next_e, next_part
    if SINKS:
        total += tl.exp2(sink - top)
    if LSE_OUT:
        tl.store(lse_out + row, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)
    acc = acc * norm[None, :]
    # The matrix of +1 and -1 is exact; two halves keep float32's precision of acc.
    hi = acc.to(matrix.dtype)
    lo = (acc - hi.to(tl.float32)).to(matrix.dtype)
    turned = tl.dot(hi, matrix, input_precision="ieee") + tl.dot(lo, matrix, input_precision="ieee")
    turned = tl.sum(tl.reshape(turned, [ROWS, LANES, DP]), 1)
    turned = turned * (value_unit / tl.where(total == 0, 1.0, total))[:, None]
    out = out_ptr + (row // NUM_Q_HEADS) * out_stride + (row % NUM_Q_HEADS) * D
    inside = valid[:, None] & (d < D)[None, :]
    tl.store(out[:, None] + d[None, :], turned.to(out_ptr.dtype.element_ty), mask=inside)


def merge(
    partial: torch.Tensor,
    lse: torch.Tensor,
    output: torch.Tensor,
    num_splits: int,
    *,
    sinks: torch.Tensor | None = None,
    lse_out: torch.Tensor | None = None,
    value_unit: float = 1.0,
) -> None:
    """Merge partial float32 [rows, num_splits, head_dim] with lse float32 [rows, num_splits] (base 2)
    into output [tokens, q_heads, head_dim], rows being (token, query head) pairs in the rotated basis.

    sinks float32 [q_heads]: logits without a value. lse_out float32 [tokens, q_heads], natural.
    """
    num_tokens, num_q_heads, head_dim = output.shape
    rows = num_tokens * num_q_heads
    if rows == 0:
        return
    padded = triton.next_power_of_2(head_dim)
    variant = triton.next_power_of_2(num_splits)
    lanes = min(PARTS, variant)
    # The interpreter multiplies bfloat16 wrongly; with float32 the low half is simply zero.
    matrix_dtype = torch.bfloat16 if output.device.type == "cuda" else torch.float32
    _merge_kernel[(triton.cdiv(rows * lanes, PARTS),)](
        partial, lse, output, lse if sinks is None else sinks, lse if lse_out is None else lse_out,
        device_tables.signed_hadamard(head_dim, padded, matrix_dtype, output.device, back=True),
        device_tables.norms(head_dim, padded, output.device),
        rows, num_splits, output.stride(0), value_unit,
        num_q_heads, head_dim, padded, PARTS // lanes, lanes, variant // lanes,
        sinks is not None, lse_out is not None, num_warps=WARPS,
    )

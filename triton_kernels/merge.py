"""Combine splits by log-sum-exp, rotate back and write the model's dtype: the launch after attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device_tables

MANY_SPLITS = 8
CHUNK = 32  # splits read at a time where there are many
ROWS = 16  # rows a program where there are few: the smallest tile of the matrix unit


@triton.jit
def _finish(acc, total, top, sink, row, valid, out_ptr, lse_out, out_stride, value_unit,
            NUM_Q_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SINKS: tl.constexpr, LSE_OUT: tl.constexpr):
    """Divide, and hand out where and with what factor a row is written."""
    if SINKS:
        total += tl.exp2(sink - top)
    if LSE_OUT:
        tl.store(lse_out + row, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)
    at = (row // NUM_Q_HEADS) * out_stride + (row % NUM_Q_HEADS) * D
    return value_unit / tl.where(total == 0, 1.0, total), out_ptr + at


@triton.jit
def _weight(e, top):
    """exp2(e - top); 0 for a split that saw no token, NaN for one that saw a flagged vector."""
    return tl.where(e != e, e, tl.where(e > -1e29, tl.exp2(e - top), 0.0))


@triton.jit
def _merge_few_kernel(
    partial, lse, out_ptr, sinks, lse_out, hadamard, norms, num_rows, num_splits, out_stride, value_unit,
    NUM_Q_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    SINKS: tl.constexpr, LSE_OUT: tl.constexpr,
):
    # ROWS (token, query head) rows a program, split by split; one matrix product rotates them back.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = row < num_rows
    d = tl.arange(0, DP)
    inside = valid[:, None] & (d < D)[None, :]
    top = tl.full([ROWS], -1e30, tl.float32)
    sink = top
    if SINKS:
        sink = tl.load(sinks + row % NUM_Q_HEADS, mask=valid, other=0.0) * 1.4426950408889634
        top = sink
    for split in range(num_splits):
        top = tl.maximum(top, tl.load(lse + row * num_splits + split, mask=valid, other=-1e30))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for split in range(num_splits):
        at = row * num_splits + split
        w = _weight(tl.load(lse + at, mask=valid, other=-1e30), top)
        part = tl.load(partial + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        acc += part * w[:, None]
        total += w
    factor, out = _finish(acc, total, top, sink, row, valid, out_ptr, lse_out, out_stride, value_unit,
                          NUM_Q_HEADS, D, DP, SINKS, LSE_OUT)
    acc = acc * factor[:, None] * tl.load(norms + d)[None, :]
    # The transposed matrix of +1 and -1 is exact; two halves keep float32's precision of acc.
    matrix = tl.load(hadamard + d[None, :] * DP + d[:, None])
    hi = acc.to(matrix.dtype)
    lo = (acc - hi.to(tl.float32)).to(matrix.dtype)
    turned = tl.dot(hi, matrix, input_precision="ieee") + tl.dot(lo, matrix, input_precision="ieee")
    tl.store(out[:, None] + d[None, :], turned.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _merge_many_kernel(
    partial, lse, out_ptr, sinks, lse_out, hadamard, norms, num_splits, out_stride, value_unit,
    NUM_Q_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
    SINKS: tl.constexpr, LSE_OUT: tl.constexpr,
):
    # One row a program, CHUNK splits at a time.
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    c = tl.arange(0, CHUNK)
    top = tl.full([], -1e30, tl.float32)
    sink = top
    if SINKS:
        sink = tl.load(sinks + row % NUM_Q_HEADS) * 1.4426950408889634
        top = sink
    for start in range(0, num_splits, CHUNK):
        e = tl.load(lse + row * num_splits + start + c, mask=start + c < num_splits, other=-1e30)
        top = tl.maximum(top, tl.max(e, 0))
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([DP], tl.float32)
    for start in range(0, num_splits, CHUNK):
        inside = start + c < num_splits
        at = row * num_splits + start + c
        w = _weight(tl.load(lse + at, mask=inside, other=-1e30), top)
        part = tl.load(partial + at[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        acc += tl.sum(part * w[:, None], 0)
        total += tl.sum(w, 0)
    factor, out = _finish(acc, total, top, sink, row, True, out_ptr, lse_out, out_stride, value_unit,
                          NUM_Q_HEADS, D, DP, SINKS, LSE_OUT)
    acc = acc * factor * tl.load(norms + d)
    matrix = tl.load(hadamard + d[:, None] * DP + d[None, :]).to(tl.float32)
    turned = tl.sum(matrix * acc[None, :], 1)
    tl.store(out + d, turned.to(out_ptr.dtype.element_ty), mask=d < D)


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
    # The interpreter multiplies bfloat16 wrongly; with float32 the low half is simply zero.
    matrix_dtype = torch.bfloat16 if output.device.type == "cuda" else torch.float32
    tensors = (
        partial, lse, output, lse if sinks is None else sinks, lse if lse_out is None else lse_out,
        device_tables.signed_hadamard(head_dim, padded, matrix_dtype, output.device),
        device_tables.norms(head_dim, padded, output.device),
    )
    flags = (sinks is not None, lse_out is not None)
    if num_splits > MANY_SPLITS:
        _merge_many_kernel[(rows,)](
            *tensors, num_splits, output.stride(0), value_unit, num_q_heads, head_dim, padded, CHUNK, *flags, num_warps=4
        )
    else:
        _merge_few_kernel[(triton.cdiv(rows, ROWS),)](
            *tensors, rows, num_splits, output.stride(0), value_unit, num_q_heads, head_dim, padded, ROWS, *flags,
            num_warps=4,
        )

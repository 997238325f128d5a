"""Combine splits by log-sum-exp, rotate back and write the model's dtype: the launch after attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device_tables

LN_2 = 0.6931471805599453


@triton.jit
def _merge_kernel(
    partial, lse, out_ptr, sinks, lse_out, hadamard, norms, num_rows, num_splits, out_stride, value_unit,
    NUM_Q_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    SINKS: tl.constexpr, LSE_OUT: tl.constexpr,
):
    # One program merges ROWS (token, query head) rows; splits are read CHUNK at a time.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    d = tl.arange(0, DP)
    c = tl.arange(0, CHUNK)
    row64 = row.to(tl.int64)
    top = tl.full([ROWS], -1e30, tl.float32)
    if SINKS:
        sink = tl.load(sinks + row % NUM_Q_HEADS, mask=valid, other=0.0) * 1.4426950408889634
        top = sink
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for start in range(0, num_splits, CHUNK):
        split = start + c
        inside = valid[:, None] & (split < num_splits)[None, :]
        at = row64[:, None] * num_splits + split[None, :]
        e = tl.load(lse + at, mask=inside, other=-1e30)
        top_new = tl.maximum(top, tl.max(e, 1))
        decay = tl.exp2(top - top_new)
        w = tl.where(e > -1e29, tl.exp2(e - top_new[:, None]), 0.0)
        w = tl.where(e != e, e, w)
        part = tl.load(
            partial + at[:, :, None] * D + d[None, None, :],
            mask=inside[:, :, None] & (d < D)[None, None, :], other=0.0,
        )
        acc = acc * decay[:, None] + tl.sum(part * w[:, :, None], 1)
        total = total * decay + tl.sum(w, 1)
        top = top_new
    if SINKS:
        total += tl.exp2(sink - top)
    acc = acc * (value_unit / tl.where(total == 0, 1.0, total))[:, None]
    # Rotating back is the transposed matrix; its +1 and -1 are exact, sums are float32.
    acc = acc * tl.load(norms + d)[None, :]
    if ROWS == 1:
        matrix = tl.load(hadamard + d[:, None] * DP + d[None, :]).to(tl.float32)
        turned = tl.sum(matrix * tl.reshape(acc, [DP])[None, :], 1)[None, :]
    else:
        matrix = tl.load(hadamard + d[None, :] * DP + d[:, None])
        hi = acc.to(matrix.dtype)
        lo = (acc - hi.to(tl.float32)).to(matrix.dtype)
        turned = tl.dot(hi, matrix, input_precision="ieee") + tl.dot(lo, matrix, input_precision="ieee")
    at = (row64 // NUM_Q_HEADS) * out_stride + (row64 % NUM_Q_HEADS) * D
    tl.store(
        out_ptr + at[:, None] + d[None, :], turned.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :]
    )
    if LSE_OUT:
        tl.store(lse_out + row, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)


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

    Many splits of few rows: a row a program, read 32 splits at a time. Otherwise 16 rows a program
    share one matrix product. sinks float32 [q_heads]; lse_out float32 [tokens, q_heads], natural.
    """
    num_tokens, num_q_heads, head_dim = output.shape
    rows = num_tokens * num_q_heads
    if rows == 0:
        return
    padded = triton.next_power_of_2(head_dim)
    # The interpreter multiplies bfloat16 wrongly; with float32 the low half is simply zero.
    matrix_dtype = torch.bfloat16 if output.device.type == "cuda" else torch.float32
    alone = num_splits > 8 and rows <= 2048
    rows_a_program, chunk = (1, 32) if alone else (16, 2)
    _merge_kernel[(triton.cdiv(rows, rows_a_program),)](
        partial, lse, output, sinks if sinks is not None else lse, lse_out if lse_out is not None else lse,
        device_tables.signed_hadamard(head_dim, padded, matrix_dtype, output.device),
        device_tables.norms(head_dim, padded, output.device),
        rows, num_splits, output.stride(0), value_unit,
        num_q_heads, head_dim, padded, rows_a_program, chunk, sinks is not None, lse_out is not None,
        num_warps=4,
    )

"""Pages -> dense keys and values, for prefill over a cached prefix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tqai_plugins.core.key_mean import COLUMNS
from tqai_plugins.core.kv_format import SCALE_DENOMINATOR, KVFormat

from . import device_tables
from .key_mean import mean_arguments, mean_term
from .rotation import norms
from .unpack import load_levels

TILE = 64  # tokens a program


@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_table", "starts", "ends", "out_starts"]
)
def _dequantize_kernel(
    pages, block_table, starts, ends, out_starts, k_out, v_out, k_levels, v_levels, hadamard,
    mean_table, mean_coefficients, mean_columns,
    table_stride, page_stride, head_stride, k_stride, v_stride,
    D: tl.constexpr, DP: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr, K_BYTES: tl.constexpr,
    V_CODES: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    SCALE_DENOMINATOR: tl.constexpr, ROTATED: tl.constexpr, MEAN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(starts + sequence)
    end = tl.load(ends + sequence)
    token = start + tl.program_id(2) * TILE + tl.arange(0, TILE)
    valid = token < end
    d = tl.arange(0, DP)
    block = tl.load(block_table + sequence * table_stride + token // PAGE, mask=valid, other=-1)
    valid = valid & (block >= 0)
    block = tl.maximum(block, 0)
    page = pages + block.to(tl.int64) * page_stride + head * head_stride
    in_page = token % PAGE
    inside = valid[:, None] & (d < D)[None, :]
    row = (tl.load(out_starts + sequence) + token - start).to(tl.int64)
    if not ROTATED:
        matrix = tl.load(hadamard + d[:, None] * DP + d[None, :])
    for part in tl.static_range(2):
        if part == 0:
            level = load_levels((page + in_page * K_BYTES)[:, None], d[None, :], 1, k_levels, inside, BITS_K, D)
            scale = tl.load((page + K_SCALES + 2 * in_page).to(tl.pointer_type(tl.float16)), mask=valid, other=0.0)
            out = k_out + row * k_stride
        else:
            level = load_levels((page + V_CODES + in_page)[:, None], d[None, :], PAGE, v_levels, inside, BITS_V, D)
            scale = tl.load((page + V_SCALES + 2 * in_page).to(tl.pointer_type(tl.float16)), mask=valid, other=0.0)
            out = v_out + row * v_stride
        value = level.to(tl.float32) + 0.5
        # Half-integers below 128 and +-1 are exact in bfloat16: for so many rows the matrix unit beats a butterfly.
        if not ROTATED:
            value = tl.dot(value.to(matrix.dtype), matrix, input_precision="ieee") * norms(D, DP)
        value = value * (scale.to(tl.float32) / SCALE_DENOMINATOR)[:, None]
        if MEAN and part == 0:
            heads = tl.zeros([TILE], tl.int32) + head
            value += mean_term(mean_table, mean_coefficients, mean_columns, token, heads, inside, D, DP, COLUMNS)
        tl.store((out + head * D)[:, None] + d[None, :], value.to(k_out.dtype.element_ty), mask=inside)


def dequantize(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out_starts: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    fmt: KVFormat,
    page_tokens: int,
    max_tokens: int,
    *,
    rotated: bool = True,
    mean=None,
) -> None:
    """Tokens [starts, ends) of each sequence as dense vectors, rotated as they are stored or as they were, one launch.

    pages uint8 [num_pages, kv_heads, page_bytes]; block_table int32 [sequences, pages], tokens of page -1 are
    left out; starts, ends
    and out_starts int32 [sequences]: tokens of sequence i go to rows out_starts[i] and on of k_out and
    v_out [rows, kv_heads, head_dim], float. max_tokens is at least the longest range. mean: the torch_kernels.KeyMean
    that was taken off the keys; not for rotated ones (ValueError).
    """
    if rotated and mean is not None:
        raise ValueError("a key mean is added to vectors as they were; ask for rotated=False")
    num_sequences = starts.shape[0]
    if num_sequences == 0 or max_tokens == 0:
        return
    head_dim = fmt.head_dim
    padded = triton.next_power_of_2(head_dim)
    layout = fmt.page_layout(page_tokens)
    device = pages.device
    # The interpreter multiplies bfloat16 wrongly.
    matrix_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    _dequantize_kernel[(num_sequences, pages.shape[1], triton.cdiv(max_tokens, TILE))](
        pages, block_table, starts, ends, out_starts, k_out, v_out,
        device_tables.levels(head_dim, fmt.bits_k, device), device_tables.levels(head_dim, fmt.bits_v, device),
        device_tables.back_matrix(head_dim, padded, matrix_dtype, device),
        *mean_arguments(mean, pages)[:3],
        block_table.stride(0), pages.stride(0), pages.stride(1), k_out.stride(0), v_out.stride(0),
        head_dim, padded, fmt.bits_k, fmt.bits_v, fmt.k_bytes,
        layout.v_codes, layout.k_scales, layout.v_scales, page_tokens, TILE, SCALE_DENOMINATOR, rotated,
        mean is not None, COLUMNS,
        num_warps=4 if mean is None else 8,  # four would spill 1.5 KB a thread
    )

"""The launch before attention: rotate queries, keys and values; split queries into int8 planes;
quantize keys and values and write them into their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from tqai_plugins.core.codebook import SEARCH, TOP
from tqai_plugins.core.kv_format import SCALE_DENOMINATOR, KVFormat

from . import device_tables
from .unpack import sign_plane
from .workspace import Workspace

ROWS = 16  # rows a program: the smallest tile of the matrix unit


@triton.jit
def _nearest(x):
    """Round to the nearest whole number, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rotated(x_ptr, row_offsets, valid, matrix, norm, D: tl.constexpr, DP: tl.constexpr):
    """float32 [ROWS, DP] rotated vectors. +1 and -1 are exact in any float, sums are float32."""
    d = tl.arange(0, DP)
    inside = valid[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + row_offsets[:, None] + d[None, :], mask=inside, other=0.0)
    return tl.dot(x, matrix, input_precision="ieee") * norm[None, :]


@triton.jit
def _encode(y, grid_of_row, table, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
            NUM_GRIDS: tl.constexpr, TOP: tl.constexpr):
    """core.reference.encode, a grid a row: rows come in groups of NUM_GRIDS copies of one vector.

    Magnitude index [rows, DP], scale [rows] (NaN marks a flagged vector), and which row of its group
    to keep, [rows].
    """
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    size = tl.where(inside, tl.abs(y), 0.0)
    rms = tl.sqrt(tl.sum(size * size, 1) / D)
    live = (rms > 1e-18) & (rms < float("inf"))
    index = tl.zeros(y.shape, tl.int32)
    if BITS == 8:
        grid = tl.where(live, tl.max(size, 1) / TOP, 1.0)
        index = tl.minimum(tl.floor(size / grid[:, None]), 127.0).to(tl.int32)
        level = index.to(tl.float32) + 0.5
    else:
        grid = rms * tl.load(table + grid_of_row)
        boundaries = table + NUM_GRIDS
        magnitudes = boundaries + (1 << (BITS - 1)) - 1
        level = tl.zeros(y.shape, tl.float32) + tl.load(magnitudes)
        for j in tl.static_range((1 << (BITS - 1)) - 1):
            above = size > (grid * tl.load(boundaries + j))[:, None]
            index = tl.where(above, j + 1, index)
            level = tl.where(above, tl.load(magnitudes + j + 1), level)
    level = tl.where(inside, level, 0.0)
    along = tl.sum(size * level, 1)
    energy = tl.sum(level * level, 1)
    merit = tl.reshape(along * along / energy, [y.shape[0] // NUM_GRIDS, NUM_GRIDS])
    # argmax takes the first of equals; a flagged or zero vector keeps its first copy.
    merit = tl.where(merit == merit, merit, 0.0)
    first = tl.argmax(merit, 1)
    best = tl.reshape(tl.broadcast_to(first[:, None], [y.shape[0] // NUM_GRIDS, NUM_GRIDS]), [y.shape[0]])
    scale = tl.where(live, along / energy, tl.where(rms < float("inf"), 0.0, float("nan")))
    return tl.where(live[:, None], index, 0), scale, live, best == grid_of_row


@triton.jit
def _store_vectors(
    y, grid_of_row, table, page, token, codes_at, byte_stride, vector_stride, scales_at, valid, num_bytes: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, NUM_GRIDS: tl.constexpr, TOP: tl.constexpr,
    SCALE_DENOMINATOR: tl.constexpr,
):
    """Quantize rows and write their packed codes (core.bit_packing) and scales."""
    ROWS: tl.constexpr = y.shape[0]
    index, scale, live, best = _encode(y, grid_of_row, table, D, DP, BITS, NUM_GRIDS, TOP)
    valid = valid & best
    negative = ((y < 0) & live[:, None]).to(tl.int32)
    stored = (scale * SCALE_DENOMINATOR).to(tl.float16)
    overflow = ~(stored.to(tl.float32) < float("inf"))
    stored = tl.where(overflow, float("nan"), stored.to(tl.float32)).to(tl.float16)
    tl.store((page + scales_at + 2 * token).to(tl.pointer_type(tl.float16)), stored, mask=valid)
    index = tl.where(overflow[:, None], 0, index)
    negative = tl.where(overflow[:, None], 0, negative)
    base = page + codes_at + token * vector_stride
    if BITS == 8:
        packed = index ^ -negative
        j = tl.arange(0, DP)
    elif BITS == 3:
        f = tl.arange(0, 4)[None, None, :]
        packed = tl.sum(tl.reshape(index, [ROWS, DP // 4, 4]) << (2 * f), 2)
        j = tl.arange(0, DP // 4)
        i = tl.arange(0, 4)[None, None, None, None, :]
        half = tl.arange(0, 2)[None, None, :, None, None]
        place = i + 2 * (i // 2) + 2 - 2 * half
        signs = tl.sum(tl.sum(tl.reshape(negative, [ROWS, DP // 32, 2, 4, 4]) << place, 4), 2)
        signs = tl.reshape(signs, [ROWS, DP // 8])
        s = tl.arange(0, DP // 8)
        tl.store(
            base[:, None] + (sign_plane(D) + s)[None, :] * byte_stride, signs.to(tl.uint8),
            mask=valid[:, None] & (s < sign_plane(D) // 2)[None, :],
        )
    else:
        PER: tl.constexpr = 8 // BITS
        f = tl.arange(0, PER)[None, None, :]
        code = index + (negative << (BITS - 1))
        packed = tl.sum(tl.reshape(code, [ROWS, DP // PER, PER]) << (BITS * f), 2)
        j = tl.arange(0, DP // PER)
    limit: tl.constexpr = num_bytes * 2 // 3 if BITS == 3 else num_bytes
    tl.store(base[:, None] + j[None, :] * byte_stride, packed.to(tl.uint8), mask=valid[:, None] & (j < limit)[None, :])


@triton.jit(do_not_specialize=["num_query_rows", "num_kv_rows"])
def _prepare_kernel(
    q_ptr, k_ptr, v_ptr, pages_ptr, slot_ptr, planes_ptr, q_scale_ptr, q_bias_ptr, hadamard, norms, k_table, v_table,
    num_query_rows, num_kv_rows, q_stride, k_stride, v_stride, page_stride, head_stride, softmax_scale,
    NUM_Q_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BITS_K: tl.constexpr, BITS_V: tl.constexpr, K_BYTES: tl.constexpr, V_BYTES: tl.constexpr,
    PAGE: tl.constexpr, V_CODES: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr,
    NUM_GRIDS: tl.constexpr, TOP: tl.constexpr, SCALE_DENOMINATOR: tl.constexpr, ROWS: tl.constexpr,
):
    # First programs turn queries, ROWS each; then come those of keys, then those of values.
    program = tl.program_id(0)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    matrix = tl.load(hadamard + d[:, None] * DP + d[None, :])
    norm = tl.load(norms + d)
    query_programs = tl.cdiv(num_query_rows, ROWS)
    VECTORS: tl.constexpr = ROWS // NUM_GRIDS  # each is encoded on every grid at once, a row each
    kv_programs = tl.cdiv(num_kv_rows, VECTORS)
    if program < query_programs:
        query_row = (program * ROWS + r).to(tl.int64)
        valid = query_row < num_query_rows
        offsets = (query_row // NUM_Q_HEADS) * q_stride + (query_row % NUM_Q_HEADS) * D
        y = _rotated(q_ptr, offsets, valid, matrix, norm, D, DP)
        # Two int8 planes, q = scale * (hi + lo / 254): about 15 bits.
        top = tl.maximum(tl.max(tl.abs(y), 1), 1e-20)
        z = y * (127.0 / top)[:, None]
        hi = _nearest(z)
        lo = _nearest((z - hi) * 254.0)
        out = planes_ptr + (query_row * (2 * D))[:, None] + d[None, :]
        inside = valid[:, None] & (d < D)[None, :]
        tl.store(out, hi.to(tl.int8), mask=inside)
        tl.store(out + D, lo.to(tl.int8), mask=inside)
        tl.store(q_scale_ptr + query_row, top * (softmax_scale / (127.0 * 254.0)), mask=valid)
        # Codes hold m for m + 1/2: the missing halves of a score.
        tl.store(q_bias_ptr + query_row, 0.5 * softmax_scale * tl.sum(y, 1), mask=valid)
    else:
        is_key = program < query_programs + kv_programs
        row = (program - query_programs - tl.where(is_key, 0, kv_programs)) * VECTORS + r // NUM_GRIDS
        valid = row < num_kv_rows
        token = row // NUM_KV_HEADS
        head = row % NUM_KV_HEADS
        slot = tl.load(slot_ptr + token, mask=valid, other=-1).to(tl.int64)
        valid = slot >= 0
        slot = tl.maximum(slot, 0)
        page = pages_ptr + (slot // PAGE) * page_stride + head * head_stride
        in_page = slot % PAGE
        if is_key:
            y = _rotated(k_ptr, token.to(tl.int64) * k_stride + head * D, valid, matrix, norm, D, DP)
            _store_vectors(y, r % NUM_GRIDS, k_table, page, in_page, 0, 1, K_BYTES, K_SCALES, valid, K_BYTES,
                           D, DP, BITS_K, NUM_GRIDS, TOP, SCALE_DENOMINATOR)
        else:
            y = _rotated(v_ptr, token.to(tl.int64) * v_stride + head * D, valid, matrix, norm, D, DP)
            _store_vectors(y, r % NUM_GRIDS, v_table, page, in_page, V_CODES, PAGE, 1, V_SCALES, valid, V_BYTES,
                           D, DP, BITS_V, NUM_GRIDS, TOP, SCALE_DENOMINATOR)


def prepare(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    workspace: Workspace,
    fmt: KVFormat,
    page_tokens: int,
    softmax_scale: float,
) -> None:
    """Store a step's keys and values; turn its queries for decode_attention. One launch.

    query [tokens, q_heads, head_dim] or None (store only), key and value [new_tokens, kv_heads,
    head_dim], of any one float dtype, heads contiguous; slot_mapping int [>= new_tokens], page *
    page_tokens + offset, -1 to skip. pages uint8 [num_pages, kv_heads, page_bytes], laid out by
    fmt.page_layout(page_tokens). A vector with NaN or infinity gets the scale NaN.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    assert head_dim == fmt.head_dim and key.stride(1) == head_dim and value.stride(1) == head_dim
    queries = 0 if query is None else query.shape[0] * query.shape[1]
    padded = triton.next_power_of_2(head_dim)
    layout = fmt.page_layout(page_tokens)
    device = key.device
    programs = triton.cdiv(queries, ROWS) + 2 * triton.cdiv(num_tokens * num_kv_heads, ROWS // len(SEARCH))
    if programs == 0:
        return
    q = key if query is None else query
    _prepare_kernel[(programs,)](
        q, key, value, pages, slot_mapping, workspace.planes, workspace.q_scale, workspace.q_bias,
        device_tables.signed_hadamard(head_dim, padded, key.dtype, device), device_tables.norms(head_dim, padded, device),
        device_tables.encoder(head_dim, fmt.bits_k, device), device_tables.encoder(head_dim, fmt.bits_v, device),
        queries, num_tokens * num_kv_heads, q.stride(0), key.stride(0), value.stride(0),
        pages.stride(0), pages.stride(1), softmax_scale * LOG2_E / SCALE_DENOMINATOR,
        q.shape[1], num_kv_heads, head_dim, padded, fmt.bits_k, fmt.bits_v, fmt.k_bytes, fmt.v_bytes,
        page_tokens, layout.v_codes, layout.k_scales, layout.v_scales, len(SEARCH), TOP, SCALE_DENOMINATOR, ROWS,
        num_warps=4,
    )


LOG2_E = 1.4426950408889634

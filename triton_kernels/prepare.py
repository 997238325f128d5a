"""The launch before attention: rotate queries, keys and values; split queries into int8 planes;
quantize keys and values and write them into their pages."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tqai_plugins.core.codebook import SEARCH, TOP, Codebook
from tqai_plugins.core.key_mean import COLUMNS
from tqai_plugins.core.kv_format import SCALE_DENOMINATOR, KVFormat

from . import device_tables
from .key_mean import mean_arguments, mean_term, mean_weights
from .recent import RecentPages
from .rotation import rotate
from .unpack import sign_plane
from .workspace import Workspace


@dataclass(frozen=True)
class Tiling:
    """rows a program holds at a time; copies of each key and value among them, which share the grids of
    the scale search between them; warps. Many copies for latency, one for throughput."""

    rows: int
    copies: int
    warps: int


# By the number of vectors from which each is taken: from latency to throughput (README.md).
TILINGS = {0: Tiling(8, len(SEARCH) // 2, 4), 512: Tiling(4, len(SEARCH) // 4, 2), 4096: Tiling(16, 1, 4)}


def choose_tiling(vectors: int) -> Tiling:
    """vectors: new tokens times KV heads."""
    return TILINGS[max(least for least in TILINGS if least <= vectors)]


@triton.jit
def _nearest(x):
    """Round to the nearest whole number, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _places(slot_ptr, token, inside, pages, head, page_stride, head_stride, PAGE: tl.constexpr):
    """Where vectors go: page, token in it, and whether they are to be stored; slots are page * PAGE + token, or -1."""
    slot = tl.load(slot_ptr + token, mask=inside, other=-1).to(tl.int64)
    valid = slot >= 0
    slot = tl.maximum(slot, 0)
    return pages + (slot // PAGE) * page_stride + head * head_stride, slot % PAGE, valid


@triton.jit
def _store_planes(out, z, top, mask, plane_stride: tl.constexpr):
    """Two int8 planes, z = top / 127 * (hi + lo / 254): about 15 bits."""
    rest = z * (127.0 / top)[:, None]
    for plane in range(2):
        whole = _nearest(rest)
        tl.store(out + plane * plane_stride, whole.to(tl.int8), mask=mask)
        rest = (rest - whole) * 254.0


@triton.jit
def _size_and_rms(y, D: tl.constexpr, DP: tl.constexpr):
    """|y| with zeros in the padding, its root mean square, and whether the vector can be scaled."""
    size = tl.abs(y)
    if D < DP:
        size = tl.where((tl.arange(0, DP) < D)[None, :], size, 0.0)
    rms = tl.sqrt(tl.sum(size * size, 1) / D)
    return size, rms, (rms > 1e-18) & (rms < float("inf"))


@triton.jit
def _fit(size, level, D: tl.constexpr, DP: tl.constexpr):
    """Sums of size * level and of level * level, [rows]."""
    if D < DP:
        level = tl.where((tl.arange(0, DP) < D)[None, :], level, 0.0)
    return tl.sum(size * level, 1), tl.sum(level * level, 1)


@triton.jit
def _encode_eight(y, D: tl.constexpr, DP: tl.constexpr, TOP: tl.constexpr):
    """core.reference.encode at 8 bits: magnitude index [rows, DP], scale [rows], whether it is live [rows]."""
    size, rms, live = _size_and_rms(y, D, DP)
    grid = tl.where(live, tl.max(size, 1) / TOP, 1.0)
    index = tl.minimum(tl.floor(size / grid[:, None]), 127.0)
    along, energy = _fit(size, index + 0.5, D, DP)
    return index.to(tl.int32), _flagged(along / energy, rms, live), live


@triton.jit
def _flagged(scale, rms, live):
    """0 for a vector of zeros, NaN for one that is not finite."""
    return tl.where(live, scale, tl.where(rms < float("inf"), 0.0, float("nan")))


@triton.jit
def _encode(y, copy, BOOK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COPIES: tl.constexpr):
    """core.reference.encode with its scale search; rows come in groups of COPIES equal vectors.

    As _encode_eight, and whether a row has its vector's best grid.
    """
    VECTORS: tl.constexpr = y.shape[0] // COPIES
    GRIDS: tl.constexpr = BOOK[0]
    BOUNDARIES: tl.constexpr = BOOK[1]
    MAGNITUDES: tl.constexpr = BOOK[2]
    size, rms, live = _size_and_rms(y, D, DP)
    best_merit = tl.full([y.shape[0]], -1.0, tl.float32)
    best_grid = rms
    best_scale = rms
    best_number = copy
    for g in range(len(GRIDS) // COPIES):  # a loop at run time, which is compiled once
        number = g * COPIES + copy
        multiple = tl.zeros([y.shape[0]], tl.float32)
        for n in tl.static_range(len(GRIDS)):
            multiple = tl.where(number == n, GRIDS[n], multiple)
        grid = rms * multiple
        steps = size * (1.0 / grid)[:, None]
        level = tl.full(y.shape, MAGNITUDES[0], tl.float32)
        for j in tl.static_range(len(BOUNDARIES)):
            level = tl.where(steps > BOUNDARIES[j], MAGNITUDES[j + 1], level)
        along, energy = _fit(size, level, D, DP)
        merit = along * along / energy
        merit = tl.where(live & (merit == merit), merit, 0.0)
        better = merit > best_merit  # the first of equals
        best_merit = tl.where(better, merit, best_merit)
        best_grid = tl.where(better, grid, best_grid)
        best_scale = tl.where(better, along / energy, best_scale)
        best_number = tl.where(better, number, best_number)
    steps = size * (1.0 / best_grid)[:, None]
    index = tl.zeros(y.shape, tl.int32)
    for j in tl.static_range(len(BOUNDARIES)):
        index += (steps > BOUNDARIES[j]).to(tl.int32)
    keep = live | (copy == 0)
    if COPIES > 1:
        top = tl.max(tl.reshape(best_merit, [VECTORS, COPIES]), 1)
        top = tl.reshape(tl.broadcast_to(top[:, None], [VECTORS, COPIES]), [y.shape[0]])
        number = tl.where(best_merit == top, best_number, len(GRIDS))
        number = tl.min(tl.reshape(number, [VECTORS, COPIES]), 1)
        keep = best_number == tl.reshape(tl.broadcast_to(number[:, None], [VECTORS, COPIES]), [y.shape[0]])
    return tl.where(live[:, None], index, 0), _flagged(best_scale, rms, live), live, keep


@triton.jit
def _store_vectors(
    y, copy, page, token, codes_at, byte_stride, vector_stride, scales_at, valid, num_bytes: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, BOOK: tl.constexpr, COPIES: tl.constexpr,
    TOP: tl.constexpr, SCALE_DENOMINATOR: tl.constexpr,
):
    """Quantize rows and write their packed codes (core.bit_packing) and scales."""
    ROWS: tl.constexpr = y.shape[0]
    if BITS == 8:
        index, scale, live = _encode_eight(y, D, DP, TOP)
        valid = valid & (copy == 0)
    else:
        index, scale, live, best = _encode(y, copy, BOOK, D, DP, COPIES)
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


@triton.jit
def _vectors(ptr, token, head, stride, valid, D: tl.constexpr, DP: tl.constexpr):
    """Vectors [ROWS, DP] of tokens and heads [ROWS], zeros beyond D and where not valid; where each begins [ROWS]."""
    d = tl.arange(0, DP)
    at = ptr + token.to(tl.int64) * stride + head * D
    return tl.load(at[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0), at


@triton.jit
def _turn_queries(
    program, q_ptr, planes_ptr, q_scale_ptr, q_bias_ptr, signs, mean_coefficients, mean_coordinates, mean_planes_ptr, mean_scale_ptr,
    num_rows, stride, softmax_scale,
    NUM_Q_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALE_DENOMINATOR: tl.constexpr,
    ROWS: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Rotate queries and split them into int8 planes, and with a key mean what they give each column of its table."""
    row = program * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    head = row % NUM_Q_HEADS
    d = tl.arange(0, DP)
    x, at = _vectors(q_ptr, row // NUM_Q_HEADS, head, stride, valid, D, DP)
    sign = tl.load(signs + d)
    if MEAN:
        kv_head = head // (NUM_Q_HEADS // NUM_KV_HEADS)
        weights = mean_weights(at, mean_coefficients, mean_coordinates, kv_head, valid, D, COLUMNS)
    y = rotate(x, sign, D, DP)
    row = row.to(tl.int64)
    top = tl.maximum(tl.max(tl.abs(y), 1), 1e-20)
    _store_planes(planes_ptr + (row * (2 * D))[:, None] + d[None, :], y, top, valid[:, None] & (d < D)[None, :], D)
    tl.store(q_scale_ptr + row, top * (softmax_scale / (127.0 * 254.0)), mask=valid)
    # Codes hold m for m + 1/2: the missing halves of a score.
    tl.store(q_bias_ptr + row, 0.5 * softmax_scale * tl.sum(y, 1), mask=valid)
    if MEAN:
        top = tl.maximum(tl.max(tl.abs(weights), 1), 1e-20)
        out = mean_planes_ptr + (row * (2 * COLUMNS))[:, None] + tl.arange(0, COLUMNS)[None, :]
        _store_planes(out, weights, top, valid[:, None], COLUMNS)
        tl.store(mean_scale_ptr + row, top * (softmax_scale * SCALE_DENOMINATOR / (127.0 * 254.0)), mask=valid)


@triton.jit
def _store_tokens(
    program, programs, k_ptr, v_ptr, pages_ptr, slot_ptr, recent_ptr, recent_slot_ptr, signs,
    position_ptr, mean_table, mean_coefficients, mean_columns,
    num_rows, k_stride, v_stride, page_stride, head_stride, recent_page_stride, recent_head_stride,
    NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BITS_K: tl.constexpr, BITS_V: tl.constexpr, K_BYTES: tl.constexpr, V_BYTES: tl.constexpr,
    PAGE: tl.constexpr, V_CODES: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr,
    RECENT: tl.constexpr, RECENT_PAGE: tl.constexpr, RECENT_V_CODES: tl.constexpr,
    RECENT_K_SCALES: tl.constexpr, RECENT_V_SCALES: tl.constexpr,
    BOOK_K: tl.constexpr, BOOK_V: tl.constexpr, TOP: tl.constexpr, SCALE_DENOMINATOR: tl.constexpr,
    ROWS: tl.constexpr, COPIES: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Quantize and store keys, which the first `programs` take, or values."""
    VECTORS: tl.constexpr = ROWS // COPIES
    is_key = program < programs
    r = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    copy = r % COPIES
    row = (program - tl.where(is_key, 0, programs)) * VECTORS + r // COPIES
    valid = row < num_rows
    token = row // NUM_KV_HEADS
    head = row % NUM_KV_HEADS
    # All that is not computed is asked for before any of it is used: latency is what a decode step pays.
    x, _ = _vectors(tl.where(is_key, k_ptr, v_ptr), token, head, tl.where(is_key, k_stride, v_stride), valid, D, DP)
    sign = tl.load(signs + d)
    page, in_page, stored = _places(slot_ptr, token, valid, pages_ptr, head, page_stride, head_stride, PAGE)
    if RECENT:
        twin_page, in_twin, twin = _places(
            recent_slot_ptr, token, valid, recent_ptr, head, recent_page_stride, recent_head_stride, RECENT_PAGE
        )
        twin = twin & stored  # beyond the step's tokens recent slots are old
    coded = x
    if MEAN:
        if is_key:
            position = tl.load(position_ptr + token, mask=valid, other=0)
            inside = stored[:, None] & (d < D)[None, :]
            mean = mean_term(mean_table, mean_coefficients, mean_columns, position, head, inside, D, DP, COLUMNS)
            coded = (x.to(tl.float32) - mean).to(x.dtype)
    y = rotate(coded, sign, D, DP)
    if BITS_K == BITS_V and BITS_K < 8:  # one text for both, which is compiled once; 8-bit keys are slow byte by byte
        _store_vectors(y, copy, page, in_page, tl.where(is_key, 0, V_CODES), tl.where(is_key, 1, PAGE),
                       tl.where(is_key, K_BYTES, 1), tl.where(is_key, K_SCALES, V_SCALES), stored, K_BYTES,
                       D, DP, BITS_K, BOOK_K, COPIES, TOP, SCALE_DENOMINATOR)
    elif is_key:
        _store_vectors(y, copy, page, in_page, 0, 1, K_BYTES, K_SCALES, stored, K_BYTES,
                       D, DP, BITS_K, BOOK_K, COPIES, TOP, SCALE_DENOMINATOR)
    else:
        _store_vectors(y, copy, page, in_page, V_CODES, PAGE, 1, V_SCALES, stored, V_BYTES,
                       D, DP, BITS_V, BOOK_V, COPIES, TOP, SCALE_DENOMINATOR)
    if RECENT:
        if tl.max(twin.to(tl.int32), 0) > 0:
            if MEAN:
                if is_key:
                    y = rotate(x, sign, D, DP)
            _store_vectors(y, copy, twin_page, in_twin, tl.where(is_key, 0, RECENT_V_CODES), tl.where(is_key, 1, RECENT_PAGE),
                           tl.where(is_key, D, 1), tl.where(is_key, RECENT_K_SCALES, RECENT_V_SCALES), twin, D,
                           D, DP, 8, (), COPIES, TOP, SCALE_DENOMINATOR)


# Functions of their own, as Triton's time to compile grows by more than a function's length; they are inlined after its layouts.
_turn_queries_apart = triton.jit(noinline=True)(_turn_queries.fn)
_store_tokens_apart = triton.jit(noinline=True)(_store_tokens.fn)


@triton.jit(do_not_specialize=["num_query_rows", "num_kv_rows"], do_not_specialize_on_alignment=["slot_ptr", "position_ptr"])
def _prepare_kernel(
    q_ptr, k_ptr, v_ptr, pages_ptr, slot_ptr, recent_ptr, recent_slot_ptr,
    planes_ptr, q_scale_ptr, q_bias_ptr, signs,
    position_ptr, mean_table, mean_coefficients, mean_columns, mean_coordinates, mean_planes_ptr, mean_scale_ptr,
    num_query_rows, num_kv_rows, q_stride, k_stride, v_stride, page_stride, head_stride,
    recent_page_stride, recent_head_stride, softmax_scale,
    NUM_Q_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BITS_K: tl.constexpr, BITS_V: tl.constexpr, K_BYTES: tl.constexpr, V_BYTES: tl.constexpr,
    PAGE: tl.constexpr, V_CODES: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr,
    RECENT: tl.constexpr, RECENT_PAGE: tl.constexpr, RECENT_V_CODES: tl.constexpr,
    RECENT_K_SCALES: tl.constexpr, RECENT_V_SCALES: tl.constexpr,
    BOOK_K: tl.constexpr, BOOK_V: tl.constexpr, TOP: tl.constexpr, SCALE_DENOMINATOR: tl.constexpr,
    ROWS: tl.constexpr, COPIES: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr,
):
    # First programs turn queries, ROWS each; then come those of keys, then those of values. Many vectors want the layout that
    # both have together, of sixteen coordinates a lane: alone tokens have eight.
    program = tl.program_id(0)
    query_programs = tl.cdiv(num_query_rows, ROWS)
    if program < query_programs:
        (_turn_queries if COPIES == 1 else _turn_queries_apart)(
            program, q_ptr, planes_ptr, q_scale_ptr, q_bias_ptr, signs, mean_coefficients, mean_coordinates, mean_planes_ptr,
            mean_scale_ptr, num_query_rows, q_stride, softmax_scale,
            NUM_Q_HEADS, NUM_KV_HEADS, D, DP, SCALE_DENOMINATOR, ROWS, MEAN, COLUMNS,
        )
    else:
        (_store_tokens if COPIES == 1 else _store_tokens_apart)(
            program - query_programs, tl.cdiv(num_kv_rows, ROWS // COPIES), k_ptr, v_ptr, pages_ptr, slot_ptr, recent_ptr,
            recent_slot_ptr, signs, position_ptr, mean_table, mean_coefficients, mean_columns,
            num_kv_rows, k_stride, v_stride, page_stride, head_stride, recent_page_stride, recent_head_stride,
            NUM_KV_HEADS, D, DP, BITS_K, BITS_V, K_BYTES, V_BYTES, PAGE, V_CODES, K_SCALES, V_SCALES,
            RECENT, RECENT_PAGE, RECENT_V_CODES, RECENT_K_SCALES, RECENT_V_SCALES,
            BOOK_K, BOOK_V, TOP, SCALE_DENOMINATOR, ROWS, COPIES, MEAN, COLUMNS,
        )


@functools.lru_cache(None)
def _book(head_dim: int, bits: int) -> tuple[tuple[float, ...], ...]:
    """The grids to try (multiples of a vector's root mean square), boundaries, magnitudes: constants of the kernel,
    which would wait for loads of them and take longer to compile."""
    if bits == 8:
        return ()
    book = Codebook.lloyd_max(head_dim, bits)
    return tuple(s * book.unit for s in SEARCH), tuple(book.boundaries), tuple(book.magnitudes)


LOG2_E = 1.4426950408889634


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
    *,
    recent: RecentPages | None = None,
    positions: torch.Tensor | None = None,
    mean=None,
    tiling: Tiling | None = None,
) -> None:
    """Store a step's keys and values; turn its queries for decode_attention. One launch.

    query [tokens, q_heads, head_dim] or None (store only), key and value [new_tokens, kv_heads,
    head_dim], of any one float dtype, heads contiguous; slot_mapping int [>= new_tokens], page *
    page_tokens + offset, -1 to skip. pages uint8 [num_pages, kv_heads, page_bytes], laid out by
    fmt.page_layout(page_tokens). recent: where tokens are kept at 8 bits too. mean: a torch_kernels.KeyMean that is
    taken off the keys of the codes, at positions int [>= new_tokens]. A vector with NaN or infinity gets the
    scale NaN.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    assert head_dim == fmt.head_dim and key.stride(1) == head_dim and value.stride(1) == head_dim
    queries = 0 if query is None else query.shape[0] * query.shape[1]
    vectors = num_tokens * num_kv_heads
    tiling = tiling or choose_tiling(vectors)
    programs = triton.cdiv(queries, tiling.rows) + 2 * triton.cdiv(vectors, tiling.rows // tiling.copies)
    if programs == 0:
        return
    padded = triton.next_power_of_2(head_dim)
    layout = fmt.page_layout(page_tokens)
    copy = recent or RecentPages.none(pages, slot_mapping)
    copy_layout = copy.layout(head_dim)
    device = key.device
    q = key if query is None else query
    _prepare_kernel[(programs,)](
        q, key, value, pages, slot_mapping, copy.pages, copy.slots,
        workspace.planes, workspace.q_scale, workspace.q_bias,
        device_tables.signs(head_dim, padded, device),
        slot_mapping if positions is None else positions, *mean_arguments(mean, pages),
        workspace.mean_planes, workspace.mean_scale,
        queries, vectors, q.stride(0), key.stride(0), value.stride(0),
        pages.stride(0), pages.stride(1), copy.pages.stride(0), copy.pages.stride(1),
        softmax_scale * LOG2_E / SCALE_DENOMINATOR,
        workspace.planes.shape[1], num_kv_heads, head_dim, padded, fmt.bits_k, fmt.bits_v, fmt.k_bytes, fmt.v_bytes,
        page_tokens, layout.v_codes, layout.k_scales, layout.v_scales,
        recent is not None, copy_layout.page_tokens, copy_layout.v_codes, copy_layout.k_scales, copy_layout.v_scales,
        _book(head_dim, fmt.bits_k), _book(head_dim, fmt.bits_v), TOP, SCALE_DENOMINATOR,
        tiling.rows, tiling.copies, mean is not None, COLUMNS,
        num_warps=tiling.warps,
    )

"""Attention of a few new tokens over compressed pages: split over tokens, then merged by whoever comes last.

Design: codes become int8 levels in registers and both products run on the integer matrix unit.
Queries and softmax weights are carried as two int8 planes, hi + lo / 254, in columns that the unit
would pad anyway. K is the left operand of K Q, V^T of V^T P.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tqai_plugins.core.key_mean import COLUMNS
from tqai_plugins.core.kv_format import COPIED_PAGES, SCALE_DENOMINATOR, KVFormat

from . import device_tables
from .key_mean import mean_arguments
from .merge import MERGED_SPLITS, TILE, finish, merge, shares
from .recent import RecentPages
from .unpack import (
    PLANES,
    four_planes,
    four_planes_signed,
    key_coordinate,
    load_levels,
    sign_byte,
    sign_lift,
    sign_plane,
    two_planes,
    unpack_ptx,
)
from .workspace import Workspace

MAX_SPLITS = 128


@dataclass(frozen=True)
class Tuning:
    """How a format runs: loads in flight beyond the current tile's, a cap on registers, how many
    programs that leaves resident on a multiprocessor, and their warps. Swept on an H100, see README.md."""

    stages: int
    registers: int
    resident: int
    warps: int = 1


def _tile_bytes(fmt: KVFormat, ptx: bool) -> tuple[int, int]:
    """Bytes of a token's key and value in a tile, no less than the matrix unit takes; a coordinate each without PTX."""
    planes = (PLANES[fmt.bits_k], PLANES[fmt.bits_v]) if ptx else (1, 1)
    padded = triton.next_power_of_2(fmt.head_dim)
    return max(32, padded // planes[0]), max(16, padded // planes[1])


def tuning(fmt: KVFormat, columns: int) -> Tuning:
    """What was the fastest on an H100 for this format and so many query columns a KV head."""
    eight = fmt.bits_k == 8 or fmt.bits_v == 8
    if columns * fmt.head_dim > 4 * 128:  # one warp would spill; four would take another matrix unit
        return Tuning(1, 240, 4, 2) if eight else Tuning(1, 168, 6, 2)
    padded = _tile_bytes(fmt, True) != (fmt.head_dim // PLANES[fmt.bits_k], fmt.head_dim // PLANES[fmt.bits_v])
    if padded:
        return Tuning(1, 168, 12)  # masked tiles must not be loaded ahead: Triton 3.6 reads them wrongly
    if eight:
        return Tuning(3, 232, 8)  # bytes are the limit: many in flight
    # Five stages load a tile while the one before is read, three (there are page numbers to load first) behind it.
    return Tuning(5 if fmt.bits_v == 2 and fmt.bits_k != 3 else 3, 168, 12)


@triton.jit
def _query_plane(planes, rows, plane, coordinate, valid, D: tl.constexpr):
    """int8 [coordinates, columns]: columns alternate hi and lo of each row."""
    inside = (coordinate < D)[:, None] & valid[None, :]
    return tl.load(planes + (rows * 2 + plane)[None, :] * D + coordinate[:, None], mask=inside, other=0)


@triton.jit
def _rescale(acc, factor):
    """Integer sums under a new unit: a rounding of half a unit, 1 / 64516 of the largest weight."""
    return (acc.to(tl.float32) * factor[None, :]).to(tl.int32)


@triton.jit
def _low_byte(x):
    """The nearest whole number to x, |x| < 128, as int8: adding 1.5 * 2^23 leaves it in the low byte."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _permute_table(levels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Both words by one load: ptxas keeps words of two loads in uniform registers and copies them for every permute.
    both = tl.load(levels.to(tl.pointer_type(tl.int64)) + tl.zeros([1, 1], tl.int32))
    return tl.broadcast_to(both.to(tl.int32), [ROWS, COLUMNS]), tl.broadcast_to((both >> 32).to(tl.int32), [ROWS, COLUMNS])


@triton.jit
def _store_sums(out, real, acc, half, inverse, D: tl.constexpr, H: tl.constexpr):
    """acc int32 [coordinates, 2 H], columns hi and lo of each row, to out [H]."""
    hi, lo = tl.split(tl.reshape(acc, [acc.shape[0], H, 2]))
    value = (hi.to(tl.float32) + lo.to(tl.float32) * (1.0 / 254) + 0.5 * half[None, :]) * inverse[None, :]
    coordinate = tl.arange(0, acc.shape[0])[:, None]
    tl.store(out[None, :] + coordinate, value, mask=real[None, :] & (coordinate < D))


@triton.jit
def _in_turn(a0, a1):
    """[N, C] and [N, C] -> [2 N, C], rows in turn."""
    return tl.reshape(tl.permute(tl.join(a0, a1), (0, 2, 1)), [2 * a0.shape[0], a0.shape[1]])


@triton.jit
def _page_ids(table, tile, stop, length, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Of a tile before `stop`: its page, or where pages are no tiles that of each token [TILE]."""
    if PAGE == TILE:
        ids = tl.load(table + tile, mask=tile < stop, other=0)
    else:
        token = tile * TILE + tl.arange(0, TILE)
        ids = tl.load(table + token // PAGE, mask=token < tl.minimum(length, stop * TILE), other=0)
    return ids


@triton.jit
def _in_page(tile, PAGE: tl.constexpr, TILE: tl.constexpr):
    in_page = tl.arange(0, TILE)
    if PAGE != TILE:
        in_page = (tile * TILE + in_page) % PAGE
    return in_page


@triton.jit
def _load_scales(
    pages, ids, tile, page_stride,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):
    """Scales [TILE] of a tile in the pages `ids`."""
    page = pages + ids.to(tl.int64) * page_stride
    in_page = _in_page(tile, PAGE, TILE)
    k_scale = tl.load((page + K_SCALES).to(tl.pointer_type(tl.float16)) + in_page)
    v_scale = tl.load((page + V_SCALES).to(tl.pointer_type(tl.float16)) + in_page)
    return k_scale, v_scale


@triton.jit
def _load_codes_of_tile(
    pages, ids, tile, page_stride, k_levels, v_levels,
    D: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr, K_BYTES: tl.constexpr, V_CODES: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, F_K: tl.constexpr, F_V: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Codes of TILE tokens in the pages `ids`: keys [TILE, KB], values [VB, TILE], 3-bit signs beside each (else the
    codes again). Without PTX they come as int8 levels, a coordinate a byte."""
    jk = tl.arange(0, KB)[None, :]
    jv = tl.arange(0, VB)[:, None]
    page = pages + ids.to(tl.int64) * page_stride
    in_page = _in_page(tile, PAGE, TILE)
    k_base = (page + in_page * K_BYTES)[:, None]
    v_base = (page + V_CODES + in_page)[None, :]
    # Rows beyond the codes are padding of the tile; a mask that is always true costs nothing.
    k_mask = jk < D // F_K
    v_mask = jv < D // F_V
    if USE_PTX:
        x = tl.load(k_base + jk, mask=k_mask, other=0)
        z = tl.load(v_base + jv * PAGE, mask=v_mask, other=0)
        x_sign = x
        z_sign = z
        if BITS_K == 3:
            x_sign = tl.load(k_base + sign_plane(D) + sign_byte(jk), mask=k_mask, other=0)
        if BITS_V == 3:
            z_sign = tl.load(v_base + (sign_plane(D) + sign_byte(jv)) * PAGE, mask=v_mask, other=0)
    else:
        x = load_levels(k_base, jk, 1, k_levels, k_mask, BITS_K, D)
        z = load_levels(v_base, jv, PAGE, v_levels, v_mask, BITS_V, D)
        x_sign = x
        z_sign = z
    return x, x_sign, z, z_sign


@triton.jit
def _softmax_weights(
    s, more, k_scale, v_scale, token, length, last_seen, window, soft_cap, scale, bias,
    ref, v_unit, total, half, a0, a1, a2, a3,
    H: tl.constexpr, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, F_V: tl.constexpr,
    TILE: tl.constexpr, MEAN: tl.constexpr,
):
    """One tile of the online softmax: int8 weights [TILE, 2 H], and the sums under its reference and unit.
    more [TILE, H]: what the key mean adds to the scores.

    Weights are whole numbers in units of v_unit * exp2(ref): sums stay integers while ref and
    v_unit stand. Both have headroom, so that a split changes them only a few times.
    """
    k_scale = k_scale.to(tl.float32)
    v_scale = v_scale.to(tl.float32)
    s_hi, s_lo = tl.split(tl.reshape(s, [TILE, H, 2]))
    score = ((s_hi * 254 + s_lo).to(tl.float32) * scale[None, :] + bias[None, :]) * k_scale[:, None]
    if MEAN:
        score += more
    if SOFT_CAP:  # scores are in units of log 2
        e = tl.exp2(score * (2.0 / soft_cap))
        score = soft_cap * 1.4426950408889634 * (1.0 - 2.0 / (e + 1.0))
    if QUERY_LEN > 1 or WINDOW:
        seen = token[:, None] <= last_seen[None, :]
        if WINDOW:
            seen = seen & (token[:, None] > last_seen[None, :] - window)
        score = tl.where(seen, score, float("-inf"))
    if tl.max(token, 0) >= length:
        score = tl.where((token < length)[:, None], score, float("-inf"))
        v_scale = tl.where(token < length, v_scale, 0.0)
    if (tl.max(tl.max(score - ref[None, :], 1), 0) > 0.0) | (tl.max(v_scale, 0) > 127.0 * v_unit):
        page_top = tl.max(score, 0)
        new_ref = tl.where(page_top > ref, page_top + 1.0, ref)
        new_unit = tl.maximum(v_unit, tl.max(v_scale, 0) * (1.25 / 127.0))
        decay = tl.exp2(ref - new_ref)
        total = total * decay[None, :]
        factor = decay * (v_unit / new_unit)
        half = half * factor[None, :]
        column_factor = tl.reshape(tl.join(factor, factor), [2 * H])
        a0 = _rescale(a0, column_factor)
        if F_V >= 2:
            a1 = _rescale(a1, column_factor)
        if F_V == 4:
            a2 = _rescale(a2, column_factor)
            a3 = _rescale(a3, column_factor)
        ref = new_ref
        v_unit = new_unit
    p = tl.exp2(score - ref[None, :])
    total += p
    x_p = p * (v_scale * (1.0 / v_unit))[:, None]
    if QUERY_LEN > 1 or WINDOW:  # a flagged value counts for those that see it
        x_p = tl.where(p == 0.0, 0.0, x_p)
    half += x_p
    shifted = x_p + 12582912.0
    lo = (x_p - (shifted - 12582912.0)) * 254.0
    weights = tl.join(shifted.to(tl.int32, bitcast=True).to(tl.int8), _low_byte(lo))
    return tl.reshape(weights, [TILE, 2 * H]), ref, v_unit, total, half, a0, a1, a2, a3


@triton.jit
def _load_codes(base, rows, row_stride, columns, column_stride, mask):
    return tl.load(base + rows * row_stride + columns * column_stride, mask=mask, other=0).to(tl.int8, bitcast=True)


@triton.jit
def _query_row(r, sequence, head, NUM_Q_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERY_LEN: tl.constexpr):
    """Where pair r of (query, query head) of a KV head lies among all (token, query head) pairs."""
    return (sequence * QUERY_LEN + r // GROUP) * NUM_Q_HEADS + head * GROUP + r % GROUP


@triton.jit(noinline=True)
def _finish_rows(
    partial, lse, sequence, head, first_row, num_splits, splits, out_ptr, out_stride, sinks, lse_out, signs,
    NUM_Q_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SINKS: tl.constexpr, LSE_OUT: tl.constexpr, SCALE_DENOMINATOR: tl.constexpr,
):
    """merge.finish for a program's H rows: a function of its own, since Triton's time to compile grows by the square of one's length."""
    r = first_row + tl.arange(0, H)
    row = _query_row(r, sequence, head, NUM_Q_HEADS, GROUP, QUERY_LEN)
    finish(partial, lse, row.to(tl.int64), r < GROUP * QUERY_LEN, num_splits, splits, out_ptr, out_stride, sinks, lse_out, signs,
           NUM_Q_HEADS, D, DP, H, 16 // H, SINKS, LSE_OUT, SCALE_DENOMINATOR)


@triton.jit(
    do_not_specialize=["num_splits", "merges", "window", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens"],
)
def _decode_kernel(
    planes, q_scale, q_bias, mean_planes, mean_scale, mean_table, pages, block_table, seq_lens, recent_pages, recent_table, partial, lse,
    k_levels, v_levels, arrivals, out_ptr, sinks, lse_out, signs, out_stride,
    table_stride, page_stride, head_stride, recent_page_stride, recent_head_stride,
    num_splits, merges, window, soft_cap,
    NUM_Q_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr, MERGED_SPLITS: tl.constexpr,
    K_BYTES: tl.constexpr, V_CODES: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    K_PTX: tl.constexpr, V_PTX: tl.constexpr, USE_PTX: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, STAGES: tl.constexpr, COPIED_PAGES: tl.constexpr,
    RECENT_V_CODES: tl.constexpr, RECENT_K_SCALES: tl.constexpr, RECENT_V_SCALES: tl.constexpr,
    MEAN: tl.constexpr, COLUMNS: tl.constexpr, SINKS: tl.constexpr, LSE_OUT: tl.constexpr, SCALE_DENOMINATOR: tl.constexpr,
):
    # Rows of a KV head are its QUERY_LEN * GROUP (query, query head) pairs; a program takes H of them.
    TILES_OF_ROWS: tl.constexpr = (GROUP * QUERY_LEN + H - 1) // H
    C: tl.constexpr = 2 * H
    sequence = tl.program_id(0)
    head = tl.program_id(1) // TILES_OF_ROWS
    first_row = (tl.program_id(1) % TILES_OF_ROWS) * H
    split = tl.program_id(2)

    r = first_row + tl.arange(0, H)
    c = first_row + tl.arange(0, C) // 2
    query_row = _query_row(r, sequence, head, NUM_Q_HEADS, GROUP, QUERY_LEN)
    column_row = _query_row(c, sequence, head, NUM_Q_HEADS, GROUP, QUERY_LEN)
    real = r < GROUP * QUERY_LEN
    real_column = c < GROUP * QUERY_LEN
    plane = tl.arange(0, C) % 2
    n = tl.arange(0, TILE)
    jk = tl.arange(0, KB)
    jv = tl.arange(0, VB)
    F_K: tl.constexpr = 1 if BITS_K == 8 or not USE_PTX else (2 if BITS_K == 4 else 4)
    F_V: tl.constexpr = 1 if BITS_V == 8 or not USE_PTX else (2 if BITS_V == 4 else 4)

    # All that needs nothing else is asked for before any of it is used.
    length = tl.load(seq_lens + sequence)
    copied = 0  # last pages that have copies
    if COPIED_PAGES:
        copies = recent_table + COPIED_PAGES * sequence
        first_copy = tl.load(copies)
        for i in tl.static_range(1, COPIED_PAGES):
            copied = tl.where(tl.load(copies + i) < 0, 0, copied + 1)
    if F_K == 1:
        q0 = _query_plane(planes, column_row, plane, jk, real_column, D)
    else:
        q0 = _query_plane(planes, column_row, plane, key_coordinate(0, jk, BITS_K), real_column, D)
        q1 = _query_plane(planes, column_row, plane, key_coordinate(1, jk, BITS_K), real_column, D)
    if F_K == 4:
        q2 = _query_plane(planes, column_row, plane, key_coordinate(2, jk, BITS_K), real_column, D)
        q3 = _query_plane(planes, column_row, plane, key_coordinate(3, jk, BITS_K), real_column, D)
    if MEAN:
        jm = tl.arange(0, COLUMNS)
        q_mean = tl.load(
            mean_planes + (column_row * 2 + plane)[None, :] * COLUMNS + jm[:, None], mask=real_column[None, :], other=0
        )
        scale_mean = tl.load(mean_scale + query_row, mask=real, other=0.0)
    scale = tl.load(q_scale + query_row, mask=real, other=0.0)
    bias = tl.load(q_bias + query_row, mask=real, other=0.0)
    # Tables of the byte permutes. Loads and broadcasts let the compiler decode in the operand's layout.
    k_p, k_q = _permute_table(k_levels, TILE, KB)
    v_p, v_q = _permute_table(v_levels, VB, TILE)

    first_tile, per_split, splits = shares(length, num_splits, window, QUERY_LEN, WINDOW, TILE)
    if split >= splits:  # of a short sequence, which has fewer: it stores nothing
        return
    tiles = tl.cdiv(length, TILE)
    start = first_tile + split * per_split
    stop = tl.minimum(start + per_split, tiles)
    coded_stop = stop
    firsts = 0  # tiles of this split before the coded ones
    if COPIED_PAGES:  # the first tile and the last ones are read from their 8-bit copies
        coded_stop = tl.minimum(stop, tiles - copied)
        firsts = tl.where((first_copy >= 0) & (start == 0) & (start < coded_stop), 1, 0)
    coded_start = start + firsts
    last_seen = length - QUERY_LEN + r // GROUP  # position of each row's query
    ref = tl.full([H], -1e30, tl.float32)
    v_unit = tl.full([], 1e-30, tl.float32)
    total = tl.zeros([TILE, H], tl.float32)
    half = tl.zeros([TILE, H], tl.float32)
    a0 = tl.zeros([VB, C], tl.int32)
    a1 = tl.zeros([VB if F_V >= 2 else 1, C], tl.int32)
    a2 = tl.zeros([VB if F_V == 4 else 1, C], tl.int32)
    a3 = tl.zeros([VB if F_V == 4 else 1, C], tl.int32)
    if BITS_K == 3:
        k_lift = tl.reshape(tl.broadcast_to(tl.reshape(sign_lift(), [1, 1, 2, 1]), [TILE, KB // 8, 2, 4]), [TILE, KB])
    if BITS_V == 3:
        v_lift = tl.reshape(tl.broadcast_to(tl.reshape(sign_lift(), [1, 2, 1, 1]), [VB // 8, 2, 4, TILE]), [VB, TILE])

    # Triton loads ahead what a product reads. Scales it would wait for: each tile asks for those of the next one, whose
    # page the tile before has looked up.
    pages += head * head_stride
    table = block_table + sequence * table_stride
    first_ids = _page_ids(table, coded_start, coded_stop, length, PAGE, TILE)
    k_scale, v_scale = _load_scales(pages, first_ids, coded_start, page_stride, K_SCALES, V_SCALES, PAGE, TILE)
    next_ids = _page_ids(table, coded_start + 1, coded_stop, length, PAGE, TILE)
    for tile in tl.range(coded_start, coded_stop, num_stages=STAGES):
        next_k_scale, next_v_scale = _load_scales(pages, next_ids, tile + 1, page_stride, K_SCALES, V_SCALES, PAGE, TILE)
        next_ids = _page_ids(table, tile + 2, coded_stop, length, PAGE, TILE)
        if MEAN:  # asked for together with the codes
            turns = tl.load(mean_table + (tile * TILE + n)[:, None] * COLUMNS + jm[None, :])
        x, x_sign, z, z_sign = _load_codes_of_tile(
            pages, _page_ids(table, tile, coded_stop, length, PAGE, TILE), tile, page_stride, k_levels, v_levels,
            D, BITS_K, BITS_V, K_BYTES, V_CODES, PAGE, TILE, KB, VB, F_K, F_V, USE_PTX,
        )
        if F_K == 1:
            s = tl.dot(x.to(tl.int8, bitcast=True), q0, out_dtype=tl.int32)
        elif F_K == 2:
            k0, k1 = two_planes(x, k_p, k_q, K_PTX)
            s = tl.dot(k0, q0, out_dtype=tl.int32)
            s = tl.dot(k1, q1, s, out_dtype=tl.int32)
        else:
            if BITS_K == 2:
                k0, k1, k2, k3 = four_planes(x, k_p, k_q, K_PTX)
            else:
                k0, k1, k2, k3 = four_planes_signed(x, x_sign, k_lift, k_p, k_q, K_PTX)
            s = tl.dot(k0, q0, out_dtype=tl.int32)
            s = tl.dot(k1, q1, s, out_dtype=tl.int32)
            s = tl.dot(k2, q2, s, out_dtype=tl.int32)
            s = tl.dot(k3, q3, s, out_dtype=tl.int32)
        if MEAN:
            hi, lo = tl.split(tl.reshape(tl.dot(turns, q_mean, out_dtype=tl.int32), [TILE, H, 2]))
            more = (hi * 254 + lo).to(tl.float32) * scale_mean[None, :]
        else:
            more = bias  # not read
        weights, ref, v_unit, total, half, a0, a1, a2, a3 = _softmax_weights(
            s, more, k_scale, v_scale, tile * TILE + n, length, last_seen, window, soft_cap, scale, bias,
            ref, v_unit, total, half, a0, a1, a2, a3, H, QUERY_LEN, WINDOW, SOFT_CAP, F_V, TILE, MEAN,
        )
        if F_V == 1:
            a0 = tl.dot(z.to(tl.int8, bitcast=True), weights, a0, out_dtype=tl.int32)
        elif F_V == 2:
            v0, v1 = two_planes(z, v_p, v_q, V_PTX)
            a0 = tl.dot(v0, weights, a0, out_dtype=tl.int32)
            a1 = tl.dot(v1, weights, a1, out_dtype=tl.int32)
        else:
            if BITS_V == 2:
                v0, v1, v2, v3 = four_planes(z, v_p, v_q, V_PTX)
            else:
                v0, v1, v2, v3 = four_planes_signed(z, z_sign, v_lift, v_p, v_q, V_PTX)
            a0 = tl.dot(v0, weights, a0, out_dtype=tl.int32)
            a1 = tl.dot(v1, weights, a1, out_dtype=tl.int32)
            a2 = tl.dot(v2, weights, a2, out_dtype=tl.int32)
            a3 = tl.dot(v3, weights, a3, out_dtype=tl.int32)
        k_scale = next_k_scale
        v_scale = next_v_scale

    if COPIED_PAGES:
        # Keys in natural order against queries in natural order; values by the rows of each accumulator.
        copied_start = tl.maximum(start, coded_stop)
        j = tl.arange(0, DP)
        for at in tl.range(copied_start - firsts, stop, num_stages=1):
            tile = tl.where(at < copied_start, 0, at)
            copy = tl.load(copies + tl.where(at < copied_start, 0, COPIED_PAGES + at - tiles))
            page = recent_pages + copy.to(tl.int64) * recent_page_stride + head * recent_head_stride
            x8 = _load_codes(page, n[:, None], D, j[None, :], 1, (j < D)[None, :])
            s = tl.dot(x8, _query_plane(planes, column_row, plane, j, real_column, D), out_dtype=tl.int32)
            k_scale = tl.load((page + RECENT_K_SCALES + 2 * n).to(tl.pointer_type(tl.float16)))
            v_scale = tl.load((page + RECENT_V_SCALES + 2 * n).to(tl.pointer_type(tl.float16)))
            weights, ref, v_unit, total, half, a0, a1, a2, a3 = _softmax_weights(
                s, bias, k_scale, v_scale, tile * TILE + n, length, last_seen, window, soft_cap, scale, bias,
                ref, v_unit, total, half, a0, a1, a2, a3, H, QUERY_LEN, WINDOW, SOFT_CAP, F_V, TILE, False,
            )
            values = page + RECENT_V_CODES
            row = (jv * F_V)[:, None]
            column = n[None, :]
            a0 = tl.dot(_load_codes(values, row, TILE, column, 1, row < D), weights, a0, out_dtype=tl.int32)
            if F_V >= 2:
                z1 = _load_codes(values, row + 1, TILE, column, 1, row + 1 < D)
                a1 = tl.dot(z1, weights, a1, out_dtype=tl.int32)
            if F_V == 4:
                z2 = _load_codes(values, row + 2, TILE, column, 1, row + 2 < D)
                a2 = tl.dot(z2, weights, a2, out_dtype=tl.int32)
                z3 = _load_codes(values, row + 3, TILE, column, 1, row + 3 < D)
                a3 = tl.dot(z3, weights, a3, out_dtype=tl.int32)

    total = tl.sum(total, 0)
    half = tl.sum(half, 0)
    out_row = query_row.to(tl.int64) * num_splits + split
    inverse = 1.0 / tl.where(total == 0, 1.0, total)
    # Rows beyond the group are not stored: their column points nowhere.
    out = partial + tl.where(real, out_row, 0) * D
    inverse = tl.where(real, inverse * v_unit, 0.0)
    if F_V == 4:
        a0 = _in_turn(a0, a2)
        a1 = _in_turn(a1, a3)
    if F_V >= 2:
        a0 = _in_turn(a0, a1)
    _store_sums(out, real, a0, half, inverse, D, H)
    log_total = tl.where(total == 0, -1e30, tl.log2(tl.where(total == 0, 1.0, total)))
    tl.store(lse + out_row, ref + log_total, mask=real)

    if merges & (splits <= MERGED_SPLITS):
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = arrivals + sequence * tl.num_programs(1) + tl.program_id(1)
        done = 1
        if splits > 1:
            done += tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if done == splits:
            tl.store(counter, 0)  # for the next launch
            # Few lanes at a time: the loop above sets the registers.
            _finish_rows(partial, lse, sequence, head, first_row, num_splits, splits, out_ptr, out_stride, sinks, lse_out, signs,
                         NUM_Q_HEADS, GROUP, QUERY_LEN, H, D, DP, SINKS, LSE_OUT, SCALE_DENOMINATOR)


@functools.lru_cache(None)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _columns(rows: int) -> int:
    """Rows of a KV head that one program takes."""
    return min(8, max(4, triton.next_power_of_2(rows)))


def choose_splits(num_sequences: int, num_kv_heads: int, rows: int, fmt: KVFormat, device: torch.device) -> int:
    """Splits that fill the machine once with resident programs; a partial second wave loses.

    rows: query heads of a KV head times query tokens.
    """
    columns = _columns(rows)
    programs = num_sequences * num_kv_heads * triton.cdiv(rows, columns)
    room = tuning(fmt, columns).resident * _multiprocessors(device) // max(1, programs)
    return max(1, min(MAX_SPLITS, room))


def _most_tiles(room: int, query_len: int, sliding_window: int | None) -> int:
    """Tiles that a sequence can have where a block table has room for so many tokens; what a window sees may begin in a tile."""
    most = triton.cdiv(room, TILE)
    return most if sliding_window is None else min(most, triton.cdiv(sliding_window + query_len - 1, TILE) + 1)


def max_partial_rows(
    max_sequences: int, num_q_heads: int, num_kv_heads: int, query_len: int, fmt: KVFormat, device: torch.device
) -> int:
    """Rows of partial results that any batch up to max_sequences and query_len needs."""
    group = num_q_heads // num_kv_heads
    rows = lambda n, length: n * length * choose_splits(n, num_kv_heads, group * length, fmt, device)
    return num_q_heads * max(rows(n, length) for n in range(1, max_sequences + 1) for length in range(1, query_len + 1))


def uses_ptx(device: torch.device) -> bool:
    """Inline PTX runs on NVIDIA alone; elsewhere, and in the interpreter, codes are decoded by plain loads."""
    return device.type == "cuda" and torch.version.cuda is not None


def decode_attention(
    workspace: Workspace,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    fmt: KVFormat,
    page_tokens: int,
    *,
    query_len: int = 1,
    num_splits: int | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    recent: RecentPages | None = None,
    mean=None,
    ptx: bool | None = None,
    tuned: Tuning | None = None,
    merged: bool = True,
) -> None:
    """softmax(q k^T) v for the last query_len tokens of each sequence, over stored codes. One launch, and a second
    where there are many splits.

    Queries lie in the workspace (see prepare), sequence by sequence. pages uint8 [num_pages, kv_heads,
    page_bytes]; block_table int32 [sequences, >= pages of the longest]; seq_lens int32 [sequences],
    stored tokens, the new ones included; output [sequences * query_len, q_heads, head_dim] in the
    model's dtype. sinks float32 [q_heads]: logits without a value. lse float32 [sequences * query_len,
    q_heads], filled with the natural log-sum-exp if given. recent: 8-bit copies of the first and the last tokens,
    read in place of their codes. mean: the torch_kernels.KeyMean that prepare took off the keys, with a table of whole
    tiles of positions. A sequence of length 0 gets zeros. merged: without it parts stay in the workspace and output as it
    is, to time one without the other. ValueError if the workspace is too small.
    """
    num_sequences = seq_lens.shape[0]
    num_q_heads, head_dim = output.shape[-2:]
    num_kv_heads = pages.shape[1]
    group = num_q_heads // num_kv_heads
    device = pages.device
    ptx = uses_ptx(device) if ptx is None else ptx
    tuned = tuned or tuning(fmt, _columns(group * query_len))
    rows = group * query_len
    columns = _columns(rows)
    splits = num_splits or min(
        choose_splits(num_sequences, num_kv_heads, rows, fmt, device),
        _most_tiles(block_table.shape[1] * page_tokens, query_len, sliding_window),
    )
    query_rows = num_sequences * query_len * num_q_heads
    if query_rows * splits > workspace.lse.shape[0]:
        raise ValueError(
            f"{splits} splits of {query_rows} rows need {query_rows * splits} partial rows, the workspace has "
            f"{workspace.lse.shape[0]}; allocate it with max_partial_rows"
        )
    padded = triton.next_power_of_2(head_dim)
    layout = fmt.page_layout(page_tokens)
    copy = recent or RecentPages.none(pages, block_table)
    copy_layout = copy.layout(head_dim)
    k_planes = PLANES[fmt.bits_k] if ptx else 1
    v_planes = PLANES[fmt.bits_v] if ptx else 1
    _decode_kernel[(num_sequences, num_kv_heads * triton.cdiv(rows, columns), splits)](
        workspace.planes, workspace.q_scale, workspace.q_bias, workspace.mean_planes, workspace.mean_scale,
        mean_arguments(mean, pages)[0], pages, block_table, seq_lens,
        copy.pages, copy.table, workspace.partial, workspace.lse,
        device_tables.levels(head_dim, fmt.bits_k, device), device_tables.levels(head_dim, fmt.bits_v, device),
        workspace.arrivals, output, workspace.lse if sinks is None else sinks, workspace.lse if lse is None else lse,
        device_tables.signs(head_dim, padded, device), output.stride(0),
        block_table.stride(0), pages.stride(0), pages.stride(1), copy.pages.stride(0), copy.pages.stride(1), splits,
        int(merged), sliding_window or 0, soft_cap or 0.0,
        num_q_heads, group, query_len, columns, head_dim, padded, fmt.bits_k, fmt.bits_v,
        MERGED_SPLITS, fmt.k_bytes, layout.v_codes, layout.k_scales, layout.v_scales, page_tokens, TILE,
        *_tile_bytes(fmt, ptx),
        unpack_ptx(fmt.bits_k, by_token=True) if k_planes > 1 else "",
        unpack_ptx(fmt.bits_v, by_token=False) if v_planes > 1 else "", ptx,
        sliding_window is not None, soft_cap is not None, tuned.stages, 0 if recent is None else COPIED_PAGES, copy_layout.v_codes,
        copy_layout.k_scales, copy_layout.v_scales, mean is not None, COLUMNS, sinks is not None, lse is not None,
        SCALE_DENOMINATOR,
        num_warps=tuned.warps, maxnreg=tuned.registers,
    )
    if merged and splits > MERGED_SPLITS:
        merge(
            workspace.partial, workspace.lse, seq_lens, output, splits, query_len=query_len, sliding_window=sliding_window,
            sinks=sinks, lse_out=lse,
        )

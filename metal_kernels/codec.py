"""Slots in plain mx operations: what the kernels do, for machines without them and for prefill.

A slot is one token of one KV head, KVFormat.slot_bytes long, in little-endian uint32 words:

    [key codes | value codes | float16 key scale, float16 value scale]
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from ..core.bit_packing import PATTERN_BITS, sign_positions
from ..core.codebook import SEARCH, TOP, Codebook
from ..core.kv_format import PATTERN_WIDE, SCALE_DENOMINATOR, SERVED_WIDTHS, KVFormat
from ..core.reference import SMALLEST_RMS
from ..core.rotation import Rotation, block_norm
from ..core.vector_codebook import VECTOR, VectorCodebook, codebook_of

WORD = 4  # bytes


def check_served(fmt: KVFormat) -> None:
    """ValueError for widths and head dimensions that slots cannot hold."""
    if not fmt.served:
        raise ValueError(
            f"{fmt.name} with head_dim {fmt.head_dim} cannot be served on MLX; allowed are bits_k and bits_v of "
            f"{', '.join(map(str, SERVED_WIDTHS))} and head dimensions that are multiples of 16"
        )


def slot_words(fmt: KVFormat) -> int:
    """32-bit words of a slot."""
    return fmt.slot_bytes // WORD


@functools.lru_cache(None)
def _table(name: str, *key) -> mx.array:
    """Constants as evaluated arrays, since an unevaluated one belongs to the thread that made it."""
    array = mx.array(_TABLES[name](*key))
    mx.eval(array)
    return array


def _levels(head_dim: int, bits: int) -> np.ndarray:
    magnitudes = np.array(Codebook.lloyd_max(head_dim, bits).magnitudes, np.float32)
    return np.concatenate([magnitudes, -magnitudes])


_TABLES = {
    "signs": lambda head_dim: np.array(Rotation(head_dim).signs, np.float32),
    "levels": _levels,
    "shifts": lambda bits: np.arange(0, 32, bits, dtype=np.uint32),
    "patterns": lambda: np.array(VECTOR.patterns, np.float32),
    "half_energies": lambda: np.array(VECTOR.half_energies, np.float32),
    "pattern_signs": lambda: np.arange(PATTERN_BITS, PATTERN_BITS + PATTERN_WIDE, dtype=np.uint32),
    "sign_shifts": lambda: sign_positions(1).astype(np.uint32),
}


def _hadamard(x: mx.array, rotation: Rotation) -> mx.array:
    """Strides 1, 2, 4 ... in float32, the order of additions that core.reference has."""
    parts, start = [], 0
    for size in rotation.blocks:
        y, stride = x[..., start : start + size], 1
        while stride < size:
            pairs = y.reshape(*y.shape[:-1], size // (2 * stride), 2, stride)
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            y = mx.stack([a + b, a - b], -2).reshape(y.shape)
            stride *= 2
        parts.append(y * block_norm(size))
        start += size
    return mx.concatenate(parts, -1)


def rotate(x: mx.array) -> mx.array:
    """[..., head_dim] -> float32 of the same shape, in the basis of the codes."""
    head_dim = x.shape[-1]
    return _hadamard(x.astype(mx.float32) * _table("signs", head_dim), Rotation(head_dim))


def rotate_back(y: mx.array) -> mx.array:
    """[..., head_dim] -> float32 [..., head_dim], the inverse of rotate."""
    head_dim = y.shape[-1]
    return _hadamard(y.astype(mx.float32), Rotation(head_dim)) * _table("signs", head_dim)


class _Coordinates:
    """How a Codebook codes sizes [..., head_dim]: each coordinate by itself."""

    def __init__(self, size: mx.array, book: Codebook):
        self.size, self.book = size, book

    def sums(self, grid: mx.array) -> tuple[mx.array, mx.array]:
        """For one grid a vector, [..., 1]: sizes times levels, and levels times levels, both summed to [..., 1]."""
        level = _level(self.size / grid, self.book)
        return (self.size * level).sum(-1, keepdims=True), (level * level).sum(-1, keepdims=True)

    def codes(self, grid: mx.array, negative: mx.array) -> mx.array:
        """uint32 [..., head_dim]."""
        return _index(self.size / grid, self.book) | negative.astype(mx.uint32) << (self.book.bits - 1)


class _Patterns:
    """The same for a VectorCodebook: four coordinates at once, whose code is a byte."""

    def __init__(self, size: mx.array, book: VectorCodebook):
        fours = size.reshape(*size.shape[:-1], -1, PATTERN_WIDE, 1)
        self.along = sum(fours[..., j, :] * _table("patterns")[:, j] for j in range(PATTERN_WIDE))  # in the reference's order

    def _nearest(self, grid: mx.array) -> mx.array:
        return mx.argmax(self.along - grid[..., None] * _table("half_energies"), -1, keepdims=True)

    def sums(self, grid: mx.array) -> tuple[mx.array, mx.array]:
        nearest = self._nearest(grid)
        along = mx.take_along_axis(self.along, nearest, -1)[..., 0]
        return along.sum(-1, keepdims=True), 2 * mx.take(_table("half_energies"), nearest[..., 0]).sum(-1, keepdims=True)

    def codes(self, grid: mx.array, negative: mx.array) -> mx.array:
        signs = negative.reshape(*negative.shape[:-1], -1, PATTERN_WIDE).astype(mx.uint32) << _table("pattern_signs")
        return self._nearest(grid)[..., 0] | signs.sum(-1)


def quantize(x: mx.array, bits: int, vector: bool = False) -> tuple[mx.array, mx.array]:
    """[..., head_dim] -> uint32 words [..., bytes / 4] and float16 scales [...], as core.reference.quantize with the
    codebook_of(head_dim, bits, vector).

    A vector that cannot be stored (NaN, infinity, a scale beyond float16) gets the scale NaN.
    """
    book = codebook_of(x.shape[-1], bits, vector)
    y = rotate(x)
    size = mx.abs(y)
    rms = mx.sqrt(mx.mean(y * y, -1, keepdims=True))
    live = (rms > SMALLEST_RMS) & (rms < mx.inf)
    coder = _Coordinates(size, book) if isinstance(book, Codebook) else _Patterns(size, book)
    best = mx.full(rms.shape, -1.0)
    won_grid, worth = mx.ones(rms.shape), mx.zeros(rms.shape)
    for multiple in (1.0,) if bits == 8 else SEARCH:
        grid = size.max(-1, keepdims=True) / TOP if bits == 8 else rms * multiple * book.unit
        grid = mx.where(live, grid, 1)
        along, energy = coder.sums(grid)
        merit = along * along / energy
        won = merit > best
        best, won_grid = mx.where(won, merit, best), mx.where(won, grid, won_grid)
        worth = mx.where(won, along / energy, worth)
    stored = (mx.where(live, worth, mx.where(rms < mx.inf, 0.0, mx.nan)) * SCALE_DENOMINATOR).astype(mx.float16)
    bad = ~(mx.abs(stored) < mx.inf)
    codes = mx.where(live & ~bad, coder.codes(won_grid, y < 0), 0)
    return _words(codes, 8) if vector else _pack(codes, bits), mx.where(bad, mx.array(mx.nan, mx.float16), stored)[..., 0]


def _index(scaled: mx.array, book: Codebook) -> mx.array:
    """Index of the magnitude nearest to each number; a number on a boundary takes the smaller."""
    if book.bits == 8:  # boundaries are 1, 2, ... 127
        return mx.clip(mx.ceil(scaled) - 1, 0, 127).astype(mx.uint32)
    index = mx.zeros(scaled.shape, mx.uint32)
    for boundary in book.boundaries:
        index = index + (scaled > boundary)
    return index


def _level(scaled: mx.array, book: Codebook) -> mx.array:
    if book.bits == 8:
        return mx.clip(mx.ceil(scaled) - 1, 0, 127) + 0.5
    return mx.take(_table("levels", book.head_dim, book.bits), _index(scaled, book))


def _pack(codes: mx.array, bits: int) -> mx.array:
    """uint32 codes [..., head_dim] -> words, by core.bit_packing's rule."""
    if bits == 8:
        codes = mx.where(codes & 0x80, codes ^ 0x7F, codes)
    elif bits == 3:
        groups = -(-codes.shape[-1] // 32)
        codes = mx.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 32 * groups - codes.shape[-1])])
        signs = (codes >> 2).reshape(*codes.shape[:-1], groups, 32)
        return mx.concatenate([_pack(codes & 3, 2), (signs << _table("sign_shifts")).sum(-1)], -1).astype(mx.uint32)
    return _words(codes, bits)


def _words(fields: mx.array, bits: int) -> mx.array:
    """uint32 fields [..., n] of a width that divides 32 -> words, the first field lowest."""
    fields = fields.reshape(*fields.shape[:-1], -1, 32 // bits)
    return (fields << _table("shifts", bits)).sum(-1).astype(mx.uint32)


def _unpack(words: mx.array, bits: int, head_dim: int) -> mx.array:
    """words -> uint32 codes [..., head_dim]; widths below 8."""
    if bits == 3:
        groups = words.shape[-1] // 3
        low = _unpack(words[..., : 2 * groups], 2, 32 * groups)
        signs = words[..., 2 * groups :, None] >> _table("sign_shifts") & 1
        return (low | signs.reshape(low.shape) << 2)[..., :head_dim]
    return (words[..., None] >> _table("shifts", bits) & (1 << bits) - 1).reshape(*words.shape[:-1], head_dim)


def dequantize(words: mx.array, scales: mx.array, bits: int, head_dim: int, vector: bool = False) -> mx.array:
    """The vectors in the basis of the codes: float32 [..., head_dim]; rotate_back gives the model's basis."""
    if vector:
        code = words.view(mx.uint8)
        size = mx.take(_table("patterns"), code & (1 << PATTERN_BITS) - 1, 0)
        level = mx.where(code[..., None] >> _table("pattern_signs") & 1, -size, size).reshape(*code.shape[:-1], head_dim)
    elif bits == 8:
        level = words.view(mx.int8).astype(mx.float32) + 0.5
    else:
        level = mx.take(_table("levels", head_dim, bits), _unpack(words, bits, head_dim))
    return level * (scales.astype(mx.float32) / SCALE_DENOMINATOR)[..., None]


def store(keys: mx.array, values: mx.array, fmt: KVFormat) -> mx.array:
    """keys, values [batch, kv_heads, tokens, head_dim] -> slots uint32 [batch, kv_heads, tokens, slot_words]."""
    (k, k_scales), (v, v_scales) = quantize(keys, fmt.bits_k), quantize(values, fmt.bits_v, fmt.vector_values)
    return mx.concatenate([k, v, mx.stack([k_scales, v_scales], -1).view(mx.uint32)], -1)


def load(slots: mx.array, fmt: KVFormat) -> tuple[mx.array, mx.array]:
    """slots [..., slot_words] -> keys and values in the basis of the codes, float32 [..., head_dim] each."""
    k, v = fmt.k_bytes // WORD, (fmt.k_bytes + fmt.v_bytes) // WORD
    scales = slots[..., v:].view(mx.float16)
    return (
        dequantize(slots[..., :k], scales[..., 0], fmt.bits_k, fmt.head_dim),
        dequantize(slots[..., k:v], scales[..., 1], fmt.bits_v, fmt.head_dim, fmt.vector_values),
    )

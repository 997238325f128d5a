"""What the kernels read from the codebooks and the rotation, as evaluated arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..core.codebook import SEARCH, Codebook
from ..core.kv_format import KVFormat
from ..core.rotation import Rotation
from ..core.vector_codebook import VECTOR

LEVELS = 16  # room for the levels of keys, and of values; 8-bit codes need none


def _evaluated(numbers) -> mx.array:
    array = mx.array(np.concatenate([part.astype(np.float32) for part in numbers]))
    mx.eval(array)
    return array


def _padded(numbers, room: int) -> np.ndarray:
    return np.pad(np.array(numbers, np.float32), (0, room - len(numbers)))


def _levels(head_dim: int, bits: int) -> np.ndarray:
    if bits == 8:
        return np.zeros(LEVELS, np.float32)
    magnitudes = np.array(Codebook.lloyd_max(head_dim, bits).magnitudes, np.float32)
    return _padded(np.concatenate([magnitudes, -magnitudes]), LEVELS)


def _value_levels(fmt: KVFormat) -> np.ndarray:
    if fmt.vector_values:
        # The four bytes of a pattern's m (a magnitude is m + 1/2) in the bits of a number that nobody calculates with:
        # all four come with one look-up. None is NaN, as bytes are below 128.
        return np.array(VECTOR.patterns).astype(np.uint8).view(np.float32)[:, 0]
    return _levels(fmt.head_dim, fmt.bits_v)


@functools.lru_cache(None)
def encoding(fmt: KVFormat) -> mx.array:
    """Signs of the rotation, the grids of the search, and for keys and values: unit, 8 magnitudes, 7 boundaries; for
    vector values unit, 16 times 4 magnitudes."""
    parts = [np.array(Rotation(fmt.head_dim).signs), np.array(SEARCH)]
    for bits in (fmt.bits_k,) if fmt.vector_values else (fmt.bits_k, fmt.bits_v):
        book = Codebook.lloyd_max(fmt.head_dim, bits)
        magnitudes, boundaries = (book.magnitudes, book.boundaries) if bits < 8 else ((), ())
        parts += [np.array([book.unit]), _padded(magnitudes, 8), _padded(boundaries, 7)]
    if fmt.vector_values:
        parts += [np.array([VECTOR.unit]), np.array(VECTOR.patterns).ravel()]
    return _evaluated(parts)


@functools.lru_cache(None)
def decoding(fmt: KVFormat) -> mx.array:
    """Level by code of keys, then of values."""
    return _evaluated([_levels(fmt.head_dim, fmt.bits_k), _value_levels(fmt)])


@functools.lru_cache(64)
def attention(fmt: KVFormat, factor: float) -> mx.array:
    """A factor for queries, the signs of the rotation, and the levels."""
    signs = np.array(Rotation(fmt.head_dim).signs)
    return _evaluated([np.array([factor]), signs, _levels(fmt.head_dim, fmt.bits_k), _value_levels(fmt)])


@functools.lru_cache(64)
def numbers(*values: int) -> mx.array:
    """Whole numbers, at least eight of them: MLX puts smaller inputs into another address space."""
    array = mx.array([*values, *(0 for _ in range(8 - len(values)))], mx.int32)
    mx.eval(array)
    return array


def rows(padding: Sequence[int], recent_from: Sequence[int]) -> mx.array:
    """int32 [3, batch] for decode_attention: first column of each sequence, the first that the exact ones hold, and a row that
    nobody reads. MLX's CUDA backend has arrays of up to eight bytes where a kernel waits 15 us for them (on an H200)."""
    return mx.array([padding, recent_from, [0] * len(padding)], mx.int32)


@functools.lru_cache(None)
def nothing(dtype: mx.Dtype) -> mx.array:
    """An input that is not read."""
    array = mx.zeros(8, dtype)
    mx.eval(array)
    return array

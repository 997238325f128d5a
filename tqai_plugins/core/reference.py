"""NumPy quantize, dequantize and attention: the truth that every backend is tested against."""

from __future__ import annotations

import functools

import numpy as np

from .bit_packing import pack, pack_patterns, unpack, unpack_patterns
from .codebook import SEARCH, TOP, Codebook
from .kv_format import PATTERN_WIDE, SCALE_DENOMINATOR, KVFormat
from .rotation import Rotation, block_norm
from .vector_codebook import VectorCodebook, codebook_of

SCALES = ("least_squares", "exact_norm", "norm")
INVALID = ("raise", "flag")
SMALLEST_RMS = 1e-18  # below it the squares of float32 underflow: such a vector counts as zero


@functools.lru_cache(None)
def rotation_matrix(rotation: Rotation) -> np.ndarray:
    """The orthogonal matrix R, float32 [head_dim, head_dim]; rows are outputs: y = R x."""
    if rotation.kind == "hadamard":
        return rotate(np.eye(rotation.head_dim, dtype=np.float32), rotation).T.copy()
    normal = np.random.default_rng(rotation.seed).standard_normal((rotation.head_dim,) * 2)
    q, r = np.linalg.qr(normal)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def _hadamard(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """Orthonormal block Walsh-Hadamard transform, strides 1, 2, 4 ... in float32."""
    parts, start = [], 0
    for size in rotation.blocks:
        y = x[..., start : start + size]
        stride = 1
        while stride < size:
            pairs = y.reshape(*y.shape[:-1], size // (2 * stride), 2, stride)
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            y = np.stack([a + b, a - b], -2).reshape(y.shape)
            stride *= 2
        parts.append(y * np.float32(block_norm(size)))
        start += size
    return np.concatenate(parts, -1)


def rotate(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """float32 [..., head_dim] -> R x, float32."""
    x = np.asarray(x, np.float32)
    if rotation.kind == "haar":
        return x @ rotation_matrix(rotation).T
    return _hadamard(x * np.array(rotation.signs, np.float32), rotation)


def rotate_back(y: np.ndarray, rotation: Rotation) -> np.ndarray:
    """float32 [..., head_dim] -> transpose(R) y, float32: the inverse of rotate."""
    y = np.asarray(y, np.float32)
    if rotation.kind == "haar":
        return y @ rotation_matrix(rotation)
    return _hadamard(y, rotation) * np.array(rotation.signs, np.float32)


class _Coordinates:
    """How a Codebook codes sizes float32 [..., head_dim]: each coordinate by itself."""

    def __init__(self, size: np.ndarray, codebook: Codebook):
        self.size, self.bits = size, codebook.bits
        self.boundaries = np.array(codebook.boundaries, np.float32)
        self.magnitudes = np.array(codebook.magnitudes, np.float32)

    def on_grid(self, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For one grid a vector, float32 [...]: indices, sizes times levels, and levels times levels, both summed to [...]."""
        tried = np.searchsorted(self.boundaries, self.size / grid[..., None]).astype(np.uint8)
        level = self.magnitudes[tried]
        return tried, (self.size * level).sum(-1), (level * level).sum(-1)

    def codes(self, index: np.ndarray, negative: np.ndarray) -> np.ndarray:
        return index | negative.astype(np.uint8) << (self.bits - 1)


class _Patterns:
    """The same for a VectorCodebook: four coordinates at once."""

    def __init__(self, size: np.ndarray, codebook: VectorCodebook):
        fours = size.reshape(*size.shape[:-1], -1, PATTERN_WIDE, 1)
        patterns = np.array(codebook.patterns, np.float32).T
        # Summed in this order by every backend; the products serve all grids.
        self.along = sum(fours[..., j, :] * patterns[j] for j in range(PATTERN_WIDE))
        self.half_energies = np.array(codebook.half_energies, np.float32)

    def on_grid(self, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tried = (self.along - grid[..., None, None] * self.half_energies).argmax(-1)
        along = np.take_along_axis(self.along, tried[..., None], -1)[..., 0]
        return tried.astype(np.uint8), along.sum(-1), 2 * self.half_energies[tried].sum(-1)

    def codes(self, index: np.ndarray, negative: np.ndarray) -> np.ndarray:
        return pack_patterns(index, negative)


def encode(
    y: np.ndarray, codebook: Codebook | VectorCodebook, *, scale: str = "least_squares", search: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [..., head_dim] and float32 scales [...] for rotated vectors y; ValueError for another `scale` than SCALES.
    Codes of a VectorCodebook are its bytes, [..., head_dim / 4].

    With `search` every grid of codebook.SEARCH is tried and the one whose codes point closest to y
    is kept, the first of equals. Tie rule for other backends, 2^-16 of leeway for float32 sums in
    another order: a coordinate within one part in 2^16 of a boundary may take either neighbour, one
    within 2^-16 of the root mean square of zero either sign, and a grid whose squared cosine is
    within one part in 2^16 of the best may be chosen. Four coordinates may take another pattern whose merit
    (VectorCodebook.half_energies) falls short of the best by 2^-16 of their product with it.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; allowed are {', '.join(SCALES)}")
    y = np.asarray(y, np.float32)
    size = np.abs(y)
    with np.errstate(over="ignore", invalid="ignore"):
        rms = np.sqrt(np.mean(y * y, -1, dtype=np.float32))
        if isinstance(codebook, Codebook) and codebook.bits == 8:
            grids = size.max(-1, keepdims=True) / np.float32(TOP)
        else:
            multiples = SEARCH if search else (1.0,)
            grids = rms[..., None] * np.array(multiples, np.float32) * np.float32(codebook.unit)
        live = (rms > SMALLEST_RMS) & np.isfinite(rms)
        size = np.where(live[..., None], size, 0)
        coder = _Coordinates(size, codebook) if isinstance(codebook, Codebook) else _Patterns(size, codebook)
        best = np.full(rms.shape, -1, np.float32)
        index = np.zeros((*rms.shape, 1), np.uint8)
        worth = np.zeros(rms.shape, np.float32)
        for k in range(grids.shape[-1]):
            grid = np.where(live, grids[..., k], 1)
            tried, along, energy = coder.on_grid(grid)
            merit = np.where(live, along * along / energy, 0)
            won = merit > best
            best = np.where(won, merit, best)
            index = np.where(won[..., None], tried, index)
            if scale == "least_squares":
                fitted = along / energy
            elif scale == "exact_norm":
                fitted = rms * np.sqrt(np.float32(y.shape[-1]) / energy)
            else:
                fitted = grid
            worth = np.where(won, fitted, worth)
    codes = np.where(live[..., None], coder.codes(index, y < 0), 0).astype(np.uint8)
    return codes, np.where(live, worth, np.where(np.isfinite(rms), np.float32(0), np.float32(np.nan)))


def quantize(
    x: np.ndarray,
    bits: int,
    *,
    rotation: Rotation | None = None,
    codebook: Codebook | VectorCodebook | None = None,
    scale: str = "least_squares",
    search: bool = True,
    on_invalid: str = "raise",
) -> tuple[np.ndarray, np.ndarray]:
    """Compress vectors x [..., head_dim] to packed codes and one float16 scale each.

    Returns uint8 [..., packed_bytes(head_dim, bits)] and float16 [...]. codebook: that of vector_codebook.codebook_of.
    A vector of zeros, or one whose root mean square underflows (below 1e-18), or whose scale
    underflows float16 (root mean square below about 3e-8), reads back as zeros. A vector that holds
    NaN or infinity, or whose scale overflows float16 (root mean square above about 6e4), raises
    ValueError; with on_invalid="flag" it gets the scale NaN, so all it touches reads as NaN.
    """
    if on_invalid not in INVALID:
        raise ValueError(f"on_invalid is {on_invalid!r}; allowed are {', '.join(INVALID)}")
    x = np.asarray(x, np.float32)
    rotation = rotation or Rotation(x.shape[-1])
    codebook = codebook or Codebook.lloyd_max(x.shape[-1], bits)
    with np.errstate(over="ignore", invalid="ignore"):
        codes, worth = encode(rotate(x, rotation), codebook, scale=scale, search=search)
        stored = (worth * np.float32(SCALE_DENOMINATOR)).astype(np.float16)
    bad = ~np.isfinite(stored)
    if bad.any():
        if on_invalid == "raise":
            raise ValueError(
                f"{int(bad.sum())} of {bad.size} vectors hold NaN, infinity or numbers too large for a float16 "
                "scale; mend the input, or pass on_invalid='flag' to have them read back as NaN"
            )
        stored = np.where(bad, np.float16(np.nan), stored)
        codes = np.where(bad[..., None], np.uint8(0), codes)
    return pack(codes, bits) if isinstance(codebook, Codebook) else codes, stored


def dequantize_rotated(
    packed: np.ndarray, scales: np.ndarray, bits: int, codebook: Codebook | VectorCodebook
) -> np.ndarray:
    """Packed codes [..., bytes] and float16 scales [...] -> float32 vectors [..., head_dim] in the rotated basis."""
    if isinstance(codebook, VectorCodebook):
        index, negative = unpack_patterns(packed)
        size = np.array(codebook.patterns, np.float32)[index].reshape(negative.shape)
    else:
        codes, half = unpack(packed, bits, codebook.head_dim), 1 << (bits - 1)
        negative, size = codes & half > 0, np.array(codebook.magnitudes, np.float32)[codes & (half - 1)]
    level = np.where(negative, -size, size)
    return level * (scales.astype(np.float32) / np.float32(SCALE_DENOMINATOR))[..., None]


def dequantize(
    packed: np.ndarray,
    scales: np.ndarray,
    bits: int,
    head_dim: int,
    *,
    rotation: Rotation | None = None,
    codebook: Codebook | VectorCodebook | None = None,
) -> np.ndarray:
    """The inverse of quantize: float32 [..., head_dim]."""
    rotation = rotation or Rotation(head_dim)
    codebook = codebook or Codebook.lloyd_max(head_dim, bits)
    return rotate_back(dequantize_rotated(packed, scales, bits, codebook), rotation)


def softmax_attention(
    scores: np.ndarray, v: np.ndarray, sinks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scores) v over the last axis, with log-sum-exp; `sinks` are extra logits without a value.

    scores [..., queries, tokens] (-inf where masked), v [..., tokens, head_dim], sinks [...] or None.
    A query that sees no token gets zeros and a log-sum-exp of -inf.
    """
    top = scores.max(-1, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks)
    safe = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - safe[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total = total + np.exp(sinks - safe)
    with np.errstate(divide="ignore"):
        return weights @ v / np.maximum(total, 1e-300)[..., None], np.log(total) + safe


def attention(
    q: np.ndarray,
    k: tuple[np.ndarray, np.ndarray],
    v: tuple[np.ndarray, np.ndarray],
    fmt: KVFormat,
    *,
    softmax_scale: float,
    rotation: Rotation | None = None,
) -> np.ndarray:
    """Causal attention of the newest queries over quantized keys and values, in the rotated basis.

    q float [queries, q_heads, head_dim] are the last `queries` of `tokens` positions; k and v are
    (codes uint8 [tokens, kv_heads, bytes], scales float16 [tokens, kv_heads]). Queries are rotated
    once and the output is rotated back once; no key is. Returns float64 [queries, q_heads, head_dim].
    """
    rotation = rotation or Rotation(fmt.head_dim)
    keys = dequantize_rotated(*k, fmt.bits_k, Codebook.lloyd_max(fmt.head_dim, fmt.bits_k)).astype(np.float64)
    values = dequantize_rotated(*v, fmt.bits_v, codebook_of(fmt.head_dim, fmt.bits_v, fmt.vector_values)).astype(np.float64)
    queries, q_heads, _ = q.shape
    tokens, kv_heads, _ = keys.shape
    turned = rotate(q, rotation).astype(np.float64).reshape(queries, kv_heads, q_heads // kv_heads, -1)
    scores = np.einsum("qhgd,thd->hgqt", turned, keys) * softmax_scale
    seen = np.arange(tokens) <= np.arange(tokens - queries, tokens)[:, None]
    out, _ = softmax_attention(np.where(seen, scores, -np.inf), values.transpose(1, 0, 2)[:, None])
    out = out.transpose(2, 0, 1, 3).reshape(queries, q_heads, -1)
    return rotate_back(out.astype(np.float32), rotation).astype(np.float64)

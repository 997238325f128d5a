"""Codes <-> bytes: the rule every kernel follows.

A code of b bits is a sign bit (the top one) and a magnitude index.

1, 2, 4 bits   little-endian fields: coordinate i fills bits b*i to b*i + b - 1 of the vector.
               Nibbles are selectors of the GPU's byte permute as they are.
8 bits         one int8 a coordinate: m, or ~m under a negative sign, as the matrix unit reads it.
3 bits         groups of 32 coordinates, the last one filled up with zeros: first the 2-bit magnitudes of
               all groups as above (8 bytes a group, coordinates 4 i to 4 i + 3 in byte i), then the signs
               of all groups (4 bytes a group). Sign byte i of a group, i = 0 to 3, holds

                   coordinates 4 i to 4 i + 3              in its bits 2 3 6 7, one a coordinate,
                   coordinates 4 (i + 4) to 4 (i + 4) + 3  in its bits 0 1 4 5.

               Shifted by at most two places a sign then lies above its magnitude, and both make a
               byte permute's selector.
4 coordinates  (vector_codebook) byte i stands for coordinates 4 i to 4 i + 3: the index of their pattern in its bits
at 2 bits      0 to 3, the sign of coordinate 4 i + j in bit 4 + j.
5, 6, 7 bits   a little-endian bit string; read by the reference and transformers only.
"""

from __future__ import annotations

import numpy as np

from .kv_format import PATTERN_WIDE, packed_bytes

# Sign bits of the four coordinates of a magnitude byte in the first half of its group, then in the second.
SIGN_BITS = ((2, 3, 6, 7), (0, 1, 4, 5))

PATTERN_BITS = 4  # of a pattern's index, below the signs
_PATTERN_SIGNS = PATTERN_BITS + np.arange(PATTERN_WIDE, dtype=np.uint8)


def _pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """Little-endian bit string of `bits`-bit fields: uint8 [..., n] -> uint8 [..., ceil(n*bits/8)]."""
    ones = fields[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(ones.reshape(*fields.shape[:-1], -1), axis=-1, bitorder="little")


def _unpack_fields(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    ones = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    return np.packbits(ones.reshape(*packed.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]


def sign_positions(groups: int) -> np.ndarray:
    """Bit position in the sign plane of each of 32 * groups coordinates."""
    byte = 32 * np.arange(groups)[:, None, None, None] + 8 * np.arange(4)[None, None, :, None]
    return (byte + np.array(SIGN_BITS)[None, :, None, :]).ravel()


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., head_dim] -> uint8 bytes [..., packed_bytes(head_dim, bits)]."""
    head_dim = codes.shape[-1]
    if bits == 8:
        return np.where(codes & 0x80, codes ^ 0x7F, codes).astype(np.uint8)
    if bits != 3:
        return _pack_fields(codes, bits)
    groups = -(-head_dim // 32)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 32 * groups - head_dim)])
    signs = np.zeros_like(codes)
    signs[..., sign_positions(groups)] = codes >> 2
    return np.concatenate([_pack_fields(codes & 3, 2), _pack_fields(signs, 1)], -1)


def unpack(packed: np.ndarray, bits: int, head_dim: int) -> np.ndarray:
    """uint8 bytes [..., packed_bytes(head_dim, bits)] -> uint8 codes [..., head_dim]. ValueError for another number of bytes."""
    if packed.shape[-1] != packed_bytes(head_dim, bits):
        raise ValueError(f"{packed.shape[-1]} bytes for {head_dim} codes of {bits} bits; expected {packed_bytes(head_dim, bits)}")
    if bits == 8:
        return np.where(packed & 0x80, packed ^ 0x7F, packed).astype(np.uint8)
    if bits != 3:
        return _unpack_fields(packed, bits, head_dim)
    groups = packed.shape[-1] // 12
    low = _unpack_fields(packed[..., : 8 * groups], 2, 32 * groups)
    signs = _unpack_fields(packed[..., 8 * groups :], 1, 32 * groups)[..., sign_positions(groups)]
    return (low | signs << 2)[..., :head_dim]


def pack_patterns(index: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Pattern indices uint8 [..., head_dim / 4] and signs bool [..., head_dim] -> uint8 bytes [..., head_dim / 4]."""
    signs = negative.reshape(*index.shape, PATTERN_WIDE).astype(np.uint8) << _PATTERN_SIGNS
    return index | signs.sum(-1, dtype=np.uint8)


def unpack_patterns(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of pack_patterns: uint8 bytes [..., head_dim / 4] -> indices of that shape and bool [..., head_dim]."""
    negative = packed[..., None] >> _PATTERN_SIGNS & 1 > 0
    return packed & (1 << PATTERN_BITS) - 1, negative.reshape(*packed.shape[:-1], -1)

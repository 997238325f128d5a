"""Codes <-> bytes: the rule every kernel follows.

A code of b bits is a sign bit (the top one) and a magnitude index.

1, 2, 4 bits   little-endian fields: coordinate i fills bits b*i to b*i + b - 1 of the vector.
               Nibbles are selectors of the GPU's byte permute as they are.
8 bits         one int8 a coordinate: m, or ~m under a negative sign, as the matrix unit reads it.
3 bits         a low plane of 2-bit fields (magnitude) as above, head_dim / 4 bytes, then a plane of
               sign bits, head_dim / 8 bytes. Byte j of the sign plane serves bytes j and
               j + head_dim / 8 of the low plane, whose coordinates lie in its bits 2 3 6 7 and
               1 0 5 4... see SIGN_BITS: shifted by -1 to 2 places the sign lands beside its magnitude.
5, 6, 7 bits   a little-endian bit string; read by the reference and transformers only.
"""

from __future__ import annotations

import numpy as np

from .kv_format import packed_bytes

# Bit of the sign byte for coordinate 4j + i of the low plane's first half, then of its second half.
SIGN_BITS = ((2, 3, 6, 7), (1, 0, 5, 4))


def _pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """Little-endian bit string of `bits`-bit fields: uint8 [..., n] -> uint8 [..., ceil(n*bits/8)]."""
    ones = fields[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(ones.reshape(*fields.shape[:-1], -1), axis=-1, bitorder="little")


def _unpack_fields(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    ones = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    return np.packbits(ones.reshape(*packed.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]


def _sign_order(eighth: int) -> np.ndarray:
    """Bit position in the sign plane of each coordinate, [8 * eighth]."""
    byte = np.arange(eighth)[:, None] * 8
    return np.concatenate([(byte + np.array(half)).ravel() for half in SIGN_BITS])


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., head_dim] -> uint8 bytes [..., packed_bytes(head_dim, bits)]."""
    head_dim = codes.shape[-1]
    if bits == 8:
        return np.where(codes & 0x80, codes ^ 0x7F, codes).astype(np.uint8)
    if bits != 3:
        return _pack_fields(codes, bits)
    eighth = -(-head_dim // 8)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 8 * eighth - head_dim)])
    signs = np.zeros_like(codes)
    signs[..., _sign_order(eighth)] = codes >> 2
    return np.concatenate([_pack_fields(codes & 3, 2), _pack_fields(signs, 1)], -1)


def unpack(packed: np.ndarray, bits: int, head_dim: int) -> np.ndarray:
    """uint8 bytes [..., packed_bytes(head_dim, bits)] -> uint8 codes [..., head_dim]."""
    if packed.shape[-1] != packed_bytes(head_dim, bits):
        raise ValueError(f"{packed.shape[-1]} bytes for {head_dim} codes of {bits} bits; expected {packed_bytes(head_dim, bits)}")
    if bits == 8:
        return np.where(packed & 0x80, packed ^ 0x7F, packed).astype(np.uint8)
    if bits != 3:
        return _unpack_fields(packed, bits, head_dim)
    eighth = packed.shape[-1] // 3
    low = _unpack_fields(packed[..., : 2 * eighth], 2, 8 * eighth)
    signs = _unpack_fields(packed[..., 2 * eighth :], 1, 8 * eighth)[..., _sign_order(eighth)]
    return (low | signs << 2)[..., :head_dim]

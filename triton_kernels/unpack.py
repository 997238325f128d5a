"""Codes -> int8 codebook values: byte-permute PTX for NVIDIA, and plain loads for everything else.

A register holds four bytes. A byte permute picks four table entries by the low nibbles of its
selector, so packed codes (core.bit_packing) are selectors almost as they lie in memory.
An int8 value m stands for the level m + 1/2 and ~m = -(m + 1) for -(m + 1/2).
"""

from __future__ import annotations

import triton
import triton.language as tl
from tqai_plugins.core.codebook import Codebook

# Coordinates come out in `planes`, one per field of a byte.
PLANES = {8: 1, 4: 2, 3: 4, 2: 4}


def _word(values) -> str:
    return f"0x{sum((v & 255) << 8 * i for i, v in enumerate(values)):08x}"


def unpack_ptx(codebook: Codebook, *, by_token: bool) -> str:
    """PTX that turns one register of packed codes into PLANES registers of int8 values.

    by_token: the four bytes belong to one token (keys), and the outputs take the bytes in selector
    order (see key_coordinate). Otherwise to four tokens (values): two more permutes a pair bring
    each token's values back into its own byte, and plane f of byte j is coordinate PLANES * j + f.
    """
    bits, m = codebook.bits, codebook.integers
    if bits == 8:
        return ""
    if bits == 4:
        p, n = _word(m[:4]), _word(m[4:])
        select = f"and.b32 s, $2, 0x77777777; shr.u32 h, s, 16; prmt.b32 a, {p}, {n}, s; prmt.b32 b, {p}, {n}, h;"
        if by_token:  # signs of the eight nibbles: top bits of x << 4 and of x
            body = "shl.b32 t, $2, 4; prmt.b32 u, t, $2, 0xd9c8; prmt.b32 v, t, $2, 0xfbea; xor.b32 $0, a, u; xor.b32 $1, b, v;"
        else:
            body = (
                "prmt.b32 u, a, b, 0x6420; prmt.b32 v, a, b, 0x7531; prmt.b32 a, $2, 0, 0xba98; "
                "shl.b32 t, $2, 4; prmt.b32 b, t, 0, 0xba98; xor.b32 $0, u, b; xor.b32 $1, v, a;"
            )
        return f"{{ .reg .b32 s, h, t, u, v, a, b; {select} {body} }}"
    table = [*m, *(~v for v in m)]
    if bits == 2:
        p = n = _word(table)
        even, odd = "and.b32 t, $4, 0x33333333;", "shr.u32 u, $4, 2; and.b32 u, u, 0x33333333;"
    else:
        p, n = _word(table[:4]), _word(table[4:])
        # Two bytes of signs serve four bytes of magnitudes; those of the second pair lie two bits lower.
        if by_token:
            lift = "shl.b32 s, $5, 2; and.b32 s, s, 0xffff0000; and.b32 h, $5, 0x0000ffff; or.b32 s, s, h;"
        else:
            lift = "and.b32 h, $6, 2; shl.b32 s, $5, h;"
        even = f"{lift} and.b32 h, s, 0x44444444; and.b32 t, $4, 0x33333333; or.b32 t, t, h;"
        odd = "shr.u32 h, s, 1; and.b32 h, h, 0x44444444; shr.u32 u, $4, 2; and.b32 u, u, 0x33333333; or.b32 u, u, h;"
    if by_token:
        look = "prmt.b32 ${0}, {p}, {n}, {r}; shr.u32 h, {r}, 16; prmt.b32 ${1}, {p}, {n}, h;"
    else:
        look = (
            "prmt.b32 a, {p}, {n}, {r}; shr.u32 h, {r}, 16; prmt.b32 b, {p}, {n}, h; "
            "prmt.b32 ${0}, a, b, 0x6420; prmt.b32 ${1}, a, b, 0x7531;"
        )
    first, second = ((0, 1), (2, 3)) if by_token else ((0, 2), (1, 3))
    look_even = look.format(*first, p=p, n=n, r="t")
    look_odd = look.format(*second, p=p, n=n, r="u")
    return f"{{ .reg .b32 s, h, t, u, a, b; {even} {look_even} {odd} {look_odd} }}"


@triton.jit
def key_coordinate(plane: tl.constexpr, byte, BITS: tl.constexpr):
    """The coordinate that output `plane`, byte `byte` of a key's unpack_ptx holds."""
    if BITS == 8:
        return byte
    elif BITS == 4:
        return (byte // 4) * 8 + plane * 4 + byte % 4
    else:
        return (byte // 4) * 16 + (plane % 2) * 8 + (byte % 4) * 2 + plane // 2


@triton.jit
def two_planes(x, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(PTX, "=r,=r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)


@triton.jit
def four_planes(x, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(
        PTX, "=r,=r,=r,=r,r", [x], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def four_key_planes_signed(x, signs, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(
        PTX, "=r,=r,=r,=r,r,r", [x, signs], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def four_value_planes_signed(x, signs, lift, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(
        PTX, "=r,=r,=r,=r,r,r,r", [x, signs, lift], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def sign_byte(byte):
    """Which byte of the 3-bit sign plane serves magnitude byte `byte`."""
    return (byte // 4) * 2 + byte % 2


@triton.jit
def load_levels(codes, coordinate, stride, levels, mask, BITS: tl.constexpr, D: tl.constexpr):
    """int8 values of coordinates, whatever the target: the plain form of unpack_ptx.

    codes: pointers to byte 0 of each vector; byte i lies `stride` further each. levels: the
    codebook's 2^BITS int8 values by code, in memory. Shapes broadcast.
    """
    if BITS == 8:
        return tl.load(codes + coordinate * stride, mask=mask, other=0).to(tl.int8, bitcast=True)
    if BITS == 3:
        byte = coordinate // 4
        field = coordinate % 4
        low = tl.load(codes + byte * stride, mask=mask, other=0).to(tl.int32)
        sign = tl.load(codes + (D // 4 + sign_byte(byte)) * stride, mask=mask, other=0).to(tl.int32)
        place = field + 2 * (field // 2) + 2 - 2 * ((byte // 2) % 2)
        code = ((low >> (2 * field)) & 3) | (((sign >> place) & 1) << 2)
    else:
        per_byte: tl.constexpr = 8 // BITS
        byte = tl.load(codes + (coordinate // per_byte) * stride, mask=mask, other=0).to(tl.int32)
        code = (byte >> (BITS * (coordinate % per_byte))) & ((1 << BITS) - 1)
    return tl.load(levels + code)

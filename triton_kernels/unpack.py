"""Codes -> int8 codebook values: byte-permute PTX for NVIDIA, and plain loads for everything else.

A register holds four bytes. A byte permute picks four table entries by the low nibbles of its
selector, so packed codes (core.bit_packing) are selectors almost as they lie in memory.
An int8 value m stands for the level m + 1/2 and ~m = -(m + 1) for -(m + 1/2).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values come out in planes, one per field of a byte.
PLANES = {8: 1, 4: 2, 3: 4, 2: 4}


def unpack_ptx(bits: int, *, by_token: bool) -> str:
    """PTX that turns one register of packed codes into PLANES registers of int8 values.

    by_token: the four bytes belong to one token (keys), and the outputs take the bytes in selector
    order (see key_coordinate). Otherwise to four tokens (values): two more permutes a pair bring
    each token's values back into its own byte, and plane f of byte j is coordinate PLANES * j + f.

    {x} codes, {y} 3-bit signs, {l} their lift (0 or 2), {p} and {q} the eight table bytes, which come
    in registers: as immediates ptxas copies them anew for every permute.
    """
    inputs = ["x"] + ["y"] * (bits == 3) + ["l"] * (bits == 3)
    at = {name: f"${PLANES[bits] + i}" for i, name in enumerate(inputs)}
    # An int32 beside four packed bytes takes four operands, all the same register.
    at["p"], at["q"] = (f"${PLANES[bits] + len(inputs) + i}" for i in (0, 4))
    look = "prmt.b32 {a}, {p}, {q}, {r}; shr.u32 h, {r}, 16; prmt.b32 {b}, {p}, {q}, h;"
    split = " prmt.b32 {a}, a, b, 0x6420; prmt.b32 {b}, a, b, 0x7531;"
    if bits == 4:
        body = "and.b32 s, {x}, 0x77777777; " + look.format(a="a", b="b", r="s", p="{p}", q="{q}")
        if by_token:  # signs of the eight nibbles: top bits of x << 4 and of x
            body += (
                " shl.b32 t, {x}, 4; prmt.b32 u, t, {x}, 0xd9c8; prmt.b32 s, t, {x}, 0xfbea;"
                " xor.b32 $0, a, u; xor.b32 $1, b, s;"
            )
        else:
            body += split.format(a="u", b="s") + (
                " prmt.b32 a, {x}, 0, 0xba98; shl.b32 t, {x}, 4; prmt.b32 b, t, 0, 0xba98;"
                " xor.b32 $0, u, b; xor.b32 $1, s, a;"
            )
    else:
        even, odd = "and.b32 t, {x}, 0x33333333;", "shr.u32 u, {x}, 2; and.b32 u, u, 0x33333333;"
        if bits == 3:
            # Signs of the second half of a group lie two bits lower.
            lift = "and.b32 h, {l}, 2; shl.b32 s, {y}, h;"
            even = f"{lift} and.b32 h, s, 0x44444444; {even} or.b32 t, t, h;"
            odd = f"shr.u32 h, s, 1; and.b32 h, h, 0x44444444; {odd} or.b32 u, u, h;"
        if by_token:
            even += look.format(a="$0", b="$1", r="t", p="{p}", q="{q}")
            odd += look.format(a="$2", b="$3", r="u", p="{p}", q="{q}")
        else:
            even += look.format(a="a", b="b", r="t", p="{p}", q="{q}") + split.format(a="$0", b="$2")
            odd += look.format(a="a", b="b", r="u", p="{p}", q="{q}") + split.format(a="$1", b="$3")
        body = even + odd
    return "{ .reg .b32 s, h, t, u, a, b; " + body.format(**at) + " }"


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
def two_planes(x, p, q, PTX: tl.constexpr):
    """int8 levels of two groups of codes, four codes of each at a time."""
    return tl.inline_asm_elementwise(
        PTX, "=r,=r,r,r,r,r,r,r,r,r,r", [x, p, q], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def four_planes(x, p, q, PTX: tl.constexpr):
    """int8 levels of four groups of codes, four codes of each at a time."""
    return tl.inline_asm_elementwise(
        PTX, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r", [x, p, q],
        dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
    )


@triton.jit
def four_planes_signed(x, signs, lift, p, q, PTX: tl.constexpr):
    """As four_planes, for 3 bits, whose signs lie apart."""
    return tl.inline_asm_elementwise(
        PTX, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r", [x, signs, lift, p, q],
        dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
    )


@triton.jit
def sign_plane(D: tl.constexpr):
    """Where the sign plane of a 3-bit vector begins: after its magnitudes, in groups of 32 coordinates."""
    return (D + 31) // 32 * 8


@triton.jit
def sign_byte(byte):
    """Which byte of the 3-bit sign plane serves magnitude byte `byte`."""
    return (byte // 8) * 4 + byte % 4


@triton.jit
def sign_lift():
    """int8 [1, 2]: how far the 3-bit signs of four magnitude bytes, and of the next four, lie below their place
    (core.bit_packing). Not a table in memory: what is loaded there keeps Triton from loading codes ahead."""
    return tl.join(tl.full([1], 0, tl.int8), tl.full([1], 2, tl.int8))


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
        sign = tl.load(codes + (sign_plane(D) + sign_byte(byte)) * stride, mask=mask, other=0).to(tl.int32)
        place = field + 2 * (field // 2) + 2 - 2 * ((byte // 4) % 2)
        code = ((low >> (2 * field)) & 3) | (((sign >> place) & 1) << 2)
    else:
        per_byte: tl.constexpr = 8 // BITS
        byte = tl.load(codes + (coordinate // per_byte) * stride, mask=mask, other=0).to(tl.int32)
        code = (byte >> (BITS * (coordinate % per_byte))) & ((1 << BITS) - 1)
    return tl.load(levels + code)

"""Quantize and dequantize in plain PyTorch on any device; the codes are core.reference's.

Reading packed codes is one table look-up for each stored byte. Tables of 16-bit words would take half the
look-ups, but the model's weights push them out of the CPU's caches between two layers.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from ..core import bit_packing, qjl
from ..core.codebook import SEARCH, TOP, Codebook
from ..core.kv_format import PATTERN_WIDE, SCALE_DENOMINATOR, check_head_dim, packed_bytes
from ..core.reference import INVALID, SCALES, SMALLEST_RMS, rotation_matrix
from ..core.rotation import Rotation, block_norm
from ..core.vector_codebook import VECTOR, VectorCodebook, codebook_of

TILE = 1 << 18  # coordinates quantized at a time: bounds the temporaries of a long prefill to some 20 MB


def _constant(make):
    """Make a table once for each set of arguments, fit for autograd even if inference mode asked first."""
    return functools.lru_cache(None)(torch.inference_mode(False)(make))


@_constant
def _signs(rotation: Rotation, device: torch.device) -> torch.Tensor:
    return torch.tensor(rotation.signs, dtype=torch.float32, device=device)


@_constant
def matrix(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """R [head_dim, head_dim], float32: rotate(x) is x @ R.T up to rounding, in one step where bits do not matter."""
    return torch.tensor(rotation_matrix(rotation), device=device)


@_constant
def level_matrix(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """R / SCALE_DENOMINATOR: dequantize is levels @ level_matrix * scales up to rounding."""
    return matrix(rotation, device) / SCALE_DENOMINATOR


def _hadamard(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    parts, start = [], 0
    for size in rotation.blocks:
        y = x[..., start : start + size]
        stride = 1
        while stride < size:
            a, b = y.reshape(*y.shape[:-1], size // (2 * stride), 2, stride).unbind(-2)
            y = torch.stack([a + b, a - b], -2).reshape(y.shape)
            stride *= 2
        parts.append(y * block_norm(size))
        start += size
    return torch.cat(parts, -1)


def rotate(x: torch.Tensor, rotation: Rotation | None = None) -> torch.Tensor:
    """Vectors [..., head_dim] -> R x in float32, bit for bit as the reference (Hadamard)."""
    rotation = rotation or Rotation(x.shape[-1])
    if rotation.kind == "haar":
        return x.float() @ matrix(rotation, x.device).T
    return _hadamard(x.float() * _signs(rotation, x.device), rotation)


def rotate_back(y: torch.Tensor, rotation: Rotation | None = None) -> torch.Tensor:
    """Vectors [..., head_dim] -> transpose(R) y in float32: the inverse of rotate."""
    rotation = rotation or Rotation(y.shape[-1])
    if rotation.kind == "haar":
        return y.float() @ matrix(rotation, y.device)
    return _hadamard(y.float(), rotation) * _signs(rotation, y.device)


@_constant
def _boundaries(codebook: Codebook, device: torch.device) -> torch.Tensor:
    return torch.tensor(codebook.boundaries, dtype=torch.float32, device=device)


def _nearest(size: torch.Tensor, grids: torch.Tensor, codebook: Codebook):
    """For sizes [vectors, head_dim] and grids [vectors, grids]: indices [vectors, grids, head_dim], and the sums
    [vectors, grids] of sizes times levels and of levels times levels."""
    tried = torch.bucketize(size[:, None] / grids[..., None], _boundaries(codebook, size.device), out_int32=True)
    magnitudes = _level_of(codebook.head_dim, codebook.bits).to(size.device)
    level = magnitudes.index_select(0, tried.view(-1)).view(tried.shape)
    return tried, torch.linalg.vecdot(level, size[:, None]), torch.linalg.vecdot(level, level)


@_constant
def _patterns(codebook: VectorCodebook, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(codebook.patterns, device=device).T.contiguous(), torch.tensor(codebook.half_energies, device=device)


def _nearest_patterns(size: torch.Tensor, grids: torch.Tensor, codebook: VectorCodebook):
    """The same for a VectorCodebook, indices [vectors, grids, head_dim / 4]; the order of sums is the reference's."""
    patterns, half_energies = _patterns(codebook, size.device)
    fours = size.unflatten(-1, (-1, PATTERN_WIDE))[..., None]
    along = sum(fours[..., j, :] * patterns[j] for j in range(PATTERN_WIDE))
    tried = torch.stack([(along - grid[:, None, None] * half_energies).argmax(-1) for grid in grids.unbind(1)], 1)
    energy = half_energies.take(tried).sum(-1)
    return tried, along.gather(-1, tried.mT).sum(1), 2 * energy


def _encode(
    y: torch.Tensor, codebook: Codebook | VectorCodebook, scale: str, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.encode for y float32 [vectors, head_dim], all grids of the search at once."""
    size = y.abs()
    rms = (y * y).mean(-1).sqrt()
    live = (rms > SMALLEST_RMS) & rms.isfinite()
    if isinstance(codebook, Codebook) and codebook.bits == 8:
        # Divided by a tensor: CUDA multiplies by the reciprocal of a number.
        grids = size.amax(-1, keepdim=True) / torch.tensor(TOP, device=y.device)
    else:
        multiples = torch.tensor(SEARCH if search else (1.0,), dtype=torch.float32, device=y.device)
        grids = rms[:, None] * multiples * codebook.unit
    grids = torch.where(live[:, None], grids, 1)
    size = torch.where(live[:, None], size, 0)
    if isinstance(codebook, Codebook):
        tried, along, energy = _nearest(size, grids, codebook)
    else:
        tried, along, energy = _nearest_patterns(size, grids, codebook)
    best = (along * along / energy).argmax(-1, keepdim=True)  # the first of equals
    index = tried.gather(1, best[..., None].expand(-1, -1, tried.shape[-1]))[:, 0].to(torch.uint8)
    if scale == "least_squares":
        step = along / energy
    elif scale == "exact_norm":
        step = rms[:, None] * torch.sqrt(y.shape[-1] / energy)
    else:
        step = grids
    negative = (y < 0).to(torch.uint8)
    codes = index | negative << codebook.bits - 1 if isinstance(codebook, Codebook) else pack_patterns(index, negative)
    step = torch.where(live, step.gather(1, best)[:, 0], torch.where(rms.isfinite(), 0.0, torch.nan))
    return torch.where(live[:, None], codes, 0), step


def quantize(
    x: torch.Tensor,
    bits: int,
    *,
    vector: bool = False,
    rotation: Rotation | None = None,
    scale: str = "least_squares",
    search: bool = True,
    on_invalid: str = "raise",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compress vectors x [..., head_dim], any floating dtype, to packed codes and one float16 scale each.

    vector: four coordinates at once, by vector_codebook; ValueError for other bits than 2 and a head_dim that 4 does not divide.
    Returns uint8 [..., packed_bytes(head_dim, bits)] and float16 [...]. Zero, NaN, infinite and
    too large vectors are treated, and ValueError is raised, as reference.quantize says;
    on_invalid="flag" also spares a GPU the wait for the check.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; allowed are {', '.join(SCALES)}")
    if on_invalid not in INVALID:
        raise ValueError(f"on_invalid is {on_invalid!r}; allowed are {', '.join(INVALID)}")
    if not x.is_floating_point():
        raise ValueError(f"vectors are {x.dtype}; expected a floating dtype")
    head_dim = x.shape[-1]
    check_head_dim(head_dim)
    codebook = codebook_of(head_dim, bits, vector)
    flat = x.reshape(-1, head_dim)
    packed = torch.empty(flat.shape[0], packed_bytes(head_dim, bits), dtype=torch.uint8, device=x.device)
    scales = torch.empty(flat.shape[0], dtype=torch.float16, device=x.device)
    rows = max(TILE // head_dim, 1)
    for start in range(0, flat.shape[0], rows):
        part = slice(start, start + rows)
        codes, step = _encode(rotate(flat[part], rotation), codebook, scale, search)
        scales[part] = (step * SCALE_DENOMINATOR).to(torch.float16)
        codes = torch.where(scales[part, None].isfinite(), codes, 0)
        packed[part] = codes if vector else pack(codes, bits)
    bad = ~scales.isfinite()
    if on_invalid == "raise" and bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} vectors hold NaN, infinity or numbers too large for a float16 "
            "scale; mend the input, or pass on_invalid='flag' to have them read back as NaN"
        )
    scales.masked_fill_(bad, torch.nan)
    return packed.view(*x.shape[:-1], packed.shape[-1]), scales.view(x.shape[:-1])


def _join(ones: torch.Tensor) -> torch.Tensor:
    """Bits 0 or 1 [..., n] -> bytes, the first bit lowest: uint8 [..., ceil(n / 8)]."""
    ones = torch.nn.functional.pad(ones, (0, -ones.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (ones << torch.arange(8, dtype=torch.uint8, device=ones.device)).sum(-1, dtype=torch.uint8)


def _fields(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Little-endian string of bits-bit fields: uint8 [..., n] -> bytes."""
    return _join((codes[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device) & 1).flatten(-2))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., head_dim] -> uint8 bytes [..., packed_bytes(head_dim, bits)], as core.bit_packing says."""
    if bits == 8:
        return torch.where(codes > 127, codes ^ 127, codes)
    if bits != 3:
        return _fields(codes, bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 32))
    signs = torch.empty_like(codes)
    signs[..., _sign_positions(codes.shape[-1] // 32, codes.device)] = codes >> 2
    return torch.cat([_fields(codes & 3, 2), _join(signs)], -1)


def pack_patterns(index: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Pattern indices uint8 [..., head_dim / 4] and signs uint8 [..., head_dim] -> bytes, as core.bit_packing says."""
    places = bit_packing.PATTERN_BITS + torch.arange(PATTERN_WIDE, dtype=torch.uint8, device=index.device)
    return index | (negative.unflatten(-1, (-1, PATTERN_WIDE)) << places).sum(-1, dtype=torch.uint8)


@_constant
def _sign_positions(groups: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(bit_packing.sign_positions(groups)).to(device)


@_constant
def _level_of(head_dim: int, bits: int) -> torch.Tensor:
    """float32 level of each code, [2 ** bits]."""
    magnitudes = torch.tensor(Codebook.lloyd_max(head_dim, bits).magnitudes)
    return torch.cat([magnitudes, -magnitudes])


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_words(levels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows of levels [rows, levels a row] -> the same as int8, less the one half, as one whole number a row.

    Looking up numbers instead of rows of a matrix is three times faster on a CPU.
    """
    return (levels - 0.5).to(torch.int8).view(_WORDS[levels.shape[1]]).flatten().to(device)


@_constant
def _byte_table(head_dim: int, bits: int, vector: bool, device: torch.device) -> torch.Tensor:
    every = np.arange(256, dtype=np.uint8)[:, None]
    if vector:
        index, negative = (torch.from_numpy(part) for part in bit_packing.unpack_patterns(every))
        size = torch.tensor(VECTOR.patterns)[index[:, 0].long()]
        return _as_words(torch.where(negative, -size, size), device)
    codes = bit_packing.unpack(every, bits, 8 // bits)
    return _as_words(_level_of(head_dim, bits)[torch.from_numpy(codes).long()], device)


@_constant
def _three_bit_table(head_dim: int, device: torch.device) -> torch.Tensor:
    """For a magnitude byte m and the signs over it, kept in the bits of SIGN_BITS[0]: row m + 256 * signs."""
    row = np.arange(1 << 16)[:, None]
    signs = row >> 8 + np.array(bit_packing.SIGN_BITS[0]) & 1
    return _as_words(_level_of(head_dim, 3)[torch.from_numpy((row >> 2 * np.arange(4) & 3) + 4 * signs).long()], device)


def levels(
    packed: torch.Tensor, bits: int, head_dim: int, dtype: torch.dtype = torch.float32, *, vector: bool = False
) -> torch.Tensor:
    """Packed codes [..., bytes] -> the codebook's levels [..., head_dim], without their scales.

    Levels of 1 to 4 and 8 bits are whole numbers plus one half, exact in float16 and bfloat16 too.
    """
    if bits in (5, 6, 7):
        at = torch.arange(head_dim, device=packed.device) * bits
        pair = torch.nn.functional.pad(packed, (0, 1)).int()  # a code lies in two neighbouring bytes
        codes = (pair[..., at // 8] | pair[..., at // 8 + 1] << 8) >> at % 8 & (1 << bits) - 1
        return _level_of(head_dim, bits).to(packed.device, dtype).take(codes)
    if bits == 8:
        integers = packed.view(torch.int8)
    elif bits == 3:
        low, signs = packed.split([packed.shape[-1] * 2 // 3, packed.shape[-1] // 3], -1)
        low, signs = low.unflatten(-1, (-1, 2, 4)).long(), signs.unflatten(-1, (-1, 1, 4)).int()
        row = low + (torch.cat([signs & 0xCC, (signs & 0x33) << 2], -2) << 8)
        integers = _look_up(_three_bit_table(head_dim, packed.device), row.flatten(-3))
    else:
        integers = _look_up(_byte_table(head_dim, bits, vector, packed.device), packed.int())
    return integers[..., :head_dim].to(dtype).add_(0.5)


def _look_up(table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    found = table.index_select(0, row.flatten()).view(torch.int8)
    return found.view(*row.shape[:-1], row.shape[-1] * table.itemsize)


def dequantize_rotated(
    packed: torch.Tensor, scales: torch.Tensor, bits: int, head_dim: int, dtype: torch.dtype = torch.float32,
    *, vector: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Packed codes [..., bytes] and float16 scales [...] -> vectors [..., head_dim] in the rotated basis."""
    worth = (scales.float() / SCALE_DENOMINATOR)[..., None]
    return (levels(packed, bits, head_dim, vector=vector) * worth).to(dtype)


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    vector: bool = False,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """The inverse of quantize: [..., head_dim] in dtype."""
    rotation = rotation or Rotation(head_dim)
    return rotate_back(dequantize_rotated(packed, scales, bits, head_dim, vector=vector), rotation).to(dtype)


@_constant
def _projection(size: int, head_dim: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(qjl.projection(size, head_dim)).to(device)


def sketch(residual: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """core.qjl.sketch of float32 residuals [..., head_dim]: uint8 [..., ceil(size / 8)] and float16 [...]."""
    signs = residual @ _projection(size, residual.shape[-1], residual.device).T >= 0
    return _join(signs.to(torch.uint8)), residual.norm(dim=-1).half()


def estimate(signs: torch.Tensor, norms: torch.Tensor, size: int, head_dim: int) -> torch.Tensor:
    """core.qjl.estimate: float32 [..., head_dim]."""
    places = torch.arange(8, dtype=torch.uint8, device=signs.device)
    ones = (signs[..., None] >> places & 1).flatten(-2)[..., :size].float() * 2 - 1
    return ones @ _projection(size, head_dim, signs.device) * (norms.float() * (math.sqrt(math.pi / 2) / size))[..., None]

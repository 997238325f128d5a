"""Rotation and codebook as tensors on a device, made once per (head_dim, bits, device)."""

from __future__ import annotations

import functools

import torch
import triton

from tqai_plugins.core.codebook import SEARCH, Codebook
from tqai_plugins.core.kv_format import KVFormat, recent_format
from tqai_plugins.core.rotation import Rotation, block_norm, hadamard_rows


@functools.lru_cache(None)
def signed_hadamard(
    head_dim: int, padded: int, dtype: torch.dtype, device: torch.device, back: bool = False
) -> torch.Tensor:
    """The transform without its norms, [padded, padded]: y = (x @ it) * norms, and x = (y * norms) @
    the one for going back. Entries are +1, -1 and 0 between blocks, exact in bfloat16."""
    rotation = Rotation(head_dim)
    matrix = torch.zeros(padded, padded)
    start = 0
    for size in rotation.blocks:
        matrix[start : start + size, start : start + size] = torch.tensor(hadamard_rows(size))
        start += size
    matrix[:head_dim] *= torch.tensor(rotation.signs)[:, None]
    return (matrix.T if back else matrix).contiguous().to(device, dtype)


@functools.lru_cache(None)
def norms(head_dim: int, padded: int, device: torch.device) -> torch.Tensor:
    """float32 [padded]: the norm of each output coordinate's block, 0 in the padding."""
    blocks = [block_norm(size) for size in Rotation(head_dim).blocks for _ in range(size)]
    return torch.tensor(blocks + [0.0] * (padded - head_dim), device=device)


@functools.lru_cache(None)
def levels(head_dim: int, bits: int, device: torch.device) -> torch.Tensor:
    """int8 [max(8, 2^bits)]: the int8 value of each code, the first eight being a byte permute's table
    (4-bit magnitudes, or all codes of 2 and 3 bits). 8-bit codes are values already."""
    if bits == 8:
        return torch.zeros(8, dtype=torch.int8, device=device)
    m = Codebook.lloyd_max(head_dim, bits).integers
    table = [*m, *(~v for v in m)]
    return torch.tensor(table * (2 if bits == 2 else 1), dtype=torch.int8, device=device)


@functools.lru_cache(None)
def encoder(head_dim: int, bits: int, device: torch.device) -> torch.Tensor:
    """float32: the grids to try (multiples of a vector's root mean square), boundaries, magnitudes."""
    book = Codebook.lloyd_max(head_dim, bits)
    if bits == 8:
        return torch.zeros(1, device=device)
    return torch.tensor([*(s * book.unit for s in SEARCH), *book.boundaries, *book.magnitudes], device=device)


def make_all(fmt: KVFormat, dtype: torch.dtype, device: torch.device) -> None:
    """Make every table that a GPU's kernels take for a format now: a server may later allocate memory whose
    contents it gives away (vLLM's sleep mode)."""
    padded = triton.next_power_of_2(fmt.head_dim)
    signed_hadamard(fmt.head_dim, padded, dtype, device)
    signed_hadamard(fmt.head_dim, padded, torch.bfloat16, device, back=True)
    norms(fmt.head_dim, padded, device)
    for bits in (fmt.bits_k, fmt.bits_v, recent_format(fmt.head_dim).bits_k):
        levels(fmt.head_dim, bits, device)
        encoder(fmt.head_dim, bits, device)

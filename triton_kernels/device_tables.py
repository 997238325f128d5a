"""Rotation and codebook as tensors on a device, made once per (head_dim, bits, device)."""

from __future__ import annotations

import functools

import torch
import triton

from tqai_plugins.core.codebook import Codebook
from tqai_plugins.core.kv_format import KVFormat, recent_format
from tqai_plugins.core.rotation import Rotation, hadamard_rows


@functools.lru_cache(None)
def signs(head_dim: int, padded: int, device: torch.device) -> torch.Tensor:
    """float32 [padded]: +1 or -1 for each coordinate before the transform, 0 in the padding."""
    return torch.tensor([float(sign) for sign in Rotation(head_dim).signs] + [0.0] * (padded - head_dim), device=device)


@functools.lru_cache(None)
def back_matrix(head_dim: int, padded: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The way back as a matrix without the norms, [padded, padded]: x = (y * norms) @ it. Entries are +1, -1 and 0
    between blocks, exact in bfloat16."""
    rotation = Rotation(head_dim)
    matrix = torch.zeros(padded, padded)
    start = 0
    for size in rotation.blocks:
        matrix[start : start + size, start : start + size] = torch.tensor(hadamard_rows(size))
        start += size
    matrix[:, :head_dim] *= torch.tensor(rotation.signs)
    return matrix.to(device, dtype)


@functools.lru_cache(None)
def levels(head_dim: int, bits: int, device: torch.device) -> torch.Tensor:
    """int8 [max(8, 2^bits)]: the int8 value of each code, the first eight being a byte permute's table
    (4-bit magnitudes, or all codes of 2 and 3 bits). 8-bit codes are values already."""
    if bits == 8:
        return torch.zeros(8, dtype=torch.int8, device=device)
    m = Codebook.lloyd_max(head_dim, bits).integers
    table = [*m, *(~v for v in m)]
    return torch.tensor(table * (2 if bits == 2 else 1), dtype=torch.int8, device=device)


def make_all(fmt: KVFormat, device: torch.device) -> None:
    """Make every table that a GPU's kernels take for a format now: a server may later allocate memory whose
    contents it gives away (vLLM's sleep mode at level 1, which keeps what lies with the weights)."""
    padded = triton.next_power_of_2(fmt.head_dim)
    signs(fmt.head_dim, padded, device)
    back_matrix(fmt.head_dim, padded, torch.bfloat16, device)
    for bits in (fmt.bits_k, fmt.bits_v, recent_format(fmt.head_dim).bits_k):
        levels(fmt.head_dim, bits, device)

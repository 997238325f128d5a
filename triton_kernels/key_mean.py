"""What prepare and dequantize share of the key mean (core/key_mean.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def mean_term(table, coefficients, columns, position, head, inside, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr):
    """core.key_mean.term: float32 [ROWS, DP] of positions and KV heads [ROWS]; zeros where not inside [ROWS, DP]."""
    d = tl.arange(0, DP)
    column = tl.load(columns + d, mask=d < D, other=0)
    rows = table + position.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    of_head = coefficients + head[:, None] * (2 * D) + d[None, :]
    cosine = tl.load(rows, mask=inside, other=0).to(tl.float32)
    sine = tl.load(rows + COLUMNS // 2, mask=inside, other=0).to(tl.float32)
    return cosine * tl.load(of_head, mask=inside, other=0.0) + sine * tl.load(of_head + D, mask=inside, other=0.0)


@triton.jit
def mean_weights(vectors, coefficients, coordinates, head, valid, D: tl.constexpr, COLUMNS: tl.constexpr):
    """What queries at these addresses, of KV heads [ROWS], give each column of the table: float32 [ROWS, COLUMNS]."""
    PAIRS: tl.constexpr = COLUMNS // 2
    c = tl.arange(0, COLUMNS)[None, :]
    at = tl.load(coordinates + tl.arange(0, 2)[:, None] * PAIRS + c % PAIRS)[None, :, :]  # both coordinates of each pair
    of_head = coefficients + (head * (2 * D))[:, None, None] + (c // PAIRS * D)[None, :, :] + at
    part = tl.load(vectors[:, None, None] + at, mask=valid[:, None, None], other=0.0)
    return tl.sum(part.to(tl.float32) * tl.load(of_head), 1)


def mean_arguments(mean, placeholder: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Table, coefficients, columns and coordinates of a torch_kernels.KeyMean; the placeholder [...] for a kernel that is
    compiled without it."""
    if mean is None:
        return (placeholder,) * 4
    return mean.table, mean.coefficients, mean.columns, mean.coordinates

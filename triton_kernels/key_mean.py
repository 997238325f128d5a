"""What prepare and dequantize share of the key mean (core/key_mean.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def mean_term(
    table, place_ptr, coefficients, position, head, inside, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr
):
    """core.key_mean.term: float32 [ROWS, DP] of positions and KV heads [ROWS]."""
    place = tl.load(place_ptr + tl.arange(0, DP), mask=tl.arange(0, DP) < D, other=-1)
    inside = inside & (place >= 0)[None, :]
    place = tl.maximum(place, 0)
    rows = table + position.to(tl.int64)[:, None] * COLUMNS + (place % COLUMNS)[None, :]
    of_head = coefficients + head[:, None] * (2 * COLUMNS) + place[None, :]
    cosines = tl.load(rows, mask=inside, other=0).to(tl.float32) * tl.load(of_head, mask=inside, other=0.0)
    sines = tl.load(rows + COLUMNS // 2, mask=inside, other=0).to(tl.float32)
    return cosines + sines * tl.load(of_head + COLUMNS // 2, mask=inside, other=0.0)


def mean_arguments(mean, placeholder: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Table, place, coefficients and coordinates of a torch_kernels.KeyMean; the placeholder [...] for a kernel that is
    compiled without it."""
    if mean is None:
        return (placeholder,) * 4
    return mean.table, mean.place, mean.coefficients, mean.coordinates

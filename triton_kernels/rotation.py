"""The rotation (core/rotation.py) as a butterfly in registers, which prepare and merge share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hadamard(x, D: tl.constexpr, DP: tl.constexpr):
    """float32 [rows, DP], zeros from D on, through blocks of +1 and -1: the reference's sums in its order."""
    tl.static_assert(DP <= 256)
    d = tl.arange(0, DP)[None, :]
    side = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, None, :, None]
    for bit in tl.static_range(8):
        if (2 << bit) <= D:
            # Both bit patterns of a pair, summed, less one's own are exactly the partner's. Of that the compiler makes
            # one shuffle, or nothing where a thread holds both; halves by tl.split would go through shared memory.
            pairs = tl.reshape(x, [x.shape[0], DP // (2 << bit), 2, 1 << bit])
            own = pairs.to(tl.int32, bitcast=True)
            partner = (tl.sum(own, 2, keep_dims=True) - own).to(tl.float32, bitcast=True)
            turned = tl.reshape(partner + pairs * side, x.shape)
            # Smaller blocks, which lie behind, are done.
            x = turned if D == DP else tl.where(d < D // (2 << bit) * (2 << bit), turned, x)
    return x


@triton.jit
def norms(D: tl.constexpr, DP: tl.constexpr):
    """float32 [1, DP]: core.rotation.block_norm of each coordinate's block, 0 from D on."""
    d = tl.arange(0, DP)[None, :]
    norm = tl.zeros([1, DP], tl.float32)
    for bit in tl.static_range(9):
        if (D >> bit) % 2 == 1:
            norm = tl.where(d < (D >> bit) << bit, 2.0 ** (-bit / 2), norm)
    return norm


@triton.jit
def rotate(x, sign, D: tl.constexpr, DP: tl.constexpr):
    """core.reference.rotate: float32 [rows, DP] of float vectors; sign [DP] as in device_tables.signs."""
    return _hadamard(x.to(tl.float32) * sign[None, :], D, DP) * norms(D, DP)


@triton.jit
def rotate_back(y, sign, D: tl.constexpr, DP: tl.constexpr):
    """core.reference.rotate_back: float32 [rows, DP]."""
    return _hadamard(y, D, DP) * norms(D, DP) * sign[None, :]

"""The fixed orthogonal transform that makes every coordinate follow one known distribution.

TurboQuant (arXiv 2504.19874, section 3) multiplies by a random orthogonal matrix. Random signs and
one Walsh-Hadamard transform do the same for real K and V vectors at O(d log d), and in a fixed
order of float32 additions every backend gets the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .kv_format import check_head_dim

KINDS = ("hadamard", "haar")
SEED = 0x7467_6169  # part of what stored bytes mean: see kv_format.FORMAT_VERSION


def splitmix64(seed: int):
    """Endless 64-bit integers from a seed, the same in every language (Steele et al. 2014)."""
    mask = (1 << 64) - 1
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        yield z ^ (z >> 31)


@dataclass(frozen=True)
class Rotation:
    """y = H (signs * x), H block-diagonal with Walsh-Hadamard blocks of `blocks` coordinates.

    A head_dim that is no power of two is cut into falling powers of two (80 = 64 + 16), so nothing
    is padded. Its inverse is x = signs * (H y), H being symmetric and orthonormal.
    `haar` is the paper's own choice, a dense matrix: see reference.rotation_matrix.
    """

    head_dim: int
    kind: str = "hadamard"
    seed: int = SEED

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        if self.kind not in KINDS:
            raise ValueError(f"rotation is {self.kind!r}; allowed are {', '.join(KINDS)}")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Sizes of the Hadamard blocks, largest first; they sum to head_dim."""
        return tuple(1 << i for i in range(self.head_dim.bit_length() - 1, -1, -1) if self.head_dim >> i & 1)

    @property
    def signs(self) -> tuple[int, ...]:
        """+1 or -1 for each coordinate, applied before the transform."""
        numbers = splitmix64(self.seed)
        return tuple(1 - 2 * (next(numbers) >> 63) for _ in range(self.head_dim))


def hadamard_rows(size: int) -> list[list[int]]:
    """The Sylvester matrix of +1 and -1, [size, size]; size is a power of two."""
    return [[1 - 2 * ((i & j).bit_count() & 1) for j in range(size)] for i in range(size)]


def block_norm(size: int) -> float:
    """What an unnormalized block of this size is multiplied by to be orthonormal."""
    return 1 / math.sqrt(size)

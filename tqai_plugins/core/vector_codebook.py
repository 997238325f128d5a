"""One codebook for four coordinates at once: 2-bit values with a seventh less squared error than coordinate by coordinate.

A code is a byte (bit_packing.pack_patterns): four signs, and which of sixteen patterns of four magnitudes. So it is still
signs and an index into magnitudes, an encoder compares sixteen candidates, and a reader's table is 64 numbers.
The codebook is Linde, Buzo and Gray's (1980) for four Gaussian numbers, which is what coordinates of a rotated vector are
in the limit of large head dimensions: one table serves all of them. solve_vector_codebook makes the numbers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from .codebook import Codebook
from .kv_format import PATTERN_WIDE, check_vector_head_dim, check_vector_width

PATTERNS = (
    (18.5, 65.5, 26.5, 25.5), (21.5, 21.5, 19.5, 19.5), (25.5, 23.5, 66.5, 25.5), (26.5, 24.5, 23.5, 66.5),
    (28.5, 31.5, 29.5, 127.5), (30.5, 84.5, 33.5, 83.5), (31.5, 28.5, 124.5, 31.5), (31.5, 124.5, 30.5, 30.5),
    (32.5, 34.5, 85.5, 87.5), (32.5, 86.5, 88.5, 32.5), (61.5, 61.5, 27.5, 23.5), (69.5, 18.5, 27.5, 27.5),
    (86.5, 34.5, 34.5, 91.5), (89.5, 34.5, 90.5, 34.5), (100.5, 99.5, 38.5, 44.5), (127.5, 32.5, 32.5, 31.5),
)  # fmt: skip
UNIT = 0.017886525


@dataclass(frozen=True)
class VectorCodebook:
    """Sixteen patterns of four magnitudes each, whole numbers m plus 1/2 up to codebook.TOP: an int8 holds m, as in Codebook.

    `unit` is what one step of the magnitude scale is worth on a vector of root mean square 1.
    """

    patterns: tuple[tuple[float, ...], ...] = PATTERNS
    unit: float = UNIT

    @property
    def half_energies(self) -> tuple[float, ...]:
        """Half the squared length of each pattern, exact in float32. Of sizes s on a grid that pattern m is closest whose
        s . m - grid * half_energy is largest; of equals the first is taken."""
        return tuple(sum(m * m for m in pattern) / 2 for pattern in self.patterns)

    @property
    def digest(self) -> str:
        """As Codebook.digest."""
        return hashlib.sha256(json.dumps([PATTERN_WIDE, self.patterns, self.unit]).encode()).hexdigest()[:8]


VECTOR = VectorCodebook()


def codebook_of(head_dim: int, bits: int, vector: bool = False) -> Codebook | VectorCodebook:
    """What codes of this head_dim and width are read and written with; vector: four coordinates at once.

    ValueError for a width or a head_dim that there is no codebook for.
    """
    if not vector:
        return Codebook.lloyd_max(head_dim, bits)
    check_vector_width("bits", bits)
    check_vector_head_dim(head_dim)
    return VECTOR

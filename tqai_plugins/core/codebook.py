"""Optimal scalar quantizers for one coordinate of a random unit vector.

After a random rotation a coordinate of a unit vector in d dimensions has the density
(1 - t^2)^((d-3)/2) on [-1, 1], a scaled Beta distribution (TurboQuant, arXiv 2504.19874, Lemma 1).
Lloyd-Max levels for it are the paper's codebooks (section 3.1, equation 4).
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass

from .kv_format import SERVED_WIDTHS, check_head_dim, check_width

TOP = 127.5  # the largest magnitude an int8 can stand for: see Codebook


@dataclass(frozen=True)
class Codebook:
    """A symmetric codebook: a code is a sign and an index into `magnitudes`.

    `magnitudes` rise to TOP at most. For the served widths each is a whole number m plus 1/2, so an int8
    kernel that holds m (or ~m for a negative sign) reconstructs exactly these numbers.
    `unit` is what one step of the magnitude scale is worth on a vector of root mean square 1.
    """

    head_dim: int
    bits: int
    magnitudes: tuple[float, ...]
    unit: float

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Between neighbouring magnitudes; a value on a boundary takes the smaller magnitude."""
        return tuple((a + b) / 2 for a, b in zip(self.magnitudes, self.magnitudes[1:]))

    @property
    def integers(self) -> tuple[int, ...]:
        """m for each magnitude m + 1/2 (served widths only)."""
        if self.bits not in SERVED_WIDTHS:
            raise ValueError(f"{self.bits}-bit magnitudes are not on the integer grid; served widths are {SERVED_WIDTHS}")
        return tuple(int(m) for m in self.magnitudes)

    @classmethod
    def lloyd_max(cls, head_dim: int, bits: int) -> Codebook:
        """The shipped codebook, or one solved in milliseconds for an uncommon head_dim."""
        return _lloyd_max(head_dim, bits)


# Searching around the Lloyd-Max scale lowers the error at no cost for the reader: 15 % at 4 bits,
# 6 % at 3, 1 % at 2. Multiples of the unit; eight, so that a GPU tile of 16 rows tries two vectors at once.
SEARCH = (0.8, 0.86, 0.92, 0.99, 1.05, 1.12, 1.18, 1.25)


@functools.lru_cache(None)
def _tables() -> dict:
    return json.loads((importlib.resources.files(__package__) / "codebook_tables.json").read_text())


@functools.lru_cache(None)
def _lloyd_max(head_dim: int, bits: int) -> Codebook:
    check_width("bits", bits)
    check_head_dim(head_dim)
    entry = _tables().get(f"{head_dim}/{bits}")
    if entry is None:
        from .solve_codebook import solve  # numpy is needed only here

        entry = solve(head_dim, bits)
    return Codebook(head_dim, bits, tuple(entry["magnitudes"]), entry["unit"])

"""Solves the codebook of vector values; run as a script it prints vector_codebook's PATTERNS and UNIT.

    python -m tqai_plugins.core.solve_vector_codebook

Lloyd's rule for vectors (Linde, Buzo and Gray, "An algorithm for vector quantizer design", IEEE Transactions on
Communications 28, 1980) on a fixed sample of the magnitudes of four Gaussian numbers, from several starts, the best kept.
"""

from __future__ import annotations

import numpy as np

from .bit_packing import PATTERN_BITS
from .codebook import TOP
from .kv_format import PATTERN_WIDE

COUNT = 1 << PATTERN_BITS
SAMPLE, STARTS, SETTLED = 1 << 15, 6, 1e-3


def _scores(x: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """[sample, patterns]: the larger, the closer. Sums in one order, so that every machine finds the same numbers."""
    return sum(x[:, j, None] * patterns[:, j] for j in range(PATTERN_WIDE)) - (patterns * patterns).sum(1) / 2


def _settle(x: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """Lloyd's iteration: every pattern to the centre of what is closest to it, until none moves further than SETTLED."""
    while True:
        nearest = _scores(x, patterns).argmax(1)
        count = np.bincount(nearest, minlength=COUNT)
        centres = np.stack([np.bincount(nearest, x[:, j], COUNT) for j in range(PATTERN_WIDE)], 1) / count[:, None]
        if np.abs(centres - patterns).max() < SETTLED:
            return centres
        patterns = centres


def solve() -> tuple[np.ndarray, float]:
    """Patterns [16, 4], whole numbers plus one half up to TOP in rising order, and the unit: see VectorCodebook."""
    x = np.abs(np.random.default_rng(0).standard_normal((SAMPLE, PATTERN_WIDE)))
    found = [_settle(x, x[COUNT * start :][:COUNT]) for start in range(STARTS)]
    best = max(found, key=lambda patterns: _scores(x, patterns).max(1).mean())
    unit = best.max() / TOP
    on_grid = np.minimum(np.floor(best / unit) + 0.5, TOP)
    return on_grid[np.lexsort(on_grid.T[::-1])], round(float(unit), 9)


def main() -> None:
    """Print what vector_codebook.py holds."""
    patterns, unit = solve()
    rows = [", ".join(str(tuple(row)) for row in patterns[i : i + 4].tolist()) for i in range(0, COUNT, 4)]
    print("PATTERNS = (\n" + "".join(f"    {row},\n" for row in rows) + f")\nUNIT = {unit}")


if __name__ == "__main__":
    main()

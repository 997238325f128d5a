"""Solves Lloyd-Max codebooks; run as a script it rewrites codebook_tables.json.

    python -m tqai_plugins.core.solve_codebook
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np

from .codebook import TOP
from .kv_format import SERVED_WIDTHS, WIDTHS

COMMON_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def _cells(head_dim: int, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mass and first moment of sqrt(d) * |coordinate| between consecutive edges, unnormalized."""
    half = np.diff(edges)[:, None] / 2
    t = edges[:-1, None] + half * (_NODES + 1)
    density = np.exp((head_dim - 3) / 2 * np.log1p(-np.minimum(t * t / head_dim, 1 - 1e-15)))
    weight = density * _WEIGHTS * half
    return weight.sum(1), (weight * t).sum(1)


def lloyd_max_levels(head_dim: int, bits: int) -> np.ndarray:
    """The positive levels of the 2^bits-level Lloyd-Max quantizer, unit variance, rising.

    Newton's method on `level = centroid of its cell` with a finite-difference tridiagonal
    Jacobian: converged to 1e-12, where plain Lloyd iterations stall at 6 to 8 bits.
    ArithmeticError if it does not.
    """
    count = 1 << (bits - 1)
    top = min(math.sqrt(head_dim), 12.0)
    # Start from the high-resolution optimum: level density follows the cube root of the density.
    grid = np.linspace(0, top, 20001)
    cube = np.cumsum(np.exp((head_dim - 3) / 6 * np.log1p(-np.minimum(grid**2 / head_dim, 1 - 1e-15))))
    levels = np.interp((np.arange(count) + 0.5) / count, cube / cube[-1], grid)

    def centroids(x: np.ndarray) -> np.ndarray:
        mass, moment = _cells(head_dim, np.concatenate([[0], (x[1:] + x[:-1]) / 2, [top]]))
        return moment / mass

    for _ in range(100):
        gap = levels - centroids(levels)
        jacobian = np.zeros((count, count))
        for offset in range(3):  # a level moves only its own and its neighbours' centroids
            shift = np.zeros(count)
            shift[offset::3] = 1e-6
            change = ((levels + shift) - centroids(levels + shift) - gap) / 1e-6
            for j in range(offset, count, 3):
                near = slice(max(j - 1, 0), j + 2)
                jacobian[near, j] = change[near]
        step = np.linalg.solve(jacobian, gap)
        moved = levels - step
        while np.any(np.diff(np.concatenate([[0], moved, [top]])) <= 0):  # keep the order
            step = step / 2
            moved = levels - step
        levels = moved
        if np.abs(step).max() < 1e-12:
            return levels
    raise ArithmeticError(f"Lloyd-Max did not converge for head_dim {head_dim}, {bits} bits")


def _fit(head_dim: int, magnitudes: np.ndarray) -> tuple[float, float]:
    """The best worth of one step of these magnitudes, and the mean squared error with it.

    The cells depend on the unit and the best unit on the cells: a fixed point, found by the secant rule.
    """
    top = min(math.sqrt(head_dim), 12.0)

    def refit(unit: float) -> tuple[float, np.ndarray, np.ndarray]:
        inner = (magnitudes[1:] + magnitudes[:-1]) / 2 * unit
        mass, moment = _cells(head_dim, np.concatenate([[0], inner, [top]]))
        return (moment * magnitudes).sum() / (mass * magnitudes**2).sum(), mass, moment

    before = 2.7 / magnitudes[-1]
    unit = refit(before)[0]
    gap_before = unit - before
    for _ in range(50):
        fitted, mass, moment = refit(unit)
        gap = fitted - unit
        if abs(gap) < 1e-13 or gap == gap_before:
            break
        before, unit, gap_before = unit, unit - gap * (unit - before) / (gap - gap_before), gap
    error = 1 - (2 * moment * magnitudes * unit - mass * (magnitudes * unit) ** 2).sum() / mass.sum()
    return float(unit), float(error)


def distortion(head_dim: int, magnitudes) -> float:
    """Mean squared error of one unit-variance coordinate, magnitudes in any common unit."""
    return _fit(head_dim, np.asarray(magnitudes, float))[1]


def _on_grid(head_dim: int, levels: np.ndarray) -> np.ndarray:
    """The best whole numbers plus one half for these levels: every top from 112 to 127, then one step each way."""
    tops = np.arange(112, 128)[:, None] + 0.5
    magnitudes = min(np.floor(levels / levels[-1] * tops) + 0.5, key=functools.partial(distortion, head_dim))
    error = distortion(head_dim, magnitudes)
    while True:
        start = error
        for j, move in itertools.product(range(len(magnitudes) - 1), (-1, 1)):
            tried = magnitudes.copy()
            tried[j] += move
            found = distortion(head_dim, tried)
            if found < error:
                magnitudes, error = tried, found
        if error == start:
            return magnitudes


def solve(head_dim: int, bits: int) -> dict:
    """`magnitudes` (rising, at most 127.5) and `unit`, as Codebook holds them."""
    if bits == 8:  # uniform: the encoder sets the grid by the largest coordinate instead
        return {"magnitudes": [m + 0.5 for m in range(128)], "unit": 0.0}
    levels = lloyd_max_levels(head_dim, bits)
    magnitudes = _on_grid(head_dim, levels) if bits in SERVED_WIDTHS else levels / levels[-1] * TOP
    unit = _fit(head_dim, magnitudes)[0]
    return {"magnitudes": [round(float(m), 6) for m in magnitudes], "unit": round(unit, 9)}


def main() -> None:
    """Write codebook_tables.json."""
    tables = {f"{d}/{b}": solve(d, b) for d in COMMON_HEAD_DIMS for b in WIDTHS}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in tables.items())
    Path(__file__).with_name("codebook_tables.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()

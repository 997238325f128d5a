"""The balance of keys and queries: what a query looks at most is stored most exactly.

The rotation spreads the noise of a key's codes evenly over its coordinates, while queries are large in some and small in
others. With queries times s and keys divided by s all scores stay what they are, and their noise is least where both are
alike: s^2 is the ratio of their root mean squares. Models whose heads norm their queries and keys (Gemma 3's and Qwen 3's
kind) say in the weights of these norms how large both are, and take s there: nothing is learned and reading costs nothing.
Both coordinates of a pair that RoPE turns share their s, which then passes through RoPE; powers of two round nothing.
"""

from __future__ import annotations

import numpy as np

LARGEST = 4  # exponents from -4 to 4
TINY = 1e-6  # of the largest energy: what is smaller is not used


def exponents(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """log2 of s for each pair (i, i + head_dim / 2), whole numbers [head_dim / 2], of what coordinates [head_dim] of
    queries and of keys are multiplied by in their norms."""
    squares = [(np.asarray(x, np.float64) ** 2).reshape(2, -1).sum(0) for x in (queries, keys)]
    q, k = (np.log2(np.maximum(x, TINY * x.max() + 1e-30)) for x in squares)
    return np.clip(np.rint((k - q) / 4), -LARGEST, LARGEST).astype(np.int8)


def factors(exponents: np.ndarray) -> np.ndarray:
    """s, float [head_dim], of exponents [head_dim / 2]."""
    return np.tile(np.exp2(exponents.astype(np.float64)), 2)

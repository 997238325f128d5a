"""The balance of keys and queries: what a query looks at most is stored most exactly.

The rotation spreads the noise of a key's codes evenly over its coordinates, while queries are large in some and small in
others. With queries times s and keys divided by s all scores stay what they are, and their noise is least where both are
alike: s^2 is the ratio of their root mean squares. Both coordinates of a pair that RoPE turns share their s, which then
passes through RoPE into the weights of the norms of queries and keys, where a model has them (Gemma 3's and Qwen 3's kind):
reading costs nothing. Powers of two round nothing.
"""

from __future__ import annotations

import numpy as np

LARGEST = 4  # exponents from -4 to 4
TINY = 1e-6  # of the largest square: what is smaller is not used


def pair_squares(x: np.ndarray) -> np.ndarray:
    """Of vectors [..., head_dim], for each pair (i, i + head_dim / 2) the sum of its squares, [..., head_dim / 2]."""
    a, b = np.split(np.asarray(x, np.float64), 2, -1)
    return a * a + b * b


def exponents(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """log2 of s for each pair, whole numbers [head_dim / 2], of pair_squares of queries and of keys: their means over a text,
    or, if none was read, those of what their norms multiply by."""
    q, k = (np.log2(np.maximum(x, TINY * x.max() + 1e-30)) for x in (queries, keys))
    return np.clip(np.rint((k - q) / 4), -LARGEST, LARGEST).astype(np.int8)


def factors(exponents: np.ndarray) -> np.ndarray:
    """s, float [head_dim], of exponents [head_dim / 2]."""
    return np.tile(np.exp2(exponents.astype(np.float64)), 2)

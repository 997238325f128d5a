"""The key mean: what the keys of a head have in common before RoPE is taken off before they are quantized.

A head's keys, before they are turned by RoPE, scatter around a mean mu that is larger than the scatter. At
position p it lies at R_p mu, which is known, so codes need to hold k - R_p mu only: that is worth one bit and
more (the design's quality.md, section 13). Reading adds q . R_p mu to the score: a sum over the pairs of
coordinates that RoPE turns, each with a cosine and a sine of the position. A few pairs hold most of the mean;
those of largest energy are kept, the same for all heads of a RoPE, so that one small table serves all.

The table is of whole numbers; since the same table is used to write and to read, that costs nothing.
"""

from __future__ import annotations

import numpy as np

from .kv_format import KVFormat

MEAN_PAIRS = 16
COLUMNS = 2 * MEAN_PAIRS  # of the table: cosines, then sines
TOKENS = 512  # of core.texts.PROSE, over which a mean is taken; fewer where the model reads no more
FIRST_TOKEN = 4  # earlier keys are attention sinks, unlike the others: they are stored whole
TABLE_TOP = 127


def profits(fmt: KVFormat) -> bool:
    """Whether keys make enough of a format's error that a mean, which costs time to read, is worth it: with values
    two bits narrower than keys, as in K4V2, it changes nothing that can be measured."""
    return fmt.bits_k < 8 and fmt.bits_k - fmt.bits_v < 2


def energy(means: np.ndarray) -> np.ndarray:
    """Of each pair [head_dim / 2], the sum over heads of its share in a head's mean [heads, head_dim]."""
    a, b = np.split(means.astype(np.float64), 2, -1)
    square = a * a + b * b
    return (square / np.maximum(square.sum(-1, keepdims=True), 1e-30)).sum(0)


def choose_pairs(energies: np.ndarray) -> np.ndarray:
    """The MEAN_PAIRS pairs of largest energy [head_dim / 2], in ascending order."""
    return np.sort(np.argsort(-energies, kind="stable")[:MEAN_PAIRS])


def make_table(cos: np.ndarray, sin: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """int8 [positions, COLUMNS] of RoPE's cos and sin [positions, head_dim / 2], in units of `unit(cos) / TABLE_TOP`."""
    chosen = np.concatenate([cos[:, pairs], sin[:, pairs]], 1)
    table = np.rint(chosen * (TABLE_TOP / unit(cos))).astype(np.int8, order="C")
    table[:FIRST_TOKEN] = 0
    return table


def unit(cos: np.ndarray) -> float:
    """What RoPE scales vectors by: 1, but for YaRN and its kin."""
    return float(np.abs(cos).max())


def coefficients(means: np.ndarray, pairs: np.ndarray, unit: float = 1.0) -> np.ndarray:
    """float32 [heads, 2, COLUMNS] of means [heads, head_dim] before RoPE.

    R_p mu is table[p] times those of [head, 0] at a pair's first coordinate, summed over its cosine and its sine,
    and those of [head, 1] at its second, which lies head_dim / 2 further.
    """
    a, b = np.split(means, 2, -1)
    a, b = a[:, pairs], b[:, pairs]
    rows = np.stack([np.concatenate([a, -b], 1), np.concatenate([b, a], 1)], 1)
    return (rows * (unit / TABLE_TOP)).astype(np.float32, order="C")


def term(table: np.ndarray, coefficients: np.ndarray, pairs: np.ndarray, head_dim: int) -> np.ndarray:
    """R_p mu: float32 [positions, heads, head_dim] for the positions of the table's rows [positions, COLUMNS]."""
    products = table.astype(np.float32)[:, None, None, :] * coefficients[None]
    sums = products[..., :MEAN_PAIRS] + products[..., MEAN_PAIRS:]
    out = np.zeros((len(table), len(coefficients), head_dim), np.float32)
    out[..., pairs], out[..., pairs + head_dim // 2] = sums[:, :, 0], sums[:, :, 1]
    return out


def mean_before_rope(keys: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The mean [heads, head_dim] of keys as before_rope takes them, but for the attention sinks."""
    return before_rope(keys, cos, sin)[FIRST_TOKEN:].mean(0)


def before_rope(keys: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Keys [tokens, heads, head_dim] as they were before RoPE with cos and sin [tokens, head_dim / 2]."""
    a, b = np.split(keys, 2, -1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c + b * s, b * c - a * s], -1) / unit(cos) ** 2

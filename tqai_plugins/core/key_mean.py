"""The key mean: what the keys of a head have in common before RoPE is taken off before they are quantized.

A head's keys, before they are turned by RoPE, scatter around a mean mu that is larger than the scatter. At
position p it lies at R_p mu, which is known, so codes need to hold k - R_p mu only: that is worth one bit and
more (the design's quality.md, section 13). Reading adds q . R_p mu to the score: a sum over the pairs of
coordinates that RoPE turns, each with a cosine and a sine of the position. A few pairs hold most of the mean;
those of largest energy are kept, the same for all heads of a layer, so that one small table serves them.

The table is of whole numbers; since the same table is used to write and to read, that costs nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from . import reference
from .codebook import Codebook
from .key_balance import pair_squares
from .kv_format import KVFormat
from .rotation import Rotation

MEAN_PAIRS = 16
COLUMNS = 2 * MEAN_PAIRS  # of the table: cosines, then sines
TOKENS = 512  # of core.texts.PROSE, over which a mean is taken; fewer where the model reads no more
LEAST_DISTINCT = 16  # tokens among them, from a tokenizer that knows the text's words
FIRST_TOKEN = 4  # earlier keys are attention sinks, unlike the others: they are stored whole
TABLE_TOP = 127
# A mean costs time to read. It pays where it takes more from the variance of scores than LEAST_GAIN, and more than
# VALUES_SHARE of the values' relative squared error, which attention's output has in any case.
LEAST_GAIN = 0.02
VALUES_SHARE = 2.0
# Biases of keys may lie in more pairs than are kept. Where what is left of the mean outweighs what tells keys apart so many times,
# codes of less than 8 bits would mostly hold the bias.
MOST_LOST = 2.0


@dataclass(frozen=True)
class LayerMeans:
    """Of the KV heads of a layer: means float [heads, head_dim] of keys before RoPE, and query_energy float [heads], the
    mean of softmax_scale^2 |q|^2 / head_dim over their queries: the variance of a score whose key is off by noise of energy 1.
    squares float [2, head_dim / 2]: key_balance.pair_squares of all queries and of all keys, their means."""

    means: np.ndarray
    query_energy: np.ndarray
    squares: np.ndarray


def choose_tokens(text: list[int], vocabulary: int, most: int) -> list[int]:
    """Up to `most` of TOKENS tokens to measure with: those of core.texts.PROSE, or pseudo-random ones, which are worth less, where
    there is no tokenizer (text is empty) or it does not know the words."""
    if len(set(text)) < LEAST_DISTINCT:
        text = np.random.default_rng(0).integers(vocabulary, size=TOKENS).tolist()
    return text[: min(TOKENS, most)]


def measure(keys: np.ndarray, queries: np.ndarray, cos: np.ndarray, sin: np.ndarray, softmax_scale: float) -> LayerMeans:
    """Of a text's keys [tokens, heads, head_dim] and queries [tokens, q_heads, head_dim], both after RoPE with cos and sin
    [tokens, head_dim / 2]. The attention sinks count among the queries only."""
    plain = before_rope(keys, cos, sin)[FIRST_TOKEN:]
    energy = (queries.reshape(len(queries), keys.shape[1], -1, queries.shape[-1]) ** 2).sum(-1).mean((0, 2))
    squares = np.stack([pair_squares(x).mean((0, 1)) for x in (queries, plain)])
    return LayerMeans(plain.mean(0), energy * (softmax_scale**2 / queries.shape[-1]), squares)


@functools.lru_cache(None)
def noise(head_dim: int, bits: int) -> float:
    """Relative squared error of codes of random vectors."""
    x = np.random.default_rng(0).standard_normal((256, head_dim)).astype(np.float32)
    codes = reference.quantize(x, bits)
    error = reference.dequantize_rotated(*codes, bits, Codebook.lloyd_max(head_dim, bits)) - reference.rotate(x, Rotation(head_dim))
    return float((error**2).sum() / (x**2).sum())


def may_pay(fmt: KVFormat) -> bool:
    """Whether a mean can pay in any layer: at 8 bits keys are exact enough."""
    return fmt.bits_k < 8


def pays(fmt: KVFormat, kept: float) -> bool:
    """Whether it pays in a layer; kept: kept_energy over all of its heads."""
    return kept * noise(fmt.head_dim, fmt.bits_k) > max(LEAST_GAIN, VALUES_SHARE * noise(fmt.head_dim, fmt.bits_v))


def kept_energy(layer: LayerMeans, pairs: np.ndarray) -> float:
    """What the variance of scores, per unit of the codes' relative squared error, loses with the mean of these
    pairs, int [pairs]."""
    a, b = np.split(layer.means, 2, -1)
    return float(((a * a + b * b)[:, pairs].sum(-1) * layer.query_energy).mean())


def lost_energy(layer: LayerMeans, pairs: np.ndarray) -> float:
    """The same of the mean in all pairs but these, int [pairs], which stays in the codes."""
    return kept_energy(layer, np.arange(layer.means.shape[-1] // 2)) - kept_energy(layer, pairs)


def scatter_energy(layer: LayerMeans) -> float:
    """The same of what tells keys apart: of their distance to the mean."""
    total = float(layer.query_energy.mean() * layer.squares[1].sum())
    return max(0.0, total - kept_energy(layer, np.arange(layer.means.shape[-1] // 2)))


def cannot_hold(fmt: KVFormat, lost: float, scatter: float) -> bool:
    """Whether a layer's keys need 8 bits, by its lost_energy and scatter_energy over all of its heads."""
    return lost > MOST_LOST * scatter and lost * noise(fmt.head_dim, fmt.bits_k) > LEAST_GAIN


def energy(means: np.ndarray) -> np.ndarray:
    """Of each pair [head_dim / 2], the sum over heads of its share in a head's mean [heads, head_dim], squared."""
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
    """What RoPE scales vectors by, of its cos [positions, head_dim / 2]: 1, but for YaRN and its kin."""
    return float(np.abs(cos).max())


def columns(pairs: np.ndarray, head_dim: int) -> np.ndarray:
    """int [head_dim]: the table's column with a coordinate's cosine; its sine is MEAN_PAIRS further. 0 for those of other pairs."""
    out = np.zeros(head_dim, int)
    out[pairs] = out[pairs + head_dim // 2] = np.arange(len(pairs))
    return out


def coefficients(means: np.ndarray, pairs: np.ndarray, unit: float = 1.0) -> np.ndarray:
    """float32 [heads, 2, head_dim] of means [heads, head_dim] before RoPE: a coordinate of R_p mu is its cosine in the table
    times the first plus its sine times the second; zeros but in these pairs."""
    a, b = np.split(means, 2, -1)
    kept = np.tile(np.isin(np.arange(a.shape[-1]), pairs), 2)
    rows = np.stack([means, np.concatenate([-b, a], -1)], 1) * kept
    return (rows * (unit / TABLE_TOP)).astype(np.float32, order="C")


def term(table: np.ndarray, coefficients: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """R_p mu: float32 [positions, heads, head_dim] for the positions of the table's rows [positions, COLUMNS]."""
    at = columns(pairs, coefficients.shape[-1])
    cosines, sines = (table[:, None, at + side].astype(np.float32) for side in (0, MEAN_PAIRS))
    return cosines * coefficients[:, 0] + sines * coefficients[:, 1]


def before_rope(keys: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Keys [tokens, heads, head_dim] as they were before RoPE with cos and sin [tokens, head_dim / 2]."""
    a, b = np.split(keys, 2, -1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c + b * s, b * c - a * s], -1) / unit(cos) ** 2

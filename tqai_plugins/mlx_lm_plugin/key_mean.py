"""What is taken off the keys of one layer before they are coded (core/key_mean.py), in numbers that a cache file can hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..core import key_mean
from ..core.key_mean import COLUMNS, MEAN_PAIRS, LayerMeans


@dataclass(frozen=True)
class KeyMean:
    """pairs that are kept; angles by which RoPE turns them from one position to the next, modulo a whole turn; unit: what
    RoPE scales by; means of the pairs, [heads, COLUMNS] as tuples: first coordinates, then second ones. All numbers are
    float32's, so that they are the same after a file. Caches compare theirs before they are batched."""

    head_dim: int
    pairs: tuple[int, ...]
    angles: tuple[float, ...]
    unit: float
    means: tuple[tuple[float, ...], ...]

    @classmethod
    def make(cls, measured: LayerMeans, angles: np.ndarray, unit: float) -> KeyMean:
        """angles [head_dim / 2]: of all pairs."""
        head_dim = measured.means.shape[1]
        pairs = key_mean.choose_pairs(key_mean.energy(measured.means))
        kept = measured.means[:, np.concatenate([pairs, pairs + head_dim // 2])]
        return cls.from_numbers(np.concatenate([[head_dim, unit], pairs, angles[pairs], kept.reshape(-1)]))

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.head_dim, self.pairs, self.angles, self.unit, self.means))

    def __hash__(self) -> int:  # asked for at every step of every layer
        return self._hash

    @property
    def numbers(self) -> np.ndarray:
        """All of it, float32 [2 + COLUMNS (1 + heads)]."""
        return np.concatenate([[self.head_dim, self.unit], self.pairs, self.angles, *self.means]).astype(np.float32)

    @classmethod
    def from_numbers(cls, numbers: np.ndarray) -> KeyMean:
        """ValueError for what is no key mean."""
        x = np.asarray(numbers, np.float32)
        if x.ndim != 1 or len(x) < 2 + 2 * COLUMNS or (len(x) - 2) % COLUMNS or not np.isfinite(x).all():
            raise ValueError("these are not the numbers of a key mean")
        head_dim, pairs = int(x[0]), x[2 : 2 + MEAN_PAIRS].astype(int)
        if head_dim < COLUMNS or (np.diff(pairs) <= 0).any() or not 0 <= pairs[0] <= pairs[-1] < head_dim // 2:
            raise ValueError("these are not the numbers of a key mean")
        means = x[2 + COLUMNS :].reshape(-1, COLUMNS).tolist()
        return cls(head_dim, tuple(pairs.tolist()), tuple(x[2 + MEAN_PAIRS : 2 + COLUMNS].tolist()), float(x[1]), tuple(map(tuple, means)))

    @property
    def heads(self) -> int:
        """KV heads of the layer."""
        return len(self.means)

    def table(self, positions: int) -> np.ndarray:
        """int8 [positions, COLUMNS], as core.key_mean.make_table's."""
        turns = np.arange(positions)[:, None] * np.array(self.angles)
        return key_mean.make_table(self.unit * np.cos(turns), self.unit * np.sin(turns), np.arange(MEAN_PAIRS))

    def matrix(self) -> np.ndarray:
        """float32 [heads, COLUMNS, head_dim]: a row of the table times it is core.key_mean.term."""
        pairs = np.array(self.pairs)
        means = np.zeros((self.heads, self.head_dim))
        means[:, np.concatenate([pairs, pairs + self.head_dim // 2])] = self.means
        by, columns = key_mean.coefficients(means, pairs, self.unit), key_mean.columns(pairs, self.head_dim)
        out = np.zeros((self.heads, COLUMNS, self.head_dim), np.float32)
        for part, column in enumerate((columns, columns + MEAN_PAIRS)):
            out[:, column, np.arange(self.head_dim)] = by[:, part]
        return out

"""What a key mean (core/key_mean.py) adds to keys and to scores, as attention over codes needs it."""

from __future__ import annotations

import functools

import mlx.core as mx

from ..metal_kernels import codec
from .key_mean import KeyMean

BLOCK = 1024  # positions of the smallest table; each is twice as long as the one before


@functools.lru_cache(None)
def _matrices(mean: KeyMean) -> tuple[mx.array, mx.array]:
    """KeyMean.matrix in the basis of keys and in that of codes; evaluated, since other threads use them too."""
    plain = mx.array(mean.matrix())
    turned = codec.rotate(plain)
    mx.eval(plain, turned)
    return plain, turned


@functools.lru_cache(None)
def _table(mean: KeyMean, positions: int) -> mx.array:
    table = mx.array(mean.table(positions))
    mx.eval(table)
    return table


def _rows(mean: KeyMean, positions: int) -> mx.array:
    """int8 [>= positions, COLUMNS]: the table, which all caches of a layer share."""
    size = BLOCK
    while size < positions:
        size *= 2
    return _table(mean, size)


def term(mean: KeyMean, padding: mx.array, start: int, count: int, rotated: bool = False) -> mx.array:
    """core.key_mean.term for columns from start on, float32 [batch, heads, count, head_dim], of rows that begin at the
    columns `padding` [batch]; rotated: in the basis of the codes."""
    place = mx.clip(mx.arange(start, start + count) - padding[:, None], 0, None)
    rows = _rows(mean, start + count)[place].astype(mx.float32)
    return rows[:, None] @ _matrices(mean)[rotated]


def scores(mean: KeyMean, queries: mx.array, positions: int, factor: float) -> mx.array:
    """factor times queries [batch, q_heads, head_dim] times the term, at positions from 0: float32 [batch, q_heads, positions
    or more], whose shape stays the same for many tokens."""
    positions = -(-positions // BLOCK) * BLOCK
    grouped = queries.astype(mx.float32).reshape(queries.shape[0], mean.heads, -1, mean.head_dim)
    weights = grouped @ (_matrices(mean)[0] * factor).swapaxes(1, 2)
    found = weights @ _rows(mean, positions)[:positions].astype(mx.float32).T
    return found.reshape(*queries.shape[:2], positions)

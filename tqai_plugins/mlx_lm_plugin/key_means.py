"""The mean key of each layer of an MLX model (core/key_mean.py): learned, and as attention over codes needs it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import KVCache

from ..core import key_mean
from ..core.key_mean import COLUMNS, LayerMeans
from ..core.texts import PROSE
from ..metal_kernels import codec
from . import dispatch
from .key_mean import KeyMean
from .options import CacheOptions

BLOCK = 1024  # positions of the smallest table; each is twice as long as the one before
NO_ROPE = "this model has no RoPE of the common form, so no key means; leave them out"
FAR = 1000  # a position at which RoPE must turn by so many times the angle


def learn(model: nn.Module, tokenizer) -> dict[int, LayerMeans]:
    """Layer -> its means, while the model reads a built-in text with mlx-lm's own caches. ValueError for a model without a
    layer whose RoPE turns all pairs (i, i + head_dim / 2) by one position."""
    tokens = mx.array(key_mean.choose_tokens(tokenizer.encode(PROSE), tokenizer.vocab_size, key_mean.TOKENS))
    make = getattr(type(model), "make_cache", None)
    caches = make(model) if make else [KVCache() for _ in model.layers]
    layers = {id(cache): layer for layer, cache in enumerate(caches) if type(cache) is KVCache}
    seen: dict[int, tuple] = {}
    with dispatch.recording(lambda cache, *read: seen.setdefault(id(cache), read)):
        mx.eval(model(tokens[None], cache=caches))
    found = {}
    for cache, (queries, keys, scale) in seen.items():
        angles = _angles(model, layers[cache], keys.shape[-1]) if cache in layers else None
        if angles:
            q, k = (np.array(x[0].swapaxes(0, 1).astype(mx.float32), np.float64) for x in (queries, keys))
            turns, unit = np.arange(len(k))[:, None] * angles[0], angles[1]
            found[layers[cache]] = key_mean.measure(k, q, unit * np.cos(turns), unit * np.sin(turns), scale)
    if not found:
        raise ValueError(NO_ROPE)
    return found


def of(model: nn.Module, layers: Mapping[int, LayerMeans | KeyMean] | None, options: CacheOptions) -> dict[int, KeyMean] | None:
    """For CacheOptions.key_means: those of the layers in which they pay, by the options' widths. ValueError for a model all of
    whose layers have another kind of RoPE. What is no mean of a layer is passed on, for the options to refuse."""
    if not isinstance(layers, Mapping):
        return layers
    made, wanted = {}, 0
    for layer, measured in layers.items():
        if not isinstance(measured, LayerMeans) or type(layer) is not int or not 0 <= layer < len(model.layers):
            made[layer] = measured
            continue
        head_dim = measured.means.shape[1]
        if head_dim < COLUMNS:
            continue
        fmt = options.of_layer(layer).format(head_dim)
        pairs = key_mean.choose_pairs(key_mean.energy(measured.means))
        if key_mean.may_pay(fmt) and key_mean.pays(fmt, key_mean.kept_energy(measured, pairs)):
            wanted += 1
            if angles := _angles(model, layer, head_dim):
                made[layer] = KeyMean.make(measured, *angles)
    if wanted and not made:
        raise ValueError(NO_ROPE)
    return made  # type: ignore[return-value]


def _angles(model: nn.Module, layer: int, head_dim: int) -> tuple[np.ndarray, float] | None:
    """By which a layer's RoPE turns its pairs from one position to the next [head_dim / 2], and what it scales by; None where
    it does something else."""
    rope = next((module["rope"] for module in model.layers[layer].modules() if "rope" in module), None)
    if rope is None:
        return None
    half = head_dim // 2
    ones = mx.repeat(mx.array([1.0, 0.0]), half).reshape(1, 1, 1, head_dim)
    turned = lambda position: np.array(rope(ones, offset=position), np.float64).reshape(2, half)
    (cos, sin), unit = turned(1), float(turned(0)[0, 0])
    angles = np.arctan2(sin, cos)
    turns = np.array([0, 1, FAR])[:, None, None] * angles
    expected = unit * np.concatenate([np.cos(turns), np.sin(turns)], 1)
    found = np.stack([turned(position) for position in (0, 1, FAR)])
    return (angles, unit) if np.allclose(found, expected, atol=0.01 * unit) else None


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
    """factor times queries [batch, q_heads, head_dim] times the term, at positions from 0: float32 [batch, q_heads, positions]."""
    grouped = queries.astype(mx.float32).reshape(queries.shape[0], mean.heads, -1, mean.head_dim)
    weights = grouped @ (_matrices(mean)[0] * factor).swapaxes(1, 2)
    found = weights @ _rows(mean, positions)[:positions].astype(mx.float32).T
    return found.reshape(*queries.shape[:2], positions)

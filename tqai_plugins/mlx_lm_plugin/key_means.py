"""The mean key of each layer of an MLX model (core/key_mean.py), learned."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import KVCache

from ..core import key_mean
from ..core.key_mean import COLUMNS, LayerMeans
from ..core.texts import PROSE
from . import dispatch
from .key_mean import KeyMean
from .options import CacheOptions

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

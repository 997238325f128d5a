"""Attention over codes and the exact tokens that lie over them."""

from __future__ import annotations

import math

import mlx.core as mx

from ..metal_kernels import codec, launch
from ..metal_kernels.decode_attention import decode_attention
from ..metal_kernels.dequantize import dequantize
from . import masks, mean_terms
from .tokens import Operand, Tokens

TILE_BYTES = 256 << 20  # of a layer's keys and values that are dequantized at once, or those of one head


def attend(queries: mx.array, keys: Operand, values: Operand, scale: float, mask, sinks=None) -> mx.array:
    """What mx.fast.scaled_dot_product_attention gives for dense keys and values: [batch, q_heads, new, head_dim].

    A query at column c reads columns c - window + 1 to c, and the first tokens of its row, exactly, and all others
    as codes: so the result does not depend on how a prompt was cut into chunks or batches. ValueError if keys and
    values are not of one update.
    """
    if not isinstance(values, Operand) or values.tokens is not keys.tokens:
        raise ValueError("keys and values of different updates; this model cannot be served with a tqai cache")
    tokens = keys.tokens
    if queries.shape[2] == 1 and launch.available():
        ours, sliding = masks.sliding_window(mask)
        if ours:
            bias = None if tokens.mean is None else mean_terms.scores(tokens.mean, queries[:, :, 0], tokens.length, scale * math.log2(math.e))
            return decode_attention(
                queries, tokens.slots, tokens.length, tokens.fmt, tokens.rows, scale=scale, recent=tokens.recent,
                ring=tokens.ring, sinks=tokens.sinks, first=max(tokens.length - sliding, 0) if sliding else 0, extra=sinks,
                bias=bias,
            )  # fmt: skip
    return dense_attention(queries, tokens, scale, mask, sinks)


def dense_attention(queries: mx.array, tokens: Tokens, scale: float, mask, sinks=None) -> mx.array:
    """Dequantize this layer for the moment, some KV heads at a time, and attend with MLX's own kernel.

    queries [batch, q_heads, new, head_dim], as the result. All of it happens in the basis of the codes.
    """
    heads, group = tokens.slots.shape[1], queries.shape[1] // tokens.slots.shape[1]
    mask = _split_mask(tokens, queries.shape[2], mask)
    dense_bytes = 2 * tokens.slots.shape[0] * tokens.length * tokens.fmt.head_dim * queries.dtype.size
    step = max(TILE_BYTES // dense_bytes, 1)
    out = []
    for start in range(0, heads, step):
        some = slice(start, min(start + step, heads))
        theirs = slice(group * some.start, group * some.stop)
        out.append(
            _attend_to_heads(
                queries[:, theirs], tokens, some, scale, mask if mask.shape[1] == 1 else mask[:, theirs],
                None if sinks is None else sinks[theirs],
            )
        )  # fmt: skip
    return out[0] if len(out) == 1 else mx.concatenate(out, 1)


def _attend_to_heads(queries: mx.array, tokens: Tokens, some: slice, scale: float, mask: mx.array, sinks) -> mx.array:
    dtype, heads = queries.dtype, tokens.slots.shape[1]
    whole = (some.start, some.stop) == (0, heads)
    parts = [dequantize(tokens.slots if whole else tokens.slots[:, some], tokens.length, tokens.fmt, dtype)]
    if tokens.mean is not None:
        term = mean_terms.term(tokens.mean, tokens.rows[0], 0, tokens.length, rotated=True)[:, some]
        parts = [((parts[0][0].astype(mx.float32) + term).astype(dtype), parts[0][1])]
    exact = [x for x in (tokens.sinks, _recent_in_order(tokens)) if x is not None]
    if exact:
        both = mx.concatenate([x[:, heads * part + some.start : heads * part + some.stop] for part in (0, 1) for x in exact], 2)
        turned = codec.rotate(both).astype(dtype)
        parts.append(mx.split(turned, 2, 2))
    k, v = (mx.concatenate(both, 2) if len(both) > 1 else both[0] for both in zip(*parts))
    turned = codec.rotate(queries).astype(dtype)
    out = mx.fast.scaled_dot_product_attention(turned, k, v, scale=scale, mask=mask, sinks=sinks)
    return codec.rotate_back(out).astype(dtype)


def _recent_in_order(tokens: Tokens) -> mx.array | None:
    return mx.roll(tokens.recent, -tokens.ring, 2) if tokens.ring else tokens.recent


def _split_mask(tokens: Tokens, count: int, mask) -> mx.array:
    """The mask over [codes of all columns | first tokens | newest tokens], each token allowed in one of them."""
    length = tokens.length
    column, query = mx.arange(length), mx.arange(length - count, length)[:, None]
    padding, recent_from = (rows[:, None, None, None] for rows in tokens.rows[:2])  # each [batch, 1, 1, 1]
    bias = None
    if isinstance(mask, mx.array):
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)[..., -length:]
        allowed = mask if mask.dtype == mx.bool_ else mask > -mx.inf
        bias = None if mask.dtype == mx.bool_ else mask
    else:
        allowed = column <= query if mask == "causal" else mx.ones((count, length), mx.bool_)
    allowed = allowed & (column >= padding)
    first = column < padding + tokens.sink_count
    oldest = mx.maximum(recent_from, length - tokens.recent_count)
    newest = (column > query - tokens.window) & (column >= oldest) & ~first
    parts = [allowed & ~first & ~newest]
    where = [column]
    if tokens.sink_count:
        place = padding + mx.arange(tokens.sink_count)  # [batch, 1, 1, sinks]
        where.append(mx.clip(place, 0, length - 1))
        parts.append(_take(allowed, where[1]) & (place < length))
    if tokens.recent_count:
        where.append(column[length - tokens.recent_count :])
        parts.append((allowed & newest)[..., length - tokens.recent_count :])
    shape = mx.broadcast_shapes(*(part.shape[:-1] for part in parts))
    whole = mx.concatenate([mx.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], -1)
    if bias is None:
        return whole
    biases = [_take(bias, place) for place in where]
    shape = mx.broadcast_shapes(shape, *(b.shape[:-1] for b in biases))
    whole_bias = mx.concatenate([mx.broadcast_to(b, (*shape, b.shape[-1])) for b in biases], -1)
    return mx.where(whole, whole_bias, mx.array(-mx.inf, bias.dtype))


def _take(x: mx.array, place: mx.array) -> mx.array:
    """x [..., columns] at these columns: place [count], or [batch, 1, 1, count]."""
    if place.ndim == 1:
        return x[..., place]
    shape = mx.broadcast_shapes(x.shape[:-1], place.shape[:-1])
    x = mx.broadcast_to(x, (*shape, x.shape[-1]))
    return mx.take_along_axis(x, mx.broadcast_to(place, (*shape, place.shape[-1])), -1)

"""Runs every kernel against core.reference over a grid of formats and shapes, on whatever device MLX has."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ..core import reference
from ..core.bit_packing import unpack
from ..core.kv_format import KVFormat
from ..core.vector_codebook import codebook_of
from . import codec, tables
from .decode_attention import decode_attention
from .dequantize import dequantize
from .store import store_and_join

HEAD_DIMS = (64, 80, 96, 128, 192, 256, 512)
TOLERANCE = {mx.float16: 2e-3, mx.bfloat16: 1.5e-2, mx.float32: 5e-5}
SHAPES = (  # query heads a KV head, tokens of each sequence, exact window, sink tokens
    (4, (1,), 128, 4), (4, (300, 150, 3), 128, 4), (7, (129, 64), 0, 0), (1, (1000, 999), 16, 4), (8, (2500,), 128, 4),
)  # fmt: skip


def draw(seed: int, *shape: int, dtype=mx.float16) -> mx.array:
    """Normal numbers of this shape, the same for a seed."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


class Case:
    """A batch with left padding, a ring of newest tokens and first tokens, and what attention over it has to be."""

    def __init__(self, fmt: KVFormat, group: int, lengths, window: int, sinks: int, dtype=mx.float16, seed=0, heads=2):
        self.fmt, self.total, batch = fmt, max(lengths), len(lengths)
        self.keys, self.values = (draw(seed + i, batch, heads, self.total, fmt.head_dim, dtype=dtype) for i in (1, 2))
        self.queries = draw(seed + 3, batch, heads * group, 1, fmt.head_dim, dtype=dtype)
        slots = codec.store(self.keys, self.values, fmt)
        self.slots = mx.pad(slots, [(0, 0), (0, 0), (0, 9), (0, 0)], constant_values=0xFFFFFFFF)  # NaN, not to be read
        self.padding = [self.total - n for n in lengths]
        both, count = mx.concatenate([self.keys, self.values], 1), min(window, self.total)
        self.ring = 3 % count if count else 0
        self.recent = mx.roll(both[:, :, self.total - count :], self.ring, 2) if window else None
        place = mx.clip(mx.array(self.padding)[:, None] + mx.arange(sinks), 0, self.total - 1)[:, None, :, None]
        self.sinks = mx.take_along_axis(both, place, 2) if sinks else None
        self.window, self.sink_count, self.group = window, sinks, group
        self.rows = tables.rows(self.padding, [max(p, self.total - window) for p in self.padding])

    def run(self, scale: float, **more) -> np.ndarray:
        """What the kernels give: float32 [batch, q_heads, head_dim]."""
        found = decode_attention(
            self.queries, self.slots, self.total, self.fmt, self.rows, scale=scale, recent=self.recent, ring=self.ring,
            sinks=self.sinks, **more,
        )  # fmt: skip
        return np.array(found.astype(mx.float32))[:, :, 0]

    def expected(self, scale: float, first: int = 0, extra: np.ndarray | None = None, bias: mx.array | None = None) -> np.ndarray:
        """The same in float64, by the definition; extra [q_heads]: logits without a value; bias as decode_attention's."""
        f64 = lambda x: np.array(x.astype(mx.float32)).astype(np.float64)
        coded = [f64(codec.rotate_back(x)) for x in codec.load(self.slots[:, :, : self.total], self.fmt)]
        exact_k, exact_v, queries = f64(self.keys), f64(self.values), f64(self.queries)
        out = np.zeros((*self.queries.shape[:2], self.fmt.head_dim))
        for b, padding in enumerate(self.padding):
            column = np.arange(max(padding, first), self.total)
            exact = ((column >= self.total - self.window) | (column < padding + self.sink_count))[:, None]
            for h in range(out.shape[1]):
                kv = h // self.group
                k = np.where(exact, exact_k[b, kv, column], coded[0][b, kv, column])
                v = np.where(exact, exact_v[b, kv, column], coded[1][b, kv, column])
                sinks = None if extra is None else np.float64(extra[h])
                gain = 0.0 if bias is None else np.where(exact[:, 0], 0.0, np.float64(bias[b, h])[column - padding] / math.log2(math.e))
                out[b, h], _ = reference.softmax_attention(scale * (k @ queries[b, h, 0]) + gain, v, sinks)
        return out


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected| over all of [...]."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def run_grid(head_dims=HEAD_DIMS) -> Iterator[dict]:
    """One row a check: kernel, format, what, error, ok, seconds (the first of a kernel compiles it)."""
    formats = [KVFormat(k, v, d) for d in head_dims for k, v in ((4, 2), (4, 4), (3, 3), (8, 8), (2, 3), (2, 8))]
    formats += [KVFormat(k, 2, d, vector_values=True) for d in (64, 80, 128, 256) if d in head_dims for k in (4, 3)]
    for fmt in formats:
        for dtype in (mx.float16, mx.bfloat16, mx.float32) if (fmt.bits_k, fmt.bits_v) == (4, 2) else (mx.float16,):
            yield from _codec_rows(fmt, dtype)
    for fmt in formats:
        shapes = SHAPES if (fmt.bits_k, fmt.bits_v) == (4, 2) else SHAPES[1:2]
        for group, lengths, window, sinks in shapes:
            yield _attention_row(fmt, group, lengths, window, sinks, mx.float16)
    for fmt in (KVFormat(4, 2, d) for d in (80, 128) if d in head_dims):
        for dtype in (mx.bfloat16, mx.float32):
            yield _attention_row(fmt, 4, (300, 20), 128, 4, dtype)
        for first in (0, 250):
            yield _attention_row(fmt, 4, (300, 150), 128, 4, mx.float16, first=first, extra=draw(9, 8))
        yield _attention_row(fmt, 4, (300, 150), 128, 4, mx.float16, bias=draw(10, 2, 8, 300, dtype=mx.float32))


def _codec_rows(fmt: KVFormat, dtype) -> Iterator[dict]:
    """Codes may differ from the reference's where a number lies on a boundary: at most one in 5,000 (of vector values, bytes)."""
    start = time.perf_counter()
    keys, values = draw(1, 2, 3, 333, fmt.head_dim, dtype=dtype), draw(2, 2, 3, 333, fmt.head_dim, dtype=dtype)
    slots, joined = store_and_join(keys, values, fmt)
    packed = np.array(slots).view(np.uint8)
    differ = total = 0
    kinds = (keys, fmt.bits_k, False, slice(0, fmt.k_bytes)), (values, fmt.bits_v, fmt.vector_values, slice(fmt.k_bytes, -4))
    for x, bits, vector, part in kinds:
        expected, _ = reference.quantize(np.array(x.astype(mx.float32)), bits, codebook=codebook_of(fmt.head_dim, bits, vector))
        found = np.ascontiguousarray(packed[..., part])
        same = expected == found if vector else unpack(expected, bits, fmt.head_dim) == unpack(found, bits, fmt.head_dim)
        differ, total = differ + int((~same).sum()), total + same.size
    yield _row("store", fmt, f"{dtype}, {differ} of {total} codes differ", differ / total, 2e-4, start)
    wrong = mx.mean(joined != mx.concatenate([keys, values], 1)).item()
    yield _row("store", fmt, f"{dtype}, keys and values as they came", wrong, 0.0, start)
    start = time.perf_counter()
    found = dequantize(slots, 330, fmt, dtype)
    plain = codec.load(slots[:, :, :330], fmt)
    error = max(relative_error(np.array(a.astype(mx.float32)), np.array(b)) for a, b in zip(found, plain))
    yield _row("dequantize", fmt, f"{dtype}", error, TOLERANCE[dtype], start)


def _attention_row(fmt, group, lengths, window, sinks, dtype, first=0, extra=None, bias=None) -> dict:
    start = time.perf_counter()
    case = Case(fmt, group, lengths, window, sinks, dtype)
    scale = fmt.head_dim**-0.5
    logits = None if extra is None else mx.tile(extra, 1 + 2 * group // extra.size)[: 2 * group]
    found = case.run(scale, first=first, extra=logits, bias=bias)
    error = relative_error(found, case.expected(scale, first, None if logits is None else np.array(logits, np.float64), bias))
    what = f"{dtype}, {group} query heads a KV head, lengths {lengths}, window {window}, sinks {sinks}, from {first}"
    return _row("decode_attention", fmt, what + (", learned sinks" if extra is not None else "") + (", bias" if bias is not None else ""), error, TOLERANCE[dtype], start)


def _row(kernel: str, fmt: KVFormat, what: str, error: float, limit: float, start: float) -> dict:
    seconds = round(time.perf_counter() - start, 3)
    return {
        "kernel": kernel, "format": fmt.name, "head_dim": fmt.head_dim, "what": what.replace("mlx.core.", ""),
        "error": error, "limit": limit, "ok": bool(error <= limit), "seconds": seconds,
    }  # fmt: skip

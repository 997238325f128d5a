"""The caches that mlx-lm's generators and server hold: one sequence, or a batch of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import _BaseCache, create_attention_mask

from ..core.codebook import Codebook
from ..core.kv_format import FORMAT_VERSION
from ..core.vector_codebook import VectorCodebook, codebook_of
from ..metal_kernels import codec, tables
from ..metal_kernels.store import store, store_and_join
from . import masks, mean_terms
from .key_mean import KeyMean
from .options import CacheOptions
from .tokens import Operand, Tokens

ANEW = "make the cache anew"
STEP = 256  # columns are allocated so many at a time, as in mlx-lm's own caches


class _Compressed(_BaseCache):
    """Rows of tokens. All end at column `length`; row b begins at column padding[b].

    Codes are kept for every token; exact tokens lie over them, so that trimming and batching only move columns.
    """

    def __init__(self, options: CacheOptions | None = None, padding: Sequence[int] = (0,)):
        self.options = options or CacheOptions()
        self.length = self.head_dim = 0
        self.columns: list[mx.array] | None = None  # slots and, if kept, dense numbers: [batch, heads, capacity, ...]
        self.recent: mx.array | None = None  # see Tokens
        self.ring = 0
        self.sinks: mx.array | None = None
        self._set_rows(list(padding), [0] * len(padding))
        self._clear()

    def _clear(self) -> None:
        self._right_padding: list[int] | None = None
        self._last: tuple | None = None  # what update_and_fetch returned, if a layer without keys shares it
        self.shared = False

    def _set_rows(self, padding: list[int], recent_from: list[int]) -> None:
        self.padding, self.recent_from = padding, recent_from
        self._rows = tables.rows(padding, recent_from)

    # ---- the model's side

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        """Store new tokens [batch, kv_heads, new, head_dim]; returns all, for attention to read."""
        self._last = None
        if keys.shape != values.shape:
            raise ValueError(f"keys of shape {keys.shape} and values of {values.shape}; tqai needs equal head dimensions")
        fmt, dtype = self.options.format(keys.shape[3]), keys.dtype
        codec.check_served(fmt)
        self.head_dim = fmt.head_dim
        if self.columns is None and len(self.padding) != keys.shape[0]:
            self._set_rows([0] * keys.shape[0], [0] * keys.shape[0])
        before, new = self.length, keys.shape[2]
        mean, coded = self.options.key_mean, keys
        if mean is not None:
            if (mean.heads, mean.head_dim) != (keys.shape[1], keys.shape[3]):
                raise ValueError(f"key_means are of {mean.heads} heads of {mean.head_dim} coordinates, not of keys of shape {keys.shape}")
            term = mean_terms.term(mean, self._rows[0], before, new)
            coded = (keys.astype(mx.float32) - term).astype(dtype)
        # By one launch where keys are coded as they came and some tokens stay exact.
        joins = mean is None and (self.options.window or self.options.sinks) and not self.options.keep_dense
        slots, exact = store_and_join(keys, values, fmt) if joins else (store(coded, values, fmt), None)
        added = [slots]
        if self.options.keep_dense:
            k, v = (codec.rotate_back(x) for x in codec.load(slots, fmt))
            added.append(mx.concatenate([k if mean is None else k + term, v], 1).astype(dtype))
        self._append(added)
        if self.options.keep_dense:
            dense = self.columns[1][:, :, : self.length]
            return dense[:, : keys.shape[1]], dense[:, keys.shape[1] :]
        if exact is None:
            exact = mx.concatenate([keys, values], 1)
        self._keep_sinks(exact, before)
        recent, ring = self._keep_recent(exact)
        fetched = Operand(
            Tokens(
                fmt, dtype, self.columns[0], self.length, new, self.options.window, recent, ring, self.sinks,
                self._rows, mean,
            )
        )  # fmt: skip
        if self.shared:
            self._last = fetched, fetched
        return fetched, fetched

    def keys_and_values(self):
        """What the last update_and_fetch returned, for a layer that has no keys of its own."""
        if self.options.keep_dense:
            dense = self.columns[1][:, :, : self.length]
            return dense[:, : dense.shape[1] // 2], dense[:, dense.shape[1] // 2 :]
        if self._last is None:
            raise ValueError("this layer's keys are shared by another, which was not seen when the model was patched")
        return self._last

    def _append(self, added: list[mx.array]) -> None:
        end = self.length + added[0].shape[2]
        if self.columns is None or end > self.columns[0].shape[2]:
            room = -(-added[0].shape[2] // STEP) * STEP
            grown = []
            for i, x in enumerate(added):
                zeros = mx.zeros((*x.shape[:2], room, x.shape[3]), x.dtype)
                grown.append(
                    zeros if self.columns is None else mx.concatenate([self.columns[i][:, :, : self.length], zeros], 2)
                )
            self.columns = grown
        for column, x in zip(self.columns, added):
            column[:, :, self.length : end] = x
        self.length = end

    def _keep_sinks(self, exact: mx.array, before: int) -> None:
        """Copy those of the new columns that are first tokens of their rows. Right padding is overwritten later."""
        count = self.options.sinks
        if not count or before >= max(self.padding) + count:
            return
        batch, heads, new, head_dim = exact.shape
        if self.sinks is None:
            self.sinks = mx.zeros((batch, heads, count, head_dim), exact.dtype)
        place = self._rows[0][:, None] + mx.arange(count) - before  # [batch, count]
        taken = mx.take_along_axis(exact, mx.clip(place, 0, new - 1)[:, None, :, None], 2)
        inside = (place >= 0) & (place < new)
        self.sinks = mx.where(inside[:, None, :, None], taken, self.sinks)

    def _keep_recent(self, exact: mx.array) -> tuple[mx.array | None, int]:
        """Keep the newest tokens; returns what the new ones may read, which is more, and the place of its oldest."""
        if not self.options.window:
            return None, 0
        # Right padding will be rolled away, and what is then newest must still be here.
        keep = self.options.window + max(self._right_padding or [0])
        if exact.shape[2] == 1 and self.recent is not None and self.recent.shape[2] == keep:
            self.recent[:, :, self.ring : self.ring + 1] = exact
            self.ring = (self.ring + 1) % keep
            return self.recent, self.ring
        seen = exact if self.recent is None else mx.concatenate([self._in_order(), exact], 2)
        self._set_recent(seen[:, :, max(seen.shape[2] - keep, 0) :])
        return seen, 0

    def _in_order(self) -> mx.array:
        return mx.roll(self.recent, -self.ring, 2) if self.ring else self.recent

    def _set_recent(self, recent: mx.array | None) -> None:
        self.recent, self.ring = (None if recent is None else mx.contiguous(recent)), 0

    @property
    def _recent_count(self) -> int:
        return 0 if self.recent is None else self.recent.shape[2]

    # ---- mlx-lm's side

    def size(self) -> int:
        return self.length

    def empty(self) -> bool:
        return self.columns is None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the newest n tokens. The exact window is then shorter, and refills with the tokens that follow."""
        n, self._last = min(self.length, n), None
        self.length -= n
        if self.recent is not None:
            self._set_recent(self._in_order()[:, :, : max(self._recent_count - n, 0)])
        self._set_rows(self.padding, [min(first, self.length) for first in self.recent_from])
        return n

    @property
    def nbytes(self) -> int:
        arrays = [*(self.columns or []), *(x for x in (self.recent, self.sinks) if x is not None)]
        return sum(x.nbytes for x in arrays)

    @property
    def keys(self) -> mx.array | None:
        """The slots; pipelined models make them wait for a message."""
        return None if self.columns is None else self.columns[0]

    @keys.setter
    def keys(self, slots: mx.array) -> None:
        self.columns[0] = slots

    @property
    def state(self) -> tuple:
        self._last = None
        o = self.options
        books = _codebooks(self.head_dim, o) if self.head_dim else ""
        # Vector values make it longer, so that a version without them refuses it.
        meta = (
            FORMAT_VERSION, o.bits_k, o.bits_v, o.sinks, o.residual_window, o.cache_strategy, self.shared, self.head_dim, books,
            *([o.vector_values] if o.vector_values else []),
        )  # fmt: skip
        mean = () if o.key_mean is None else (mx.array(o.key_mean.numbers),)
        return self.columns, self.recent, self.sinks, self.length, self.ring, self.padding, self.recent_from, *mean, meta

    @state.setter
    def state(self, state) -> None:
        columns, recent, exact, length, ring, padding, recent_from, *mean, meta = state
        version, bits_k, bits_v, sinks, window, strategy, shared, head_dim, books = (*meta, *[None] * (9 - len(meta)))[:9]
        if version != FORMAT_VERSION or len(meta) not in (9, 10):
            raise ValueError(f"this prompt cache has tqai's format {version}; this version reads {FORMAT_VERSION}: {ANEW}")
        vector = bool(meta[9:]) and bool(meta[9])
        self.options = CacheOptions(bits_k, bits_v, sinks, window, strategy, vector_values=vector, key_means=_means_in(mean))
        if head_dim and books != _codebooks(head_dim, self.options):
            raise ValueError(f"this prompt cache was written with other codebooks than this process uses: take those, or {ANEW}")
        _check_state(self.options, head_dim, columns, recent, exact, length, ring, padding, recent_from)
        self.columns, self.recent, self.sinks, self.length, self.ring = columns, recent, exact, length, ring
        self._set_rows(list(padding), list(recent_from))
        self._clear()
        self.shared, self.head_dim = bool(shared), head_dim

    def _join(self, caches: Sequence[_Compressed]) -> None:
        """Become the rows of all these caches, aligned at their ends."""
        length = max(cache.length for cache in caches)
        padding, recent_from = [], []
        for cache in caches:
            shift = length - cache.length
            padding += [p + shift for p in cache.padding]
            recent_from += [max(first, cache.length - cache._recent_count) + shift for first in cache.recent_from]
        filled = [cache for cache in caches if cache.columns is not None]
        if any(cache.options != self.options for cache in filled):
            raise ValueError("caches of different formats cannot be served in one batch; patch the model once")
        if filled:
            like = filled[0]
            self.head_dim = like.head_dim
            self.columns = [
                _stack([(c.columns and c.columns[i][:, :, : c.length], c) for c in caches], length, like.columns[i])
                for i in range(len(like.columns))
            ]
            width = max(cache._recent_count for cache in filled)
            if width:
                parts = [(None if c.recent is None else c._in_order(), c) for c in caches]
                self._set_recent(_stack(parts, width, next(c.recent for c in filled if c.recent is not None)))
            if self.options.sinks and not self.options.keep_dense:
                self.sinks = _stack([(c.sinks, c) for c in caches], self.options.sinks, like.sinks)
        self.length, self._last = length, None
        self._set_rows(padding, recent_from)


def _stack(parts: list[tuple[mx.array | None, _Compressed]], width: int, like: mx.array) -> mx.array:
    """[all rows, heads, width, ...] of arrays that end at the same column; zeros before them."""
    aligned = []
    for x, cache in parts:
        if x is None:
            x = mx.zeros((len(cache.padding), like.shape[1], 0, like.shape[3]), like.dtype)
        aligned.append(mx.pad(x, [(0, 0), (0, 0), (width - x.shape[2], 0), (0, 0)]))
    return mx.concatenate(aligned, 0)


def _codebooks(head_dim: int, options: CacheOptions) -> str:
    """Which codebooks this process reads and writes such codes with."""
    kinds = (options.bits_k, False), (options.bits_v, options.vector_values)
    return "-".join(_digest(codebook_of(head_dim, *kind)) for kind in kinds)


@functools.lru_cache(None)
def _digest(book: Codebook | VectorCodebook) -> str:
    return book.digest


def _means_in(mean: list[mx.array]) -> dict[int, KeyMean] | None:
    """CacheOptions.key_means of a layer, of what a state has of them."""
    if not mean:
        return None
    try:
        return {0: KeyMean.from_numbers(np.array(mean[0]))}
    except ValueError as error:
        raise ValueError(f"this prompt cache is damaged: {error}: {ANEW}") from error


def _check_state(options, head_dim, columns, recent, sinks, length, ring, padding, recent_from) -> None:
    """ValueError for what no cache holds, such as a file that was edited or damaged: it would be read as something else."""
    numbers = (length, ring, *padding, *recent_from)
    good = all(type(n) is int and n >= 0 for n in numbers) and len(recent_from) == len(padding)
    if good and not columns:
        good = length == ring == 0 and recent is None and sinks is None
    elif good:
        fmt, rows = options.format(head_dim), len(padding)
        heads = columns[0].shape[1]
        dense = [x for x in (*columns[1:], recent, sinks) if x is not None]  # keys, and then values
        good = columns[0].shape[:2] == (rows, heads) and columns[0].shape[3:] == (codec.slot_words(fmt),)
        good = good and all(x.shape[:2] == (rows, 2 * heads) and x.shape[3:] == (head_dim,) for x in dense)
        good = good and len(columns) == 1 + options.keep_dense and all(x.shape[2] >= length for x in columns)
        good = good and columns[0].dtype == mx.uint32 and max(*numbers, 0) <= length
        good = good and (sinks is None or sinks.shape[2] == options.sinks)
        good = good and (options.key_mean is None or (options.key_mean.heads, options.key_mean.head_dim) == (heads, head_dim))
    if not good:
        raise ValueError(f"this prompt cache is damaged: its sizes do not go together: {ANEW}")


class CompressedKVCache(_Compressed):
    """One sequence of one layer."""

    @property
    def offset(self) -> int:
        return self.length

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        mask = create_attention_mask(N, self.length, return_array, window_size)
        return masks.remember(mask, window_size)

    @classmethod
    def merge(cls, caches: Sequence[CompressedKVCache]) -> BatchCompressedKVCache:
        return BatchCompressedKVCache.merge(caches)


class BatchCompressedKVCache(_Compressed):
    """Sequences of different lengths, which end at the same column."""

    @property
    def offset(self) -> mx.array:
        return self.length - self._rows[0]

    @property
    def left_padding(self) -> mx.array:
        return self._rows[0]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **kwargs):
        left_padding = self._rows[0]
        mask = create_causal_mask(N, offset=self.length, left_padding=left_padding, window_size=window_size, **kwargs)
        return mask if kwargs else masks.remember(mask, window_size)

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        if left_padding is not None:
            if self.columns is not None:
                raise ValueError("left padding can only be added to an empty cache")
            self._set_rows([p + int(more) for p, more in zip(self.padding, left_padding)], self.recent_from)
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = [int(p) for p in right_padding]

    def finalize(self) -> None:
        """Roll the right padding that prepare announced to the left."""
        if self._right_padding is None:
            return
        shift, length, count = self._right_padding, self.length, self._recent_count
        rolled = mx.array(shift, mx.int32)[:, None]
        if self.columns is not None:
            place = (mx.arange(length) - rolled) % length
            self.columns = [mx.take_along_axis(x, place[:, None, :, None], 2) for x in self.columns]
        if self.recent is not None:
            width = min(count, self.options.window)
            place = mx.clip(mx.arange(count - width, count) - rolled, 0, None)
            self._set_recent(mx.take_along_axis(self._in_order(), place[:, None, :, None], 2))
        self._right_padding = self._last = None
        self._set_rows(
            [p + s for p, s in zip(self.padding, shift)],
            [min(max(first, length - count) + s, length) for first, s in zip(self.recent_from, shift)],
        )

    def filter(self, batch_indices) -> None:
        """Keep these rows, and drop columns that are padding in all of them."""
        keep = [int(i) for i in (batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices)]
        padding, recent_from = [self.padding[i] for i in keep], [self.recent_from[i] for i in keep]
        drop, index = min(padding), mx.array(keep)
        if self.columns is not None:
            self.columns = [x[index][:, :, drop:] for x in self.columns]
        self.sinks = None if self.sinks is None else self.sinks[index]
        self.length, self._last = max(self.length - drop, 0), None
        if self.recent is not None:
            count = min(self._recent_count, self.length)
            self._set_recent(self._in_order()[index][:, :, self._recent_count - count :])
        self._set_rows([p - drop for p in padding], [max(first - drop, 0) for first in recent_from])

    def extend(self, other: BatchCompressedKVCache) -> None:
        """Add the other batch's rows."""
        self._join([self, other])

    def extract(self, idx: int) -> CompressedKVCache:
        """Row idx as a cache of its own."""
        cache, start = CompressedKVCache(self.options), self.padding[idx]
        cache.shared, cache.head_dim = self.shared, self.head_dim
        if self.columns is None or start >= self.length:
            return cache
        row = slice(idx, idx + 1)
        cache.length = self.length - start
        cache.columns = [mx.contiguous(x[row, :, start : self.length]) for x in self.columns]
        cache.sinks = None if self.sinks is None else mx.contiguous(self.sinks[row])
        if self.recent is not None:
            count = self.length - max(start, self.recent_from[idx], self.length - self._recent_count)
            cache._set_recent(self._in_order()[row, :, self._recent_count - count :])
        return cache

    @classmethod
    def merge(cls, caches: Sequence[CompressedKVCache]) -> BatchCompressedKVCache:
        batch = cls(next((c.options for c in caches if c.columns is not None), caches[0].options))
        batch.shared = caches[0].shared
        batch._join(caches)
        return batch

"""Prefill on CUDA: a chunk attends to itself exactly by FlashAttention, and to cached codes in tiles of bounded
size that `dequantize` makes dense, merged by log-sum-exp. What a step needs is planned once, for all layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
from vllm.vllm_flash_attn import flash_attn_varlen_func

from tqai_plugins.core.kv_format import COPIED_PAGES, RECENT_PAGE_TOKENS, RECENT_PAGES, KVFormat, recent_format
from tqai_plugins.torch_kernels.key_mean import KeyMean
from tqai_plugins.torch_kernels.prefill import plan_tiles
from tqai_plugins.triton_kernels.dequantize import dequantize

WORKSPACE_BYTES = 64 << 20


@dataclass(frozen=True)
class Tile:
    """Dense rows made of one segment of each of some consecutive requests, and the queries that read them.

    int32 tensors [requests]: tokens [begin, end) of the cached context go to rows out and on; [2 requests], the same
    for those of the first page and then for those of the last pages that have 8-bit copies, counted as these lie in
    recent_table's rows [2 requests, 3]. key_starts and query_starts are cumulative, [requests + 1].
    """

    requests: slice
    queries: slice
    begin: torch.Tensor
    end: torch.Tensor
    out: torch.Tensor
    recent_table: torch.Tensor | None
    recent_begin: torch.Tensor
    recent_end: torch.Tensor
    recent_out: torch.Tensor
    key_starts: torch.Tensor
    query_starts: torch.Tensor
    tokens: int
    longest: int
    max_query_len: int


@dataclass(frozen=True)
class Prefill:
    """The requests of a step that are behind its decodes. Starts count from the first of their tokens.

    block_table int32 [requests, pages]; recent_table int32 [requests, 3] or None: the copies of the first and the
    last pages of each cached context.
    """

    starts: list[int]
    contexts: list[int]
    query_start_loc: torch.Tensor
    block_table: torch.Tensor
    recent_table: torch.Tensor | None
    tile_tokens: int
    plans: dict[int | None, list[Tile]] = field(default_factory=dict)

    @property
    def max_query_len(self) -> int:
        """New tokens of the request that has most of them."""
        return max(b - a for a, b in zip(self.starts, self.starts[1:]))

    def tiles(self, window: int | None) -> list[Tile]:
        """The tiles of a layer whose queries see `window` tokens, all if None. With a window a request's
        context and chunk lie behind each other in one tile, so that FlashAttention can apply it."""
        if window not in self.plans:
            self.plans[window] = _plan(self) if window is None else _plan_windows(self, window)
        return self.plans[window]


def tile_tokens(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Dense tokens, K and V, that fill WORKSPACE_BYTES; whole pages."""
    bytes_each = 2 * num_kv_heads * head_dim * dtype.itemsize
    return max(1, WORKSPACE_BYTES // bytes_each // RECENT_PAGE_TOKENS) * RECENT_PAGE_TOKENS


def _tile(prefill: Prefill, first: int, segments: list[tuple[int, int]], with_chunk: bool) -> Tile:
    """segments: cached tokens [begin, end) of requests first, first + 1 ..., their chunks behind them if so."""
    requests = slice(first, first + len(segments))
    chunks = [b - a for a, b in zip(prefill.starts[first:], prefill.starts[first + 1 :])][: len(segments)]
    lengths = [end - begin + with_chunk * chunk for (begin, end), chunk in zip(segments, chunks)]
    key_starts = [0]
    query_starts = [0]
    rows: list[list[int]] = []
    firsts: list[list[int]] = []
    recents: list[list[int]] = []
    for (begin, end), length, chunk, context in zip(segments, lengths, chunks, prefill.contexts[requests]):
        # Where the last pages would begin that recent_table lists behind the first; it can be before the first token.
        origin = (-(-context // RECENT_PAGE_TOKENS) - COPIED_PAGES) * RECENT_PAGE_TOKENS
        recent = max(begin, origin + RECENT_PAGE_TOKENS)
        at = key_starts[-1]
        rows.append([begin, end, at])
        firsts.append([begin, max(begin, min(end, RECENT_PAGE_TOKENS)), at])
        recents.append([recent - origin, max(recent, end) - origin, at + recent - begin])
        key_starts.append(key_starts[-1] + length)
        query_starts.append(query_starts[-1] + chunk)
    columns = [x for part in (rows, [*firsts, *recents]) for column in zip(*part, strict=True) for x in column]
    flat = [*columns, *key_starts, *query_starts]
    device = prefill.query_start_loc.device
    pinned = torch.tensor(flat, dtype=torch.int32, pin_memory=device.type == "cuda")
    n = len(segments)
    begin, end, out, recent_begin, recent_end, recent_out, keys, queries = pinned.to(device, non_blocking=True).split(
        [n] * 3 + [2 * n] * 3 + [n + 1] * 2
    )
    table = None if prefill.recent_table is None else prefill.recent_table[requests].repeat(2, 1)
    return Tile(
        requests, slice(prefill.starts[first], prefill.starts[first + n]), begin, end, out, table, recent_begin,
        recent_end, recent_out, keys, queries, key_starts[-1], max(e - b for b, e in segments), max(chunks),
    )  # fmt: skip


def _plan(prefill: Prefill) -> list[Tile]:
    return [
        _tile(prefill, tile[0].request, [(s.start, s.end) for s in tile], with_chunk=False)
        for tile in plan_tiles(prefill.contexts, prefill.tile_tokens)
    ]


def _plan_windows(prefill: Prefill, window: int) -> list[Tile]:
    tiles: list[Tile] = []
    segments: list[tuple[int, int]] = []
    first = used = 0
    for request, context in enumerate(prefill.contexts):
        begin = max(0, context - window + 1)
        tokens = context - begin + prefill.starts[request + 1] - prefill.starts[request]
        if segments and used + tokens > prefill.tile_tokens:
            tiles.append(_tile(prefill, first, segments, with_chunk=True))
            first, segments, used = request, [], 0
        segments.append((begin, context))
        used += tokens
    return [*tiles, _tile(prefill, first, segments, with_chunk=True)]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    page_tokens: int,
    recent_pages: torch.Tensor | None,
    prefill: Prefill,
    fmt: KVFormat,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    fa_version: int,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    mean: KeyMean | None,
) -> None:
    """Causal attention of the chunks to themselves and to their cached contexts, into out.

    query and out [tokens, q_heads, head_dim]; key and value [tokens, kv_heads, head_dim], all of the
    requests of `prefill` in a row; pages and mean as in triton_kernels.prepare; sinks float32 [q_heads].
    """

    def flash(query, key, value, query_starts, key_starts, max_query, max_key, causal, window=(-1, -1)):
        return flash_attn_varlen_func(
            query, key, value, max_seqlen_q=max_query, cu_seqlens_q=query_starts, max_seqlen_k=max_key,
            cu_seqlens_k=key_starts, softmax_scale=softmax_scale, causal=causal, window_size=list(window),
            softcap=soft_cap or 0.0, return_softmax_lse=True, fa_version=fa_version,
        )  # fmt: skip

    def dense(tile):
        """The cached tokens of a tile, and room for the rest of it."""
        k, v = reserve(max(prefill.tile_tokens, tile.tokens), *key.shape[1:], key.dtype, key.device)
        dequantize(
            pages, prefill.block_table[tile.requests], tile.begin, tile.end, tile.out, k, v, fmt, page_tokens,
            tile.longest, rotated=False, mean=mean,
        )  # fmt: skip
        if recent_pages is not None and tile.recent_table is not None:
            dequantize(
                recent_pages, tile.recent_table, tile.recent_begin, tile.recent_end, tile.recent_out, k, v, recent_format(fmt.head_dim), RECENT_PAGE_TOKENS, RECENT_PAGES * RECENT_PAGE_TOKENS, rotated=False,
            )  # fmt: skip
        return k, v

    if sliding_window is not None:
        lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
        for tile in prefill.tiles(sliding_window):
            k, v = dense(tile)
            at = 0
            for request in range(tile.requests.start, tile.requests.stop):
                rows = slice(prefill.starts[request], prefill.starts[request + 1])
                at += min(prefill.contexts[request], sliding_window - 1)
                chunk = slice(at, at + rows.stop - rows.start)
                k[chunk], v[chunk] = key[rows], value[rows]
                at = chunk.stop
            out[tile.queries], lse[:, tile.queries] = flash(
                query[tile.queries], k[: tile.tokens], v[: tile.tokens], tile.query_starts, tile.key_starts,
                tile.max_query_len, tile.longest + tile.max_query_len, True, (sliding_window - 1, 0),
            )  # fmt: skip
    else:
        starts = prefill.query_start_loc
        own, lse = flash(query, key, value, starts, starts, prefill.max_query_len, prefill.max_query_len, True)
        out.copy_(own)
        for tile in prefill.tiles(None):
            k, v = dense(tile)
            more, more_lse = flash(
                query[tile.queries], k[: tile.tokens], v[: tile.tokens], tile.query_starts, tile.key_starts,
                tile.max_query_len, tile.longest, False,
            )  # fmt: skip
            part, part_lse = out[tile.queries], lse[:, tile.queries].contiguous()
            both = torch.empty_like(part_lse)
            merge_attn_states(part, more, more_lse, part, part_lse, both)
            lse[:, tile.queries] = both
    if sinks is not None:  # a logit without a value takes its share of the weights
        out.mul_(torch.sigmoid(lse - sinks[:, None]).T[..., None])


_workspaces: dict[tuple, torch.Tensor] = {}


def reserve(tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Dense keys and values [2, >= tokens, kv_heads, head_dim], shared by all layers of one shape. Reserved
    before vLLM measures free memory, so that the capacity it announces is true."""
    key = (num_kv_heads, head_dim, dtype, device)
    if key not in _workspaces or _workspaces[key].shape[1] < tokens:
        _workspaces[key] = torch.empty(2, tokens, num_kv_heads, head_dim, dtype=dtype, device=device)
    return _workspaces[key]

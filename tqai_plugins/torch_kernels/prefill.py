"""Prefill: a chunk attends to itself exactly and to cached codes tile by tile, merged by log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch


@dataclass(frozen=True)
class Segment:
    """Cached tokens [start, end) of one request."""

    request: int
    start: int
    end: int


def plan_tiles(context_lengths: list[int], tile_tokens: int) -> list[list[Segment]]:
    """Cut the cached contexts into tiles of at most tile_tokens, several requests a tile where they fit.

    The requests of a tile are consecutive and all have tokens in it.
    """
    tiles: list[list[Segment]] = [[]]
    room = tile_tokens
    for request, length in enumerate(context_lengths):
        start = 0
        while start < length or (length == 0 and tiles[-1]):
            if room == 0 or length == 0:
                tiles.append([])
                room = tile_tokens
                continue
            end = min(length, start + room)
            tiles[-1].append(Segment(request, start, end))
            room -= end - start
            start = end
    return [tile for tile in tiles if tile]


def merge(
    out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of tokens: outputs [tokens, heads, head_dim], lse [tokens, heads]."""
    both = torch.logaddexp(lse, more_lse)
    share = torch.exp(more_lse - both)[..., None]
    return torch.lerp(out, more.to(out.dtype), share.nan_to_num(0.0).to(out.dtype)), both


def attend_cached(
    query: torch.Tensor,
    query_starts: list[int],
    context_lengths: list[int],
    tile_tokens: int,
    attend_tile: Callable[[torch.Tensor, list[Segment], int], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rotated queries to their cached tokens only, in bounded tiles.

    query [tokens, heads, head_dim], request i's queries being rows query_starts[i] to
    query_starts[i + 1]; attend_tile(queries, segments, first_request) attends the queries of the
    tile's requests (consecutive) to its segments and returns (output, lse [tokens, heads]).
    Returns float32 output and lse, -inf where a request has no cached token.
    """
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.full(query.shape[:2], float("-inf"), device=query.device)
    for tile in plan_tiles(context_lengths, tile_tokens):
        first, last = tile[0].request, tile[-1].request
        rows = slice(query_starts[first], query_starts[last + 1])
        more, more_lse = attend_tile(query[rows], tile, first)
        out[rows], lse[rows] = merge(out[rows], lse[rows], more.float(), more_lse)
    return out, lse

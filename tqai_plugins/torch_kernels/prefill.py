"""Prefill over a cached prefix: how cached contexts are cut into tiles of bounded size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Cached tokens [start, end) of one request."""

    request: int
    start: int
    end: int


def plan_tiles(context_lengths: list[int], tile_tokens: int) -> list[list[Segment]]:
    """Cut the cached contexts into tiles of at most tile_tokens, several requests a tile where they fit.

    The requests of a tile are consecutive, all have tokens in it, and each has one segment in it.
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

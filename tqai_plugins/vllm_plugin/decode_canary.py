"""The canary of decoding on CUDA. A CUDA graph replays without a word of Python, so what one row of a step read and returned is
left in tensors by some layers, graph or not, and checked when the next step is planned: its pages are still as they were."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from . import canary

LAYERS = 4  # leave their row: five small launches each


class Left:
    """What one layer leaves of a row: query, key, value and output, each [1, heads, head_dim], and its pages."""

    def __init__(self, impl, dtype: torch.dtype, row: torch.Tensor):
        heads = impl.num_heads, impl.num_kv_heads, impl.num_kv_heads, impl.num_heads
        self.row, self.pages = row, torch.empty(0)
        self.vectors = [torch.zeros(1, count, impl.head_size, dtype=dtype, device=row.device) for count in heads]

    def take(self, query, key, value, out, pages) -> None:
        """In every step of decoding; query, key, value and out [rows, heads, head_dim]."""
        self.pages = pages
        row = self.row.clamp(max=len(query) - 1)  # of a run that was not planned, such as those before capturing
        for vectors, kept in zip((query, key, value, out), self.vectors):
            torch.index_select(vectors, 0, row, out=kept)


@dataclass(frozen=True)
class Planned:
    """The request of a step that is checked after it, as tensors of its own: vLLM writes the next step's into the same places."""

    length: torch.Tensor
    table: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    copies: torch.Tensor | None


class DecodeCanary:
    """Of the layers that share a page table; impls: name -> attention_backend.Impl. The last row of a request is looked at."""

    def __init__(self, config, impls: dict, page_tokens: int, device: torch.device):
        self.turns, self.page_tokens = canary.Canary(config), page_tokens
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.planned: Planned | None = None
        # A draft model's steps have other rows, a connector may fill a page that is no longer needed, and layers without keys
        # of their own store nothing.
        able = self.turns.every and config.speculative_config is None and config.kv_transfer_config is None
        names = [name for name, impl in impls.items() if impl.owner is impl] if able else []
        self.impls = {name: impls[name] for name in random.Random().sample(names, min(LAYERS, len(names)))}
        for impl in self.impls.values():
            impl.left = Left(impl, config.model_config.dtype, self.row)

    def plan(self, meta) -> None:
        """Choose a request of a step that is about to run, if one is due."""
        if not self.impls or not meta.num_decodes or not self.turns.due():
            return
        request = random.Random().randrange(meta.num_decodes)
        row = (request + 1) * meta.query_len - 1
        self.row.fill_(row)
        of = lambda tensor, at: tensor[at : at + 1].clone()
        self.planned = Planned(
            of(meta.seq_lens, request), of(meta.block_table, request), of(meta.slot_mapping, row), of(meta.positions, row),
            None if meta.recent is None else of(meta.recent.table, request),
        )  # fmt: skip

    def look(self) -> None:
        """Check the step that was planned last; before the next one's copies are claimed."""
        planned, self.planned = self.planned, None
        if planned is None:
            return
        copies = [] if planned.copies is None else planned.copies.tolist()
        new = canary.NewTokens((0, 1), planned.length.tolist(), planned.table, copies, 1)
        for name, impl in self.impls.items():
            query, key, value, out = impl.left.vectors
            canary.check(impl, name, new, query, key, value, out, impl.left.pages, self.page_tokens, planned.slot, planned.position)

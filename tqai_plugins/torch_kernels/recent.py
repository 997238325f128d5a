"""Which first and recent pages of the running sequences have 8-bit copies, and where: bookkeeping of one step.

Copies are pages of RECENT_PAGE_TOKENS tokens in a buffer of fixed size. A copy belongs to the span of slots
that its tokens have in the paged cache (slot // RECENT_PAGE_TOKENS), and is kept only while every token
written to the span was written to the copy too: a copy is begun with the first token of a span and dropped
when its span is written without it. What has not been used longest makes room, so running sequences keep
theirs while there are COPIED_PAGES copies for each. A span without a copy is read from its
codes: that costs precision, never correctness. Everything happens on the device, without a host copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tqai_plugins.core.kv_format import COPIED_PAGES, RECENT_PAGE_TOKENS, RECENT_PAGES

NEVER = -1


@dataclass(frozen=True)
class RecentCopies:
    """owner [copies], the span a copy belongs to or -1; used [copies], the step of its last use; step [1];
    wanted_served [2], such pages of sequences counted over all steps, and those among them with a copy.

    What a step's launches read: slots int32 [tokens], where each new token's copy goes; table int32
    [sequences, COPIED_PAGES], the copies of the first page, unless it is one of the last RECENT_PAGES, and of these; context
    int32 [sequences, COPIED_PAGES], the same as of before the step's tokens, for sequences that prefill. All -1 where there is none.
    """

    owner: torch.Tensor
    used: torch.Tensor
    step: torch.Tensor
    wanted_served: torch.Tensor
    slots: torch.Tensor
    table: torch.Tensor
    context: torch.Tensor

    @classmethod
    def allocate(cls, copies: int, max_sequences: int, max_tokens: int, device) -> RecentCopies:
        """Empty books for so many copies, running sequences and tokens of a step."""
        full = lambda *shape: torch.full(shape, NEVER, dtype=torch.int32, device=device)
        zeros = lambda n, dtype: torch.zeros(n, dtype=dtype, device=device)
        return cls(
            full(copies), zeros(copies, torch.int32), zeros(1, torch.int32), zeros(2, torch.int64),
            full(max_tokens), full(max_sequences, COPIED_PAGES), full(max_sequences, COPIED_PAGES),
        )  # fmt: skip


def _copied_pages(lengths: torch.Tensor) -> torch.Tensor:
    """Numbers of the first page of each sequence and of its last RECENT_PAGES; negative where there is none, and for a
    first page among the last [sequences, COPIED_PAGES]."""
    pages = ((lengths + RECENT_PAGE_TOKENS - 1) // RECENT_PAGE_TOKENS)[:, None]
    first = torch.where(pages > RECENT_PAGES, 0, NEVER)
    return torch.cat([first, pages + torch.arange(-RECENT_PAGES, 0, device=lengths.device)], 1)


def _find(owner: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """The copy of each span [...], -1 where it has none."""
    match = (span[..., None] == owner) & (span >= 0)[..., None]
    return torch.where(match.any(-1), match.int().argmax(-1), NEVER)


def claim(
    copies: RecentCopies,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    page_tokens: int,
    decode_tokens: int = 1,
) -> None:
    """Update the bookkeeping for a step that writes slot_mapping's tokens; fill slots, table and context.

    slot_mapping int [tokens], -1 for none; query_start_loc int [sequences + 1] and seq_lens int [sequences]
    (new tokens included) as in vLLM; block_table int [sequences, pages]; page_tokens of the paged cache, a
    multiple of RECENT_PAGE_TOKENS. Sequences with more new tokens than decode_tokens prefill.
    """
    device = slot_mapping.device
    sequences, tokens = seq_lens.shape[0], slot_mapping.shape[0]
    starts = query_start_loc[:sequences].long()
    lengths = seq_lens.long()
    before = lengths - (query_start_loc[1 : sequences + 1].long() - starts)
    slot_mapping = slot_mapping.long()

    def spans(page: torch.Tensor) -> torch.Tensor:
        position = page.clamp(min=0) * RECENT_PAGE_TOKENS
        block = block_table.gather(1, (position // page_tokens).clamp(max=block_table.shape[1] - 1)).long()
        return torch.where(page >= 0, (block * page_tokens + position % page_tokens) // RECENT_PAGE_TOKENS, NEVER)

    page = _copied_pages(lengths)
    prefills = (lengths - before > decode_tokens)[:, None]
    context_span = torch.where(prefills, spans(_copied_pages(before)), NEVER)
    begun = (page >= 0) & (page * RECENT_PAGE_TOKENS >= before[:, None])  # its first token is written now
    first_row = (starts[:, None] + page * RECENT_PAGE_TOKENS - before[:, None]).clamp(0, max(tokens - 1, 0))
    first_slot = slot_mapping[first_row]
    span = torch.where(begun, torch.where(first_slot >= 0, first_slot // RECENT_PAGE_TOKENS, NEVER), spans(page))

    # Each token's column of the table, if its page is one of those.
    row = torch.arange(tokens, device=device)
    sequence = torch.searchsorted(query_start_loc[1 : sequences + 1].long(), row, right=True).clamp(max=max(sequences - 1, 0))
    position = before[sequence] + row - starts[sequence]
    column = position[:, None] // RECENT_PAGE_TOKENS == page[sequence]
    copied = column.any(1)

    copies.step.add_(1)
    # A span that begins another life, or is written without its copy, has none any more.
    dropped = (slot_mapping >= 0) & ((slot_mapping % RECENT_PAGE_TOKENS == 0) | ~copied)
    dropped = torch.where(dropped, slot_mapping // RECENT_PAGE_TOKENS, -2)
    copies.owner.masked_fill_((copies.owner[:, None] == dropped).any(1), NEVER)
    held = _find(copies.owner, torch.where(begun, NEVER, span))
    context = _find(copies.owner, context_span)
    # Those that this step reads are safe from the claims that follow.
    in_use = torch.cat([held.flatten(), context.flatten()])
    reads = (torch.arange(copies.owner.shape[0], device=device)[:, None] == in_use).any(1)
    copies.used.copy_(torch.where(reads, copies.step, copies.used))
    # The i-th claim takes the i-th longest unused copy.
    claims = (begun & (span >= 0)).flatten()
    oldest = copies.used.argsort(stable=True)
    rank = claims.cumsum(0) - 1
    taken = oldest[rank.clamp(0, oldest.shape[0] - 1)]
    granted = claims & (rank < oldest.shape[0]) & (copies.used[taken] < copies.step)
    at = torch.where(granted, taken, copies.owner.shape[0])  # a row past the end takes what is not granted
    for rows, values in ((copies.owner, span.flatten()), (copies.used, copies.step.expand_as(at))):
        rows.copy_(torch.cat([rows, rows.new_empty(1)]).scatter(0, at, values.to(rows.dtype))[:-1])

    table = torch.where(begun, torch.where(granted, taken, NEVER).view_as(begun), held)
    copies.table.fill_(NEVER)
    copies.table[:sequences] = table.int()
    copies.context.fill_(NEVER)
    copies.context[:sequences] = context.int()
    copies.wanted_served.add_(torch.stack([(span >= 0).sum(), (table >= 0).sum()]))
    copy = torch.where(column, table[sequence], NEVER).amax(1)
    slot = torch.where((copy >= 0) & (slot_mapping >= 0), copy * RECENT_PAGE_TOKENS + position % RECENT_PAGE_TOKENS, NEVER)
    copies.slots.fill_(NEVER)
    copies.slots[:tokens] = slot.int()

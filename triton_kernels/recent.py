"""The first and the newest tokens of each sequence at 8 bits too: what the launches of a step share, and the bookkeeping of a
step in one launch. torch_kernels/recent.py says what it does and why; this is the same on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tqai_plugins.core.kv_format import COPIED_PAGES, RECENT_PAGE_TOKENS, PageLayout, recent_format


@dataclass(frozen=True)
class RecentPages:
    """pages uint8 [copies, kv_heads, page_bytes] of RECENT_PAGE_TOKENS tokens at 8 bits; slots int32
    [new tokens], where the copy of each goes, -1 for none; table int32 [sequences, COPIED_PAGES], the copies of the
    first page and of the last ones (in pages of RECENT_PAGE_TOKENS), -1 for none."""

    pages: torch.Tensor
    slots: torch.Tensor
    table: torch.Tensor

    @staticmethod
    def layout(head_dim: int) -> PageLayout:
        """Offsets in one page of 8-bit copies."""
        return recent_format(head_dim).page_layout(RECENT_PAGE_TOKENS)

    @classmethod
    def none(cls, pages: torch.Tensor, any_tensor: torch.Tensor) -> RecentPages:
        """Arguments for a kernel that is compiled without copies."""
        return cls(pages, any_tensor, any_tensor)


@triton.jit
def _span(block_table, page, real, PAGE: tl.constexpr, SPAN: tl.constexpr):
    """slot // SPAN of a page of SPAN tokens, by block_table's rows [sequences, 1]; -1 where it is not real."""
    position = tl.maximum(page, 0) * SPAN
    real = real & (page >= 0)
    block = tl.load(block_table + position // PAGE, mask=real, other=0)
    return tl.where(real, (block * PAGE + position % PAGE) // SPAN, -1)


@triton.jit
def _begun(slot, real, SPAN: tl.constexpr):
    """slot // SPAN of a page whose first token's entry in the slot mapping is `slot`; -1 where it is not real."""
    first = tl.load(slot, mask=real, other=-1)
    return tl.where(first >= 0, first // SPAN, -1).to(tl.int32)


@triton.jit
def _is(span, owner):
    return (span[:, None] == owner[None, :]) & (span >= 0)[:, None]


@triton.jit
def _any(match):
    return tl.max(match.to(tl.int32), 0) > 0


@triton.jit
def _number(match, n):
    """The number n of the column that matches each row, -1 for none."""
    return tl.max(tl.where(match, n[None, :], -1), 1)


@triton.jit
def _copied_pages(last, P: tl.constexpr):
    """Pages [S, P] that can have copies, where `last` [S, 1] is the last: the first, unless it is one of the last P - 1,
    and these; negative where there is none."""
    column = tl.arange(0, P)[None, :]
    return tl.where(column == 0, tl.where(last >= P - 1, 0, -1), last - (P - 1) + column)


@triton.jit
def _store_slots(slots, slot_mapping, offset, begin, end, page, copy, SPAN: tl.constexpr):
    """Where the copies of tokens at positions [begin, end) go, which lie `offset` from there in the slot mapping, all [S, 1];
    copy [S, P] belongs to page [S, P]."""
    for i in range(tl.max(end - begin)):
        position = begin + i
        slot = tl.load(slot_mapping + offset + position, mask=position < end, other=-1)
        its = tl.max(tl.where(page == position // SPAN, copy, -1), 1, keep_dims=True)
        copied = tl.where((its >= 0) & (slot >= 0), its * SPAN + position % SPAN, -1)
        tl.store(slots + offset + position, copied, mask=position < end)


@triton.jit(
    do_not_specialize=["num_sequences", "num_tokens", "table_stride", "copies"],
    do_not_specialize_on_alignment=["slot_mapping", "query_start_loc", "seq_lens", "block_table"],
)
def _claim_kernel(
    owner_ptr, used_ptr, step_ptr, wanted_served, slots, table, context,
    slot_mapping, query_start_loc, seq_lens, block_table,
    num_sequences, num_tokens, table_stride, copies, decode_tokens,
    S: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
):
    # One program. The P pages of S sequences side by side; copies by blocks, always [S P, BLOCK] comparisons.
    s = tl.arange(0, S)[:, None]
    live = s < num_sequences
    step = tl.load(step_ptr) + 1
    start = tl.load(query_start_loc + s, mask=live, other=0)
    new = tl.load(query_start_loc + s + 1, mask=live, other=0) - start
    length = tl.load(seq_lens + s, mask=live, other=0)
    before = length - new
    row_of_table = block_table + s * table_stride
    last = (length + SPAN - 1) // SPAN - 1
    page = _copied_pages(last, P)
    begun = live & (page >= 0) & (page * SPAN >= before)
    begun_span = tl.reshape(_begun(slot_mapping + start + page * SPAN - before, begun, SPAN), [S * P])
    span = tl.reshape(_span(row_of_table, page, live & ~begun, PAGE, SPAN), [S * P])
    prefills = live & (new > decode_tokens)
    context_page = _copied_pages((before + SPAN - 1) // SPAN - 1, P)
    context_span = tl.reshape(_span(row_of_table, context_page, prefills, PAGE, SPAN), [S * P])
    # The page that a chunk goes on with and leaves behind is written without its copy.
    left = live & (new > 0) & (before >= SPAN) & (before // SPAN < last - (P - 2))
    left_span = tl.reshape(_begun(slot_mapping + start, left, SPAN), [S])

    t = tl.arange(0, S)
    held = tl.full([S * P], -1, tl.int32)
    held_before = held
    for first in range(0, copies, BLOCK):
        n = first + tl.arange(0, BLOCK)
        owner = tl.load(owner_ptr + n, mask=n < copies, other=-1)
        used = tl.load(used_ptr + n, mask=n < copies, other=0)
        dropped = _any(_is(left_span, owner))
        for token in range(0, num_tokens, S):
            slot = tl.load(slot_mapping + token + t, mask=token + t < num_tokens, other=-1)
            dropped = dropped | _any(_is(tl.where(slot % SPAN == 0, slot // SPAN, -1).to(tl.int32), owner))
        owner = tl.where(dropped, -1, owner)
        is_held = _is(span, owner)
        was_held = _is(context_span, owner)
        held = tl.maximum(held, _number(is_held, n))
        held_before = tl.maximum(held_before, _number(was_held, n))
        used = tl.where(_any(is_held | was_held), step, used)
        tl.store(owner_ptr + n, owner, mask=n < copies)
        tl.store(used_ptr + n, used, mask=n < copies)
    for token in range(0, num_tokens, S):
        tl.store(slots + token + t, tl.full([S], -1, tl.int32), mask=token + t < num_tokens)
    tl.debug_barrier()

    # The i-th claim takes the i-th longest unused copy.
    claims = begun_span >= 0
    claim_rank = tl.cumsum(claims.to(tl.int32), 0) - 1
    if tl.max(claim_rank, 0) >= 0:
        for first in range(0, copies, BLOCK):
            n = first + tl.arange(0, BLOCK)
            used = tl.load(used_ptr + n, mask=n < copies, other=0)
            rank = tl.zeros([BLOCK], tl.int32)
            for other in range(0, copies, S):
                m = other + t
                theirs = tl.load(used_ptr + m, mask=m < copies, other=0)
                tie = (theirs[:, None] == used[None, :]) & (m[:, None] < n[None, :])
                older = (theirs[:, None] < used[None, :]) | tie
                rank += tl.sum((older & (m < copies)[:, None]).to(tl.int32), 0)
            free = (used < step) & (n < copies)
            takes = claims[:, None] & (claim_rank[:, None] == rank[None, :]) & free[None, :]
            held = tl.maximum(held, _number(takes, n))
            owner = tl.max(tl.where(takes, begun_span[:, None], -1), 0)
            tl.store(owner_ptr + n, owner, mask=(n < copies) & (owner >= 0))
    tl.debug_barrier()
    tl.store(used_ptr + held, step + tl.zeros([S * P], tl.int32), mask=held >= 0)
    tl.store(step_ptr, step)

    row = tl.arange(0, S * P)
    tl.store(table + row, held, mask=row < num_sequences * P)
    tl.store(context + row, held_before, mask=row < num_sequences * P)
    tl.store(wanted_served, tl.load(wanted_served) + tl.sum(((span >= 0) | claims).to(tl.int64), 0))
    tl.store(wanted_served + 1, tl.load(wanted_served + 1) + tl.sum((held >= 0).to(tl.int64), 0))
    held = tl.reshape(held, [S, P])
    writes = live & (new > 0)
    first_end = tl.where(writes & (last >= P - 1), SPAN, 0)
    recent_begin = tl.maximum(before, tl.maximum(last - (P - 2), 0) * SPAN)
    offset = start - before
    _store_slots(slots, slot_mapping, offset, before, first_end, page, held, SPAN)
    _store_slots(slots, slot_mapping, offset, recent_begin, tl.where(writes, length, 0), page, held, SPAN)


# Sequences side by side -> copies that they are compared with at once, which is faster the fewer sequences there are, and warps:
# what registers hold. Each side is one more kernel to compile.
SIDES = {16: (64, 8), 64: (16, 8), 256: (4, 8), 1024: (4, 32), 4096: (1, 32)}


def claim(
    copies,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    page_tokens: int,
    decode_tokens: int = 1,
) -> None:
    """torch_kernels.recent.claim in one launch: copies is its RecentCopies. slot_mapping int [>= tokens], query_start_loc
    int32 [sequences + 1], seq_lens int32 [sequences], block_table int32 [sequences, pages].

    Entries of slots, table and context beyond the step's tokens and sequences are left as they are.
    """
    side = next(side for side in SIDES if side >= seq_lens.shape[0])
    block, warps = SIDES[side]
    _claim_kernel[(1,)](
        copies.owner, copies.used, copies.step, copies.wanted_served, copies.slots, copies.table, copies.context,
        slot_mapping, query_start_loc, seq_lens, block_table, seq_lens.shape[0], slot_mapping.shape[0],
        block_table.stride(0), copies.owner.shape[0], decode_tokens,
        side, COPIED_PAGES, block, page_tokens, RECENT_PAGE_TOKENS, num_warps=warps,
    )

"""The first and the newest tokens of each sequence at 8 bits too: what the launches of a step share, and the bookkeeping of a
step in one launch. torch_kernels/recent.py says what it does and why; this is the same on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tqai_plugins.core.kv_format import RECENT_PAGE_TOKENS, PageLayout, recent_format


@dataclass(frozen=True)
class RecentPages:
    """pages uint8 [copies, kv_heads, page_bytes] of RECENT_PAGE_TOKENS tokens at 8 bits; slots int32
    [new tokens], where the copy of each goes, -1 for none; table int32 [sequences, 3], the copies of the
    first page, of the last but one and of the last (in pages of RECENT_PAGE_TOKENS), -1 for none."""

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
    """slot // SPAN of a page of SPAN tokens, by block_table's rows [sequences]; -1 where it is not real."""
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
def _count(match):
    return tl.sum(match.to(tl.int64), 0)


@triton.jit
def _store_row(table, s, copy0, copy1, copy2, live):
    tl.store(table + 3 * s, copy0, mask=live)
    tl.store(table + 3 * s + 1, copy1, mask=live)
    tl.store(table + 3 * s + 2, copy2, mask=live)


@triton.jit
def _store_slots(slots, slot_mapping, offset, begin, end, copy, copy_of_last, last, SPAN: tl.constexpr):
    """Where the copies of tokens at positions [begin, end) go, which lie `offset` from there in the slot mapping."""
    for i in range(tl.max(end - begin, 0)):
        position = begin + i
        slot = tl.load(slot_mapping + offset + position, mask=position < end, other=-1)
        its = tl.where(position // SPAN == last, copy_of_last, copy)
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
    S: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
):
    # One program. S sequences side by side; copies by blocks, always [S, BLOCK] comparisons.
    s = tl.arange(0, S)
    live = s < num_sequences
    step = tl.load(step_ptr) + 1
    start = tl.load(query_start_loc + s, mask=live, other=0)
    new = tl.load(query_start_loc + s + 1, mask=live, other=0) - start
    length = tl.load(seq_lens + s, mask=live, other=0)
    before = length - new
    row_of_table = block_table + s * table_stride
    last = (length + SPAN - 1) // SPAN - 1
    # Three pages each: 0 is the first, unless it is one of the last two, 1 and 2 are these.
    has_first = live & (last >= 2)
    begun0 = has_first & (before == 0)
    begun1 = (last >= 1) & ((last - 1) * SPAN >= before) & live
    begun2 = (last >= 0) & (last * SPAN >= before) & live
    begun_span0 = _begun(slot_mapping + start, begun0, SPAN)
    begun_span1 = _begun(slot_mapping + start + (last - 1) * SPAN - before, begun1, SPAN)
    begun_span2 = _begun(slot_mapping + start + last * SPAN - before, begun2, SPAN)
    span0 = _span(row_of_table, tl.zeros_like(last), has_first & ~begun0, PAGE, SPAN)
    span1 = _span(row_of_table, last - 1, live & ~begun1, PAGE, SPAN)
    span2 = _span(row_of_table, last, live & ~begun2, PAGE, SPAN)
    prefills = live & (new > decode_tokens)
    old_last = (before + SPAN - 1) // SPAN - 1
    context_span0 = _span(row_of_table, tl.zeros_like(last), prefills & (old_last >= 2), PAGE, SPAN)
    context_span1 = _span(row_of_table, old_last - 1, prefills, PAGE, SPAN)
    context_span2 = _span(row_of_table, old_last, prefills, PAGE, SPAN)
    # The page that a chunk goes on with and leaves behind is written without its copy.
    left = live & (new > 0) & (before >= SPAN) & (before // SPAN < last - 1)
    left_slot = tl.load(slot_mapping + start, mask=left, other=-1)
    left_span = tl.where(left_slot >= 0, left_slot // SPAN, -1).to(tl.int32)

    t = tl.arange(0, S)
    held0 = tl.full([S], -1, tl.int32)
    held1 = held0
    held2 = held0
    context0 = held0
    context1 = held0
    context2 = held0
    for first in range(0, copies, BLOCK):
        n = first + tl.arange(0, BLOCK)
        owner = tl.load(owner_ptr + n, mask=n < copies, other=-1)
        used = tl.load(used_ptr + n, mask=n < copies, other=0)
        dropped = _any(_is(left_span, owner))
        for token in range(0, num_tokens, S):
            slot = tl.load(slot_mapping + token + t, mask=token + t < num_tokens, other=-1)
            dropped = dropped | _any(_is(tl.where(slot % SPAN == 0, slot // SPAN, -1).to(tl.int32), owner))
        owner = tl.where(dropped, -1, owner)
        is0 = _is(span0, owner)
        is1 = _is(span1, owner)
        is2 = _is(span2, owner)
        was0 = _is(context_span0, owner)
        was1 = _is(context_span1, owner)
        was2 = _is(context_span2, owner)
        held0 = tl.maximum(held0, _number(is0, n))
        held1 = tl.maximum(held1, _number(is1, n))
        held2 = tl.maximum(held2, _number(is2, n))
        context0 = tl.maximum(context0, _number(was0, n))
        context1 = tl.maximum(context1, _number(was1, n))
        context2 = tl.maximum(context2, _number(was2, n))
        used = tl.where(_any(is0 | is1 | is2 | was0 | was1 | was2), step, used)
        tl.store(owner_ptr + n, owner, mask=n < copies)
        tl.store(used_ptr + n, used, mask=n < copies)
    for token in range(0, num_tokens, S):
        tl.store(slots + token + t, tl.full([S], -1, tl.int32), mask=token + t < num_tokens)
    tl.debug_barrier()

    # The i-th claim takes the i-th longest unused copy.
    claim0 = begun_span0 >= 0
    claim1 = begun_span1 >= 0
    claim2 = begun_span2 >= 0
    claims = claim0.to(tl.int32) + claim1.to(tl.int32) + claim2.to(tl.int32)
    rank0 = tl.cumsum(claims, 0) - claims
    rank1 = rank0 + claim0.to(tl.int32)
    rank2 = rank1 + claim1.to(tl.int32)
    if tl.sum(claims, 0) > 0:
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
            takes0 = claim0[:, None] & (rank0[:, None] == rank[None, :]) & free[None, :]
            takes1 = claim1[:, None] & (rank1[:, None] == rank[None, :]) & free[None, :]
            takes2 = claim2[:, None] & (rank2[:, None] == rank[None, :]) & free[None, :]
            held0 = tl.maximum(held0, _number(takes0, n))
            held1 = tl.maximum(held1, _number(takes1, n))
            held2 = tl.maximum(held2, _number(takes2, n))
            taken = tl.maximum(tl.where(takes0, begun_span0[:, None], -1), tl.where(takes1, begun_span1[:, None], -1))
            owner = tl.max(tl.maximum(taken, tl.where(takes2, begun_span2[:, None], -1)), 0)
            tl.store(owner_ptr + n, owner, mask=(n < copies) & (owner >= 0))
    tl.debug_barrier()
    tl.store(used_ptr + held0, step + tl.zeros([S], tl.int32), mask=held0 >= 0)
    tl.store(used_ptr + held1, step + tl.zeros([S], tl.int32), mask=held1 >= 0)
    tl.store(used_ptr + held2, step + tl.zeros([S], tl.int32), mask=held2 >= 0)
    tl.store(step_ptr, step)

    _store_row(table, s, held0, held1, held2, live)
    _store_row(context, s, context0, context1, context2, live)
    wanted = _count((span0 >= 0) | claim0) + _count((span1 >= 0) | claim1) + _count((span2 >= 0) | claim2)
    served = _count(held0 >= 0) + _count(held1 >= 0) + _count(held2 >= 0)
    tl.store(wanted_served, tl.load(wanted_served) + wanted)
    tl.store(wanted_served + 1, tl.load(wanted_served + 1) + served)
    offset = start - before
    writes = live & (new > 0)
    _store_slots(slots, slot_mapping, offset, before, tl.where(writes & has_first, SPAN, 0), held0, held0, last, SPAN)
    recent = tl.maximum(before, tl.maximum(last - 1, 0) * SPAN)
    _store_slots(slots, slot_mapping, offset, recent, tl.where(writes, length, 0), held1, held2, last, SPAN)


# Sequences side by side: comparing few with many copies at once takes less time. Each is one more kernel to compile.
SIDES = (16, 64, 256, 1024, 4096)


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
    _claim_kernel[(1,)](
        copies.owner, copies.used, copies.step, copies.wanted_served, copies.slots, copies.table, copies.context,
        slot_mapping, query_start_loc, seq_lens, block_table, seq_lens.shape[0], slot_mapping.shape[0],
        block_table.stride(0), copies.owner.shape[0], decode_tokens,
        side, max(4, 4096 // side), page_tokens, RECENT_PAGE_TOKENS, num_warps=8,
    )

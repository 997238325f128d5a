"""The newest tokens of each sequence at 8 bits too: what the launches of a step share, and the bookkeeping of a
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
    [new tokens], where the copy of each goes, -1 for none; table int32 [sequences, 2], the copies of the
    last page but one and of the last (in pages of RECENT_PAGE_TOKENS), -1 for none."""

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
def _is(span, owner):
    return (span[:, None] == owner[None, :]) & (span >= 0)[:, None]


@triton.jit
def _any(match):
    return tl.max(match.to(tl.int32), 0) > 0


@triton.jit
def _number(match, n):
    """The number n of the column that matches each row, -1 for none."""
    return tl.max(tl.where(match, n[None, :], -1), 1)


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
    begun0 = (last >= 1) & ((last - 1) * SPAN >= before) & live
    begun1 = (last >= 0) & (last * SPAN >= before) & live
    first0 = tl.load(slot_mapping + start + (last - 1) * SPAN - before, mask=begun0, other=-1)
    first1 = tl.load(slot_mapping + start + last * SPAN - before, mask=begun1, other=-1)
    begun_span0 = tl.where(first0 >= 0, first0 // SPAN, -1).to(tl.int32)
    begun_span1 = tl.where(first1 >= 0, first1 // SPAN, -1).to(tl.int32)
    span0 = _span(row_of_table, last - 1, live & ~begun0, PAGE, SPAN)
    span1 = _span(row_of_table, last, live & ~begun1, PAGE, SPAN)
    prefills = live & (new > decode_tokens)
    old_last = (before + SPAN - 1) // SPAN - 1
    context_span0 = _span(row_of_table, old_last - 1, prefills, PAGE, SPAN)
    context_span1 = _span(row_of_table, old_last, prefills, PAGE, SPAN)
    # The page that a chunk goes on with and leaves behind is written without its copy.
    left = live & (new > 0) & (before // SPAN < last - 1)
    left_slot = tl.load(slot_mapping + start, mask=left, other=-1)
    left_span = tl.where(left_slot >= 0, left_slot // SPAN, -1).to(tl.int32)

    t = tl.arange(0, S)
    held0 = tl.full([S], -1, tl.int32)
    held1 = held0
    context0 = held0
    context1 = held0
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
        was0 = _is(context_span0, owner)
        was1 = _is(context_span1, owner)
        held0 = tl.maximum(held0, _number(is0, n))
        held1 = tl.maximum(held1, _number(is1, n))
        context0 = tl.maximum(context0, _number(was0, n))
        context1 = tl.maximum(context1, _number(was1, n))
        used = tl.where(_any(is0 | is1 | was0 | was1), step, used)
        tl.store(owner_ptr + n, owner, mask=n < copies)
        tl.store(used_ptr + n, used, mask=n < copies)
    for token in range(0, num_tokens, S):
        tl.store(slots + token + t, tl.full([S], -1, tl.int32), mask=token + t < num_tokens)
    tl.debug_barrier()

    # The i-th claim takes the i-th longest unused copy.
    claim0 = begun_span0 >= 0
    claim1 = begun_span1 >= 0
    claims = claim0.to(tl.int32) + claim1.to(tl.int32)
    rank0 = tl.cumsum(claims, 0) - claims
    rank1 = rank0 + claim0.to(tl.int32)
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
            held0 = tl.maximum(held0, _number(takes0, n))
            held1 = tl.maximum(held1, _number(takes1, n))
            taken = tl.maximum(tl.where(takes0, begun_span0[:, None], -1), tl.where(takes1, begun_span1[:, None], -1))
            owner = tl.max(taken, 0)
            tl.store(owner_ptr + n, owner, mask=(n < copies) & (owner >= 0))
    tl.debug_barrier()
    tl.store(used_ptr + held0, step + tl.zeros([S], tl.int32), mask=held0 >= 0)
    tl.store(used_ptr + held1, step + tl.zeros([S], tl.int32), mask=held1 >= 0)
    tl.store(step_ptr, step)

    tl.store(table + 2 * s, held0, mask=live)
    tl.store(table + 2 * s + 1, held1, mask=live)
    tl.store(context + 2 * s, context0, mask=live)
    tl.store(context + 2 * s + 1, context1, mask=live)
    wanted = tl.sum(((span0 >= 0) | claim0).to(tl.int64) + ((span1 >= 0) | claim1).to(tl.int64), 0)
    served = tl.sum((held0 >= 0).to(tl.int64) + (held1 >= 0).to(tl.int64), 0)
    tl.store(wanted_served, tl.load(wanted_served) + wanted)
    tl.store(wanted_served + 1, tl.load(wanted_served + 1) + served)
    first = tl.maximum(before, tl.maximum(last - 1, 0) * SPAN)
    count = tl.where(live & (new > 0), length - first, 0)
    for i in range(tl.max(count, 0)):
        position = first + i
        at = start + position - before
        slot = tl.load(slot_mapping + at, mask=i < count, other=-1)
        copy = tl.where(position // SPAN == last, held1, held0)
        copied = tl.where((copy >= 0) & (slot >= 0), copy * SPAN + position % SPAN, -1)
        tl.store(slots + at, copied, mask=i < count)


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

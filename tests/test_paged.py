"""Compressed pages in plain PyTorch, and prefill over them in tiles, against dense attention."""

import pytest

torch = pytest.importorskip("torch")

from tqai_plugins.core import reference
from tqai_plugins.core.codebook import Codebook
from tqai_plugins.core.kv_format import COPIED_PAGES, RECENT_PAGE_TOKENS, KVFormat, recent_format
from tqai_plugins.torch_kernels import codec, paged, prefill

PAGE = 16


def filled(fmt, lengths, kv_heads=2):
    """Pages of random noise, then each sequence's keys and values stored on shuffled ones."""
    g = torch.Generator().manual_seed(0)
    each = -(-max(lengths) // PAGE)
    count = len(lengths) * each
    pages = torch.randint(0, 256, (count, kv_heads, fmt.page_layout(PAGE).page_bytes), dtype=torch.uint8, generator=g)
    table = torch.randperm(count, generator=g).view(len(lengths), each)
    states = []
    for i, n in enumerate(lengths):
        k, v = torch.randn(2, n, kv_heads, fmt.head_dim, generator=g)
        token = torch.arange(n)
        paged.store(k, v, pages, table[i][token // PAGE] * PAGE + token % PAGE, fmt, PAGE)
        states.append((k, v))
    return pages, table, states


@pytest.mark.parametrize("bits", [(4, 2), (3, 3), (8, 4), (2, 8)], ids=lambda b: f"k{b[0]}v{b[1]}")
def test_pages_hold_what_the_reference_writes(bits):
    fmt = KVFormat(*bits, 64)
    pages, table, states = filled(fmt, [37, 5])
    for i, (k, v) in enumerate(states):
        start, end = 3, k.shape[0]
        for got, x, width in zip(paged.dequantize(pages, table[i], start, end, fmt, PAGE), (k, v), bits):
            packed, scales = codec.quantize(x, width)
            book = Codebook.lloyd_max(64, width)
            expected = reference.dequantize_rotated(packed.numpy(), scales.numpy(), width, book)
            torch.testing.assert_close(got, torch.from_numpy(expected)[start:end])


def test_a_skipped_slot_changes_nothing_and_a_bad_vector_reads_as_nan():
    fmt = KVFormat(4, 2, 64)
    pages, table, states = filled(fmt, [20])
    before = pages.clone()
    paged.store(*(x[:3] for x in states[0]), pages, torch.full((3,), -1), fmt, PAGE)
    assert torch.equal(pages, before)
    bad = states[0][0][:1].clone()
    bad[0, 0, 5] = torch.nan
    paged.store(bad, states[0][1][:1], pages, table[0][:1] * PAGE, fmt, PAGE)
    out = paged.attention(torch.randn(1, 4, 64), pages, table[0], 20, fmt, PAGE, 0.125)
    assert torch.isnan(out[:, :2]).all() and torch.isfinite(out[:, 2:]).all()


@pytest.mark.parametrize("window, soft_cap, sinks", [(None, None, False), (9, None, True), (None, 3.0, True)])
def test_attention_is_attention_over_the_dequantized(window, soft_cap, sinks):
    fmt, queries, length = KVFormat(8, 8, 32), 4, 41
    pages, table, _ = filled(fmt, [length])
    q = torch.randn(queries, 6, 32)
    extra = torch.randn(6) if sinks else None
    got = paged.attention(
        q, pages, table[0], length, fmt, PAGE, 0.2, sliding_window=window, soft_cap=soft_cap, sinks=extra
    )
    k, v = (codec.rotate_back(x).repeat_interleave(3, 1) for x in paged.dequantize(pages, table[0], 0, length, fmt, PAGE))
    for t in range(queries):
        last = length - queries + t
        first = 0 if window is None else last - window + 1
        score = torch.einsum("hd,thd->ht", q[t], k[first : last + 1]) * 0.2
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        if sinks:
            score = torch.cat([score, extra[:, None]], 1)
        weights = score.softmax(-1)[:, : last + 1 - first]
        torch.testing.assert_close(got[t], torch.einsum("ht,thd->hd", weights, v[first : last + 1]), atol=1e-4, rtol=1e-4)


def test_tiles_hold_every_token_once_and_no_request_without_tokens():
    lengths = [5, 0, 3, 20, 0, 0, 1]
    tiles = prefill.plan_tiles(lengths, 8)
    found = [0] * len(lengths)
    for tile in tiles:
        assert 0 < sum(s.end - s.start for s in tile) <= 8
        assert [s.request for s in tile] == list(range(tile[0].request, tile[-1].request + 1))
        for s in tile:
            assert s.start == found[s.request]
            found[s.request] = s.end
    assert found == lengths


@pytest.mark.parametrize("window", [None, 50, 210])
def test_a_chunk_reads_itself_exactly_copies_next_and_codes_before(window):
    """Against dense attention over what each token is read from: codes, 8-bit copies, exact keys and values."""
    fmt, queries, length, scale, none = KVFormat(4, 2, 32), 6, 235, 0.2, [-1] * (COPIED_PAGES - 2)
    pages, table, ((k, v),) = filled(fmt, [length])
    context = length - queries
    eight = recent_format(32)
    recent = torch.zeros(3, 2, eight.page_layout(RECENT_PAGE_TOKENS).page_bytes, dtype=torch.uint8)
    last = context // RECENT_PAGE_TOKENS * RECENT_PAGE_TOKENS  # the first page has copy 1, the one being filled 2, those between none
    for copy, begin, end in ((1, 0, RECENT_PAGE_TOKENS), (2, last, context)):
        token = torch.arange(begin, end)
        paged.store(k[token], v[token], recent, copy * RECENT_PAGE_TOKENS + token - begin, eight, RECENT_PAGE_TOKENS)
    query = torch.randn(queries, 4, 32)
    got = paged.attention(
        query, pages, table[0], length, fmt, PAGE, scale, sliding_window=window, own=(k[context:], v[context:]),
        recent=(recent, [1, *none, 2]),
    )  # fmt: skip
    dense = [codec.rotate_back(x) for x in paged.dequantize(pages, table[0], 0, context, fmt, PAGE)]
    for copy, begin, end in ((1, 0, RECENT_PAGE_TOKENS), (2, last, context)):
        copied = paged.dequantize(recent, torch.tensor([copy]), 0, end - begin, eight, RECENT_PAGE_TOKENS)
        for x, eight_bits in zip(dense, copied, strict=True):
            x[begin:end] = codec.rotate_back(eight_bits)
    key, value = (torch.cat(pair).repeat_interleave(2, 1) for pair in zip(dense, (k[context:], v[context:]), strict=True))
    at = torch.arange(length)
    now = torch.arange(context, length)[:, None]
    hidden = (at > now) | (at <= now - (window or length))
    score = (torch.einsum("qhd,thd->hqt", query, key) * scale).masked_fill(hidden, float("-inf"))
    expected = torch.einsum("hqt,thd->qhd", score.softmax(-1), value)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - paged.attention(query, pages, table[0], length, fmt, PAGE, scale, sliding_window=window)).abs().max() > 1e-3


def test_a_first_chunk_reads_nothing_but_itself():
    fmt = KVFormat(4, 2, 32)
    pages, table, _ = filled(fmt, [5])
    query, (k, v) = torch.randn(5, 2, 32), torch.randn(2, 5, 2, 32)
    got = paged.attention(query, pages, table[0], 5, fmt, PAGE, 0.2, own=(k, v), recent=(pages, [-1] * COPIED_PAGES))
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    score = (torch.einsum("qhd,thd->hqt", query, k) * 0.2).masked_fill(later, float("-inf"))
    torch.testing.assert_close(got, torch.einsum("hqt,thd->qhd", score.softmax(-1), v), atol=1e-4, rtol=1e-4)

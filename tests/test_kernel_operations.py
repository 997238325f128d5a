"""Triton kernels on random page tables, lengths and slots, against the plain PyTorch form of each: by the interpreter
here, compiled on a CUDA machine.

What lies on other pages is noise, so that a token read from elsewhere shows.
"""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from hypothesis import given
from hypothesis import strategies as st
from operations import done, sized
from tqai_plugins.triton_kernels.decode_attention import decode_attention, max_partial_rows
from tqai_plugins.triton_kernels.dequantize import dequantize
from tqai_plugins.triton_kernels.prepare import Tiling, prepare
from tqai_plugins.triton_kernels.workspace import Workspace

from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.torch_kernels import paged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter takes a second for some twenty programs: many rows in each.
TILING = None if DEVICE.type == "cuda" else Tiling(64, 1, 4)
SERVED = st.sampled_from([2, 3, 4, 8])


def as_int(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


@sized(1 / 6, 15)
@pytest.mark.slow
@given(data=st.data(), bits=st.tuples(SERVED, SERVED), head_dim=st.sampled_from([64, 80]), page=st.sampled_from([16, 48, 64]))
def test_kernels_on_random_pages(data, bits, head_dim, page):
    """Sequences of any length, of which some begin on the pages of another; tokens arrive in any order of slots."""
    fmt, heads, group = KVFormat(*bits, head_dim), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 150)), min_size=1, max_size=3), "lengths")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    draw = lambda *shape: torch.randn(*shape, generator=random).to(DEVICE, torch.float16)
    each = -(-max(lengths) // page) + 1
    count = len(lengths) * each + 2
    table = torch.randperm(count, generator=random)[: len(lengths) * each].view(len(lengths), each)
    shared = data.draw(st.integers(0, min(lengths) // page), "whole pages that all share")
    table[:, :shared] = table[0, :shared].clone()
    noise = torch.randint(0, 256, (count, heads, fmt.page_layout(page).page_bytes), dtype=torch.uint8, generator=random)

    at = [table[i, torch.arange(n) // page] * page + torch.arange(n) % page for i, n in enumerate(lengths)]
    slots = torch.cat([at[0], *(x[shared * page :] for x in at[1:])])
    skipped = torch.rand(len(slots), generator=random) < data.draw(st.sampled_from([0.0, 0.3]), "share of padding")
    slots = torch.cat([slots, torch.full((int(skipped.sum()),), -1)])[torch.randperm(len(slots) + int(skipped.sum()), generator=random)]
    key, value = draw(len(slots), heads, head_dim), draw(len(slots), heads, head_dim)
    query_len = data.draw(st.integers(1, min(4, *lengths)), "query tokens")
    query = draw(len(lengths) * query_len, heads * group, head_dim)
    splits, scale = data.draw(st.integers(1, 3), "splits"), head_dim**-0.5
    rows = max(4 * query.shape[0] * heads * group, max_partial_rows(len(lengths), heads * group, heads, query_len, fmt, DEVICE))
    workspace = Workspace.allocate(query.shape[0], heads * group, head_dim, rows, DEVICE)
    pages = noise.clone().to(DEVICE)
    prepare(query, key, value, pages, slots.to(DEVICE), workspace, fmt, page, scale, tiling=TILING)
    done["pages by Triton kernels"] += 1 + 2 * len(lengths)

    plain = noise.clone()
    paged.store(key.cpu(), value.cpu(), plain, slots, fmt, page)
    untouched = torch.ones(count, dtype=torch.bool).index_fill_(0, slots[slots >= 0] // page, False)
    assert torch.equal(pages.cpu()[untouched], noise[untouched])
    for i, length in enumerate(lengths):
        # Now and then the kernel takes a neighbouring level or grid for what lies on a border.
        for found, expected in zip(paged.dequantize(pages.cpu(), table[i], 0, length, fmt, page), paged.dequantize(plain, table[i], 0, length, fmt, page)):
            assert ((found - expected).norm(dim=-1) < 0.1 * expected.norm(dim=-1)).float().mean() > 0.97

    window = data.draw(st.one_of(st.none(), st.integers(1, 100)), "window")
    soft_cap = data.draw(st.sampled_from([None, 3.0]), "soft cap")
    sinks = torch.randn(heads * group, generator=random) if data.draw(st.booleans(), "sinks") else None
    out = torch.full_like(query, torch.nan)
    decode_attention(
        workspace, pages, table.int().to(DEVICE), as_int(lengths), out, fmt, page, query_len=query_len, num_splits=splits,
        sliding_window=window, soft_cap=soft_cap, sinks=None if sinks is None else sinks.to(DEVICE),
    )  # fmt: skip
    for i, (found, asked) in enumerate(zip(out.cpu().float().split(query_len), query.cpu().split(query_len))):
        expected = paged.attention(
            asked, pages.cpu(), table[i], lengths[i], fmt, page, scale, sliding_window=window, soft_cap=soft_cap, sinks=sinks
        )
        assert (found - expected).norm() < 2e-3 * expected.norm()

    starts = [data.draw(st.integers(0, n), "from") for n in lengths]
    ends = [data.draw(st.integers(start, n), "to") for start, n in zip(starts, lengths)]
    places = torch.tensor([0, *(b - a for a, b in zip(starts, ends))]).cumsum(0)
    dense = torch.full((2, int(places[-1]) + 1, heads, head_dim), torch.nan, device=DEVICE)
    dequantize(
        pages, table.int().to(DEVICE), as_int(starts), as_int(ends), as_int(places[:-1].tolist()), *dense, fmt, page,
        max(1, *(b - a for a, b in zip(starts, ends))),
    )  # fmt: skip
    assert torch.isnan(dense[:, -1]).all()
    for i in range(len(lengths)):
        for found, expected in zip(dense.cpu(), paged.dequantize(pages.cpu(), table[i], starts[i], ends[i], fmt, page)):
            torch.testing.assert_close(found[places[i] : places[i + 1]], expected, rtol=1e-6, atol=1e-6)

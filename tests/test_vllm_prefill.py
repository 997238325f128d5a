"""Prefill of the CUDA backend, with vLLM's FlashAttention, against attention in float64 over what is stored."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")

from tqai_plugins.core.kv_format import COPIED_PAGES, RECENT_PAGES, KVFormat, recent_format
from tqai_plugins.core.reference import rotation_matrix
from tqai_plugins.core.rotation import Rotation
from tqai_plugins.torch_kernels.recent import RecentCopies

pytestmark = [pytest.mark.vllm, pytest.mark.cuda]

PAGE, Q_HEADS, KV_HEADS, DIM = 64, 8, 2, 128
# Chunks of one token are decodes.
CONTEXTS, CHUNKS = [0, 300, 64, 1000, 5], [33, 70, 2, 200, 9]


def stored(pages, table, tokens, fmt):
    """Keys and values [tokens, kv_heads, head_dim] in the model's basis, float64."""
    from tqai_plugins.triton_kernels.dequantize import dequantize

    one = lambda n: torch.tensor([n], dtype=torch.int32, device="cuda")
    k, v = torch.full((2, max(tokens, 1), KV_HEADS, DIM), torch.nan, device="cuda")
    dequantize(pages, table[None], one(0), one(tokens), one(0), k, v, fmt, PAGE, max(tokens, 1))
    turn = torch.from_numpy(rotation_matrix(Rotation(DIM))).cuda().double()
    return k[:tokens].double() @ turn, v[:tokens].double() @ turn


def dense(q, k, v, position, scale, window, soft_cap, sinks):
    score = torch.einsum("qhd,thd->hqt", q, k.repeat_interleave(Q_HEADS // KV_HEADS, 1)) * scale
    if soft_cap:
        score = soft_cap * torch.tanh(score / soft_cap)
    token = torch.arange(k.shape[0], device=q.device)
    seen = token <= position[:, None]
    if window:
        seen &= token > position[:, None] - window
    score = score.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        score = torch.cat([score, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:1])])
    return torch.einsum("hqt,thd->qhd", score.softmax(-1), v.repeat_interleave(Q_HEADS // KV_HEADS, 1))


@pytest.mark.parametrize("copied", [False, True], ids=["codes", "copies"])
@pytest.mark.parametrize("tile_tokens", [128, 8192])
@pytest.mark.parametrize(
    "window, soft_cap, sinks",
    [(None, None, False), (None, 20.0, False), (100, None, False), (None, None, True), (100, None, True)],
)
def test_chunks_over_cached_contexts(window, soft_cap, sinks, tile_tokens, copied):
    from tqai_plugins.triton_kernels.prepare import prepare
    from tqai_plugins.triton_kernels.recent import RecentPages, claim
    from tqai_plugins.triton_kernels.workspace import Workspace

    from tqai_plugins.vllm_plugin import prefill

    fmt, scale = KVFormat(4, 3, DIM), DIM**-0.5
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=g)
    n, each = len(CONTEXTS), 20
    shape = n * each, KV_HEADS, fmt.page_layout(PAGE).page_bytes
    pages = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=g)
    table = torch.randperm(n * each, device="cuda", generator=g).int().view(n, each)
    workspace = Workspace.allocate(1, Q_HEADS, DIM, 1, torch.device("cuda"))
    bookkeeping = RecentCopies.allocate(COPIED_PAGES * n + 2, n, 4096, "cuda")
    copies = torch.zeros(COPIED_PAGES * n + 2, KV_HEADS, RecentPages.layout(DIM).page_bytes, dtype=torch.uint8, device="cuda")
    as_int = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")

    def store(lengths, before):
        """Keys and values of new tokens up to these lengths, through the launches of a step."""
        new = [b - a for a, b in zip(before, lengths)]
        starts = [0, *torch.tensor(new).cumsum(0).tolist()]
        slots = torch.cat([
            table[i].long()[(p := torch.arange(a, b, device="cuda")) // PAGE] * PAGE + p % PAGE
            for i, (a, b) in enumerate(zip(before, lengths))
        ])  # fmt: skip
        k, v = draw(starts[-1], KV_HEADS, DIM), draw(starts[-1], KV_HEADS, DIM)
        claim(bookkeeping, slots, as_int(starts), as_int(lengths), table, PAGE)
        recent = RecentPages(copies, bookkeeping.slots, bookkeeping.table) if copied else None
        prepare(None, k, v, pages, slots, workspace, fmt, PAGE, scale, recent=recent)
        return k, v, starts

    store(CONTEXTS, [0] * n)
    held = bookkeeping.table.clone()
    cached = [stored(pages, table[i], c, fmt) for i, c in enumerate(CONTEXTS)]
    exact = [stored(copies, as_int([copy]), PAGE, recent_format(DIM)) for copy in range(copies.shape[0])]
    totals = [a + b for a, b in zip(CONTEXTS, CHUNKS)]
    key, value, starts = store(totals, CONTEXTS)
    for i, context in enumerate(CONTEXTS if copied else []):
        pages_before = -(-context // PAGE)
        copied_pages = 0 if pages_before > RECENT_PAGES else -1, *range(pages_before - RECENT_PAGES, pages_before)
        for which, (page, copy) in enumerate(zip(copied_pages, bookkeeping.context[i].tolist())):
            # A page that the chunk goes on with and leaves behind loses its copy, and is read from its codes.
            left = (page + 1) * PAGE > context and 0 < page < -(-totals[i] // PAGE) - RECENT_PAGES
            assert copy == (held[i, which] if page >= 0 and not left else -1)
            if copy >= 0:
                rows = slice(page * PAGE, min(context, (page + 1) * PAGE))
                for x, eight in zip(cached[i], exact[copy]):
                    x[rows] = eight[: rows.stop - rows.start]
    query = draw(starts[-1], Q_HEADS, DIM)
    sink_logits = torch.randn(Q_HEADS, device="cuda", generator=g) if sinks else None
    out = torch.full_like(query, torch.nan)
    step = prefill.Prefill(
        starts, CONTEXTS, as_int(starts), table, bookkeeping.context if copied else None, tile_tokens
    )
    prefill.attend(
        query, key, value, pages, PAGE, copies if copied else None, step, fmt, out, softmax_scale=scale, fa_version=3,
        sliding_window=window, soft_cap=soft_cap, sinks=sink_logits, mean=None,
    )
    for i, context in enumerate(CONTEXTS):
        rows = slice(starts[i], starts[i + 1])
        k, v = (torch.cat([past, own[rows].double()]) for past, own in zip(cached[i], (key, value)))
        position = torch.arange(context, totals[i], device="cuda")
        expected = dense(query[rows].double(), k, v, position, scale, window, soft_cap, sink_logits)
        error = (out[rows].double() - expected).norm() / expected.norm()
        assert error < 6e-3, (i, error)

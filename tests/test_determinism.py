"""The same request gives the same bytes and tokens; what shares its batch, its chunk or its rank does not change its codes."""

import pytest
import small_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import tqai
from tqai import models

from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.torch_kernels import codec, paged

HEADS, TOKENS, PAGE = 8, 100, 16
FORMATS = [KVFormat(k, v, head_dim) for k, v in ((4, 2), (3, 3), (8, 4)) for head_dim in (64, 80, 128)]


def stored(key: torch.Tensor, value: torch.Tensor, fmt: KVFormat, chunks: list[int]) -> torch.Tensor:
    """Pages after keys and values [tokens, heads, head_dim] came in chunks of these sizes."""
    pages = torch.zeros(-(-TOKENS // PAGE), key.shape[1], fmt.page_layout(PAGE).page_bytes, dtype=torch.uint8)
    for part in torch.arange(key.shape[0]).split(chunks):
        paged.store(key[part], value[part], pages, part, fmt, PAGE)
    return pages


@pytest.fixture(params=FORMATS, ids=lambda fmt: f"{fmt.name}-{fmt.head_dim}")
def request_of(request):
    generator = torch.Generator().manual_seed(0)
    return request.param, *torch.randn(2, TOKENS, HEADS, request.param.head_dim, generator=generator)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_tensor_parallel_ranks_write_the_codes_that_one_rank_writes(request_of, ranks):
    fmt, key, value = request_of
    whole = stored(key, value, fmt, [TOKENS])
    mine = HEADS // ranks
    for rank in range(ranks):
        heads = slice(rank * mine, (rank + 1) * mine)
        assert torch.equal(stored(key[:, heads], value[:, heads], fmt, [TOKENS]), whole[:, heads])


def test_chunks_and_company_do_not_change_codes(request_of):
    fmt, key, value = request_of
    whole = stored(key, value, fmt, [TOKENS])
    for chunks in ([1] * TOKENS, [64, 36], [33, 1, 1, 65]):
        assert torch.equal(stored(key, value, fmt, chunks), whole)
    others = torch.randn(57, HEADS, fmt.head_dim, generator=torch.Generator().manual_seed(1))
    codes, scales = codec.quantize(torch.cat([others, key, others]), fmt.bits_k)
    assert all(torch.equal(a[57:-57], b) for a, b in zip((codes, scales), codec.quantize(key, fmt.bits_k)))


def test_a_request_that_is_asked_again_gets_the_same_answer_and_the_same_bytes(tmp_path):
    model, tokenizer = models.load(str(small_model.write(tmp_path / "model")), torch.float32)
    ids = tokenizer("The lighthouse was built by a woman who had never seen the sea. " * 4, return_tensors="pt").input_ids
    answers, held = [], []
    for _ in range(2):
        cache = tqai.patch(model, residual_window=32)
        answers.append(model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False).tolist())
        held.append([buffer.tokens for layer in cache.layers for store in layer.stores for buffer in store.buffers])
    assert answers[0] == answers[1] and len(held[0]) == 2 * 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(*held)) and max(x.shape[2] for x in held[0]) > 150


def test_what_a_batch_can_change_is_rounding(tmp_path):
    """Codes are read exactly; sums over them in another order differ by float32's rounding, within this bound."""
    fmt, generator = KVFormat(4, 2, 64), torch.Generator().manual_seed(0)
    key, value = torch.randn(2, TOKENS, HEADS, 64, generator=generator)
    pages, table = stored(key, value, fmt, [TOKENS]), torch.arange(-(-TOKENS // PAGE))
    queries = torch.randn(16, 2 * HEADS, 64, generator=generator)
    together = paged.attention(queries, pages, table, TOKENS, fmt, PAGE, 0.125)
    alone = torch.cat([
        paged.attention(queries[i : i + 1], pages, table, TOKENS - 15 + i, fmt, PAGE, 0.125) for i in range(16)
    ])  # fmt: skip
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)

"""The cache in mlx-lm's generators: what a user of tqai.patch sees, on small random models."""

import copy

import numpy as np
import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_lm
import mlx_models
import tqai
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step, speculative_generate_step
from mlx_lm.models import base as mlx_base
from mlx_lm.models import llama as mlx_llama
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from tqai_plugins.metal_kernels import codec

from tqai_plugins.core import reference
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.mlx_lm_plugin import BatchCompressedKVCache, CacheOptions, CompressedKVCache

KINDS = ("llama", "qwen3", "gemma3_text", "gpt_oss", "gemma4_text")


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + 1000 * length).integers(5, 250, length).tolist()


def greedy(model, tokens, count=16, cache=None, **options) -> list[int]:
    steps = generate_step(mx.array(tokens), model, max_tokens=count, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


def batched(model, requests, late=(), **options) -> list[list[int]]:
    """Greedy tokens of (prompt, count) requests served together; those in `late` join at step 5."""
    generator = BatchGenerator(model, completion_batch_size=8, prefill_batch_size=4, **options)
    start = lambda some: generator.insert([p for p, _ in some], max_tokens=[n for _, n in some])
    tokens = {uid: [] for uid in start(requests)}
    step = 0
    while True:
        working, produced = generator.next()
        step += 1
        if step == 5 and late:
            tokens |= {uid: [] for uid in start(late)}
        if not working and not produced and step > 5:
            return list(tokens.values())
        for response in produced:
            tokens[response.uid].append(response.token)


@pytest.fixture(params=KINDS)
def model(request):
    model, _ = mlx_models.load(request.param)
    yield model
    tqai.unpatch(model)


@pytest.fixture
def llama():
    model, _ = mlx_models.load("llama")
    yield model
    tqai.unpatch(model)


def logits(model, tokens) -> np.ndarray:
    return np.array(model(mx.array([tokens]), cache=make_prompt_cache(model))[0], np.float32)


def test_more_bits_come_closer_to_the_uncompressed_model(model):
    stock, tokens = logits(model, prompt(300)), [greedy(model, prompt(n)) for n in (1, 37)]
    errors = []
    for bits_k, bits_v in ((8, 8), (4, 4), (4, 2), (2, 2)):
        tqai.patch(model, bits_k=bits_k, bits_v=bits_v)
        assert any(isinstance(c, CompressedKVCache) for c in make_prompt_cache(model))
        errors.append(np.linalg.norm(logits(model, prompt(300)) - stock) / np.linalg.norm(stock))
        assert [greedy(model, prompt(n)) for n in (1, 37)] == tokens, "all of it lies in the exact window"
    assert 0 < errors[0] < 0.1 and errors == sorted(errors) and errors[3] > 1.5 * errors[1]
    tqai.unpatch(model)
    assert np.array_equal(logits(model, prompt(300)), stock)
    assert not any(isinstance(c, CompressedKVCache) for c in make_prompt_cache(model))


@pytest.mark.parametrize("strategy", ["residual", "full", "incremental"])
def test_the_way_a_prompt_is_cut_changes_nothing(model, strategy):
    tqai.patch(model, cache_strategy=strategy)
    whole = greedy(model, prompt(200))
    assert greedy(model, prompt(200), prefill_step_size=16) == whole
    assert greedy(model, prompt(200), prefill_step_size=77) == whole


def test_unpatch_restores_mlx_lm(llama):
    stock = mlx_llama.scaled_dot_product_attention
    tqai.patch(llama, backend="mlx")
    assert mlx_llama.scaled_dot_product_attention is mlx_base.scaled_dot_product_attention is not stock
    other, _ = mlx_models.load("qwen3")
    tqai.patch(other)
    tqai.unpatch(llama)
    assert "make_cache" not in vars(llama) and mlx_llama.scaled_dot_product_attention is not stock, "the other needs it"
    tqai.unpatch(other)
    tqai.unpatch(other)
    assert mlx_llama.scaled_dot_product_attention is mlx_base.scaled_dot_product_attention is stock


@pytest.mark.parametrize("options", [{}, {"bits_k": 3, "bits_v": 3, "residual_window": 32}, {"cache_strategy": "full"}])
def test_batches_give_the_tokens_of_single_requests(model, options):
    tqai.patch(model, **options)
    requests = [(prompt(37), 20), (prompt(90), 6), (prompt(3), 12)]
    late = [(prompt(261), 9), (prompt(1), 14)]
    alone = [greedy(model, p, n) for p, n in requests + late]
    assert batched(model, requests, late) == alone
    assert batched(model, requests, late, prefill_step_size=32) == alone


def test_mixed_lengths_up_to_three_thousand(llama):
    tqai.patch(llama)
    requests = [(prompt(n), 6) for n in (1, 2, 129, 700, 3000)]
    assert batched(llama, requests) == [greedy(llama, p, n) for p, n in requests]


def test_generate_and_stream_generate_work_unchanged(llama):
    tqai.patch(llama)
    _, tokenizer = mlx_models.load("llama")
    expected = tokenizer.decode(greedy(llama, prompt(140), 8))
    assert mlx_lm.generate(llama, tokenizer, prompt(140), max_tokens=8) == expected
    assert "".join(part.text for part in mlx_lm.stream_generate(llama, tokenizer, prompt(140), max_tokens=8)) == expected


def test_batch_generate_goes_on_from_its_caches(llama):
    tqai.patch(llama)
    _, tokenizer = mlx_models.load("llama")
    prompts = [prompt(20), prompt(170)]
    first = batch_generate(llama, tokenizer, prompts, max_tokens=5, return_prompt_caches=True)
    assert all(isinstance(c, CompressedKVCache) for cache in first.caches for c in cache)
    again = [[7, 8, 9], [10]]
    second = batch_generate(llama, tokenizer, again, prompt_caches=first.caches, max_tokens=5)
    caches = [make_prompt_cache(llama) for _ in prompts]
    for cache, tokens, more, expected in zip(caches, prompts, again, second.texts):
        tokens = tokens + greedy(llama, tokens, 5)
        assert tokenizer.decode(greedy(llama, tokens + more, 5, cache)) == expected


def test_a_conversation_goes_on_as_if_it_had_been_one_prompt(model):
    tqai.patch(model)
    cache = make_prompt_cache(model)
    said = prompt(150) + greedy(model, prompt(150), 10, cache)
    follow = said + prompt(30, 5)
    known = next(c for c in cache if isinstance(c, CompressedKVCache)).offset
    assert greedy(model, follow[known:], 10, cache) == greedy(model, follow, 10)


def test_deep_copies_are_independent(llama):
    tqai.patch(llama)
    cache = make_prompt_cache(llama)
    greedy(llama, prompt(150), 1, cache)
    copied = copy.deepcopy(cache)
    first = greedy(llama, [9], 8, cache)
    assert greedy(llama, [9], 8, copied) == first


def test_trimmed_tokens_are_forgotten(model):
    """After a trim the rest answers as codes and exact tokens that were never followed by anything."""
    tqai.patch(model, cache_strategy="full")
    cache, short = make_prompt_cache(model), make_prompt_cache(model)
    greedy(model, prompt(50) + prompt(9, 3), 1, cache)
    if not can_trim_prompt_cache(cache):
        pytest.skip("its sliding window is full")
    greedy(model, prompt(50), 1, short)
    trim_prompt_cache(cache, cache[-1].size() - 50)
    trim_prompt_cache(short, short[-1].size() - 50)
    assert greedy(model, [9, 8, 7], 12, cache) == greedy(model, [9, 8, 7], 12, short)


def test_the_exact_window_refills_after_a_trim(llama):
    tqai.patch(llama, residual_window=32)
    cache = make_prompt_cache(llama)
    greedy(llama, prompt(100), 1, cache)
    layer = cache[0]
    known = layer.offset
    assert trim_prompt_cache(cache, 20) == 20 and layer.offset == known - 20
    assert layer.recent.shape[2] == 12, "20 of 32 exact tokens were among those forgotten"
    before = np.array(layer.recent)
    greedy(llama, prompt(3, 8), 4, cache)
    assert layer.recent.shape[2] == 12 + (layer.offset - known + 20) and np.array_equal(layer.recent[:, :, :12], before)
    greedy(llama, prompt(40, 8), 4, cache)
    assert layer.recent.shape[2] == 32
    known = layer.offset
    assert trim_prompt_cache(cache, 10_000) == known and layer.offset == 0
    assert greedy(llama, prompt(60), 8, cache) == greedy(llama, prompt(60), 8), "as good as new"


def test_the_lru_prompt_cache_reuses_and_trims(llama):
    tqai.patch(llama, cache_strategy="full")
    cache = make_prompt_cache(llama)
    tokens = prompt(200)
    tokens += greedy(llama, tokens, 12, cache)
    tokens = tokens[: cache[0].offset]
    store = LRUPromptCache(max_size=4)
    store.insert_cache("model", tokens, cache)
    assert store.nbytes == sum(c.nbytes for c in cache) > 0
    for asked, reused in ((tokens + [7, 8, 9], len(tokens)), (tokens[:120] + [5, 5], 120)):
        found, rest = store.fetch_nearest_cache("model", asked)
        assert len(asked) - len(rest) == reused
        assert greedy(llama, rest, 8, found) == greedy(llama, asked, 8)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_saved_caches_go_on_in_a_new_process(tmp_path, kind):
    import subprocess
    import sys

    model, _ = mlx_models.load(kind)
    tqai.patch(model)
    cache = make_prompt_cache(model)
    greedy(model, prompt(150), 3, cache)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, cache, {"model": kind})
    expected = greedy(model, [9], 6, cache)
    tqai.unpatch(model)
    code = (
        "import sys, mlx.core as mx, mlx_lm, tqai; from mlx_lm.models.cache import load_prompt_cache; "
        "from mlx_lm.generate import generate_step; "
        "model, _ = mlx_lm.load(sys.argv[1]); tqai.patch(model); "
        "cache, told = load_prompt_cache(sys.argv[2], return_metadata=True); "
        "print(told['model'], [int(t) for t, _ in generate_step(mx.array([9]), model, max_tokens=6, prompt_cache=cache)])"
    )
    command = [sys.executable, "-c", code, str(mlx_models.folder_of(kind)), file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{kind} {expected}"


def test_a_cache_file_of_another_format_is_refused(llama, tmp_path, monkeypatch):
    tqai.patch(llama)
    cache = make_prompt_cache(llama)
    greedy(llama, prompt(10), 1, cache)
    monkeypatch.setattr("tqai_plugins.mlx_lm_plugin.kv_cache.FORMAT_VERSION", 999)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="tqai's format 999; this version reads 1"):
        load_prompt_cache(str(tmp_path / "cache.safetensors"))


def test_speculative_decoding_gives_the_greedy_tokens(llama):
    draft, _ = mlx_models.load("draft")
    tqai.patch(llama, cache_strategy="full")
    tqai.patch(draft, cache_strategy="full")
    alone = greedy(llama, prompt(130))
    for helper in (draft, llama):
        steps = speculative_generate_step(mx.array(prompt(130)), llama, helper, num_draft_tokens=3, max_tokens=16)
        assert [int(token) for token, *_ in steps] == alone
    tqai.unpatch(draft)


@pytest.mark.parametrize("bits_k, bits_v", [(4, 2), (3, 3), (8, 8)])
def test_bytes_are_those_of_the_format(bits_k, bits_v):
    cache = CompressedKVCache(CacheOptions(bits_k, bits_v, cache_strategy="full"))
    x = mx.random.normal((1, 8, 1024, 128)).astype(mx.float16)
    cache.update_and_fetch(x, x)
    assert cache.nbytes == 1024 * 8 * KVFormat(bits_k, bits_v, 128).slot_bytes
    stock = KVCache()
    stock.update_and_fetch(x, x)
    if (bits_k, bits_v) == (4, 2):
        assert stock.nbytes / cache.nbytes > 5.1
    exact = CompressedKVCache(CacheOptions(bits_k, bits_v))
    exact.update_and_fetch(x, x)
    assert exact.nbytes - cache.nbytes == (128 + 4) * 2 * 8 * 128 * 2, "the exact tokens are counted"
    y = mx.random.normal((1, 8, 1, 128)).astype(mx.float16)
    for _ in range(200):
        exact.update_and_fetch(y, y)
    assert exact.nbytes - cache.nbytes == (128 + 4) * 2 * 8 * 128 * 2 + 256 * 8 * KVFormat(bits_k, bits_v, 128).slot_bytes


@pytest.mark.parametrize("strategy", ["residual", "full", "incremental"])
def test_bytes_are_those_that_mlx_holds(strategy):
    def fill(*lengths):
        cache = CompressedKVCache(CacheOptions(cache_strategy=strategy))
        for length in lengths:
            x = mx.random.normal((1, 8, length, 128)).astype(mx.float16)
            cache.update_and_fetch(x, x)
            mx.eval(cache.state)
        return cache

    fill(1)  # the tables of the codec stay
    before = mx.get_active_memory()
    cache = fill(600, *(1,) * 20)
    assert mx.get_active_memory() - before == pytest.approx(cache.nbytes, rel=0.01)


def attention_by_definition(q, keys, values, options, first, scale, dtype=np.float64):
    """Each query reads the newest `window` and the first `sinks` tokens as they are, the others through their codes.

    q [q_heads, new, D] are the last positions; keys, values [kv_heads, tokens, D]; the row begins at token `first`.
    """
    coded = [
        reference.dequantize(*reference.quantize(x, bits), bits, x.shape[-1])
        for x, bits in ((keys, options.bits_k), (values, options.bits_v))
    ]
    heads, count, tokens = q.shape[0], q.shape[1], keys.shape[1]
    out = np.zeros(q.shape, dtype)
    for h in range(heads):
        kv = h // (heads // keys.shape[0])
        for i in range(count):
            at = tokens - count + i
            exact = [t > at - options.window or t - first < options.sinks for t in range(first, at + 1)]
            k = np.where(np.array(exact)[:, None], keys[kv, first : at + 1], coded[0][kv, first : at + 1]).astype(dtype)
            v = np.where(np.array(exact)[:, None], values[kv, first : at + 1], coded[1][kv, first : at + 1]).astype(dtype)
            weights = np.exp(scale * (k @ q[h, i].astype(dtype)))
            out[h, i] = weights / weights.sum() @ v
    return out


@pytest.mark.parametrize("options", [CacheOptions(residual_window=8), CacheOptions(3, 4, 2, 5), CacheOptions(cache_strategy="full")])
def test_attention_is_what_it_is_defined_to_be(options):
    """In float32, over chunks, single tokens, left and right padding, filter, extend and extract."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    lengths, dim, scale = (23, 9, 2), 32, 0.2
    keys, values = ([draw(2, 40, dim) for _ in lengths] for _ in range(2))
    queries = [draw(4, 40, dim) for _ in lengths]

    def step(cache, rows, spans):
        """Feed columns of each row (right padded to the longest) and compare every real query."""
        count = max(end - start for start, end in spans)
        fill = lambda x, start, end: np.concatenate([x[:, start:end], draw(x.shape[0], count - end + start, dim)], 1)
        q, k, v = (np.stack([fill(x[r], *s) for r, s in zip(rows, spans)]) for x in (queries, keys, values))
        mask = cache.make_mask(count, return_array=False)
        fetched = cache.update_and_fetch(mx.array(k), mx.array(v))
        out = mlx_base.scaled_dot_product_attention(mx.array(q), *fetched, cache=cache, scale=scale, mask=mask)
        for i, (row, (start, end)) in enumerate(zip(rows, spans)):
            expected = attention_by_definition(queries[row][:, start:end], keys[row][:, :end], values[row][:, :end], options, 0, scale)
            assert np.abs(np.array(out)[i, :, : end - start] - expected).max() < 2e-5, (row, start, end)

    from tqai_plugins.mlx_lm_plugin import dispatch

    dispatch.install()
    try:
        single = CompressedKVCache(options)
        for start, end in ((0, 3), (3, 20), (20, 21), (21, 22)):
            step(single, [0], [(start, end)])
        batch = CompressedKVCache.merge([CompressedKVCache(options) for _ in lengths[1:]])
        batch.prepare(lengths=[9, 2], right_padding=[0, 7])
        step(batch, [1, 2], [(0, 9), (0, 2)])
        batch.finalize()
        assert batch.offset.tolist() == [9, 2]
        step(batch, [1, 2], [(9, 10), (2, 3)])
        batch.extend(CompressedKVCache.merge([single]))
        step(batch, [1, 2, 0], [(10, 11), (3, 4), (22, 23)])
        apart = batch.extract(1)
        assert apart.offset == 4
        step(apart, [2], [(4, 7)])
        batch.filter([0, 1])
        assert batch.length == 11, "columns that were padding in all rows are gone"
        for i in range(12):
            step(batch, [1, 2], [(11 + i, 12 + i), (4 + i, 5 + i)])
        batch.prepare(lengths=[1, 6], right_padding=[5, 0])
        step(batch, [1, 2], [(23, 24), (16, 22)])
        batch.finalize()
        step(batch, [1, 2], [(24, 25), (22, 23)])
        step(CompressedKVCache.merge([batch.extract(1), apart]), [2, 2], [(23, 24), (7, 8)])
    finally:
        dispatch.uninstall()


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_prompts_are_read_a_few_heads_at_a_time(monkeypatch, kind):
    model, _ = mlx_models.load(kind)
    tqai.patch(model, residual_window=16)
    whole = logits(model, prompt(90))
    monkeypatch.setattr("tqai_plugins.mlx_lm_plugin.attention.TILE_BYTES", 1)
    assert np.allclose(logits(model, prompt(90)), whole, atol=1e-5)
    tqai.unpatch(model)


def test_sliding_layers_keep_the_stock_cache():
    model, _ = mlx_models.load("gemma3_text")
    tqai.patch(model)
    assert [type(c) for c in make_prompt_cache(model)] == [RotatingKVCache, CompressedKVCache]
    tqai.unpatch(model)


@pytest.mark.parametrize("kind, owners", [("afm7", [1]), ("gemma3n", [3])])
def test_layers_without_keys_share_those_of_another(kind, owners):
    model, _ = mlx_models.load(kind)
    stock = logits(model, prompt(200))
    tqai.patch(model, bits_k=8, bits_v=8)
    assert [i for i, c in enumerate(make_prompt_cache(model)) if getattr(c, "shared", False)] == owners
    found = logits(model, prompt(200))
    assert 0 < np.linalg.norm(found - stock) < 0.05 * np.linalg.norm(stock)
    cache = make_prompt_cache(model)
    parts = [np.array(model(mx.array([prompt(200)[i : i + 50]]), cache=cache)[0], np.float32) for i in range(0, 200, 50)]
    assert np.linalg.norm(np.concatenate(parts) - found) < 0.02 * np.linalg.norm(found)
    tqai.unpatch(model)


def test_merged_caches_keep_their_format(llama):
    one, other = CompressedKVCache(CacheOptions(4, 2)), CompressedKVCache(CacheOptions(4, 4))
    x = mx.random.normal((1, 2, 5, 64))
    for cache in (one, other):
        cache.update_and_fetch(x, x)
    with pytest.raises(ValueError, match="different formats"):
        BatchCompressedKVCache.merge([one, other])


def test_codes_are_the_references(llama):
    """What lies in the cache is core's codes of the keys that the model computed."""
    tqai.patch(llama)
    seen, cache = [], make_prompt_cache(llama)
    plain = type(cache[0]).update_and_fetch
    cache[0].update_and_fetch = lambda k, v: seen.append((k, v)) or plain(cache[0], k, v)
    llama(mx.array([prompt(40)]), cache=cache)
    (keys, values), fmt = seen[0], KVFormat(4, 2, 64)
    slots = np.array(cache[0].columns[0][:, :, :40]).view(np.uint8)
    from golden_vectors import assert_matches

    scales = slots[..., -4:].view(np.float16)
    assert_matches(np.array(keys, np.float32), 4, slots[..., : fmt.k_bytes], scales[..., 0])
    assert_matches(np.array(values, np.float32), 2, slots[..., fmt.k_bytes : -4], scales[..., 1])
    assert codec.slot_words(fmt) * 4 == slots.shape[-1]


@pytest.mark.parametrize(
    "kind, why",
    [
        ("phi3small", "its attention does not go through mlx-lm's dispatch"),
        ("deepseek_v3", "needs equal head dimensions"),
        ("mamba2", "no full-attention layer to compress, only ArraysCache"),
    ],
)
def test_models_whose_attention_cannot_read_codes_are_refused_and_stay_stock(kind, why):
    model, _ = mlx_models.load(kind)
    stock = mlx_llama.scaled_dot_product_attention
    with pytest.raises(ValueError, match=f"^{kind}.*{why}"):
        tqai.patch(model)
    assert "make_cache" not in vars(model) and mlx_llama.scaled_dot_product_attention is stock
    assert greedy(model, prompt(10), 4)


def test_head_dimensions_that_slots_cannot_hold_are_refused(tmp_path):
    model, _ = mlx_lm.load(str(mlx_models.write(tmp_path / "narrow", "llama", head_dim=40)))
    with pytest.raises(ValueError, match="^llama cannot be served.*multiples of 16"):
        tqai.patch(model)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"bits_k": 5}, "bits_k is 5; on MLX allowed are 2, 3, 4, 8"),
        ({"residual_window": "many"}, "residual_window is 'many'; allowed are whole numbers from 0"),
        ({"cache_strategy": "fast"}, "cache_strategy is 'fast'; allowed are auto, residual, full, incremental"),
        ({"use_qjl": True}, "unknown option 'use_qjl' for an MLX model; allowed are bits_k, bits_v"),
        ({"backend": "torch"}, "this is an MLX model; use backend='mlx'"),
    ],
)
def test_bad_options_are_refused(llama, options, said):
    with pytest.raises(ValueError, match=said):
        tqai.patch(llama, **options)
    assert "make_cache" not in vars(llama)


@pytest.mark.parametrize("version", ["0.31.3", "0.33.0", "1.0"])
def test_untested_versions_of_mlx_lm_are_refused(llama, monkeypatch, version):
    monkeypatch.setattr("tqai_plugins.mlx_lm_plugin.compat.version", lambda name: version)
    with pytest.raises(ImportError, match=f"mlx-lm {version} was not tested with tqai; install one of >=0.32,<0.33"):
        tqai.patch(llama)


def test_the_entry_point_makes_caches(llama):
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="tqai.cache_factories", name="mlx-lm")
    caches = entry.load()(llama, bits_k=3, bits_v=3)
    assert [type(c) for c in caches] == [CompressedKVCache] * 2 and caches[0].options.bits_k == 3
    assert greedy(llama, prompt(9), 3, caches) == greedy(llama, prompt(9), 3)


CHANGES = {
    "a length beyond the columns": lambda s: s[:3] + (10**9,) + s[4:],
    "a negative length": lambda s: s[:3] + (-1,) + s[4:],
    "a length in words": lambda s: s[:3] + ("ten",) + s[4:],
    "a ring beyond the tokens": lambda s: s[:4] + (999,) + s[5:],
    "padding beyond the tokens": lambda s: s[:5] + ([99],) + s[6:],
    "another batch": lambda s: s[:5] + ([0, 0], [0, 0]) + s[7:],
    "codes of another width": lambda s: ([s[0][0][..., :-1]],) + s[1:],
    "codes of another kind": lambda s: ([s[0][0].astype(mx.uint16)],) + s[1:],
    "no codes": lambda s: (None,) + s[1:],
    "other heads": lambda s: (s[0], s[1][:, :1]) + s[2:],
    "another head_dim": lambda s: s[:2] + (s[2][..., :-2],) + s[3:],
    "fewer first tokens": lambda s: s[:2] + (s[2][:, :, :1],) + s[3:],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_cache_state_is_refused_and_leaves_the_cache_as_it_was(llama, change):
    tqai.patch(llama)
    cache = make_prompt_cache(llama)
    greedy(llama, prompt(10), 1, cache)
    layer = cache[0]
    state, other = layer.state, type(layer)()
    before = other.state
    with pytest.raises(ValueError, match="this prompt cache is damaged: its sizes do not go together: make the cache anew"):
        other.state = CHANGES[change](tuple(state))
    assert other.state == before
    other.state = state
    assert other.length == layer.length


def test_a_cache_of_another_codebook_is_refused(llama):
    tqai.patch(llama)
    cache = make_prompt_cache(llama)
    greedy(llama, prompt(10), 1, cache)
    *rest, meta = cache[0].state
    with pytest.raises(ValueError, match="was written with other codebooks than this process uses"):
        cache[0].state = (*rest, (*meta[:-1], "00000000-00000000"))


@pytest.fixture
def with_means():
    """A model of two layers whose keys have a large mean before RoPE, by the biases of their projections."""
    mx.random.seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = mlx_llama.Model(mlx_llama.ModelArgs("llama", **sizes, head_dim=64, rms_norm_eps=1e-5, vocab_size=64, attention_bias=True))
    for layer in model.layers:
        attention = layer.self_attn
        attention.k_proj.bias = mx.where(mx.arange(128) % 4 == 0, 4.0, 0.0)
        attention.k_proj.weight, attention.q_proj.weight = attention.k_proj.weight / 2, attention.q_proj.weight * 1.5
    mx.eval(model.parameters())
    return model


class Reader:
    vocab_size = 64

    def encode(self, text):
        return [ord(letter) % 64 for letter in text]


def test_a_model_with_learned_key_means_is_far_closer(with_means):
    from tqai_plugins.mlx_lm_plugin import key_means

    learned, tokens = key_means.learn(with_means, Reader()), mx.array([prompt(200), prompt(200, 1)]) % 64
    assert sorted(learned) == [0, 1] and learned[0].means.shape == (2, 64)
    assert mlx_llama.scaled_dot_product_attention is mlx_base.scaled_dot_product_attention, "nothing of it stays"
    exact, errors = with_means(tokens), []
    for given in (None, learned):
        tqai.patch(with_means, bits_k=3, bits_v=8, cache_strategy="full", key_means=given)
        cache = make_prompt_cache(with_means)
        assert [part.options.key_mean is not None for part in cache] == [given is not None] * 2
        parts = [tokens[:, :190], *(tokens[:, i : i + 1] for i in range(190, 200))]
        found = mx.concatenate([with_means(part, cache=cache) for part in parts], 1)
        errors.append(float(mx.linalg.norm(found - exact)))
        tqai.unpatch(with_means)
    assert errors[1] < 0.6 * errors[0], errors


def test_key_means_go_with_files_and_only_where_they_pay(with_means, tmp_path):
    from tqai_plugins.mlx_lm_plugin import key_means

    learned = key_means.learn(with_means, Reader())
    tqai.patch(with_means, bits_k=3, bits_v=8, cache_strategy="full", key_means=learned, layer_formats={1: "tqai_k8v8"})
    cache = make_prompt_cache(with_means)
    assert [part.options.key_mean is not None for part in cache] == [True, False], "8 bits are exact enough"
    tokens = mx.array([prompt(60)]) % 64
    with_means(tokens, cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    twin = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [part.options.key_means for part in twin] == [part.options.key_means for part in cache]
    assert mx.allclose(with_means(tokens[:, :1], cache=cache), with_means(tokens[:, :1], cache=twin))
    *rest, mean, meta = cache[0].state
    for damaged in (mean[:-1], mean * mx.inf, -mean, mx.concatenate([mean, mean[-32:]])):
        with pytest.raises(ValueError, match="this prompt cache is damaged"):
            twin[0].state = (*rest, damaged, meta)
    for given, said in (([], "expected a mapping such as"), ({0: 4}, "key_means is 4 for layer 0"), ({-1: 4}, "a layer of key_means is -1")):
        with pytest.raises(ValueError, match=said):
            tqai.patch(with_means, key_means=given)
    with_means.layers[0].self_attn.rope.traditional = True  # turns neighbouring coordinates
    tqai.patch(with_means, bits_k=3, bits_v=8, key_means=learned)
    assert [part.options.key_mean is not None for part in make_prompt_cache(with_means)] == [False, True]
    with_means.layers[1].self_attn.rope.traditional = True
    with pytest.raises(ValueError, match="no RoPE of the common form"):
        tqai.patch(with_means, bits_k=3, bits_v=8, key_means=learned)
    tqai.unpatch(with_means)

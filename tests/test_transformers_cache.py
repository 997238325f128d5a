"""The transformers cache does what DynamicCache does: every use of generate(), at 8 bits, on tiny random models."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import made_means
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.torch_kernels import codec
from tqai_plugins.transformers_plugin import Cache, vector_store
from tqai_plugins.transformers_plugin.rope import BLOCK

SIZES = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
EIGHT = {"bits_k": 8, "bits_v": 8}
STRATEGIES = {
    "residual": {"residual_window": 8},
    "full": {"cache_strategy": "full"},
    "incremental": {"cache_strategy": "incremental"},
    "key means": {"residual_window": 8, "key_means": made_means.make(3, 2, 32)},
    "key means, all coded": {"cache_strategy": "full", "key_means": made_means.make(3, 2, 32)},
}
GREEDY = {
    "plain": {},
    "several sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 16},
}
TOLERANCE = 0.5  # of a logit; those of the test models have a standard deviation of about 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="cache_strategy='incremental'")


def build(config, **options):
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


@pytest.fixture(scope="module")
def llama():
    return build(LlamaConfig(**SIZES))


@pytest.fixture(scope="module", params=STRATEGIES)
def options(request):
    return EIGHT | STRATEGIES[request.param]


def prompt(rows: int = 1, length: int = 60) -> torch.Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(rows))


def generate(model, cache, ids, **kwargs):
    torch.manual_seed(2)
    kwargs = {"do_sample": False, "max_new_tokens": 60, "attention_mask": torch.ones_like(ids)} | kwargs
    return model.generate(ids, past_key_values=cache, **kwargs)


def log_probabilities(model, tokens, mask=None):
    """What the model without any cache says of each next token, [rows, tokens - 1, vocabulary]."""
    seen = torch.ones_like(tokens)
    if mask is not None:
        seen[:, : mask.shape[1]] = mask
    with torch.no_grad():
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=seen, position_ids=positions, use_cache=False).logits
    return logits[:, :-1].log_softmax(-1)


def follows_the_model(model, cache, ids, **kwargs):
    """Greedy tokens are, up to near ties, those of the model itself: one flip would change all that follow it,
    so that equal texts cannot be asked for. A wrong cache misses by whole logits."""
    tokens = generate(model, cache, ids, **kwargs)
    assert cache.vectors_quantized and cache.vectors_dequantized  # it was read from codes
    found = log_probabilities(model, tokens, kwargs.get("attention_mask"))[:, ids.shape[1] - 1 :]
    chosen = found.gather(-1, tokens[:, ids.shape[1] :, None])[..., 0]
    assert (found.amax(-1) - chosen).max() < TOLERANCE
    return tokens


@pytest.mark.parametrize("mode", GREEDY)
def test_greedy_generation(llama, options, mode):
    rows = 1 if mode == "prompt lookup" else 2
    follows_the_model(llama, Cache(llama.config, **options), prompt(rows), **GREEDY[mode])


def test_beam_search(llama, options):
    ids, totals = prompt(2), []
    for cache in (Cache(llama.config, **options), DynamicCache(config=llama.config)):
        tokens = generate(llama, cache, ids, num_beams=4)
        found = log_probabilities(llama, tokens).gather(-1, tokens[:, 1:, None])[:, 59:]
        totals.append(found.sum(1))
    assert (totals[0] - totals[1]).abs().max() < 5  # beams may part at a near tie; unordered ones lose far more


def test_left_padding(llama, options):
    ids, mask = prompt(3), torch.ones(3, 60, dtype=torch.long)
    ids[0, :25], mask[0, :25] = 0, 0
    ids[1, :50], mask[1, :50] = 0, 0
    follows_the_model(llama, Cache(llama.config, **options), ids, attention_mask=mask)


def test_assisted_decoding(llama, options):
    assistant = copy.deepcopy(llama)
    with torch.no_grad():  # often right, often wrong: crop is called with all kinds of lengths
        assistant.lm_head.weight += 0.05 * torch.randn_like(assistant.lm_head.weight)
    follows_the_model(llama, Cache(llama.config, **options), prompt(), assistant_model=assistant)


def test_two_turns(llama, options):
    ours, ids = Cache(llama.config, **options), prompt()
    for _ in range(3):
        answer = follows_the_model(llama, ours, ids, max_new_tokens=20)
        assert ours.get_seq_length() == answer.shape[1] - 1
        ids = torch.cat([answer, prompt(1, 15)], 1)


def test_eager_attention(options):
    model = build(LlamaConfig(**SIZES), attn_implementation="eager")
    follows_the_model(model, Cache(model.config, **options), prompt(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(llama, options, dtype):
    model, ids = copy.deepcopy(llama).to(dtype), prompt(2, 80)
    ours, theirs = Cache(model.config, **options), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (ids[:, :60], *ids[:, 60:].split(1, 1)):
            a, b = (model(part, past_key_values=cache).logits.float() for cache in (ours, theirs))
    assert (a - b).norm() < 0.08 * b.norm()
    assert ours.layers[0].stores[0].exact.data.dtype == dtype


def test_sliding_window_layers_stay_the_librarys(options):
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    model = build(Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=types, query_pre_attn_scalar=32))
    cache = Cache(model.config, **options)
    assert [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers] == [True, True, False]
    follows_the_model(model, cache, prompt(2))
    follows_the_model(model, Cache(model.config, **options), prompt(1), prompt_lookup_num_tokens=4)


def test_hybrid_layers_pass_through(options):
    config = transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"])
    model = build(config)
    cache = Cache(model.config, **options)
    follows_the_model(model, cache, prompt(2))
    assert "1 of 3 layers" in repr(cache)


def states(tokens: int, rows: int = 2):
    return torch.randn(rows, 2, tokens, 32), torch.randn(rows, 2, tokens, 32)


def filled(options, rows: int = 2):
    """Our cache and DynamicCache holding the same 90 tokens."""
    caches = Cache(LlamaConfig(**SIZES), **options), DynamicCache(config=LlamaConfig(**SIZES))
    for layer in range(3):
        for new in (50, 1, 38, 1):
            k, v = states(new, rows)
            for cache in caches:
                cache.update(k, v, layer)
    return caches


def close(ours, theirs, rows: int = 2):
    """Add one token to every layer of both: lengths are equal, and all they return is close."""
    for layer in range(3):
        k, v = states(1, rows)
        assert ours.get_mask_sizes(1, layer) == theirs.get_mask_sizes(1, layer)
        for a, b in zip(ours.update(k, v, layer), theirs.update(k, v, layer)):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert (a - b).norm() < 0.01 * b.norm()
    assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("count", [0, 1, 5, 20, 60, 87, 90, 200])
def test_crop(options, count):
    ours, theirs = filled(options)
    for cache in (ours, theirs):
        cache.crop(-count)
    for _ in range(45):  # the window refills and turns to codes again
        close(ours, theirs)
    with pytest.raises(ValueError, match="crop"):
        ours.crop(3)


def test_batch_operations(options):
    ours, theirs = filled(options)
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), 2),
        (lambda cache: cache.batch_repeat_interleave(3), 6),
        (lambda cache: cache.batch_select_indices(torch.tensor([5, 0, 3])), 3),
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), 3),
    ):
        for cache in (ours, theirs):
            change(cache)
        for _ in range(35):
            close(ours, theirs, rows)


def test_reset_offload_and_prefetch(options):
    ours, theirs = filled(options)
    for layer in ours.layers:
        layer.offload()
        layer.prefetch()
    close(ours, theirs)
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.nbytes == 0
    same = filled(options)
    for a, b in zip(ours.layers, same[0].layers):
        a.update(*states(3, rows=5))  # another batch size
        assert a.get_seq_length() == 3 and b.get_seq_length() == 90


def test_stored_codes_are_the_codecs():
    cache = Cache(LlamaConfig(**SIZES), cache_strategy="full", bits_k=3, bits_v=2)
    k, v = states(70)
    cache.update(k[:, :, :50], v[:, :, :50], 0)
    cache.update(k[:, :, 50:], v[:, :, 50:], 0)
    for store, given, bits in zip(cache.layers[0].stores, (k, v), (3, 2)):
        codes, scales = codec.quantize(given, bits)
        assert torch.equal(store.codes.tokens, codes) and torch.equal(store.scales.tokens, scales)
    assert cache.vectors_quantized == 2 * 2 * 2 * 70


def test_the_window_and_the_first_tokens_are_exact():
    cache = Cache(LlamaConfig(**SIZES), bits_k=2, bits_v=2, residual_window=40, sink_tokens=3)
    k, v = states(300)
    cache.update(k[:, :, :200], v[:, :, :200], 0)
    for i in range(200, 300):
        seen = cache.update(k[:, :, i : i + 1], v[:, :, i : i + 1], 0)
        for a, b in zip(seen, (k, v)):
            differ = (a != b[:, :, : i + 1]).any(-1).any(0).any(0)
            coded = int(differ.sum())
            assert not differ[:3].any() and not differ[-40:].any() and differ[3 : 3 + coded].all()
            assert coded >= i + 1 - 3 - 40 - vector_store.BLOCK


def test_attention_over_codes_equals_attention_over_dense_states(options):
    ours, _ = filled(options | {"bits_k": 4, "bits_v": 2})
    k, v = ours.update(*states(1), 0)
    dense_k, dense_v = k + 0, v + 0
    query, some = torch.randn(2, 4, 1, 32), torch.rand(2, 1, 1, k.shape[2]) > 0.4
    some[1] = False  # a row that sees nothing
    before = ours.vectors_dequantized
    for mask in (None, some, torch.where(some, 0.0, -1e9), torch.randn(2, 4, 1, k.shape[2])):
        for scale in (None, 0.3):
            attend = torch.nn.functional.scaled_dot_product_attention
            a = attend(query, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            b = attend(query, dense_k, dense_v, attn_mask=mask, scale=scale, enable_gqa=True)
            rows = slice(0, 1) if mask is some else slice(None)
            torch.testing.assert_close(a[rows], b[rows], rtol=1e-4, atol=1e-5)
            assert a.isfinite().all()
    assert (ours.vectors_dequantized > before) == (type(k) is not torch.Tensor)


def test_nbytes_is_the_storage(options):
    cache = Cache(LlamaConfig(**SIZES), **options)
    fmt, tokens = KVFormat(8, 8, 32), 4000
    for layer in range(3):
        cache.update(*states(tokens), layer)
    codes = 3 * 2 * 2 * tokens * fmt.slot_bytes
    exact = {8: 12 + vector_store.BLOCK, 0: 0}[cache.options.window] * 3 * 2 * 2 * 2 * 32 * 4
    if cache.options.cache_strategy == "incremental":  # the dense copy is counted
        assert cache.nbytes >= codes + 3 * 2 * 2 * 2 * tokens * 32 * 4
    else:
        table = (-(-tokens // BLOCK) * BLOCK * 32 if cache.key_mean_layers else 0) + 4096  # the layers share it
        assert 0.98 * codes < cache.nbytes <= 1.02 * (codes + exact) + table


def test_storage_grows_in_amortised_constant_time():
    cache = Cache(LlamaConfig(**SIZES), residual_window=0)
    pointers, copied, size = set(), 0, 0
    for i in range(3000):
        cache.update(*states(1, rows=1), 0)
        buffer = cache.layers[0].stores[0].codes
        if buffer.data.data_ptr() not in pointers:
            pointers, copied = {buffer.data.data_ptr()}, copied + i
        size = buffer.data.shape[2]
    assert copied < 12 * 3000 and size < 1.2 * 3000 + 64


def test_peak_memory_is_one_tile(llama, monkeypatch):
    """Attention never holds more dequantized numbers than a tile, however long the cache."""
    monkeypatch.setattr(vector_store, "TILE", 2 * 32 * 64)
    largest, levels = 0, codec.levels

    def watched(packed, *args, **options):
        nonlocal largest
        out = levels(packed, *args, **options)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(codec, "levels", watched)
    cache = Cache(llama.config, **EIGHT, residual_window=8)
    follows_the_model(llama, cache, prompt(1, 200), max_new_tokens=20)
    assert largest == 2 * 32 * 64


def test_inference_mode_can_be_left_and_entered(llama, options):
    ours, theirs, ids = Cache(llama.config, **options), DynamicCache(config=llama.config), prompt(1, 100)
    for cache in (ours, theirs):
        with torch.inference_mode():
            llama(ids[:, :60], past_key_values=cache)
    with torch.no_grad():
        a, b = (llama(ids[:, 60:], past_key_values=cache).logits for cache in (ours, theirs))
    assert (a - b).norm() < 0.08 * b.norm()


def test_invalid_numbers_raise():
    cache = Cache(LlamaConfig(**SIZES), cache_strategy="full")
    k, v = states(5)
    k[0, 0, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 20 vectors hold NaN"):
        cache.update(k, v, 0)


def test_qjl_makes_inner_products_unbiased_and_costs_its_bytes(llama):
    """TurboQuant's second stage for keys: off by default, right when asked for."""
    keys, values, query = torch.randn(1, 2, 3000, 32), torch.randn(1, 2, 3000, 32), torch.randn(32)
    slopes, sizes = [], []
    for qjl in (False, True):
        cache = Cache(llama.config, bits_k=2, cache_strategy="full", use_qjl=qjl, qjl_sketch_size=128)
        seen = cache.update(keys, values, 0)[0].dense
        exact = keys @ query
        slopes.append((seen @ query * exact).sum() / (exact * exact).sum())
        sizes.append(cache.nbytes)
    assert slopes[0] < 0.92 and abs(slopes[1] - 1) < 0.03
    assert sizes[1] - sizes[0] >= 2 * 3000 * (128 // 8 + 2)


def test_generate_and_crop_with_qjl(llama):
    plain, cache = DynamicCache(config=llama.config), Cache(llama.config, use_qjl=True, residual_window=8, **EIGHT)
    expected, got = generate(llama, plain, prompt(2)), generate(llama, cache, prompt(2))
    assert (expected == got)[:, 60:80].float().mean() > 0.8
    cache.crop(-70)
    assert cache.get_seq_length() == got.shape[1] - 1 - 70
    assert torch.isfinite(llama(got[:, -3:], past_key_values=cache).logits).all()

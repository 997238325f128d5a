"""mlx-lm 0.32.2's own tests of its caches (tests/test_prompt_cache.py, MIT, Apple), adapted to ours."""

import copy

import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask, create_causal_mask
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache, trim_prompt_cache

from tqai_plugins.mlx_lm_plugin import BatchCompressedKVCache, CacheOptions, CompressedKVCache
from tqai_plugins.mlx_lm_plugin.patching import register

HEADS, DIM = 8, 64
OPTIONS = [CacheOptions(), CacheOptions(cache_strategy="full"), CacheOptions(cache_strategy="incremental")]


def ones(batch, tokens, dtype=mx.float32):
    return mx.random.normal((batch, HEADS, tokens, DIM)).astype(dtype)


def filled(tokens, options=None, dtype=mx.float32):
    cache = CompressedKVCache(options)
    if tokens:
        cache.update_and_fetch(ones(1, tokens, dtype), ones(1, tokens, dtype))
    return cache


def same(one, other) -> bool:
    return all(mx.array_equal(a, b) for a, b in zip(one.columns, other.columns))


@pytest.mark.parametrize("options", OPTIONS)
def test_save_load(tmp_path, options):
    register()
    caches = [filled(10, options) for _ in range(3)] + [KVCache(), CompressedKVCache(options)]
    caches[3].update_and_fetch(ones(1, 4), ones(1, 4))
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, caches, {"a": "b", "c": "d"})
    loaded, told = load_prompt_cache(file, return_metadata=True)
    assert told == {"a": "b", "c": "d"} and [type(c) for c in loaded] == [type(c) for c in caches]
    for cache, found in zip(caches[:3], loaded):
        assert found.offset == cache.offset == 10 and found.options.format(DIM) == cache.options.format(DIM)
        assert same(cache, found) and found.nbytes == cache.nbytes
    assert loaded[4].empty() and loaded[4].offset == 0


def test_save_load_batch(tmp_path):
    register()
    cache = BatchCompressedKVCache(None, [1, 2])
    cache.update_and_fetch(ones(2, 7), ones(2, 7))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert loaded.left_padding.tolist() == [1, 2] and loaded.offset.tolist() == [6, 5] and same(cache, loaded)


@pytest.mark.parametrize("options", OPTIONS)
def test_trim(options):
    caches = [filled(10, options) for _ in range(2)]
    assert trim_prompt_cache(caches, 7) == 7
    assert trim_prompt_cache(caches, 4) == 3, "more than remain"


@pytest.mark.parametrize("options", OPTIONS)
def test_copying(options):
    cache = [filled(10, options)]
    cache[0].update_and_fetch(ones(1, 1), ones(1, 1))
    old = copy.deepcopy(cache)
    before = [mx.array(x) for x in old[0].columns]
    trim_prompt_cache(cache, 1)
    cache[0].update_and_fetch(ones(1, 1), ones(1, 1))
    assert old[0].offset == cache[0].offset == 11
    assert all(mx.array_equal(a, b) for a, b in zip(before, old[0].columns)) and not same(old[0], cache[0])


def test_masks():
    cache = CompressedKVCache()
    assert create_attention_mask(mx.zeros((1, 4)), cache=cache, return_array=False) == "causal"
    assert mx.array_equal(create_attention_mask(mx.zeros((1, 4)), cache=cache, return_array=True), create_causal_mask(4))
    cache.update_and_fetch(ones(1, 16), ones(1, 16))
    assert create_attention_mask(mx.zeros((1, 4)), cache=cache, return_array=True).shape == (4, 20)
    assert create_attention_mask(mx.zeros((1, 1)), cache=cache) is None
    windowed = create_attention_mask(mx.zeros((1, 1, 1, 128)), cache, window_size=4)
    assert mx.array_equal(windowed, create_causal_mask(1, offset=16, window_size=4))


def test_batch():
    cache = BatchCompressedKVCache(None, [2, 3, 4])
    keys, _ = cache.update_and_fetch(ones(3, 4), ones(3, 4))
    assert keys.shape == (3, HEADS, 4, DIM)
    mx.eval(cache.state)
    cache.state = cache.state
    cache.filter([0, 1])
    assert cache.length == 2 and cache.left_padding.tolist() == [0, 1], "columns of padding are gone"
    mask = cache.make_mask(1)
    assert mask[0].squeeze().tolist() == [True, True, True] and mask[1].squeeze().tolist() == [False, True, True]


def test_offsets_are_not_changed_in_place_and_extend_aligns():
    cache = BatchCompressedKVCache(None, [0])
    captured = cache.offset
    cache.update_and_fetch(ones(1, 4), ones(1, 4))
    assert captured.tolist() == [0] and cache.offset.tolist() == [4], "gemma3n's rope, mlx-lm #1806"
    one, other = BatchCompressedKVCache(None, [2, 1, 2]), BatchCompressedKVCache(None, [3, 0])
    one.update_and_fetch(ones(3, 8), ones(3, 8))
    other.update_and_fetch(ones(2, 4), ones(2, 4))
    one.extend(other)
    assert one.keys.shape[0] == 5
    assert one.offset.tolist() == [6, 7, 6, 1, 4] and one.left_padding.tolist() == [2, 1, 2, 7, 4]


@pytest.mark.parametrize("options", OPTIONS)
def test_merge_and_extend_with_empty_caches(options):
    merged = CompressedKVCache.merge([CompressedKVCache(options), filled(4, options)])
    assert merged.keys.shape[:2] == (2, HEADS) and merged.offset.tolist() == [0, 4]
    for dtype in (mx.bfloat16, mx.float16):
        full = BatchCompressedKVCache.merge([filled(5, options, dtype), filled(3, options, dtype)])
        empty = BatchCompressedKVCache.merge([CompressedKVCache(options) for _ in range(3)])
        assert empty.empty() and empty.offset.tolist() == [0, 0, 0]
        empty.extend(full)
        full.extend(BatchCompressedKVCache.merge([CompressedKVCache(options) for _ in range(3)]))
        for batch, offsets in ((empty, [0, 0, 0, 5, 3]), (full, [5, 3, 0, 0, 0])):
            assert batch.offset.tolist() == offsets and batch.keys.shape[0] == 5
            batch.prepare(lengths=[10, 8, 12, 7, 11], right_padding=[2, 4, 0, 5, 1])
            keys, _ = batch.update_and_fetch(ones(5, 12, dtype), ones(5, 12, dtype))
            batch.finalize()
            assert keys.dtype == dtype and batch.recent is None or batch.recent.dtype == dtype
            assert batch.offset.tolist() == [o + n for o, n in zip(offsets, [10, 8, 12, 7, 11])]


def test_what_mlx_lm_must_not_find():
    """to_quantized would be called under --kv-bits, and bits would choose another attention."""
    cache = CompressedKVCache()
    assert not hasattr(cache, "to_quantized") and not hasattr(cache, "bits")

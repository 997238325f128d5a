"""vector_values in mlx-lm's caches: what is stored, and that codes of one kind are never read as the other."""

import copy

import numpy as np
import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_models
import tqai
from golden_vectors import assert_matches
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from test_mlx_cache import greedy, prompt
from tqai_plugins.metal_kernels import codec

from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.mlx_lm_plugin import BatchCompressedKVCache, CacheOptions, CompressedKVCache

FMT = KVFormat(4, 2, 64, vector_values=True)


@pytest.fixture
def llama():
    model, _ = mlx_models.load("llama")
    yield model
    tqai.unpatch(model)


def filled(options: CacheOptions, seed: int = 0, length: int = 9) -> CompressedKVCache:
    cache = CompressedKVCache(options)
    cache.update_and_fetch(*(mx.random.normal((1, 2, length, 64), key=mx.random.key(seed + i)) for i in (1, 2)))
    return cache


def test_the_models_values_are_stored_so_and_its_keys_as_ever(llama):
    tqai.patch(llama, vector_values=True)
    seen, cache = [], make_prompt_cache(llama)
    plain = type(cache[0]).update_and_fetch
    cache[0].update_and_fetch = lambda k, v: seen.append((k, v)) or plain(cache[0], k, v)
    llama(mx.array([prompt(40)]), cache=cache)
    slots = np.array(cache[0].columns[0][:, :, :40]).view(np.uint8)
    scales = slots[..., -4:].view(np.float16)
    (keys, values) = (np.array(x, np.float32) for x in seen[0])
    assert_matches(keys, 4, slots[..., : FMT.k_bytes], scales[..., 0])
    assert_matches(values, 2, slots[..., FMT.k_bytes : -4], scales[..., 1], vector=True)
    assert slots.shape[-1] == KVFormat(4, 2, 64).slot_bytes


@pytest.mark.parametrize("strategy", ["residual", "full", "incremental"])
def test_a_saved_cache_goes_on_as_it_was(llama, tmp_path, strategy):
    tqai.patch(llama, vector_values=True, residual_window=16, cache_strategy=strategy)
    cache = make_prompt_cache(llama)
    greedy(llama, prompt(60), 3, cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    expected = greedy(llama, [9], 6, copy.deepcopy(cache))
    found = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert found[0].options.vector_values and found[0].options.format(64) == FMT
    assert greedy(llama, [9], 6, found) == expected
    tqai.patch(llama, residual_window=16, cache_strategy=strategy)  # the file says what it holds, whatever is patched now
    assert greedy(llama, [9], 6, load_prompt_cache(str(tmp_path / "cache.safetensors"))) == expected


@pytest.mark.parametrize("vector", [True, False])
def test_a_state_that_says_the_other_kind_is_refused(vector):
    cache = filled(CacheOptions(vector_values=vector))
    *rest, meta = cache.state
    other = tuple(meta)[:9] + (() if vector else (True,))
    with pytest.raises(ValueError, match="was written with other codebooks than this process uses"):
        CompressedKVCache().state = (*rest, other)
    with pytest.raises(ValueError, match="tqai's format"):
        CompressedKVCache().state = (*rest, (*meta, True, True))


def test_caches_without_vector_values_are_saved_as_before():
    """So that a version without them reads the files; one with them is longer, which such a version refuses."""
    assert [len(filled(CacheOptions(vector_values=vector)).state[-1]) for vector in (False, True)] == [9, 10]


def test_kinds_are_not_merged_nor_joined():
    plain, vector = filled(CacheOptions()), filled(CacheOptions(vector_values=True))
    with pytest.raises(ValueError, match="different formats"):
        BatchCompressedKVCache.merge([plain, vector])
    batch = BatchCompressedKVCache.merge([plain, filled(CacheOptions(), 5)])
    with pytest.raises(ValueError, match="different formats"):
        batch.extend(BatchCompressedKVCache.merge([vector]))


def test_batches_trims_and_copies_keep_the_kind_and_the_codes():
    options = CacheOptions(vector_values=True, residual_window=4)
    caches = [filled(options, 0, 9), filled(options, 7, 20)]
    batch = BatchCompressedKVCache.merge(caches)
    batch.trim(2)
    batch.filter([1, 0])
    for row, cache in ((1, caches[0]), (0, caches[1])):
        found, expected = copy.deepcopy(batch.extract(row)), copy.deepcopy(cache)
        expected.trim(2)
        assert found.options == options and found.length == expected.length
        for a, b in zip(*(codec.load(x.columns[0][:, :, : x.length], x.options.format(64)) for x in (found, expected))):
            assert mx.array_equal(a, b)


def test_logits_are_closer_to_the_uncompressed_models(llama):
    logits = lambda: np.array(llama(mx.array([prompt(200)]), cache=make_prompt_cache(llama))[0], np.float32)
    exact, error = logits(), []
    for vector in (False, True):
        tqai.patch(llama, bits_k=8, bits_v=2, cache_strategy="full", vector_values=vector)
        error.append(np.linalg.norm(logits() - exact))
        tqai.unpatch(llama)
    assert error[1] < 0.97 * error[0]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"vector_values": 1}, "vector_values is 1; allowed are True and False"),
        ({"vector_values": True, "bits_v": 4}, "vector_values is True but bits_v is 4; it is allowed with 2 bits alone"),
        ({"vector_values": True, "layer_formats": {1: "tqai_k4v3"}}, "bits_v is 3 in layer 1; it is allowed with 2 bits alone"),
    ],
)
def test_bad_options_are_refused(llama, options, said):
    with pytest.raises(ValueError, match=said):
        tqai.patch(llama, **options)

"""Small models decode end to end through the Metal kernels' own text, on the CPU, as through plain mx operations."""

import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")
if shutil.which("g++") is None:
    pytest.skip("needs g++ to compile Metal source for the CPU", allow_module_level=True)

import metal_shim
import mlx_models
import tqai
from mlx_lm.models.cache import make_prompt_cache
from test_mlx_cache import batched, greedy, prompt

from tqai_plugins.mlx_lm_plugin import CompressedKVCache, key_means


@pytest.mark.parametrize(
    "kind, options",
    [("llama", {"residual_window": 16}), ("gemma3_text", {"residual_window": 16}), ("llama32", {"cache_strategy": "full"}),
     ("gpt_oss", {"bits_k": 3, "bits_v": 3, "residual_window": 8}),
     ("llama32", {"bits_k": 2, "bits_v": 8, "residual_window": 8, "key_means": True})],
)  # fmt: skip
def test_batches_with_a_late_joiner_give_the_same_tokens(monkeypatch, kind, options):
    model, tokenizer = mlx_models.load(kind)
    if "key_means" in options:
        options = options | {"key_means": key_means.learn(model, tokenizer)}
    tqai.patch(model, **options)
    caches = [cache for cache in make_prompt_cache(model) if isinstance(cache, CompressedKVCache)]
    assert any(cache.options.key_mean for cache in caches) == ("key_means" in options)
    requests, late = [(prompt(37), 9), (prompt(60), 6), (prompt(2), 7)], [(prompt(48), 6)]
    expected = batched(model, requests, late)
    launched = []

    def run(name, inputs, *rest, **options):
        launched.append((name, np.array(inputs["rows"])[0].tolist() if "rows" in inputs else None))
        return metal_shim.launch(name, inputs, *rest, **options)

    metal_shim.install(monkeypatch, run)
    assert batched(model, requests, late) == expected
    padded = [padding for name, padding in launched if name == "decode_attention" and any(padding)]
    assert {name for name, _ in launched} == {"store", "dequantize", "decode_attention", "merge"}
    assert len(padded) >= 5, "decode steps of a batch with left padding went through the kernel"
    assert greedy(model, prompt(20), 4)
    tqai.unpatch(model)

"""Compressed activations on MLX models: what changes, and that nothing stays."""

import argparse
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_models
import tqai
from mlx_lm.models.cache import make_prompt_cache

from tqai_plugins.core import reference
from tqai_plugins.core.activations import CONFIGS, group_size
from tqai_plugins.core.codebook import Codebook, shipped
from tqai_plugins.mlx_lm_plugin import CompressedKVCache
from tqai_plugins.mlx_lm_plugin.activations import round_trip

TOKENS = np.random.default_rng(0).integers(5, 250, 200)


def logits(model) -> np.ndarray:
    return np.array(model(mx.array(TOKENS[None]), cache=make_prompt_cache(model))[0], np.float32)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("which", ["hidden", "ffn"])
def test_more_bits_come_closer_and_nothing_stays(kind, which):
    from tqai_plugins.mlx_lm_plugin import activations

    model, _ = mlx_models.load(kind)
    stock, classes = logits(model), [type(module) for _, module in model.named_modules()]
    errors = []
    for bits in (8, 6, 4, 2):
        activations.install(model, activations.Activations(**{f"compress_{which}": True, f"bits_{which}": bits}))
        errors.append(np.linalg.norm(logits(model) - stock) / np.linalg.norm(stock))
    assert 0 < errors[0] < 0.1 and errors == sorted(errors)
    activations.uninstall(model)
    assert [type(module) for _, module in model.named_modules()] == classes
    assert np.array_equal(logits(model), stock)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_composes_with_the_cache(name):
    model, _ = mlx_models.load("llama")
    stock = logits(model)
    tqai.patch(model, config=name)
    cache = make_prompt_cache(model)[0]
    assert isinstance(cache, CompressedKVCache)
    assert not np.array_equal(logits(model), stock)
    tqai.unpatch(model)
    assert np.array_equal(logits(model), stock)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_numbers_are_those_of_the_reference(bits):
    x = np.random.default_rng(bits).standard_normal((5, 7, 320)).astype(np.float32)
    x[0, 0] = 0
    groups = x.reshape(5, 7, -1, group_size(320))
    expected = reference.dequantize(*reference.quantize(groups, bits), bits, groups.shape[-1]).reshape(x.shape)
    found = np.array(round_trip(mx.array(x), bits))
    # Sums in another order may choose another of two equally good scales.
    assert np.mean(np.abs(found - expected).max(-1) < 1e-6) > 0.9
    assert np.isclose(((found - x) ** 2).sum(), ((expected - x) ** 2).sum(), rtol=1e-3)


def test_a_preset_gives_each_layer_its_widths(tmp_path):
    from tqai_plugins.core.preset import Preset
    from tqai_plugins.mlx_lm_plugin import server

    Preset("llama", 2, 64, ((0, "tqai_k8v4"), (1, "tqai_k3v2"))).write(tmp_path / "p.json", {})
    model, _ = mlx_models.load("llama")
    tqai.patch(model, config=tmp_path / "p.json")
    assert [(c.options.bits_k, c.options.bits_v) for c in make_prompt_cache(model)] == [(8, 4), (3, 2)]
    logits(model)
    tqai.unpatch(model)
    parser = argparse.ArgumentParser()
    server.add_options(parser)
    options = server.cache_options(parser.parse_args(["--kv-cache-dtype", str(tmp_path / "p.json")]))
    assert options["layer_formats"] == {0: "tqai_k8v4", 1: "tqai_k3v2"}
    for formats, sentence in (({2: "tqai"}, "layer 2, which is no full-attention layer"), ({0: "tqai_k6v2"}, "bits_k is 6")):
        with pytest.raises(ValueError, match=sentence):
            tqai.patch(model, layer_formats=formats)


def test_refused():
    model, _ = mlx_models.load("llama")
    with pytest.raises(ValueError, match="config is 'all9'; expected one of kv-only"):
        tqai.patch(model, config="all9")
    with pytest.raises(ValueError, match="bits_ffn is 1"):
        tqai.patch(model, compress_ffn=True, bits_ffn=1)
    tqai.unpatch(model)


def test_a_codebook_file(tmp_path):
    """In a process of its own, which keeps it; the state of a cache names it."""
    model, _ = mlx_models.load("llama")
    head_dim = model.args.head_dim
    numbers = tuple(m + 0.5 for m in (3, 9, 20, 30, 50, 70, 90, 120))
    book = Codebook(head_dim, 4, numbers, shipped(head_dim, 4).unit, "crowded")
    book.write(tmp_path / "book.json", {})
    with pytest.raises(ValueError, match=f"'crowded' is for head_dim {head_dim} at 4 bits, but this cache has .* with 2, 3 bits"):
        tqai.patch(model, bits_k=3, codebook=tmp_path / "book.json")
    code = (
        "import sys, mlx.core as mx, mlx_lm, tqai; from mlx_lm.models.cache import make_prompt_cache\n"
        "model, _ = mlx_lm.load(sys.argv[1]); tqai.patch(model, codebook=sys.argv[2]); cache = make_prompt_cache(model)\n"
        "model(mx.array([[1, 2, 3]]), cache=cache); print(cache[0].state[-1][-1])"
    )
    command = [sys.executable, "-c", code, str(mlx_models.folder_of("llama")), str(tmp_path / "book.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{book.digest}-{shipped(head_dim, 2).digest}\n"

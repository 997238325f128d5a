"""tqai.patch, unpatch and Cache: what is returned, and what is refused in which words."""

import subprocess
import sys
import types

import pytest
import tqai

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**CONFIG)).eval()


def test_patch_gives_a_cache_that_generate_takes(model):
    before = dict(vars(model)), dict(vars(model.config))
    cache = tqai.patch(model, bits_k=4, bits_v=2)
    assert isinstance(cache, tqai.Cache)
    ids = torch.randint(1, 50, (1, 200))
    out = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert out.shape == (1, 210) and cache.get_seq_length() == 209
    # 2 layers, keys and values, one head: all of the prompt but 4 first and 128 last tokens is coded.
    assert cache.vectors_quantized == 2 * 2 * (200 - 132)
    assert cache.vectors_dequantized == 9 * cache.vectors_quantized
    assert dict(vars(model)) == before[0] and dict(vars(model.config)) == before[1]
    assert tqai.unpatch(model) is None


def test_the_defaults_are_the_documented_ones(model):
    said = {"bits_k": 4, "bits_v": 2, "cache_strategy": "auto", "residual_window": 128, "use_qjl": False}
    assert tqai.patch(model).options == tqai.patch(model, **said).options
    assert tqai.patch(model).options.sinks == 4 and tqai.patch(model, cache_strategy="full").options.sinks == 0


@pytest.mark.parametrize(
    "options, said",
    [
        ({"bits_k": 0}, "bits_k is 0; allowed are the whole numbers 1 to 8"),
        ({"bits_v": 9}, "bits_v is 9; allowed are the whole numbers 1 to 8"),
        ({"bits_v": 2.0}, "bits_v is 2.0; allowed"),
        ({"bits_k": True}, "bits_k is True; allowed"),
        ({"sink_tokens": -1}, "sink_tokens is -1; allowed are whole numbers from 0"),
        ({"residual_window": "128"}, "residual_window is '128'; allowed are whole numbers from 0"),
        ({"cache_strategy": "fast"}, "cache_strategy is 'fast'; allowed are auto, residual, full, incremental"),
        ({"qjl_sketch_size": 0}, "qjl_sketch_size is 0; allowed"),
        ({"use_qjl": 1}, "use_qjl is 1; allowed are True and False"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed are 'auto', 'torch' and 'mlx'"),
        ({"backend": "mlx"}, "pip install 'tqai\\[mlx\\]'"),
        ({"bit_k": 4}, "unknown option 'bit_k'; allowed are bits_k, bits_v"),
        ({"device": "warp"}, "device is 'warp'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(model, options, said):
    with pytest.raises(ValueError, match=said):
        tqai.patch(model, **options)


def test_a_device_that_is_not_the_models(model):
    with pytest.raises(ValueError, match="device is 'meta' but the model is on 'cpu'"):
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=tqai.patch(model, device="meta"))


def test_models_that_cannot_be_compressed():
    with pytest.raises(ValueError, match="t5 is an encoder-decoder model"):
        tqai.Cache(transformers.T5Config())
    mistral = transformers.MistralConfig(**CONFIG, sliding_window=16)
    with pytest.raises(ValueError, match="mistral has no full-attention layer to compress, only DynamicSlidingWindow"):
        tqai.Cache(mistral)
    with pytest.raises(ValueError, match="model is a dict; expected a transformers or an MLX language model"):
        tqai.patch({})


def test_incremental_warns_that_it_saves_nothing(model):
    with pytest.warns(UserWarning, match="saves no memory") as caught:
        tqai.patch(model, cache_strategy="incremental")
    assert len(caught) == 1


def test_mlx_models_go_to_the_mlx_plugin(monkeypatch):
    """Only the routing: the plugin itself is tested with MLX."""
    called = []
    hooks = types.SimpleNamespace(install=lambda model, which: called.append(which.any), uninstall=lambda model: None)
    plugin = types.SimpleNamespace(
        install=lambda model, **options: called.append(options), uninstall=lambda model: called.append("uninstall"),
        activations=hooks,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "tqai_plugins.mlx_lm_plugin", plugin)
    monkeypatch.setattr("tqai_plugins.mlx_lm_plugin", plugin, raising=False)
    mlx_model = type("Model", (), {"__module__": "mlx.nn.layers.base"})()
    tqai.patch(mlx_model, bits_k=3, backend="mlx")
    tqai.unpatch(mlx_model)
    assert called == [{"bits_k": 3}, False, "uninstall"]
    with pytest.raises(ValueError, match="this is an MLX model"):
        tqai.patch(mlx_model, backend="torch")


def test_importing_tqai_imports_no_framework():
    code = "import sys, tqai; sys.exit(' '.join({'torch', 'mlx', 'vllm', 'transformers', 'triton'} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)

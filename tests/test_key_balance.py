"""The balance of keys and queries: what it is worth, and that scores stay what they are."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tqai

from tqai_plugins.core import key_balance
from tqai_plugins.torch_kernels import codec

HEAD_DIM = 64


def of_gains(queries, keys):
    """For vectors whose coordinates have these root mean squares."""
    return key_balance.exponents(*(key_balance.pair_squares(x) for x in (queries, keys)))


def test_it_takes_noise_from_scores_and_leaves_them_as_they_are():
    g = torch.Generator().manual_seed(0)
    gain = torch.logspace(-1, 1, HEAD_DIM // 2).repeat(2)
    q, k = torch.randn(256, HEAD_DIM, generator=g) / gain, torch.randn(256, HEAD_DIM, generator=g) * gain
    exponents = of_gains(1 / gain, gain)
    s = torch.from_numpy(key_balance.factors(exponents)).float()
    assert (exponents == np.sort(exponents)).all() and s.min() == 0.125 and s.max() == 8
    assert torch.equal((q.bfloat16() * s) * (k.bfloat16() / s), q.bfloat16().float() * k.bfloat16().float()), "nothing is rounded"
    read = lambda x: codec.dequantize(*codec.quantize(x, 4), 4, HEAD_DIM)
    noise, balanced = (((q * by) @ read(k / by).T - q @ k.T).square().mean().item() for by in (torch.ones(1), s))
    assert balanced < 0.1 * noise


def test_pairs_that_rope_turns_share_theirs():
    q, k = np.random.default_rng(0).random((2, HEAD_DIM))
    s = key_balance.factors(of_gains(q, k))
    assert (s[: HEAD_DIM // 2] == s[HEAD_DIM // 2 :]).all()


def test_unused_coordinates_and_balanced_ones_are_no_trouble():
    q, k = np.ones((2, HEAD_DIM))
    assert not of_gains(q, k).any() and not of_gains(0 * q, 0 * k).any()
    q[:40] = 0
    assert np.abs(of_gains(q, k)).max() <= key_balance.LARGEST
    q, k = np.exp(np.random.default_rng(1).standard_normal((2, HEAD_DIM)))
    s = key_balance.factors(of_gains(q, k))
    assert not of_gains(q * s, k / s).any(), "done again, it changes nothing"


def qk_norm_model(name):
    """A small model of a kind whose heads norm queries and keys, with weights of its norms that are out of balance."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, head_dim=HEAD_DIM, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    for layer in model.model.layers:
        gain = torch.logspace(-1, 1, HEAD_DIM // 2, base=8).repeat(2)
        offset = 1 if name.startswith("Gemma") else 0
        layer.self_attn.q_norm.weight.data.copy_(2 / gain - offset)
        layer.self_attn.k_norm.weight.data.copy_(2 * gain - offset)
    return model


@pytest.mark.parametrize("name", ["Gemma3Text", "Qwen3"])
def test_a_transformers_cache_is_closer_in_balance(name):
    model = qk_norm_model(name)
    cache = tqai.patch(model, bits_k=3, bits_v=8, cache_strategy="full")
    factors = cache.options.key_factors
    assert sorted(factors) == [0, 1] and min(factors[0]) < 0.3 and max(factors[1]) > 3
    tokens = torch.randint(0, 64, (1, 300), generator=torch.Generator().manual_seed(0))
    errors = []
    for given in ({}, {"key_factors": None}):
        cache = tqai.patch(model, bits_k=3, bits_v=8, cache_strategy="full", **given)
        errors.append((model(tokens, past_key_values=cache).logits - model(tokens).logits).norm())
    assert errors[0] < 0.6 * errors[1]


def test_codes_in_balance_read_alike_with_and_without_numbers():
    """Scores of a few queries are taken from codes; anything else sees dense keys."""
    from tqai_plugins.transformers_plugin import Cache
    from tqai_plugins.transformers_plugin.stored_states import StoredStates

    model = qk_norm_model("Qwen3")
    factors = {0: tuple(2.0 ** (i % 5 - 2) for i in range(HEAD_DIM))}
    g = torch.Generator().manual_seed(1)
    k, v, q = (torch.randn(1, heads, n, HEAD_DIM, generator=g) for heads, n in ((2, 200), (2, 200), (4, 1)))
    for more in ({}, {"use_qjl": True}, {"cache_strategy": "incremental"}):
        cache = Cache(model.config, bits_k=4, bits_v=4, key_factors=factors, **{"cache_strategy": "full"} | more)
        keys, values = cache.update(k, v, 0)
        dense = keys.dense if isinstance(keys, StoredStates) else keys
        assert (dense - k).norm() < 0.5 * k.norm()
        sdpa = torch.nn.functional.scaled_dot_product_attention
        values = values.dense if isinstance(values, StoredStates) and not isinstance(keys, StoredStates) else values
        expected = sdpa(q, dense, getattr(values, "dense", values), enable_gqa=True)
        torch.testing.assert_close(sdpa(q, keys, values, enable_gqa=True), expected, rtol=1e-4, atol=1e-5)


def test_models_without_such_norms_and_keys_of_8_bits_have_none():
    from tqai_plugins.transformers_plugin import key_balance as of_norms

    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    assert of_norms.of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))) == {}
    cache = tqai.patch(qk_norm_model("Qwen3"), bits_k=4, layer_formats={1: "tqai_k8v4"})
    assert [layer.factors is None for layer in cache.layers] == [False, True]
    with pytest.raises(ValueError, match="key_factors has 2 for a layer of head_dim 64"):
        x = torch.zeros(1, 2, 1, HEAD_DIM)
        tqai.patch(qk_norm_model("Qwen3"), key_factors={0: (1.0, 2.0)}).update(x, x, 0)

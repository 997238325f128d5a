"""The balance of keys and queries in the weights of vLLM's norms."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")

import numpy as np
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.vllm_plugin import key_balance

pytestmark = pytest.mark.vllm
HEAD_DIM = 64


@pytest.fixture(autouse=True)
def current_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def attention(kind=RMSNorm, size=HEAD_DIM, bits_k=4):
    """A module as vLLM's models have them, of a layer that is compressed."""
    module = torch.nn.Module()
    module.q_norm, module.k_norm = kind(size).bfloat16(), kind(size).bfloat16()
    module.rotary_emb = SimpleNamespace(cos_sin_cache=torch.zeros(8, HEAD_DIM), is_neox_style=True)
    module.attn = torch.nn.Module()
    module.attn.layer_name, module.attn.head_size = "layer", HEAD_DIM
    module.attn.impl = SimpleNamespace(fmt=KVFormat(bits_k, 4, HEAD_DIM), kv_sharing_target_layer_name=None)
    g = torch.Generator().manual_seed(0)
    for norm in (module.q_norm, module.k_norm):
        if isinstance(norm.weight, torch.nn.Parameter):
            norm.weight.data.copy_(torch.randn(norm.weight.shape, generator=g).exp())
    return module


def config(module, **changes):
    layers = {"layer": module.attn, **changes.pop("layers", {})}
    given = {"additional_config": {}, "speculative_config": None} | changes
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers), **given)


def gains(module):
    return [norm.weight.detach().float() + (type(norm) is GemmaRMSNorm) for norm in (module.q_norm, module.k_norm)]


@pytest.mark.parametrize("kind", [GemmaRMSNorm, RMSNorm])
def test_queries_take_what_keys_give(kind):
    module = attention(kind)
    module.q_norm.weight.data[5] = -1 if kind is GemmaRMSNorm else 0  # a coordinate that is not used
    before = gains(module)
    assert key_balance.layers(module, config(module)) == {module.attn: module}
    key_balance.balance(module, None)
    q, k = gains(module)
    both = before[0] * before[1]
    assert not torch.equal(q, before[0]) and (q * k - both).square().sum() < 1e-5 * both.square().sum(), "8-bit codes: 6e-5"
    if kind is RMSNorm:
        assert torch.equal(q * k, both), "powers of two round nothing"
    key_balance.balance(module, None)
    assert torch.equal(gains(module)[0], q) and torch.equal(gains(module)[1], k), "once is enough"


def test_what_a_text_says_counts_before_what_the_weights_say():
    module = attention()
    before = gains(module)
    squares = np.ones((2, HEAD_DIM // 2))
    squares[1, 3] = 16**2  # keys are large there
    key_balance.balance(module, squares)
    s = torch.ones(HEAD_DIM)
    s[[3, 3 + HEAD_DIM // 2]] = 4
    assert torch.equal(gains(module)[0], before[0] * s) and torch.equal(gains(module)[1], before[1] / s)


def test_what_it_must_leave_alone():
    reader = SimpleNamespace(impl=SimpleNamespace(kv_sharing_target_layer_name="layer"))
    for module, changes in (
        (attention(size=2 * HEAD_DIM), {}),  # one norm over all heads
        (attention(lambda size: RMSNorm(size, has_weight=False)), {}),
        (attention(torch.nn.LayerNorm), {}),
        (attention(bits_k=8), {}),
        (attention(), {"additional_config": {"tqai": {"key_mean": False}}}),
        (attention(), {"speculative_config": SimpleNamespace(method="eagle")}),
        (attention(), {"layers": {"reader": reader}}),  # whose queries are not multiplied
    ):
        assert not key_balance.layers(module, config(module, **changes))
    uncompressed = attention()
    uncompressed.attn.impl = SimpleNamespace()
    assert not key_balance.layers(uncompressed, config(uncompressed))

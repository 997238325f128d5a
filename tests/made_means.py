"""Key means of any model's layers, for tests of caches: used whatever they are worth."""

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from tqai_plugins.core.key_mean import LayerMeans
from tqai_plugins.transformers_plugin.key_means import TurnedMeans
from tqai_plugins.transformers_plugin.rope import Rope


class Always(TurnedMeans):
    def pays(self, bits_k: int, bits_v: int) -> bool:
        return True


def make(layers: int, heads: int, head_dim: int, size: float = 1.0) -> dict[int, TurnedMeans]:
    """layer -> random means whose coordinates are of this size, turned by a Llama's RoPE."""
    random = np.random.default_rng(0)
    sizes = {"vocab_size": 8, "hidden_size": head_dim, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    rope = Rope(LlamaForCausalLM(LlamaConfig(**sizes)), None, head_dim)
    measured = lambda: LayerMeans(size * random.standard_normal((heads, head_dim)), np.ones(heads), np.ones((2, head_dim // 2)))
    return {layer: Always(measured(), rope) for layer in range(layers)}

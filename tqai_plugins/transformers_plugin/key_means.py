"""The mean key of each layer of a transformers model, for a converted folder (core/key_mean.py)."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache

from tqai_plugins.core import key_mean
from tqai_plugins.core.texts import PROSE


@torch.no_grad()
def learn(model, tokenizer) -> dict[int, np.ndarray]:
    """layer -> float [kv_heads, head_dim], before RoPE, while the model reads a built-in text. ValueError for a model
    whose RoPE does not turn all pairs (i, i + head_dim / 2) by one position."""
    tokens = tokenizer(PROSE, return_tensors="pt").input_ids[:, : key_mean.TOKENS].to(model.device)
    cache = DynamicCache()
    model(tokens, past_key_values=cache, use_cache=True)
    positions = torch.arange(tokens.shape[1], device=model.device)[None]
    means = {}
    for number, layer in enumerate(cache.layers):
        keys = layer.keys[0].transpose(0, 1).float()
        cos, sin = (x.cpu().numpy() for x in _half_turns(model, number, keys, positions))
        means[number] = key_mean.mean_before_rope(keys.cpu().numpy(), cos, sin)
    return means


def _half_turns(model, layer: int, keys: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """cos and sin [tokens, head_dim / 2] of a layer's RoPE."""
    config = model.config.get_text_config()
    rope = getattr(getattr(model, "model", None), "rotary_emb", None)
    kinds = getattr(config, "layer_types", None)
    kind = [kinds[layer]] if kinds and hasattr(rope, f"{kinds[layer]}_inv_freq") else []
    turns = rope(keys, positions, *kind) if rope is not None else None
    if turns is None or turns[0].shape != (1, len(keys), keys.shape[-1]):
        raise ValueError(f"{config.model_type} models have no RoPE of the common form, so no key means; convert without --key-means")
    return [x[0, :, : keys.shape[-1] // 2].float() for x in turns]

"""The mean key of each layer of a transformers model, for a converted folder (core/key_mean.py)."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tqai_plugins.core import key_mean
from tqai_plugins.core.key_mean import LayerMeans
from tqai_plugins.core.texts import PROSE

NAME = "tqai_key_means"


@torch.no_grad()
def learn(model, tokenizer) -> dict[int, LayerMeans]:
    """Layer -> its means, while the model reads a built-in text. ValueError for a model whose RoPE does not turn all
    pairs (i, i + head_dim / 2) by one position."""
    vocabulary = model.config.get_text_config().vocab_size
    text = key_mean.choose_tokens(tokenizer(PROSE).input_ids, vocabulary, key_mean.TOKENS)
    tokens = torch.tensor([text], device=model.device)
    positions = torch.arange(tokens.shape[1], device=model.device)[None]
    found: dict[int, LayerMeans] = {}

    def attention(module, query, key, value, *args, scaling=None, **kwargs):
        keys = key[0].transpose(0, 1).float()
        cos, sin = (x.cpu().numpy() for x in _half_turns(model, module.layer_idx, keys, positions))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries = query[0].transpose(0, 1).float().cpu().numpy()
        found[module.layer_idx] = key_mean.measure(keys.cpu().numpy(), queries, cos, sin, scale)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, scaling=scaling, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        model(tokens, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return found


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

"""Balance of keys and queries (core/key_balance.py) in the weights of a served model's norms."""

from __future__ import annotations

import numpy as np
import torch
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from tqai_plugins.core import key_balance
from tqai_plugins.core.key_mean import may_pay

from .options import Options

NAMES = ("q_norm", "k_norm")


def layers(model: torch.nn.Module, config) -> dict[torch.nn.Module, torch.nn.Module]:
    """The compressed attention layers that can be balanced, each with the module that it is part of."""
    if not Options.of(config).key_mean:
        return {}
    return {layer: module for module in model.modules() for layer in module.children() if _can(layer, module, config)}


def _can(layer: torch.nn.Module, module: torch.nn.Module, config) -> bool:
    """Whether a module is the attention around a compressed layer, and nothing but its own queries reads its keys."""
    fmt = getattr(getattr(layer, "impl", None), "fmt", None)
    if fmt is None or not may_pay(fmt) or not is_plain(getattr(module, "rotary_emb", None), layer.head_size):
        return False
    drafts = config.speculative_config is not None and config.speculative_config.method not in ("ngram", "suffix")
    return not drafts and layer.layer_name not in _lent(config) and _has_norms(module, layer.head_size)


def is_plain(rope, head_dim: int, positions: int = 0) -> bool:
    """Whether it turns all pairs (i, i + head_dim / 2) by one position, and knows so many positions."""
    cache = getattr(rope, "cos_sin_cache", None)
    return (
        isinstance(cache, torch.Tensor)
        and getattr(rope, "is_neox_style", False)
        and not hasattr(rope, "mrope_section")
        and cache.shape[1] == head_dim
        and cache.shape[0] >= positions
    )


def _lent(config) -> set[str | None]:
    """Names of the layers whose keys other layers read, and of those themselves."""
    names: set[str | None] = set()
    for name, layer in config.compilation_config.static_forward_context.items():
        owner = getattr(getattr(layer, "impl", None), "kv_sharing_target_layer_name", None)
        names |= {owner, name} if owner else set()
    return names


def _has_norms(module: torch.nn.Module, head_dim: int) -> bool:
    """Whether it norms the queries and the keys of each head, by weights that all heads share."""
    of_head = lambda norm: type(norm) in (GemmaRMSNorm, RMSNorm) and norm.weight.shape == (head_dim,)
    norms = [getattr(module, name, None) for name in NAMES]
    return all(of_head(norm) and isinstance(norm.weight, torch.nn.Parameter) for norm in norms)  # type: ignore[union-attr]


@torch.no_grad()
def balance(module: torch.nn.Module, squares: np.ndarray | None) -> None:
    """Multiply the queries of an attention module and divide its keys, by their squares (LayerMeans) [2, head_dim / 2],
    or without such by the weights of their norms.

    Gemma's weights are one less than what they multiply by, so that they are rounded: the keys' make up for the queries'.
    """
    queries, keys = (getattr(module, name) for name in NAMES)
    before = _gain(queries), _gain(keys)
    if squares is None:
        squares = key_balance.pair_squares(torch.stack(before).cpu().numpy())
    s = key_balance.factors(key_balance.exponents(*squares))
    by = torch.tensor(s, dtype=torch.float32, device=before[0].device)
    _set_gain(queries, before[0] * by)
    now = _gain(queries)
    _set_gain(keys, torch.where(now == 0, before[1] / by, before[0] * before[1] / now))


def _offset(norm: torch.nn.Module) -> int:
    return 1 if type(norm) is GemmaRMSNorm else 0


def _gain(norm: torch.nn.Module) -> torch.Tensor:
    """What it multiplies by, float32 [head_dim]."""
    return norm.weight.float() + _offset(norm)


def _set_gain(norm: torch.nn.Module, gain: torch.Tensor) -> None:
    norm.weight.copy_(gain - _offset(norm))

"""Balance of keys and queries (core/key_balance.py) in the norms of a served model, once its weights are there. What is off
with --additional-config '{"tqai": {"key_mean": false}}'."""

from __future__ import annotations

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from tqai_plugins.core import key_balance
from tqai_plugins.core.key_mean import may_pay

from .key_mean import is_plain
from .options import Options

logger = init_logger("vllm.tqai")

NAMES = ("q_norm", "k_norm")


def apply(model: torch.nn.Module, config) -> set[torch.nn.Module]:
    """Balance the compressed layers of `model` that norm each head's queries and keys; returns them, and says so in the log."""
    if not Options.of(config).key_mean:
        return set()
    found = {layer: module for module in model.modules() for layer in module.children() if _can(layer, module, config)}
    for module in found.values():
        scale(module)
    if found:
        logger.info("tqai: the keys of %d layers are in balance with their queries, by the weights of their norms", len(found))
    return set(found)


def _can(layer: torch.nn.Module, module: torch.nn.Module, config) -> bool:
    """Whether a module is the attention around a compressed layer, and nothing but its own queries reads its keys."""
    fmt = getattr(getattr(layer, "impl", None), "fmt", None)
    if fmt is None or not may_pay(fmt) or not is_plain(getattr(module, "rotary_emb", None), layer.head_size):
        return False
    drafts = config.speculative_config is not None and config.speculative_config.method not in ("ngram", "suffix")
    return not drafts and layer.layer_name not in _lent(config) and _has_norms(module, layer.head_size)


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
def scale(module: torch.nn.Module) -> None:
    """Multiply the queries of an attention module, and divide its keys; done again, it changes nothing.

    Gemma's weights are one less than what they multiply by, so that they are rounded: the keys' make up for the queries'.
    """
    queries, keys = (getattr(module, name) for name in NAMES)
    before = _gain(queries), _gain(keys)
    s = key_balance.factors(key_balance.exponents(*(x.cpu().numpy() for x in before)))
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

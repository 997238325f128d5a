"""What a model's norms of queries and keys say of their balance (core/key_balance.py), for its caches."""

from __future__ import annotations

import torch

from ..core import key_balance


@torch.no_grad()
def of(model) -> dict[int, tuple[float, ...]]:
    """Layer -> s [head_dim], of the attention layers that norm the queries and keys of each head by root mean square; for
    CacheOptions.key_factors."""
    found = {}
    for module in model.modules():
        norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        layer, head_dim = getattr(module, "layer_idx", None), getattr(module, "head_dim", None)
        if type(layer) is int and all(_of_head(norm, head_dim) for norm in norms):
            gains = torch.stack([norm(torch.ones_like(norm.weight)) for norm in norms])  # type: ignore[misc,union-attr]
            exponents = key_balance.exponents(*key_balance.pair_squares(gains.float().cpu().numpy()))
            if exponents.any():
                found[layer] = tuple(key_balance.factors(exponents).tolist())
    return found


def _of_head(norm, head_dim: int | None) -> bool:
    """Whether a norm makes of a vector of ones, whose root mean square is 1, what it multiplies by."""
    weight = getattr(norm, "weight", None)
    return type(norm).__name__.endswith("RMSNorm") and weight is not None and weight.shape == (head_dim,)

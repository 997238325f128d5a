"""mlx-lm's scaled_dot_product_attention, which decides by the type of the keys."""

from __future__ import annotations

import sys

from mlx_lm.models import base

from .attention import attend
from .tokens import Operand

NAME = "scaled_dot_product_attention"
_stock = base.scaled_dot_product_attention
attended: list[int] | None = None  # while a model is probed: ids of the Tokens that attention has read


def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None):
    """As mlx-lm's. Keys say by their type whether they are codes, since some layers get no cache."""
    if not isinstance(keys, Operand):
        return _stock(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    if attended is not None:
        attended.append(id(keys.tokens))
    return attend(queries, keys, values, scale, mask, sinks)


def _replace(old, new) -> None:
    """In mlx_lm.models.base, and in the models, which hold it by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, NAME, None) is old:
            setattr(module, NAME, new)


def install() -> None:
    """Let the models' attention read codes."""
    _replace(_stock, scaled_dot_product_attention)


def uninstall() -> None:
    """Give the models mlx-lm's own attention back."""
    _replace(scaled_dot_product_attention, _stock)

"""mlx-lm's scaled_dot_product_attention, which decides by the type of the keys."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from mlx_lm.models import base

from .attention import attend
from .tokens import Operand

NAME = "scaled_dot_product_attention"
_stock = base.scaled_dot_product_attention
attended: list[int] | None = None  # while a model is probed: ids of the Tokens that attention has read
_record: Callable | None = None  # while key means are learned


def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None):
    """As mlx-lm's. Keys say by their type whether they are codes, since some layers get no cache."""
    if not isinstance(keys, Operand):
        if _record is not None:
            _record(cache, queries, keys, scale)
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


@contextlib.contextmanager
def recording(record: Callable):
    """For the length of a with statement call record(cache, queries, keys, scale) at each attention over dense keys."""
    global _record
    before = base.scaled_dot_product_attention
    install()
    _record = record
    try:
        yield
    finally:
        _record = None
        if before is _stock:
            uninstall()

"""What a cache for transformers is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..core import cache_options
from ..core.cache_options import check_count, check_key_means
from ..core.kv_format import shown
from .key_means import TurnedMeans


@dataclass(frozen=True)
class CacheOptions(cache_options.CacheOptions):
    """As in core.cache_options; new tokens are coded, in blocks, as they leave the window, and sinks are the first
    positions, padding included.

    backend: torch is the only one for a transformers model. device: the model's, which is the default.
    use_qjl: the paper's second stage for keys: qjl_sketch_size signs and a norm a key more, read densely.
        Off, since it was measured to make answers worse at every width (core.qjl); raise bits_k instead.
    key_factors: layer -> head_dim powers of two that its keys are divided by before they are coded, so that they are in
        balance with queries; key_balance.of(model) finds them, and tqai.patch takes them from there.
    key_means: layer -> what its keys have in common, which is taken off before they are coded (core.key_mean) where that pays
        and they are not in balance; key_means.of(model, key_means.learn(model, tokenizer)). tqai.patch takes what learn
        returns, and by itself what a folder of `tqai convert --key-means` brings. Left padding makes the codes less exact, no more.
    """

    backend: str | None = None
    device: str | torch.device | None = None
    use_qjl: bool = False
    qjl_sketch_size: int = 64
    key_factors: Mapping[int, Sequence[float]] | None = field(default=None, repr=False)
    key_means: Mapping[int, TurnedMeans] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("qjl_sketch_size", self.qjl_sketch_size, 1)
        if self.backend not in (None, "auto", "torch"):
            raise ValueError(f"backend is {self.backend!r}; a transformers model takes 'torch' or 'auto'")
        try:
            torch.device("cpu" if self.device is None else self.device)
        except (RuntimeError, TypeError) as error:
            message = f"device is {self.device!r}; expected the model's, e.g. 'cpu' or 'cuda:0', or None"
            raise ValueError(message) from error
        if not isinstance(self.use_qjl, bool):
            raise ValueError(f"use_qjl is {self.use_qjl!r}; allowed are True and False")
        if not isinstance(self.key_factors, (Mapping, type(None))):
            raise ValueError(f"key_factors is {shown(self.key_factors)}; expected a mapping such as that of key_balance.of(model)")
        for layer, factors in (self.key_factors or {}).items():
            check_count("a layer of key_factors", layer, 0)
            if not isinstance(factors, Sequence) or not factors or not all(map(_is_power_of_two, factors)):
                raise ValueError(f"key_factors is {shown(factors)} for layer {layer}; expected powers of two, one for each coordinate")
        check_key_means(self.key_means, TurnedMeans, "what key_means.of(model, ...) makes of learned means")

    def means_of(self, layer: int) -> TurnedMeans | None:
        """key_means of one layer where they pay; balance leaves them nothing to take."""
        means, options = (self.key_means or {}).get(layer), self.of_layer(layer)
        return means if means and not self.factors_of(layer) and means.pays(options.bits_k, options.bits_v) else None

    def factors_of(self, layer: int) -> Sequence[float] | None:
        """key_factors of one layer whose keys are coded; at 8 bits they are exact enough."""
        return (self.key_factors or {}).get(layer) if self.of_layer(layer).bits_k < 8 else None


def _is_power_of_two(x: object) -> bool:
    return isinstance(x, (int, float)) and 0 < x < math.inf and math.frexp(x)[0] == 0.5

"""What a compressed cache for mlx-lm is made of."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from ..core import cache_options
from ..core.cache_options import check_key_means
from ..core.kv_format import SERVED_WIDTHS, KVFormat
from .key_mean import KeyMean

_format = functools.lru_cache(None)(KVFormat)  # asked for at every step of every layer


@dataclass(frozen=True)
class CacheOptions(cache_options.CacheOptions):
    """As in core.cache_options; with residual every token is codes, and the exact ones are kept and read besides.

    key_means: layer -> what is taken off its keys before they are coded (core.key_mean), as key_means.of makes it of learned
    means; install takes what key_means.learn(model, tokenizer) returns, or key_mean_file.read, and the server by itself what a
    folder of `tqai convert --key-means` brings.
    """

    models: ClassVar[str] = " for an MLX model"

    key_means: Mapping[int, KeyMean] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("bits_k", "bits_v"):
            bits = getattr(self, name)
            if type(bits) is not int or bits not in SERVED_WIDTHS:
                allowed = ", ".join(map(str, SERVED_WIDTHS))
                raise ValueError(f"{name} is {bits!r}; on MLX allowed are {allowed}")
        check_key_means(self.key_means, KeyMean, "what key_means.learn(model, tokenizer) returns")
        super().__post_init__()

    def of_layer(self, layer: int) -> Self:
        """The options for one layer of the model; its key mean is then that of layer 0."""
        mean = (self.key_means or {}).get(layer)
        return replace(super().of_layer(layer), key_means=None if mean is None else {0: mean})

    @property
    def key_mean(self) -> KeyMean | None:
        """Of the one layer whose options these are."""
        return (self.key_means or {}).get(0)

    def format(self, head_dim: int) -> KVFormat:
        """What is stored for a model with this head_dim."""
        return _format(self.bits_k, self.bits_v, head_dim, self.vector_values)

"""What a compressed cache for mlx-lm is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ..core.kv_format import DEFAULT_BITS, SERVED_WIDTHS, KVFormat, parse_name

STRATEGIES = ("auto", "residual", "full", "incremental")


@dataclass(frozen=True)
class CacheOptions:
    """Every value is checked; ValueError says what is allowed.

    cache_strategy:
        residual (what auto means)  every token is codes; the newest `residual_window` and the first `sink_tokens` of
                                    a sequence are exact besides, and are read exactly.
        full                        codes for all tokens but the sinks, the newest included.
        incremental                 as full, and a dequantized copy of everything beside the codes: the speed of an
                                    uncompressed cache, and more memory than one.
    sink_tokens: default 4 with residual, else 0.
    layer_formats: layer -> format name such as 'tqai_k8v4', for layers that get other widths than bits_k and bits_v.
    """

    bits_k: int = DEFAULT_BITS[0]
    bits_v: int = DEFAULT_BITS[1]
    sink_tokens: int | None = None
    residual_window: int = 128
    cache_strategy: str = "auto"
    layer_formats: Mapping[int, str] | None = None

    def __post_init__(self) -> None:
        for name in ("bits_k", "bits_v"):
            bits = getattr(self, name)
            if type(bits) is not int or bits not in SERVED_WIDTHS:
                allowed = ", ".join(map(str, SERVED_WIDTHS))
                raise ValueError(f"{name} is {bits!r}; on MLX allowed are {allowed}")
        for name in ("sink_tokens", "residual_window"):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < 0):
                raise ValueError(f"{name} is {count!r}; allowed are whole numbers from 0")
        if self.residual_window is None:
            raise ValueError("residual_window is None; allowed are whole numbers from 0")
        if self.cache_strategy not in STRATEGIES:
            raise ValueError(f"cache_strategy is {self.cache_strategy!r}; allowed are {', '.join(STRATEGIES)}")
        if not isinstance(self.layer_formats, (Mapping, type(None))):
            raise ValueError(f"layer_formats is {self.layer_formats!r}; expected a mapping such as {{0: 'tqai_k8v4'}}")
        for layer in self.layer_formats or ():
            self.of_layer(layer)

    def of_layer(self, layer: int) -> CacheOptions:
        """The options for one layer of the model."""
        bits = self.bits_k, self.bits_v
        if layer in (self.layer_formats or {}):
            bits = parse_name(self.layer_formats[layer])
        return replace(self, bits_k=bits[0], bits_v=bits[1], layer_formats=None)

    @property
    def widths(self) -> set[int]:
        """Of keys and values in all layers."""
        pairs = [(self.bits_k, self.bits_v), *map(parse_name, (self.layer_formats or {}).values())]
        return {bits for pair in pairs for bits in pair}

    @classmethod
    def of(cls, **given) -> CacheOptions:
        """The same from keyword arguments; ValueError for a name that does not exist here."""
        allowed = [field.name for field in fields(cls)]
        for name in given:
            if name not in allowed:
                raise ValueError(f"unknown option {name!r} for an MLX model; allowed are {', '.join(allowed)}")
        return cls(**given)

    @property
    def window(self) -> int:
        """Newest tokens that stay exact."""
        return self.residual_window if self.cache_strategy in ("auto", "residual") else 0

    @property
    def sinks(self) -> int:
        """First tokens that stay exact."""
        default = 4 if self.cache_strategy in ("auto", "residual") else 0
        return default if self.sink_tokens is None else self.sink_tokens

    @property
    def keep_dense(self) -> bool:
        """Whether a dequantized copy is kept beside the codes."""
        return self.cache_strategy == "incremental"

    def format(self, head_dim: int) -> KVFormat:
        """The widths for a model with this head_dim."""
        return KVFormat(self.bits_k, self.bits_v, head_dim)

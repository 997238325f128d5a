"""What a compressed cache for mlx-lm is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import cache_options
from ..core.kv_format import SERVED_WIDTHS, KVFormat, parse_name


@dataclass(frozen=True)
class CacheOptions(cache_options.CacheOptions):
    """As in core.cache_options; with residual every token is codes, and the exact ones are kept and read besides."""

    models: ClassVar[str] = " for an MLX model"

    def __post_init__(self) -> None:
        for name in ("bits_k", "bits_v"):
            bits = getattr(self, name)
            if type(bits) is not int or bits not in SERVED_WIDTHS:
                allowed = ", ".join(map(str, SERVED_WIDTHS))
                raise ValueError(f"{name} is {bits!r}; on MLX allowed are {allowed}")
        super().__post_init__()

    @property
    def widths(self) -> set[int]:
        """Of keys and values in all layers."""
        pairs = [(self.bits_k, self.bits_v), *map(parse_name, (self.layer_formats or {}).values())]
        return {bits for pair in pairs for bits in pair}

    def format(self, head_dim: int) -> KVFormat:
        """The widths for a model with this head_dim."""
        return KVFormat(self.bits_k, self.bits_v, head_dim)

"""Which activations go through a quantizer, and the named configurations of cache and activations."""

from __future__ import annotations

from dataclasses import dataclass, fields

WIDTHS = range(2, 9)
LARGEST_GROUP = 128  # coordinates that share a rotation and a scale


@dataclass(frozen=True)
class Activations:
    """Activations that a runtime quantizes and dequantizes on their way; ValueError says what is allowed.

    compress_hidden: the hidden states that a decoder layer hands to the next one.
    compress_ffn: the wide activations of the feed-forward block, which its last projection takes in.
    This simulates the error: nothing is kept as codes, so it saves no memory and takes time.
    """

    compress_hidden: bool = False
    bits_hidden: int = 8
    compress_ffn: bool = False
    bits_ffn: int = 8

    def __post_init__(self) -> None:
        for name in ("compress_hidden", "compress_ffn"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are True and False")
        for name in ("bits_hidden", "bits_ffn"):
            bits = getattr(self, name)
            if type(bits) is not int or bits not in WIDTHS:
                raise ValueError(f"{name} is {bits!r}; allowed are the whole numbers {WIDTHS[0]} to {WIDTHS[-1]}")

    @classmethod
    def split(cls, options: dict) -> tuple[dict, Activations]:
        """(the other options, what these options say about activations)."""
        own = {field.name for field in fields(cls)}
        rest = {name: value for name, value in options.items() if name not in own}
        return rest, cls(**{name: value for name, value in options.items() if name in own})

    @property
    def any(self) -> bool:
        """Whether anything is to be compressed."""
        return self.compress_hidden or self.compress_ffn


def group_size(size: int) -> int:
    """Coordinates of one group, where activations have `size`: its largest divisor up to LARGEST_GROUP.
    ValueError if that is below 8."""
    group = next(group for group in range(min(LARGEST_GROUP, size), 0, -1) if size % group == 0)
    if group < 8:
        raise ValueError(f"activations have {size} coordinates, which no group of 8 to {LARGEST_GROUP} divides")
    return group


def _config(bits_k: int, bits_v: int, hidden: int | None = None, ffn: int | None = None) -> dict:
    options = {"bits_k": bits_k, "bits_v": bits_v}
    if hidden:
        options |= {"compress_hidden": True, "bits_hidden": hidden}
    if ffn:
        options |= {"compress_ffn": True, "bits_ffn": ffn}
    return options


# Those of tqai 0.3.1's benchmark.
CONFIGS = {
    "kv-only": _config(4, 2),
    "kv+hidden8": _config(4, 2, hidden=8),
    "kv+hidden6": _config(4, 2, hidden=6),
    "kv+ffn8": _config(4, 2, ffn=8),
    "all8": _config(4, 2, hidden=8, ffn=8),
    "all6": _config(4, 2, hidden=6, ffn=6),
    "aggressive": _config(3, 2, hidden=6, ffn=6),
}

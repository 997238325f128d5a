"""What a cache in a Python program is made of, whatever the runtime: widths, and which tokens stay exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

from .kv_format import DEFAULT_BITS, check_vector_width, check_width, parse_name, shown

STRATEGIES = ("auto", "residual", "full", "incremental")


@dataclass(frozen=True)
class CacheOptions:
    """Every value is checked; ValueError says what is allowed.

    cache_strategy: residual (what auto means) keeps the newest `residual_window` tokens and the first `sink_tokens` exact;
    full keeps the sinks alone; incremental, as full, has a dequantized copy of everything beside the codes: the speed of an
    uncompressed cache, and more memory than one. sink_tokens: default 4 with residual, else 0. layer_formats: layer ->
    format name such as 'tqai_k8v4', for layers that get other widths than bits_k and bits_v. vector_values: code 2-bit values
    four coordinates at once (core.vector_codebook), closer in as many bytes; all layers need 2-bit values then.
    """

    models: ClassVar[str] = ""  # whose options they are, for messages

    bits_k: int = DEFAULT_BITS[0]
    bits_v: int = DEFAULT_BITS[1]
    sink_tokens: int | None = None
    residual_window: int = 128
    cache_strategy: str = "auto"
    layer_formats: Mapping[int, str] | None = None
    vector_values: bool = False

    def __post_init__(self) -> None:
        check_width("bits_k", self.bits_k)
        check_width("bits_v", self.bits_v)
        if self.sink_tokens is not None:
            check_count("sink_tokens", self.sink_tokens, 0)
        check_count("residual_window", self.residual_window, 0)
        if self.cache_strategy not in STRATEGIES:
            raise ValueError(f"cache_strategy is {self.cache_strategy!r}; allowed are {', '.join(STRATEGIES)}")
        if not isinstance(self.layer_formats, (Mapping, type(None))):
            raise ValueError(f"layer_formats is {self.layer_formats!r}; expected a mapping such as {{0: 'tqai_k8v4'}}")
        if not isinstance(self.vector_values, bool):
            raise ValueError(f"vector_values is {self.vector_values!r}; allowed are True and False")
        if self.vector_values:
            check_vector_width("bits_v", self.bits_v)
        for layer, name in (self.layer_formats or {}).items():
            check_count("a layer of layer_formats", layer, 0)
            if self.vector_values:
                check_vector_width("bits_v", parse_name(name)[1], f" in layer {layer}")
            self.of_layer(layer)

    def of_layer(self, layer: int) -> Self:
        """The options for one layer of the model."""
        bits_k, bits_v = self.bits_k, self.bits_v
        if layer in (self.layer_formats or {}):
            bits_k, bits_v = parse_name(self.layer_formats[layer])  # type: ignore[index]
        return replace(self, bits_k=bits_k, bits_v=bits_v, layer_formats=None)

    @property
    def codebook_widths(self) -> set[int]:
        """Of keys and values in all layers, as far as a Codebook reads them."""
        pairs = [(self.bits_k, self.bits_v), *map(parse_name, (self.layer_formats or {}).values())]
        return {bits for pair in pairs for bits in pair[: 1 if self.vector_values else 2]}

    @classmethod
    def of(cls, **given) -> Self:
        """The same from keyword arguments; ValueError for a name that does not exist."""
        allowed = [field.name for field in fields(cls)]
        for name in given:
            if name not in allowed:
                raise ValueError(f"unknown option {name!r}{cls.models}; allowed are {', '.join(allowed)}")
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


def check_count(name: str, value: int, lowest: int) -> None:
    """ValueError, with the option's name, for what is no whole number from `lowest` on."""
    if type(value) is not int or value < lowest:
        raise ValueError(f"{name} is {value!r}; allowed are whole numbers from {lowest}")


def check_key_means(given: object, kind: type, expected: str) -> None:
    """ValueError for key_means that are neither None nor a mapping: layer -> a runtime's `kind`, which `expected` describes."""
    if not isinstance(given, (Mapping, type(None))):
        raise ValueError(f"key_means is {shown(given)}; expected a mapping such as that of key_means.learn(model, tokenizer)")
    for layer, means in (given or {}).items():
        check_count("a layer of key_means", layer, 0)
        if not isinstance(means, kind):
            raise ValueError(f"key_means is {shown(means)} for layer {layer}; expected {expected}")

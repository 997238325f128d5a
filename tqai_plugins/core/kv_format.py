"""What the bytes of a compressed KV cache mean: the one place that knows sizes and offsets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

DEFAULT_NAME = "tqai"
DEFAULT_BITS = (4, 2)
WIDTHS = range(1, 9)
HEAD_DIMS = range(8, 513)

LONGEST_NAME = 40  # letters of a name that is no format, in what is said of it

# Widths that the integer kernels read; the others exist in the reference and in transformers.
SERVED_WIDTHS = (2, 3, 4, 8)

# Bytes written under one version are never read under another.
FORMAT_VERSION = 1

# Vector values (vector_codebook): a byte stands for so many coordinates, as many as at so many bits each.
PATTERN_WIDE = 4
VECTOR_BITS = 2

SCALE_BYTES = 2  # one float16 a vector
# A level c is worth scale * c / SCALE_DENOMINATOR: with it the float16 scale is close to the
# vector's root mean square, the middle of float16's range.
SCALE_DENOMINATOR = 64

# Servers keep the newest tokens of a sequence at 8 bits too, in pages of this many tokens: the page being
# filled and those before it.
RECENT_PAGE_TOKENS = 64
RECENT_PAGES = 3
COPIED_PAGES = 1 + RECENT_PAGES  # and its first page, which most queries look at


def packed_bytes(head_dim: int, bits: int) -> int:
    """Bytes that the codes of one vector fill (bit_packing says in which order)."""
    if bits == 3:  # groups of 32 coordinates: 8 bytes of magnitudes and 4 of signs
        return 12 * -(-head_dim // 32)
    return -(-head_dim * bits // 8)


def check_width(name: str, bits: int) -> None:
    """ValueError, with the option's name, for bits that are no width."""
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"{name} is {bits!r}; allowed are the whole numbers 1 to 8")


def check_vector_width(name: str, bits: int, where: str = "") -> None:
    """ValueError, with the option's name, for a width of values that vector_values does not go with."""
    if bits != VECTOR_BITS:
        raise ValueError(
            f"vector_values is True but {name} is {bits!r}{where}; it is allowed with {VECTOR_BITS} bits alone: "
            f"set {name} to {VECTOR_BITS}, or leave vector_values out"
        )


def check_vector_head_dim(head_dim: int) -> None:
    """ValueError for a head dimension that vector_values does not go with."""
    check_head_dim(head_dim)
    if head_dim % PATTERN_WIDE:
        raise ValueError(
            f"vector_values is True but head_dim is {head_dim}; allowed are multiples of {PATTERN_WIDE}: leave vector_values out"
        )


def check_head_dim(head_dim: int) -> None:
    """ValueError for a head dimension that no codebook is made for."""
    if type(head_dim) is not int or head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim!r}; allowed are the whole numbers 8 to 512")


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets inside one page: `page_tokens` tokens of one KV head.

    Keys lie token by token, values coordinate by coordinate (all tokens of a byte row side by
    side), since the integer matrix unit wants its reduction index packed: head_dim for keys,
    tokens for values.

        [page_tokens, k_bytes] key codes | [v_bytes, page_tokens] value codes
        | [page_tokens] float16 key scales | [page_tokens] float16 value scales
    """

    page_tokens: int
    k_codes: int
    v_codes: int
    k_scales: int
    v_scales: int
    page_bytes: int


@dataclass(frozen=True)
class KVFormat:
    """Widths of keys and values for one head dimension; vector_values: 2-bit values are coded by vector_codebook.

    Raises ValueError for widths outside 1 to 8, head dimensions outside 8 to 512, and vector_values with another width of
    values than 2 or a head_dim that is no multiple of 4.
    """

    bits_k: int
    bits_v: int
    head_dim: int
    vector_values: bool = False

    def __post_init__(self) -> None:
        check_width("bits_k", self.bits_k)
        check_width("bits_v", self.bits_v)
        check_head_dim(self.head_dim)
        if self.vector_values:
            check_vector_width("bits_v", self.bits_v)
            check_vector_head_dim(self.head_dim)

    @classmethod
    def from_name(cls, name: str, head_dim: int) -> KVFormat:
        """`tqai` or `tqai_k<bits>v<bits>` for a model with this head dimension."""
        return cls(*parse_name(name), head_dim)

    @property
    def name(self) -> str:
        """Such as `tqai_k4v2`; with `+vector` behind it for vector values, which no cache dtype has."""
        return format_name(self.bits_k, self.bits_v) + ("+vector" if self.vector_values else "")

    @property
    def k_bytes(self) -> int:
        """Code bytes of one key vector."""
        return packed_bytes(self.head_dim, self.bits_k)

    @property
    def v_bytes(self) -> int:
        """Code bytes of one value vector."""
        return packed_bytes(self.head_dim, self.bits_v)

    @property
    def slot_bytes(self) -> int:
        """All bytes of one token in one KV head: both codes and both scales."""
        return self.k_bytes + self.v_bytes + 2 * SCALE_BYTES

    @property
    def bits_per_element(self) -> float:
        """Stored bits for each of the 2 * head_dim numbers of a token, scales included."""
        return self.slot_bytes * 8 / (2 * self.head_dim)

    @property
    def compression(self) -> float:
        """How many times smaller than a 16-bit cache."""
        return 16 / self.bits_per_element

    @property
    def served(self) -> bool:
        """Whether the integer kernels read it."""
        return self.bits_k in SERVED_WIDTHS and self.bits_v in SERVED_WIDTHS and self.head_dim % 16 == 0

    def page_layout(self, page_tokens: int) -> PageLayout:
        """Offsets in a page of so many tokens."""
        v_codes = page_tokens * self.k_bytes
        k_scales = v_codes + page_tokens * self.v_bytes
        v_scales = k_scales + page_tokens * SCALE_BYTES
        return PageLayout(page_tokens, 0, v_codes, k_scales, v_scales, page_tokens * self.slot_bytes)


def shown(given: object) -> str:
    """What was given, for a sentence that says so: as repr, but short."""
    text = repr(given[: 2 * LONGEST_NAME] if isinstance(given, (str, bytes)) else given)
    return text if len(text) <= 2 * LONGEST_NAME else f"{text[:LONGEST_NAME]}..."


def format_name(bits_k: int, bits_v: int) -> str:
    """`tqai_k<bits>v<bits>`; parse_name is the inverse."""
    return f"tqai_k{bits_k}v{bits_v}"


def recent_format(head_dim: int) -> KVFormat:
    """Of the pages that hold the first and the newest tokens a second time."""
    return KVFormat(8, 8, head_dim)


SERVED_NAMES = (DEFAULT_NAME, *(format_name(k, v) for k in SERVED_WIDTHS for v in SERVED_WIDTHS))


def is_tqai(name: object) -> bool:
    """Whether a cache dtype name is meant for tqai, valid or not."""
    return isinstance(name, str) and name.split("_")[0] == DEFAULT_NAME


def parse_name(name: str) -> tuple[int, int]:
    """The widths (bits_k, bits_v) a format name stands for; ValueError names the nearest valid one."""
    if name == DEFAULT_NAME:
        return DEFAULT_BITS
    found = re.fullmatch(r"tqai_k([1-8])v([1-8])", name) if isinstance(name, str) else None
    if not found:
        every = [DEFAULT_NAME, *(format_name(k, v) for k in WIDTHS for v in WIDTHS)]
        near = difflib.get_close_matches(str(name)[:LONGEST_NAME].lower().replace("-", "_"), every, 1, 0.0)[0]
        raise ValueError(
            f"unknown KV cache format {shown(name)}; expected 'tqai' or 'tqai_k<bits>v<bits>' "
            f"with 1 to 8 bits, e.g. {near!r}"
        )
    return int(found[1]), int(found[2])

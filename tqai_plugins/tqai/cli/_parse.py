"""Lists in arguments."""

from __future__ import annotations

import re

from tqai_plugins.core.kv_format import shown


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between; ValueError names the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} is {shown(text)}; expected whole numbers with commas between") from error


def shapes(text: str, option: str = "--shapes") -> list[tuple[int, int]]:
    """Sequences x tokens with commas between; ValueError names the option."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in text.split(",")]
    if not all(found):
        raise ValueError(f"{option} is {shown(text)}; expected sequences x tokens with commas between, such as 8x512,1x32768")
    return [(int(match[1]), int(match[2])) for match in found if match]


def fractions(text: str, option: str) -> list[float]:
    """Numbers from 0 to 1 with commas between; ValueError names the option."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= value <= 1 for value in found):
        raise ValueError(f"{option} is {shown(text)}; expected numbers from 0 to 1 with commas between")
    return found

"""Small JSON files of others, read with care: nothing but data comes of them, at bounded cost."""

from __future__ import annotations

import json
from pathlib import Path

LARGEST = 1 << 20  # bytes; the largest file that tqai writes has some 13 thousand


def read(path: str | Path, largest: int = LARGEST) -> dict:
    """The object that a regular file holds; ValueError says why it holds none, FileNotFoundError that it is not there."""
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")  # a pipe or a device might never end
    if size > largest:
        raise ValueError(f"it has {size:,} bytes, more than the {largest:,} that such a file can have")
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    if not isinstance(given, dict):
        raise ValueError(f"it holds a {type(given).__name__}, no object with names")
    return given


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError("a name in it comes twice")
    return given

"""mlx-lm's save_prompt_cache, after which a file is whole or as it was: a full disk or a killed process leaves no half of one."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from mlx_lm.models import cache as mlx_cache

NAME, SUFFIX = "save_prompt_cache", ".safetensors"
_stock = getattr(mlx_cache, NAME)


@functools.wraps(_stock)
def save_prompt_cache(file_name, cache, metadata=None):
    """As mlx-lm's: written beside the file, flushed to the disk, renamed. OSError or RuntimeError leave nothing behind."""
    target = Path(file_name if str(file_name).endswith(SUFFIX) else f"{file_name}{SUFFIX}")  # as MLX names it
    beside = target.with_name(f".{target.name}.{os.getpid()}{SUFFIX}")
    try:
        _stock(str(beside), cache, metadata)
        _flush(beside)
        os.replace(beside, target)
        _flush(target.parent)
    finally:
        beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def install() -> None:
    """Take the place of mlx-lm's wherever it was imported by now."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(NAME) is _stock and module.__name__ != __name__:
            setattr(module, NAME, save_prompt_cache)

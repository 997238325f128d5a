"""What a configuration stands for: a name of core.activations, a format, a preset file or a converted folder."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from tqai_plugins.core import converted_folder
from tqai_plugins.core.activations import CONFIGS
from tqai_plugins.core.kv_format import LONGEST_NAME, is_tqai, parse_name, shown
from tqai_plugins.core.preset import Preset


def head_dim_of(config) -> int:
    """Of a transformers model's configuration."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def options_of(config: str | os.PathLike) -> dict:
    """The options of patch that a configuration stands for; ValueError for an unknown one."""
    if isinstance(config, str) and config in CONFIGS:
        return dict(CONFIGS[config])
    if is_tqai(config) and not _exists(config):
        return _widths(config)
    if not isinstance(config, (str, os.PathLike)) or not config or not _exists(config):
        near = difflib.get_close_matches(str(config)[:LONGEST_NAME], CONFIGS, 1, 0.0)[0]
        raise ValueError(
            f"config is {shown(str(config))}; expected one of {', '.join(CONFIGS)} (the nearest is {near!r}), a format such "
            "as 'tqai_k4v4', a preset file of `tqai recommend` or a folder of `tqai convert`"
        )
    if Path(config).is_dir():
        converted_folder.verify(config)
        return _widths(converted_folder.folder_format(config))
    return {"layer_formats": dict(Preset.read(config).formats)}


def _exists(path: str | os.PathLike) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a link to itself, a name that no file can have
        return False


def merged(config: str | os.PathLike | None, options: dict) -> dict:
    """The options with those of the configuration; ValueError where both say the same thing."""
    if config is None:
        return options
    found = options_of(config)
    said = {"bits_k", "bits_v"} | set(found)
    for name in options:
        if name in said:
            raise ValueError(f"config {str(config)!r} already says {name}; leave out one of them")
    return options | found


def check_preset(config: str | os.PathLike | None, num_layers: int, head_dim: int) -> None:
    """ValueError if the configuration is a preset for a model of another shape."""
    if config is not None and Path(config).is_file():
        Preset.read(config).check_model(num_layers, head_dim)


def _widths(name: str) -> dict:
    bits_k, bits_v = parse_name(name)
    return {"bits_k": bits_k, "bits_v": bits_v}

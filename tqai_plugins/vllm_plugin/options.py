"""What --additional-config '{"tqai": {...}}' says: recent_memory, key_mean, preset, codebook and canary."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

from tqai_plugins.core.codebook import Codebook
from tqai_plugins.core.preset import Preset

# Of a request that forced_tokens.py answers, and of the environment of its server.
FORCED_TOKENS, KEPT_LOGITS, LOGITS_FOLDER = "tqai_forced", "tqai_logits", "TQAI_LOGITS_FOLDER"

NAMES = ("recent_memory", "key_mean", "preset", "codebook", "canary")
DEFAULT_SHARE = 0.02


@dataclass(frozen=True)
class Options:
    """recent_memory: the fraction of KV memory for 8-bit copies of recent pages. key_mean: whether keys are stored
    less their mean or, where heads norm their queries and keys, in balance with queries. preset: the formats of single layers, from a file of `tqai recommend`. codebooks: from files of `tqai codebook build`.
    canary: one in so many steps of each layer is checked while it is served, 0 for none."""

    recent_memory: float = DEFAULT_SHARE
    key_mean: bool = True
    preset: Preset | None = None
    codebooks: tuple[Codebook, ...] = ()
    canary: int = 0

    @classmethod
    def of(cls, config) -> Options:
        """Those of a vllm.config.VllmConfig; ValueError for one that is unknown or no good."""
        additional = config.additional_config
        return cls.read(additional.get("tqai", {}) if isinstance(additional, dict) else {})

    @classmethod
    def read(cls, given: object) -> Options:
        """From names and values; ValueError as above."""
        if not isinstance(given, Mapping):
            raise ValueError(f"--additional-config has the tqai options {given!r}; expected names and values in braces")
        unknown = set(given) - set(NAMES)
        if unknown:
            raise ValueError(f"--additional-config has the tqai options {sorted(unknown)}; allowed are {', '.join(NAMES)}")
        return cls(
            _share(given), _key_mean(given), _preset(given.get("preset")), _codebooks(given.get("codebook", ())), _canary(given)
        )


def _share(given: Mapping) -> float:
    value = given.get("recent_memory", DEFAULT_SHARE)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 0.5:
        raise ValueError(f"the tqai option recent_memory is {value!r}; allowed is a fraction of KV memory from 0 to 0.5")
    return value


def _key_mean(given: Mapping) -> bool:
    value = given.get("key_mean", True)
    if not isinstance(value, bool):
        raise ValueError(f"the tqai option key_mean is {value!r}; allowed are true and false")
    return value


def _canary(given: Mapping) -> int:
    value = given.get("canary", 0)
    if type(value) is not int or value < 0:
        raise ValueError(f"the tqai option canary is {value!r}; allowed are whole numbers: 10000 checks one step in 10,000, 0 none")
    return value


def _preset(path: object) -> Preset | None:
    if path is None:
        return None
    if not isinstance(path, str) or not os.path.isfile(path):
        raise ValueError(f"the tqai option preset is {path!r}; expected a file of `tqai recommend`")
    return _read_preset(path)


def _codebooks(paths: object) -> tuple[Codebook, ...]:
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) and os.path.isfile(path) for path in paths):
        raise ValueError(f"the tqai option codebook is {paths!r}; expected a file of `tqai codebook build`, or a list of them")
    return tuple(map(_read_codebook, paths))


_read_preset = functools.lru_cache(Preset.read)
_read_codebook = functools.lru_cache(Codebook.read)

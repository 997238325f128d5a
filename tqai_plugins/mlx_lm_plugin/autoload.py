"""Compressed caches in the plain mlx_lm commands, by a line that `tqai mlx enable` puts where Python starts.

arm() does nothing but wait for mlx_lm.utils, whose load and sharded_load then give models compressed caches. The
environment variable TQAI_MLX names another format for one process, or turns this off with `off`.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "TQAI_MLX"
OFF = ("off", "0")
FILE = "tqai_mlx.pth"


def line(name: str) -> str:
    """The contents of the .pth file; they do nothing once tqai is gone."""
    return (
        "import importlib.util; importlib.util.find_spec('tqai_plugins') and "
        f"__import__('tqai_plugins.mlx_lm_plugin.autoload', fromlist=['arm']).arm({name!r})\n"
    )


def arm(name: str) -> None:
    """Wait for mlx_lm; caches will be of format `name` unless the environment says otherwise."""
    name = os.environ.get(VARIABLE) or name
    if name not in OFF:
        sys.meta_path.insert(0, _Finder(name))


class _Finder:
    """Finds two modules as everybody else does, and hooks them once they are loaded."""

    def __init__(self, name: str):
        self.hooks = {"mlx_lm.utils": lambda module: _hook(module, name), "mlx_lm.models.cache": _register}

    def find_spec(self, fullname, path=None, target=None):
        hook = self.hooks.pop(fullname, None)
        if hook is None:
            return None
        import importlib.util

        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                hook(module)

            spec.loader.exec_module = exec_module
        return spec


def _register(module) -> None:
    """Prompt-cache files may be loaded before any model."""
    from .patching import register

    register()


def _hook(utils, name: str) -> None:
    def wrap(load):
        def loaded(*args, **kwargs):
            from ..core.kv_format import parse_name
            from .server import with_caches

            bits_k, bits_v = parse_name(name)
            result = with_caches(load, {"bits_k": bits_k, "bits_v": bits_v})(*args, **kwargs)
            print(f"tqai: KV cache {name} (`tqai mlx disable` or {VARIABLE}=off for mlx-lm's own)", file=sys.stderr)
            return result

        return loaded

    utils.load, utils.sharded_load = wrap(utils.load), wrap(utils.sharded_load)

"""TurboQuant KV caches for mlx-lm: tqai.patch(model), or this package's install and uninstall.

Nothing is imported before it is used, since autoload is imported when Python starts.
"""

_WHERE = {
    "BatchCompressedKVCache": "kv_cache", "CacheOptions": "options", "CompressedKVCache": "kv_cache",
    "cache_factory": "patching", "install": "patching", "uninstall": "patching",
}  # fmt: skip
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value

"""TurboQuant KV caches for mlx-lm: tqai.patch(model), or this package's install and uninstall."""

from .install import cache_factory, install, uninstall
from .kv_cache import BatchCompressedKVCache, CompressedKVCache
from .options import CacheOptions

__all__ = ["BatchCompressedKVCache", "CacheOptions", "CompressedKVCache", "cache_factory", "install", "uninstall"]

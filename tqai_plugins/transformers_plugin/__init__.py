"""tqai for Hugging Face transformers."""

from .kv_cache import Cache, CacheOptions

__all__ = ["Cache", "CacheOptions"]

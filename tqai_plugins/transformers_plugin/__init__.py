"""tqai for Hugging Face transformers."""

from . import activations
from .kv_cache import Cache, CacheOptions

__all__ = ["Cache", "CacheOptions", "activations"]

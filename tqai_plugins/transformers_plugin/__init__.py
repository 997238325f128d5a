"""tqai for Hugging Face transformers."""

from . import activations, key_balance, key_means
from .kv_cache import Cache
from .options import CacheOptions

__all__ = ["Cache", "CacheOptions", "activations", "key_balance", "key_means"]

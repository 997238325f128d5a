"""Gives a model a make_cache that makes compressed caches, after a trial that its attention reads them."""

from __future__ import annotations

import weakref
from dataclasses import replace

import mlx.core as mx
from mlx import nn
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from ..core.codebook import read_all, use_for
from . import compat, dispatch, saving
from .key_means import of as means_of
from .kv_cache import BatchCompressedKVCache, CompressedKVCache
from .options import CacheOptions

_models: list[weakref.ref] = []


def _is_installed(model: nn.Module) -> bool:
    return any(ref() is model for ref in _models)


def install(model: nn.Module, codebook=(), key_means=None, **options) -> None:
    """Make every new cache of this model a compressed one, in mlx-lm's generators and its server, until uninstall.

    codebook: a file of `tqai codebook build`, or a list of them; key_means: layer -> LayerMeans, as
    key_means.learn returns; options: those of CacheOptions. Layers with a sliding-window or recurrent cache keep the stock one. Raises ValueError for bad options and for
    models that cannot be served, ImportError for untested versions of mlx-lm.
    """
    given = CacheOptions.of(**options)
    given = replace(given, key_means=means_of(model, key_means, given))
    compat.check_version()
    use_for(read_all(codebook), _head_dim(model), given.codebook_widths)
    uninstall(model)
    stock = make_prompt_cache(model)
    caches = [_compressed(cache, given.of_layer(i), _ProbedCache) for i, cache in enumerate(stock)]
    for layer in given.layer_formats or ():
        if not 0 <= layer < len(caches) or not _parts(caches[layer]):
            raise ValueError(f"layer_formats has layer {layer}, which is no full-attention layer of this {_name(model)}")
    if not any(map(_parts, caches)):
        kinds = ", ".join(sorted({type(cache).__name__ for cache in stock}))
        raise ValueError(f"{_name(model)} has no full-attention layer to compress, only {kinds}")
    dispatch.install()
    register()
    try:
        _probe(model, caches)
    except Exception:
        if not any(ref() for ref in _models):
            dispatch.uninstall()
        raise
    shared = [[part.taken for part in _parts(cache)] for cache in caches]
    plain = type(model).make_cache if hasattr(type(model), "make_cache") else None
    layers, this = len(stock), weakref.ref(model)

    def make_cache() -> list:
        made = plain(this()) if plain else [KVCache() for _ in range(layers)]
        made = [_compressed(cache, given.of_layer(i)) for i, cache in enumerate(made)]
        for cache, flags in zip(made, shared):
            for part, flag in zip(_parts(cache), flags):
                part.shared = flag
        return made

    model.make_cache = make_cache
    _models.append(weakref.ref(model))


def _head_dim(model: nn.Module) -> int:
    args = getattr(model, "args", None)
    return getattr(args, "head_dim", None) or getattr(args, "hidden_size", 0) // getattr(args, "num_attention_heads", 1)


def uninstall(model: nn.Module) -> None:
    """Undo install; caches made meanwhile can no longer be used. Nothing happens to a model that has none."""
    if _is_installed(model):
        del model.make_cache
    _models[:] = [ref for ref in _models if ref() is not None and ref() is not model]
    if not _models:
        dispatch.uninstall()


def register() -> None:
    """mlx_lm's load_prompt_cache looks cache classes up by name in its own module; files are saved whole."""
    saving.install()
    for kind in (CompressedKVCache, BatchCompressedKVCache):
        setattr(mlx_cache, kind.__name__, kind)


def cache_factory(model: nn.Module, **options) -> list:
    """The entry point tqai.cache_factories: compressed caches for one request, one for each layer of this model."""
    if not _is_installed(model):
        install(model, **options)
    return model.make_cache()


def _compressed(cache, options: CacheOptions, kind: type = CompressedKVCache):
    if type(cache) is KVCache:
        return kind(options)
    if type(cache) is CacheList:
        return CacheList(*(_compressed(part, options, kind) for part in cache.caches))
    return cache


def _parts(cache) -> list[CompressedKVCache]:
    """The compressed caches in a layer's cache."""
    parts = cache.caches if isinstance(cache, CacheList) else (cache,)
    return [part for part in parts if isinstance(part, CompressedKVCache)]


def _name(model) -> str:
    return getattr(getattr(model, "args", None), "model_type", None) or type(model).__module__


class _ProbedCache(CompressedKVCache):
    """Notes what it has handed out, and whether a layer without keys of its own took it too."""

    handed = None
    taken = False

    def update_and_fetch(self, keys, values):
        self.shared = True  # keeps what is handed out
        fetched = super().update_and_fetch(keys, values)
        self.handed = fetched[0]
        return fetched

    def keys_and_values(self):
        self.taken = True
        return super().keys_and_values()


def _probe(model: nn.Module, caches: list) -> None:
    """Trace two short steps, without computing them: attention has to read what every compressed cache handed out."""
    parts = [part for cache in caches for part in _parts(cache)]
    dispatch.attended = []
    try:
        for count in (2, 1):
            dispatch.attended.clear()
            model(mx.zeros((1, count), mx.int32), cache=caches)
            for i, part in enumerate(parts):
                if part.handed is None:
                    raise ValueError(f"its full-attention layer {i} does not use the cache")
                if not isinstance(part.handed, mx.array) and id(part.handed.tokens) not in dispatch.attended:
                    raise ValueError(f"attention of its full-attention layer {i} does not go through mlx-lm's dispatch")
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else "its attention does not go through mlx-lm's dispatch"
        raise ValueError(f"{_name(model)} cannot be served with tqai's cache, use it with mlx-lm's own: {reason}") from error
    finally:
        dispatch.attended = None

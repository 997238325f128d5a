"""tqai: TurboQuant KV caches for vLLM, mlx-lm and Hugging Face transformers.

cache = tqai.patch(model, bits_k=4, bits_v=2)
model.generate(**inputs, past_key_values=cache)
"""

from __future__ import annotations

from tqai_plugins.core import converted_folder
from tqai_plugins.core.activations import Activations
from tqai_plugins.core.kv_format import KVFormat, parse_name

from . import configurations

__all__ = ["Cache", "KVFormat", "__version__", "patch", "unpatch"]


def patch(model, **options):
    """Give a model a compressed KV cache.

    transformers: returns a tqai.Cache for one request or conversation, to be passed to generate() or
    the model as past_key_values; the model itself is not changed, unless activations are to be compressed too.
    For the next request call patch again, make a tqai.Cache(model.config, ...), or reset() the cache.
    MLX: installs the cache in the model, for mlx_lm.generate and its server, until unpatch.

    Options: bits_k=4, bits_v=2, sink_tokens, residual_window=128, cache_strategy="auto", backend,
    device, use_qjl=False, qjl_sketch_size=64, layer_formats, vector_values=False, key_factors (those of the model's norms;
    None for none), key_means (what key_means.learn(model, tokenizer) of the runtime's plugin returns; else, for
    transformers, a converted folder's, None for none); transformers_plugin.CacheOptions explains them.
    codebook: a file of `tqai codebook build`, or a list of them, to be used instead of the shipped codebook.
    config: instead of widths, one of kv-only, kv+hidden8, kv+hidden6, kv+ffn8, all8, all6 and aggressive
    (core.activations), a format such as "tqai_k4v4", a preset of `tqai recommend` or a folder of `tqai convert`.
    compress_hidden=False, bits_hidden=8, compress_ffn=False, bits_ffn=8: simulate compressed activations, which saves
    no memory, with hooks in the model until unpatch or the next patch.
    Raises ValueError for an option that is unknown or out of range and for a model that cannot be
    compressed, ImportError where the runtime's package is missing.
    """
    backend, config = options.get("backend"), options.get("config")
    if backend not in (None, "auto", "torch", "mlx"):
        raise ValueError(f"backend is {backend!r}; allowed are 'auto', 'torch' and 'mlx'")
    if _is_mlx(model):
        if backend == "torch":
            raise ValueError("backend is 'torch' but this is an MLX model; use backend='mlx' or leave it out")
        options = {name: value for name, value in options.items() if name not in ("backend", "config")}
        options, activations = Activations.split(configurations.merged(config, options))
        _mlx_plugin().install(model, **options)
        return _mlx_activations().install(model, activations)
    if backend == "mlx":
        raise ValueError(
            f"backend is 'mlx' but the model is a {type(model).__module__}.{type(model).__name__}; install mlx-lm with "
            "pip install 'tqai[mlx]' and load the model with mlx_lm.load, or use backend='torch'"
        )
    if not hasattr(model, "config"):
        raise ValueError(f"model is a {type(model).__name__}; expected a transformers or an MLX language model")
    files = options.pop("codebook", ())
    options.pop("config", None)
    options = configurations.merged(config, options)
    if config is None:
        options = _converted(model.config, options)
    text = model.config.get_text_config(decoder=True)
    configurations.check_preset(config, text.num_hidden_layers, configurations.head_dim_of(model.config))
    options, activations = Activations.split(options)
    plugin = _transformers_plugin()
    options.setdefault("key_factors", plugin.key_balance.of(model))
    means = options["key_means"] if "key_means" in options else plugin.key_means.stored(model)
    options["key_means"] = plugin.key_means.of(model, means)
    cache = plugin.Cache(model.config, **options)
    _use_codebooks(files, model.config, cache.options)
    plugin.activations.install(model, activations)
    return cache


def unpatch(model) -> None:
    """Undo patch: remove the hooks on activations, and from an MLX model its cache. Nothing of them stays."""
    if _is_mlx(model):
        plugin = _mlx_plugin()
        plugin.uninstall(model)
        _mlx_activations().uninstall(model)
    elif hasattr(model, "config"):
        _transformers_plugin().activations.uninstall(model)


def _converted(config, options: dict) -> dict:
    """The options, with the widths that a folder of `tqai convert` was made for unless others are given."""
    entry = getattr(config, converted_folder.ENTRY, None)
    if entry is None:
        return options
    bits_k, bits_v = parse_name(converted_folder.format_of(entry))
    return {"bits_k": bits_k, "bits_v": bits_v} | options


def _use_codebooks(files, config, options) -> None:
    from tqai_plugins.core.codebook import read_all, use_for

    use_for(read_all(files), configurations.head_dim_of(config), options.codebook_widths)


def _is_mlx(model) -> bool:
    return any(base.__module__.split(".")[0] == "mlx" for base in type(model).__mro__)


def _mlx_plugin():
    from tqai_plugins import mlx_lm_plugin

    try:
        mlx_lm_plugin.install  # noqa: B018  imports mlx-lm
    except ModuleNotFoundError as error:
        raise ImportError(f"an MLX model needs mlx-lm ({error}); install it with: pip install 'tqai[mlx]'") from error
    return mlx_lm_plugin


def _mlx_activations():
    from tqai_plugins.mlx_lm_plugin import activations

    return activations


def _transformers_plugin():
    try:
        from tqai_plugins import transformers_plugin
    except ImportError as error:
        message = f"a transformers model needs torch and transformers 5 ({error}); pip install 'tqai[torch]'"
        raise ImportError(message) from error
    return transformers_plugin


def __getattr__(name: str):
    if name == "Cache":
        return _transformers_plugin().Cache
    if name == "__version__":
        from importlib.metadata import version

        return version("tqai")
    raise AttributeError(f"module 'tqai' has no attribute {name!r}")

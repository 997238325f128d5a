"""Every line that depends on vLLM's version, each naming the range it serves."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import get_args

from tqai_plugins.core import converted_folder
from tqai_plugins.core.codebook import use
from tqai_plugins.core.kv_format import SERVED_NAMES, KVFormat, is_tqai, parse_name

from .options import Options

OLDEST, NEWEST = (0, 26), (0, 33)
OLDEST_ON_CPU = (0, 28)  # before, only the GPU's runner asks a backend for the shape of its pages
OVERRIDE = "TQAI_VLLM_ANY_VERSION"


def why_unsupported() -> str | None:
    """Why this vLLM is not served, None if it is."""
    import vllm
    from vllm.platforms import current_platform

    try:
        found = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    except ValueError:
        found = (0, 0)
    oldest, where = (OLDEST_ON_CPU, " on a CPU") if current_platform.is_cpu() else (OLDEST, "")
    if oldest <= found <= NEWEST or os.environ.get(OVERRIDE) == "1":
        return None
    return (
        f"tqai supports vLLM {oldest[0]}.{oldest[1]} to {NEWEST[0]}.{NEWEST[1]}{where}, this is {vllm.__version__}; "
        f"install a supported release, use another KV cache dtype, or set {OVERRIDE}=1 to try"
    )


def check_at_start(check_name: Callable[[str], str], check_config: Callable) -> None:
    """0.26 on: have both called where arguments are read and where a configuration is made, before any weight
    is loaded. check_name takes and returns what was given for the cache dtype; both raise ValueError."""
    from vllm.engine.arg_utils import EngineArgs

    stock_arguments, stock_config = EngineArgs.add_cli_args, EngineArgs.create_engine_config

    def argument(text: str) -> str:
        try:
            return check_name(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def add_cli_args(parser):
        parser = stock_arguments(parser)
        for action in parser._actions:
            if "--kv-cache-dtype" in action.option_strings:
                action.type = argument
        return parser

    @functools.wraps(stock_config)
    def create_engine_config(self, *args, **kwargs):
        check_name(self.kv_cache_dtype)
        config = stock_config(self, *args, **kwargs)
        if is_tqai(config.cache_config.cache_dtype):
            check_config(config)
        return config

    EngineArgs.add_cli_args = staticmethod(add_cli_args)
    EngineArgs.create_engine_config = create_engine_config


def register_dtypes() -> None:
    """0.26 on: make vLLM know the names of our cache dtypes."""
    import vllm.config.cache as cache_config

    if hasattr(cache_config, "register_kv_cache_dtype"):  # 0.33 on: the official hook
        import torch
        from vllm.v1.kv_cache_interface import KVQuantMode

        for name in SERVED_NAMES:
            handler = {
                "name": name,
                "torch_dtype": lambda self: torch.uint8,
                # CUSTOM is an alias of another mode in 0.33.0; we know our layers by their dtype.
                "quant_mode": lambda self: KVQuantMode.NONE,
            }
            cache_config.register_kv_cache_dtype(name)(type("TqaiDtype", (), handler))
    else:
        _extend_literal(cache_config)


def _extend_literal(cache_config) -> None:
    """0.26 to 0.32: cache dtypes are one Literal that argparse, pydantic and the selector all read."""
    import torch
    import vllm.config.vllm as vllm_config
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    literal = cache_config.CacheDType
    literal.__args__ = (*get_args(literal), *(name for name in SERVED_NAMES if name not in get_args(literal)))
    for name in SERVED_NAMES:
        STR_DTYPE_TO_TORCH_DTYPE.setdefault(name, torch.uint8)
    rebuild_dataclass(cache_config.CacheConfig, force=True)
    rebuild_dataclass(vllm_config.VllmConfig, force=True)
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is not None and hasattr(arguments, "_compute_kwargs"):
        arguments._compute_kwargs.cache_clear()


def register_backend() -> None:
    """Take the place of the backend that serves unknown dtypes; it stays behind ours for its own."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.cpu_backend.Backend")
    else:
        register_backend(AttentionBackendEnum.TURBOQUANT, f"{__package__}.attention_backend.Backend")
    _patch_spec()


def _patch_spec() -> None:
    """0.26 and 0.27: the page size is decided in Attention.get_kv_cache_spec, by dtype name."""
    from vllm.v1.attention.backend import AttentionBackend

    if hasattr(AttentionBackend, "customize_spec"):
        return
    from vllm.model_executor.layers.attention.attention import Attention

    stock = Attention.get_kv_cache_spec

    def get_kv_cache_spec(self, vllm_config):
        if not is_tqai(self.kv_cache_dtype):
            return stock(self, vllm_config)
        from vllm.v1.kv_cache_interface import TQFullAttentionSpec

        return TQFullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            tq_slot_size=KVFormat.from_name(self.kv_cache_dtype, self.head_size).slot_bytes,
        )

    Attention.get_kv_cache_spec = get_kv_cache_spec


def register_folders() -> None:
    """0.26 on: a folder of `tqai convert` says its own dtype, which --kv-cache-dtype auto takes."""
    from vllm.logger import init_logger

    logger = init_logger("vllm.tqai")
    arguments = sys.modules.get("vllm.engine.arg_utils")  # absent in workers, which get the resolved name
    stock = getattr(arguments, "resolve_kv_cache_dtype_string", None)
    if arguments is None or stock is None or hasattr(stock, "without_tqai"):
        return

    def resolve_kv_cache_dtype_string(kv_cache_dtype, model_config):
        entry = getattr(getattr(model_config, "hf_config", None), converted_folder.ENTRY, None)
        if kv_cache_dtype != "auto" or entry is None:
            return stock(kv_cache_dtype, model_config)
        converted_folder.verify(model_config.model)
        name = converted_folder.format_of(entry, of=model_config.model)
        logger.info("tqai: %s was converted for %s; --kv-cache-dtype bfloat16 would not compress", model_config.model, name)
        return name

    resolve_kv_cache_dtype_string.without_tqai = stock  # type: ignore[attr-defined]
    arguments.resolve_kv_cache_dtype_string = resolve_kv_cache_dtype_string  # type: ignore[attr-defined]


def after_loading(act: Callable) -> None:
    """0.26 on: call act(model, config) when the weights of the served model, not of a draft, are there."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock = BaseModelLoader.load_model

    @functools.wraps(stock)
    def load_model(self, vllm_config, model_config, *args, **kwargs):
        model = stock(self, vllm_config, model_config, *args, **kwargs)
        speculative = vllm_config.speculative_config
        drafts = speculative is not None and model_config is speculative.draft_model_config
        if is_tqai(vllm_config.cache_config.cache_dtype) and not drafts:
            act(model, vllm_config)
        return model

    BaseModelLoader.load_model = load_model


@functools.lru_cache(None)
def refuse_deep_sleep() -> None:
    """0.26 on: sleep at level 2 gives away what was made with the weights, and the kernels' tables with it. ValueError instead."""
    from vllm.v1.worker.gpu_worker import Worker

    stock = Worker.sleep

    @functools.wraps(stock)
    def sleep(self, level: int = 1):
        if level > 1:
            raise ValueError(f"a compressed cache sleeps at level 1 only, not at level {level}; use level 1, or start the server again")
        return stock(self, level)

    Worker.sleep = sleep


def check_layer(name: str, attn_type: str, alibi_slopes) -> None:
    """ValueError for an attention layer that no backend of ours serves; start_checks refuses most models before."""
    if attn_type != "decoder" or alibi_slopes is not None:
        what = "ALiBi" if alibi_slopes is not None else f"{attn_type} attention"
        raise ValueError(f"--kv-cache-dtype {name} does not serve models with {what}; use --kv-cache-dtype auto")


# The dtype of this process' tqai layers, for hooks that vLLM calls without a config at hand.
_active: str | None = None


def set_active(name: str) -> None:
    """Note the dtype of a layer that this process makes, and use the codebooks that it needs."""
    global _active
    parse_name(name)
    _active = name
    _use_codebooks()


def _use_codebooks() -> None:
    """In each process: the codebooks of the options, and those that a folder of `tqai convert` was made with."""
    from vllm.config import get_current_vllm_config
    from vllm.logger import init_logger

    config = get_current_vllm_config()
    for book in Options.of(config).codebooks:
        use(book)
        init_logger("vllm.tqai").info_once("tqai: codebook %s for %d bits", book.name, book.bits)
    entry = getattr(config.model_config.hf_config, converted_folder.ENTRY, None)
    if entry is not None:
        converted_folder.format_of(entry)
        names = ", ".join(book["name"] for book in entry["codebooks"])
        init_logger("vllm.tqai").info_once("tqai: codebooks of the converted folder: %s", names)


def is_active() -> bool:
    """Whether this process has made a tqai layer."""
    return _active is not None


def active_format(head_dim: int) -> KVFormat:
    """The format of this process' tqai layers; RuntimeError before there is one."""
    import vllm.config as config

    current = getattr(config, "get_current_vllm_config_or_none", lambda: None)()
    name = _active
    if current is not None and current.cache_config is not None and is_tqai(current.cache_config.cache_dtype):
        name = current.cache_config.cache_dtype
    if name is None:
        raise RuntimeError("tqai was asked for a page size before any tqai layer exists; please report this")
    return KVFormat.from_name(name, head_dim)


def is_tqai_spec(spec) -> bool:
    """0.28 on: whether a KVCacheSpec belongs to one of our layers (uint8 without a known quantization)."""
    import torch
    from vllm.v1.kv_cache_interface import KVQuantMode

    return spec.dtype == torch.uint8 and spec.kv_quant_mode == KVQuantMode.NONE


def customize_spec(spec):
    """0.28 on: the spec with our bytes a token."""
    from dataclasses import replace

    return replace(spec, state_content_bytes=active_format(spec.head_size).slot_bytes)


def has_formats_of_layers() -> bool:
    """0.29 on. Before, a page's shape is asked of the backend, which does not know the layer."""
    from vllm.v1.attention.backend import AttentionBackend

    return "get_kv_cache_shape" not in vars(AttentionBackend)


def layer_index(name: str) -> int:
    """The number in the name of a layer, such as model.layers.3.self_attn.attn."""
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(name)


def own_page_size(layer) -> None:
    """0.29 on: let an attention layer ask for pages of its own dtype, which is not that of the run."""
    from dataclasses import replace

    stock, slot_bytes = layer.get_kv_cache_spec, KVFormat.from_name(layer.kv_cache_dtype, layer.head_size).slot_bytes
    layer.get_kv_cache_spec = lambda config: replace(stock(config), state_content_bytes=slot_bytes)


def query_token_limit(vllm_config) -> int:
    """Query tokens of one request in a decode step: 1, or more where speculative tokens are verified."""
    speculative = vllm_config.speculative_config
    return 1 + (getattr(speculative, "num_speculative_tokens", 0) or 0 if speculative else 0)


def lengths_are_bounds(vllm_config) -> bool:
    """Whether lengths on the host may be too large: asynchronous scheduling supposes that all speculated tokens hold."""
    scheduler = vllm_config.scheduler_config
    return vllm_config.speculative_config is not None and bool(getattr(scheduler, "async_scheduling", False))

"""Memory for the 8-bit copies of first and recent pages: --additional-config '{"tqai": {"recent_memory": 0.02}}'."""

from __future__ import annotations

import torch
from vllm.logger import init_logger

from tqai_plugins.core.kv_format import COPIED_PAGES, RECENT_PAGE_TOKENS, RECENT_PAGES, is_tqai, parse_name

from .options import Options

logger = init_logger("vllm.tqai")

SPARE = 16  # copies beyond those of running sequences, for chunks of prefill that come and go


def fits(page_tokens: int) -> bool:
    """Whether pages of this size can have copies."""
    return page_tokens % RECENT_PAGE_TOKENS == 0


def warn_unless_fits(page_tokens: int) -> None:
    """For a page size that vLLM chose after the copies were reserved."""
    if not fits(page_tokens):
        logger.warning(
            "tqai: blocks of %d tokens have no 8-bit copies of recent pages; give --block-size a multiple of %d",
            page_tokens, RECENT_PAGE_TOKENS,
        )  # fmt: skip


def why_none(config) -> str | None:
    """Why a server keeps no copies, None if it does."""
    if parse_name(config.cache_config.cache_dtype) == (8, 8) and Options.of(config).preset is None:
        return "all tokens have 8 bits"
    if Options.of(config).recent_memory == 0:
        return "recent_memory is 0"
    cache = config.cache_config  # without a wish of the user's, the backend's own choice comes later, and fits
    if cache.user_specified_block_size and not fits(cache.block_size):
        return f"blocks of {cache.block_size} tokens; multiples of {RECENT_PAGE_TOKENS} have them"
    if config.kv_transfer_config is not None:
        return "a KV connector writes pages that the copies would not follow"
    if getattr(config.model_config, "enable_sleep_mode", False):
        return "sleep mode gives away the memory of their books"
    if getattr(config.parallel_config, "enable_dbo", False):
        return "dual batch overlap"
    return None


# The layers of the engine in this process and how many copies each keeps: what is free when the first of them
# asks decides for all, also for a draft model's, whose config is another.
_decided: tuple[dict | None, int] = None, 0


def copies(config) -> int:
    """Copies that this process keeps, in every layer; 0 for none. Decided once, when the weights are loaded.

    COPIED_PAGES for each sequence that can run keep all of them at full fidelity; the share of KV memory is the limit.
    """
    global _decided
    layers = config.compilation_config.static_forward_context
    if _decided[0] is not layers:
        reason = why_none(config)
        _decided = layers, 0 if reason else _count(config)
        logger.info("tqai: %s", _sentence(config, _decided[1], reason))
    return _decided[1]


def _count(config) -> int:
    wanted = COPIED_PAGES * config.scheduler_config.max_num_seqs + SPARE
    return max(0, min(wanted, int(Options.of(config).recent_memory * _kv_memory(config)) // _copy_bytes(config)))


def _copy_bytes(config) -> int:
    layers = config.compilation_config.static_forward_context.values()
    return sum(layer.impl.recent_bytes() for layer in layers if is_tqai(getattr(layer, "kv_cache_dtype", None)))


def _kv_memory(config) -> int:
    """Bytes for KV pages as known before vLLM's profiling run."""
    cache = config.cache_config
    if getattr(cache, "kv_cache_memory_bytes", None):
        return cache.kv_cache_memory_bytes
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return int(cache.gpu_memory_utilization * total) - torch.cuda.memory_allocated()
    return getattr(cache, "cpu_kvcache_space_bytes", None) or 4 << 30


def _sentence(config, number: int, reason: str | None) -> str:
    if not number:
        return f"no 8-bit copies of recent pages: {reason or 'recent_memory is too small for one'}"
    share_bytes = number * _copy_bytes(config)
    sequences = max(0, number - SPARE) // COPIED_PAGES
    return (
        f"the first {RECENT_PAGE_TOKENS} and the last {RECENT_PAGE_TOKENS + 1} to {RECENT_PAGES * RECENT_PAGE_TOKENS} "
        "tokens of a sequence are kept at 8 bits too: "
        f"{number} copies of pages, {share_bytes / 2**20:.0f} MiB, enough for {sequences} running sequences; "
        "with more, the longest unused are read from their codes"
    )

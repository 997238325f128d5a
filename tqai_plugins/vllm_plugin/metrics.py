"""What compression does, in the start log and on vLLM's /metrics.

vLLM's workers and its API server are different processes. Workers count into files of the kind that
prometheus_client keeps for such cases, in a folder whose name they inherit; the API server shows their sum.
With several API servers vLLM does all of its own metrics so, and ours lie among them.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from vllm.logger import init_logger

from tqai_plugins.core.kv_format import KVFormat, is_tqai

logger = init_logger("vllm.tqai")

FOLDER = "TQAI_METRICS_DIR"
COUNTERS = {
    "tqai_vectors_quantized": "Key and value vectors that were stored as codes.",
    "tqai_tokens_read": "Cached tokens that attention read from codes, summed over layers.",
    "tqai_recent_pages_read": "Recent pages of sequences that steps read, from 8-bit copies unless counted as a fallback.",
    "tqai_fallbacks": "Recent pages read from their codes for want of a copy, and steps whose kernel was not the fastest.",
    "tqai_canary_checks": "Stored vectors and rows of attention that the canary checked.",
    "tqai_canary_failures": "Those of them whose error was beyond its bound.",
}
GAUGES = {
    "tqai_cache_info": "The format and the kernels of the compressed cache; always 1.",
    "tqai_layers": "Attention layers with a cache, by kind.",
    "tqai_token_bytes": "Bytes of the cache for one token, all layers of this rank.",
    "tqai_compression_ratio": "How many times smaller a token is than with 16 bits in all layers.",
    "tqai_cache_tokens": "Tokens that fit.",
    "tqai_key_mean_layers": "Compressed layers whose keys are stored less their mean.",
    "tqai_recent_copies": "8-bit copies of recent pages that every compressed layer has room for.",
    "tqai_canary_error": "The largest relative squared error that the canary found.",
}
NO_COPY = "recent_page_without_copy"
PLAIN_TRITON = "plain_triton"
POLL_STEPS = 64  # steps between two looks at what a GPU counted


def show() -> None:
    """Show the counts of this process and its children where prometheus_client's own metrics are shown."""
    if multiprocessing.parent_process() is not None:
        return
    from prometheus_client import REGISTRY

    # Made by whoever counts first, if anybody does; nobody else can have made it before, or linked it elsewhere.
    folder = Path(tempfile.gettempdir()) / f"tqai-metrics-{secrets.token_hex(8)}"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[FOLDER] = str(folder)
    REGISTRY.register(_Collector(folder))


class _Collector:
    def __init__(self, folder: Path):
        self.folder = folder

    def collect(self):
        from prometheus_client.multiprocess import MultiProcessCollector

        return MultiProcessCollector(None, str(self.folder)).collect() if self.folder.is_dir() else ()


class _Files:
    """This process' counters and gauges of one engine and rank."""

    def __init__(self, config):
        from prometheus_client.mmap_dict import MmapedDict

        # The same that vLLM's several API servers share, if there are several.
        folder = Path(os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ.get(FOLDER) or tempfile.mkdtemp())
        folder.mkdir(mode=0o700, exist_ok=True)
        parallel = config.parallel_config
        self.labels = {"engine": str(parallel.data_parallel_rank), "rank": str(parallel.rank)}
        self.counters = MmapedDict(str(folder / f"counter_tqai-{os.getpid()}.db"))
        self.gauges = MmapedDict(str(folder / f"gauge_max_tqai-{os.getpid()}.db"))
        self.values: Counter = Counter()

    def add(self, name: str, amount: int, **labels: str) -> None:
        at = (name, *labels.items())
        self.values[at] += amount
        self.counters.write_value(self._key(name, f"{name}_total", COUNTERS[name], labels), self.values[at], time.time())

    def set(self, name: str, value: float, **labels: str) -> None:
        self.gauges.write_value(self._key(name, name, GAUGES[name], labels), value, time.time())

    def _key(self, metric: str, name: str, text: str, labels: dict[str, str]) -> str:
        from prometheus_client.mmap_dict import mmap_key

        labels = {**self.labels, **labels}
        return mmap_key(metric, name, list(labels), list(labels.values()), text)


_files: dict[int, _Files] = {}


def _of_process(config) -> _Files:
    if os.getpid() not in _files:
        _files[os.getpid()] = _Files(config)
    return _files[os.getpid()]


def _cached_layers(config) -> list:
    """Attention layers that have a cache of their own."""
    layers = config.compilation_config.static_forward_context.values()
    return [x for x in layers if hasattr(x, "kv_cache_dtype") and not getattr(x, "kv_sharing_target_layer_name", None)]


_announced: dict[str, str] = {}  # the labels of tqai_cache_info


def announce(config, kernels: str) -> None:
    """Say once, when the weights are loaded, what is compressed and by what; set the gauges."""
    if not _announced:
        _describe(config, kernels)


def announce_again(config) -> None:
    """Say it anew, since layers have got other formats."""
    _of_process(config).set("tqai_cache_info", 0, **_announced)
    _describe(config, _announced["kernels"])


def _describe(config, kernels: str) -> None:
    layers = _cached_layers(config)
    kinds: Counter = Counter()
    formats: Counter = Counter()
    coded = plain = 0
    for layer in layers:
        window = getattr(layer, "sliding_window", None)
        kind = "full attention" if window is None else f"sliding window of {window}"
        dense = 4 * layer.num_kv_heads * layer.head_size
        plain += dense
        if is_tqai(layer.kv_cache_dtype):
            fmt = KVFormat.from_name(layer.kv_cache_dtype, layer.head_size)
            coded += layer.num_kv_heads * fmt.slot_bytes
            formats[fmt.name] += 1
        else:
            kind += ", not compressed"
            coded += dense
        kinds[kind] += 1
    held = f"{fmt.name}, {fmt.bits_k}-bit keys and {fmt.bits_v}-bit values"
    if len(formats) > 1:
        held = f"of several formats, {', '.join(f'{n} layers {name}' for name, n in sorted(formats.items()))}"
    logger.info(
        "tqai: KV cache %s: %s; %s bytes a token in all layers here, %.2f times smaller than 16 bits; kernels: %s",
        held, ", ".join(f"{n} layers of {kind}" for kind, n in kinds.items()), f"{coded:,}", plain / coded, kernels,
    )  # fmt: skip
    files = _of_process(config)
    _announced.update(format=fmt.name if len(formats) == 1 else "several", kernels=kernels)
    files.set("tqai_cache_info", 1, **_announced)
    files.set("tqai_token_bytes", coded)
    files.set("tqai_compression_ratio", plain / coded)
    for kind, number in kinds.items():
        files.set("tqai_layers", number, kind=kind)


def set_key_means(config, layers: int) -> None:
    """Show in how many layers a key mean is subtracted."""
    _of_process(config).set("tqai_key_mean_layers", layers)


def count_canary(config, what: str, checks: int, failures: int, worst: float) -> None:
    """Count checks of the canary; worst: the largest error so far."""
    files = _of_process(config)
    files.add("tqai_canary_checks", checks, what=what)
    files.add("tqai_canary_failures", failures, what=what)
    files.set("tqai_canary_error", worst, what=what)


class Meter:
    """Counts the steps of the layers that share a metadata builder; reads nothing from a device in a step."""

    def __init__(self, config, layer_names: list[str], recent=None):
        """recent: the builder's RecentCopies, None without."""
        context = config.compilation_config.static_forward_context
        layers = [context[name] for name in layer_names if name in context]
        self.files = _of_process(config)
        self.config = config
        own = [x for x in layers if not getattr(x, "kv_sharing_target_layer_name", None)]
        self.vectors = sum(2 * layer.num_kv_heads for layer in own)
        self.windows = Counter(getattr(layer, "sliding_window", None) for layer in layers)
        self.served = None if recent is None else _Served(recent.wanted_served)
        for name in ("tqai_vectors_quantized", "tqai_tokens_read"):
            self.files.add(name, 0)  # shown from the start
        if recent is not None:
            self.files.set("tqai_recent_copies", recent.owner.shape[0])
            self.files.add("tqai_recent_pages_read", 0)
            self.files.add("tqai_fallbacks", 0, reason=NO_COPY)
        self._capacity()

    def _capacity(self) -> None:
        cache = self.config.cache_config
        if cache.num_gpu_blocks:
            tokens = getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size
            self.files.set("tqai_cache_tokens", tokens)

    def step(self, query_starts: torch.Tensor, lengths: torch.Tensor, fallback: str | None = None) -> None:
        """query_starts [requests + 1] and lengths [requests], new tokens included, on the host."""
        new = query_starts.diff()
        cached = (lengths[: new.shape[0]] - new).clamp_(min=0)
        read = sum(
            number * int((cached if window is None else cached.clamp(max=window)).sum()) for window, number in self.windows.items()
        )
        self.files.add("tqai_vectors_quantized", self.vectors * int(query_starts[-1]))
        self.files.add("tqai_tokens_read", read)
        if fallback:
            self.files.add("tqai_fallbacks", 1, reason=fallback)
        if self.served is not None:
            wanted, served = self.served.new()
            if wanted:
                self.files.add("tqai_recent_pages_read", wanted)
                self.files.add("tqai_fallbacks", wanted - served, reason=NO_COPY)


class _Served:
    """RecentCopies.wanted_served, read now and then without waiting for the device."""

    def __init__(self, counts: torch.Tensor):
        self.counts, self.steps, self.known = counts, 0, [0, 0]
        self.here = torch.zeros_like(counts, device="cpu", pin_memory=counts.is_cuda)

    def new(self) -> tuple[int, int]:
        """What was counted since the last call, as far as it has arrived: pages wanted, pages served."""
        if self.counts.is_cuda and self.steps % POLL_STEPS:
            self.steps += 1
            return 0, 0
        self.steps += 1
        if not self.counts.is_cuda:
            self.here.copy_(self.counts)
        found = self.here.tolist()  # on a GPU: what the look before this one asked for
        if self.counts.is_cuda:
            self.here.copy_(self.counts, non_blocking=True)
        difference = found[0] - self.known[0], found[1] - self.known[1]
        self.known = found
        return difference

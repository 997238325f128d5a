"""Will it fit, how many at once, how fast at most: arithmetic over a model's shape and a machine."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from tqai_plugins.core.kv_format import KVFormat

from .model_shape import CacheLayer, ModelShape

GB = 10**9


@dataclass(frozen=True)
class Machine:
    """Bytes of memory that a program sees and bytes/s that a copy reaches."""

    name: str
    memory: float
    bandwidth: float


def _rated(name: str, gib: float, gb_s: float) -> Machine:
    """A machine by its data sheet; a copy reaches nine tenths of the rated bandwidth (an H100: 3.00 of 3.35 TB/s)."""
    return Machine(name, gib * 2**30, 0.9 * gb_s * GB)


# Memory as CUDA reports it, or what Metal lets a program use (three quarters of a Mac's).
MACHINES = {
    m.name: m
    for m in (
        _rated("a10", 22.0, 600), _rated("a100-40", 39.4, 1555), _rated("a100-80", 79.1, 2039), _rated("b200", 178.4, 8000),
        _rated("h100", 79.2, 3350), _rated("h200", 139.7, 4800), _rated("l4", 22.0, 300), _rated("l40s", 44.4, 864),
        _rated("rtx3090", 23.6, 936), _rated("rtx4090", 23.5, 1008), _rated("rtx5090", 31.4, 1792),
        _rated("m4-16", 12, 120), _rated("m4pro-48", 36, 273), _rated("m4max-64", 48, 546), _rated("m4max-128", 96, 546),
        _rated("m3ultra-256", 192, 819),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """How a runtime lays a cache out: tokens a page, which layers tqai codes, tokens it keeps exact, spare room."""

    pages: int | None  # tokens of a page for 16-bit and fp8 caches; None: no pool, each request has its own buffers
    coded_pages: int | None
    codes_windows: bool  # whether sliding-window layers are coded too
    exact_tokens: int  # of each request, at 16 bits
    batched_tokens: int  # of a prefill step: they decide the room for activations
    steps_in_flight: int  # scheduled and not yet settled: window layers keep their tokens so long
    utilization: float  # share of the memory that it takes
    fixed_bytes: float  # CUDA context, library workspaces, graphs


RUNTIMES = {
    "vllm": Runtime(16, 64, False, 0, 8192, 2, 0.9, 0.5 * GB),
    "vllm-cpu": Runtime(128, 128, True, 0, 4096, 1, 1.0, 0),
    "transformers": Runtime(None, None, False, 4 + 128 + 16, 8192, 1, 0.95, 0.5 * GB),
    "mlx": Runtime(None, None, False, 0, 2048, 1, 0.95, 0.5 * GB),
}


@dataclass(frozen=True)
class Use:
    """What is asked for."""

    runtime: Runtime
    context: int
    tensor_parallel: int = 1
    twins: float = 0.0  # share of the cache's memory that exact copies of recent pages take
    batched_tokens: int | None = None
    utilization: float | None = None
    cache_bytes: float | None = None  # instead of what the machine leaves, a rank

    @property
    def in_flight(self) -> int:
        """Tokens that vLLM may have scheduled and not yet settled."""
        return self.runtime.steps_in_flight * (self.batched_tokens or self.runtime.batched_tokens)


@dataclass(frozen=True)
class Row:
    """The answer for one cache format. Bytes are those of one rank."""

    format: str
    weight_bytes: float
    cache_bytes: float
    token_bytes: float  # of the layers that grow
    request_bytes: float  # of one request at the context
    tokens: int  # that fit, counted as vLLM's log counts: requests at the context times the context
    requests: float
    read_bytes: float  # of one request's cache, in one decode step


def parse_bytes(text: str) -> float:
    """`24GB`, `24GiB` or a plain number of GB, as bytes; ValueError for anything else."""
    found = re.fullmatch(r"([0-9.]+)\s*(GB|GiB|MB|MiB)?", text)
    try:
        number = float(found[1]) if found else -1.0
    except ValueError:
        number = -1.0
    if number <= 0:
        raise ValueError(f"memory is {text!r}; expected a size such as 24GB or 79.2GiB")
    return number * {"GB": GB, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}[found[2] or "GB"]


def token_bytes(layer: CacheLayer, name: str, heads: int, coded: bool) -> float:
    """Bytes of one token in one layer, with so many heads on a rank."""
    if coded and name.startswith("tqai"):
        return heads * KVFormat.from_name(name, layer.head_dim).slot_bytes
    return heads * 2 * layer.head_dim * (1 if name == "fp8" else 2)


def heads_of_rank(heads: int, ranks: int) -> int:
    """KV heads on each rank; with more ranks than heads each head is on several. ValueError for an uneven split."""
    if max(heads, ranks) % min(heads, ranks):
        raise ValueError(f"{heads} KV heads cannot be split over --tensor-parallel {ranks}")
    return max(heads // ranks, 1)


def plan(shape: ModelShape, machine: Machine | None, use: Use, name: str) -> Row:
    """One row of the table; ValueError if not even the weights fit."""
    runtime, ranks = use.runtime, use.tensor_parallel
    if not 0 < use.context <= shape.max_context:
        raise ValueError(f"--context is {use.context}; {shape.name} reads 1 to {shape.max_context} tokens")
    weights = shape.weight_bytes / ranks
    memory = use.cache_bytes
    if memory is None:
        memory = machine.memory * (use.utilization or runtime.utilization) - weights - workspace(shape, use)
    if memory <= 0:
        raise ValueError(
            f"{shape.name} does not fit {machine.name}: its weights are {weights / GB:.1f} GB a GPU and "
            f"{machine.memory / GB:.1f} GB are there; take more --tensor-parallel, a larger machine or quantized weights"
        )
    if name.startswith("tqai"):
        memory *= 1 - use.twins
    layers = []  # (bytes a token, window, state bytes), one for each thing that is kept
    grows = read = 0.0
    for layer in shape.layers:
        if layer.heads:
            coded = layer.window is None or runtime.codes_windows
            each = token_bytes(layer, name, heads_of_rank(layer.heads, ranks), coded)
            layers.append((each, layer.window, 0))
            grows += each if layer.window is None else 0
            read += each * min(use.context, layer.window or use.context)
        if layer.state_bytes:
            layers.append((0, None, layer.state_bytes / ranks))
            read += layer.state_bytes / ranks
    if runtime.pages is None:
        request = read
        if name.startswith("tqai"):
            exact = min(use.context, runtime.exact_tokens)
            full = [x for x in shape.layers if x.heads and x.window is None]
            request += exact * sum(token_bytes(x, "bf16", x.heads, False) - token_bytes(x, name, x.heads, True) for x in full)
        requests = memory / request
    else:
        block = runtime.coded_pages if name.startswith("tqai") else runtime.pages
        block_bytes, blocks = vllm_pool(layers, block, use.context, use.in_flight)
        request, requests = block_bytes * blocks, memory // block_bytes / blocks
    return Row(name, weights, memory, grows, request, int(requests * use.context), requests, read)


def workspace(shape: ModelShape, use: Use) -> float:
    """Room for the activations of a prefill step (16 bits: both MLP inputs, their product, three of the hidden size)."""
    tokens = use.batched_tokens or use.runtime.batched_tokens
    return use.runtime.fixed_bytes + 2 * tokens * (3 * shape.inner / use.tensor_parallel + 3 * shape.hidden)


def vllm_pool(layers: list[tuple], block: int, context: int, in_flight: int) -> tuple[float, int]:
    """(bytes of a block of the pool, blocks of one request): the rules of vLLM 0.32's kv_cache_utils.

    Layers of one kind share a table of blocks. Kinds are cut into groups of equally many layers, which all draw from
    one pool, so pages are made equal: smaller ones get more tokens, or padding, and a state fills one page.
    """
    widest = max(each for each, _, _ in layers)
    state = max(state for _, _, state in layers)
    if state:
        block *= max(math.ceil(state / (block * widest)), 1)
    kinds = Counter((each, window, bool(state)) for each, window, state in layers)

    def request_blocks(window: int | None, is_state: bool, tokens: int) -> int:
        if is_state:
            return 2  # the newest, and one that prefix caching keeps
        if window is None:
            return math.ceil(context / tokens)
        return math.ceil(min(window - 1 + in_flight, context) / tokens) + 1

    if len({(window, is_state) for _, window, is_state in kinds}) == 1:
        _, window, is_state = next(iter(kinds))
        return sum(each * block * count for (each, _, _), count in kinds.items()), request_blocks(window, is_state, block)
    page = widest * block
    fewest, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * fewest else fewest
    blocks = 0
    for (each, window, is_state), count in kinds.items():
        tokens = block * int(widest // each) if each and widest % each == 0 else block
        blocks += math.ceil(count / size) * request_blocks(window, is_state, tokens)
    return size * page, blocks


def tokens_per_second(shape: ModelShape, machine: Machine, use: Use, row: Row, requests: int) -> float:
    """Decode speed of so many requests at the context if nothing but reading memory took time: an upper bound."""
    step = shape.read_bytes(requests) / use.tensor_parallel + requests * row.read_bytes
    return requests * machine.bandwidth / step

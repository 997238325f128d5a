"""Time of one attention layer at decode, and of a whole model: codes beside mlx-lm's own caches, on the device MLX has."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from ..core.kv_format import KVFormat
from ..metal_kernels import launch, tables
from ..metal_kernels.decode_attention import decode_attention
from . import patching
from .attention import attend
from .kv_cache import CompressedKVCache
from .options import CacheOptions

SHAPES = ((1, 8192), (1, 32768), (8, 8192))  # sequences, context
SMOLLM2_135M = {
    "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "vocab_size": 49152, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True,
}  # fmt: skip


AHEAD = 1 << 28  # numbers that the device adds to while calls are queued behind it


def time_of(call: Callable[[mx.array], mx.array], query: mx.array, calls: int = 40, repeats: int = 7) -> tuple[float, float]:
    """Microseconds that a call takes on the device, and to build in Python: by how much a chain of five times `calls` takes longer
    than one of `calls`, each call on what the one before gave, as the layers of a model are; medians. query [batch, q_heads,
    1, head_dim], or whatever shape `call` takes and returns.

    A chain is queued while the device works on sums, as many as take it twice as long as the queueing, so that it never waits
    for Python or for MLX's encoding; generation too queues a token while the one before is worked on, unless the model is
    small. Sums and not products of matrices: those draw so much power that an H200 lowers its clock, and not for them alone.
    """
    numbers = mx.zeros((AHEAD,), mx.float16)
    mx.eval(call(call(query)), numbers + 1)

    def run(count: int, sums: int) -> tuple[float, float, float]:
        """Seconds until all is done, that building took, and building and encoding."""
        start, ahead = time.perf_counter(), numbers
        for _ in range(sums):
            ahead = ahead + 1
        mx.async_eval(ahead)
        began, x = time.perf_counter(), query
        for _ in range(count):
            x = call(x)
        built = time.perf_counter()
        mx.async_eval(x)
        queued = time.perf_counter()
        mx.eval(ahead, x)
        return time.perf_counter() - start, built - began, queued - began

    sums = math.ceil(2 * run(5 * calls, 1)[2] / run(0, 1)[0])

    def medians(count: int) -> list[float]:
        return [statistics.median(column) for column in zip(*(run(count, sums)[:2] for _ in range(repeats)))]

    few, many = medians(calls), medians(5 * calls)
    return tuple((longer - shorter) / (4 * calls) * 1e6 for shorter, longer in zip(few, many))


def _or_none(measure: Callable[[], float]) -> float | None:
    """None where MLX cannot: its CUDA backend lacks quantized products of some lengths, which a growing cache meets."""
    try:
        return measure()
    except RuntimeError as error:
        if "No implementation" in str(error):
            return None
        raise


def measure(formats: list[str], shapes=SHAPES, q_heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Iterator[dict]:
    """Rows of name, sequences, context, us (attention alone), build_us (building that call) and step_us (storing a
    token and attention).

    us of codes is without exact tokens; step_us goes through the caches as they are by default.
    Raises ValueError where MLX has no GPU.
    """
    if not launch.available():
        raise ValueError("MLX has no GPU here, Metal or CUDA, to measure kernels on")
    for sequences, context in shapes:
        for row in _one_shape(formats, sequences, context, q_heads, kv_heads, head_dim):
            yield {"sequences": sequences, "context": context, **row}


def _one_shape(formats, sequences: int, context: int, q_heads: int, kv_heads: int, head_dim: int) -> Iterator[dict]:
    def draw(heads: int, count: int) -> mx.array:
        return mx.random.normal((sequences, heads, count, head_dim)).astype(mx.float16)

    def step(cache, attention) -> float:
        return time_of(lambda x: attention(x, *cache.update_and_fetch(key, value)), query, calls=10)[0]

    keys, values, query = draw(kv_heads, context), draw(kv_heads, context), draw(q_heads, 1)
    key, value = draw(kv_heads, 1), draw(kv_heads, 1)
    mx.eval(keys, values, query, key, value)
    scale = head_dim**-0.5
    sdpa = lambda x, k, v: mx.fast.scaled_dot_product_attention(x, k, v, scale=scale, mask=None)
    cache = KVCache()
    cache.update_and_fetch(keys, values)
    us, build_us = time_of(lambda x: sdpa(x, keys, values), query)
    yield {"name": "mx.fast SDPA float16", "us": us, "build_us": build_us, "step_us": step(cache, sdpa)}

    affine = lambda x, k, v: quantized_scaled_dot_product_attention(x, k, v, scale=scale, mask=None, group_size=64, bits=4)
    cache = cache.to_quantized(64, 4)
    coded = mx.quantize(keys, 64, 4), mx.quantize(values, 64, 4)
    mx.eval(coded)
    us, build_us = time_of(lambda x: affine(x, *coded), query)
    through = _or_none(lambda: step(cache, affine))
    yield {"name": "mlx-lm 4-bit affine", "us": us, "build_us": build_us, "step_us": through}

    for fmt in (KVFormat.from_name(name, head_dim) for name in formats):
        cache = CompressedKVCache(CacheOptions(fmt.bits_k, fmt.bits_v))
        for start in range(0, context, 4096):
            cache.update_and_fetch(keys[:, :, start : start + 4096], values[:, :, start : start + 4096])
            mx.eval(cache.state)
        slots, rows = cache.columns[0], tables.rows([0] * sequences, [context] * sequences)
        us, build_us = time_of(lambda x: decode_attention(x, slots, context, fmt, rows, scale=scale), query)  # noqa: B023  called at once
        through = step(cache, lambda x, k, v: attend(x, k, v, scale, None))
        size = sequences * context * kv_heads * fmt.slot_bytes
        yield {"name": fmt.name, "us": us, "build_us": build_us, "step_us": through, "bytes": size}


def decode_rates(formats: list[str], sizes=SMOLLM2_135M, prompt: int = 512, tokens: int = 100, repeats: int = 3) -> Iterator[dict]:
    """Rows of name and tokens_s: mlx-lm's generator over a model of these sizes and random weights, bfloat16, with the stock
    cache and with each format's.

    Each step is built in Python while the device works on the one before: small models wait for the former.
    """
    model = llama.Model(llama.ModelArgs(model_type="llama", **sizes))
    model.set_dtype(mx.bfloat16)
    ids = mx.random.randint(0, sizes["vocab_size"], (prompt,))
    mx.eval(model.parameters(), ids)

    def rate(count: int) -> float:
        steps = generate_step(ids, model, max_tokens=count + 1)
        next(steps)  # the prompt is read
        start = time.perf_counter()
        return sum(1 for _ in steps) / (time.perf_counter() - start)

    for name in (None, *formats):
        if name is not None:
            fmt = KVFormat.from_name(name, sizes["head_dim"])
            patching.install(model, bits_k=fmt.bits_k, bits_v=fmt.bits_v)
        try:
            rate(2)  # kernels are compiled
            yield {"name": name or "stock", "tokens_s": statistics.median(rate(tokens) for _ in range(repeats))}
        finally:
            patching.uninstall(model)

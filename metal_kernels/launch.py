"""Builds and launches a kernel: its .metal body through mx.fast.metal_kernel, or through mx.fast.cuda_kernel."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Hashable
from importlib.resources import files

import mlx.core as mx

from ..core.bit_packing import PATTERN_BITS
from ..core.codebook import TOP
from ..core.kv_format import SCALE_DENOMINATOR, KVFormat
from ..core.reference import SMALLEST_RMS

VECTOR = 16  # what kernels call vector values where they tell codes apart by their bits
TILE = 8  # rows and columns of the matrix unit's tiles
TRACES = 64  # kept by a thread; the layers of a step share one or two
# What comes before a kernel; the facts come after the first.
METAL = ("metal_prelude.metal", "common.metal", "metal_keys.metal", "attention.metal")
CUDA = ("cuda_prelude.cuh", "common.metal", "cuda_keys.cuh", "attention.metal")
CUDA_TYPES = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float"}


def backend() -> str | None:
    """metal, cuda, or None where MLX has no GPU."""
    if mx.default_device() == mx.Device(mx.cpu):
        return None
    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else None


def available() -> bool:
    """Whether kernels can run here; else the callers use plain mx operations."""
    return backend() is not None


def _text(name: str) -> str:
    return (files(__package__) / name).read_text()


def _facts() -> str:
    """Numbers of the codec, and of launches, that kernels use."""
    facts = {
        "TOP": f"{TOP}f", "SMALLEST_RMS": f"{SMALLEST_RMS}f", "SCALE_DENOMINATOR": f"{SCALE_DENOMINATOR}.0f",
        "VECTOR": VECTOR, "PATTERN_BITS": PATTERN_BITS, "TILE": TILE,
    }  # fmt: skip
    return "".join(f"#define {name} {value}\n" for name, value in facts.items())


def template(fmt: KVFormat) -> dict[str, int]:
    """What a kernel's template says of the format."""
    return {"D": fmt.head_dim, "BK": fmt.bits_k, "BV": VECTOR if fmt.vector_values else fmt.bits_v}


@functools.lru_cache(None)
def header() -> str:
    """What comes before every kernel on Metal."""
    return _text(METAL[0]) + _facts() + "".join(map(_text, METAL[1:]))


def _include(name: str) -> str:
    return f'#include "{files(__package__) / name}"\n'


def cuda_text(name: str, template: tuple) -> tuple[str, str]:
    """What comes before a kernel on CUDA, and its body.

    MLX copies and hashes the text at every launch, and turns every value of a template into text: so it gets a few lines.
    """
    values = "".join(f"using {k} = {CUDA_TYPES[v]};\n" if isinstance(v, mx.Dtype) else f"constexpr int {k} = {v};\n" for k, v in template)
    # CUDA's own __device__ and __constant__ end in these words, which therefore lose their meaning last.
    before = _include(CUDA[0]) + _facts() + "".join(map(_include, CUDA[1:])) + "#define device\n#define constant\n"
    return before, values + _include(f"{name}.metal")


@functools.lru_cache(None)
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], template: tuple, kind: str) -> Callable:
    """MLX's kernel of one of our sources, for Metal or CUDA."""
    text, names = _text(f"{name}.metal"), {"input_names": list(inputs), "output_names": list(outputs)}
    if kind == "metal":
        made = mx.fast.metal_kernel(name=f"tqai_{name}", source=text, header=header(), **names)
        return functools.partial(made, template=list(template))
    before, source = cuda_text(name, template)
    # MLX keeps compiled kernels on disk by their names: another text needs another name.
    everything = before + source + "".join(map(_text, CUDA)) + text
    digest = hashlib.sha256(everything.encode()).hexdigest()[:16]
    return mx.fast.cuda_kernel(name=f"tqai_{name}_{digest}", source=source, header=before, **names)


def launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    template: dict,
    groups: tuple[int, int, int],
    simdgroups: int,
) -> list[mx.array]:
    """Run <name>.metal on groups of `simdgroups` simdgroups; the outputs in their order.

    Inputs are not copied if they are contiguous, so buffers are given whole, never a slice of them. MLX tells CUDA
    kernels apart by their names, ours by the template alone: it has to name every dtype that can differ.
    """
    run = kernel(name, tuple(inputs), tuple(outputs), tuple(template.items()), backend())
    threads = 32 * simdgroups
    shapes, dtypes = zip(*outputs.values())
    return run(
        inputs=list(inputs.values()), grid=(groups[0] * threads, groups[1], groups[2]), threadgroup=(threads, 1, 1),
        output_shapes=shapes, output_dtypes=dtypes,
    )  # fmt: skip


class _Traces(threading.local):
    """What mx.compile made of functions. MLX keeps traces by thread too, by a function's address: one that outlived its
    function in another thread would be taken for a later function's."""

    def __init__(self):
        self.of = functools.lru_cache(TRACES)(lambda function, plan: mx.compile(functools.partial(function, plan)))


_traces = _Traces()


def traced(function: Callable, plan: Hashable, *arrays: mx.array | None):
    """function(plan, *arrays), which launches kernels, built from a trace: in less than half the time, as MLX makes the whole
    text of a kernel anew at every launch, but not when it replays one.

    plan says all that the launches depend on, the arrays' shapes included, which callers have at hand (to ask all arrays
    took 1.6 us a call); numbers that change from token to token are in arrays.
    """
    return _traces.of(function, plan)(*arrays)

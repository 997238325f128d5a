"""Builds and launches a kernel: its .metal body through mx.fast.metal_kernel, or through mx.fast.cuda_kernel."""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files

import mlx.core as mx

from ..core.codebook import TOP
from ..core.kv_format import SCALE_DENOMINATOR
from ..core.reference import SMALLEST_RMS

METAL_PRELUDE = """#define TQAI_FN inline
#define UNROLL _Pragma("unroll")
// The value of lane `index` modulo 32.
TQAI_FN float simd_table(float v, uint index) { return metal::simd_shuffle(v, ushort(index & 31u)); }
"""
# CUDA's own __device__ and __constant__ end in these words, which therefore lose their meaning last.
CUDA_LAST = "#define device\n#define constant\n"


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


@functools.lru_cache(None)
def header(kind: str) -> str:
    """What comes before every kernel."""
    facts = f"#define TOP {TOP}f\n#define SMALLEST_RMS {SMALLEST_RMS}f\n#define SCALE_DENOMINATOR {SCALE_DENOMINATOR}.0f\n"
    if kind == "metal":
        return METAL_PRELUDE + facts + _text("common.metal")
    return _text("cuda_prelude.cuh") + facts + _text("common.metal") + CUDA_LAST


@functools.lru_cache(None)
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], kind: str):
    """MLX's kernel of one of our sources, for Metal or CUDA."""
    make, source = mx.fast.metal_kernel if kind == "metal" else mx.fast.cuda_kernel, _text(f"{name}.metal")
    # MLX keeps compiled CUDA kernels on disk by their names: another text needs another name.
    digest = hashlib.sha256((header(kind) + source).encode()).hexdigest()[:8]
    return make(
        name=f"tqai_{name}_{digest}", input_names=list(inputs), output_names=list(outputs), source=source, header=header(kind)
    )


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
    kernels apart by their template alone: it has to name every dtype that can differ.
    """
    run = kernel(name, tuple(inputs), tuple(outputs), backend())
    threads = 32 * simdgroups
    return run(
        inputs=list(inputs.values()), template=list(template.items()), grid=(groups[0] * threads, *groups[1:]),
        threadgroup=(threads, 1, 1), output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )  # fmt: skip

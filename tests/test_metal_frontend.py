"""clang's "C++ for OpenCL" checks the text that MLX generates for Metal: address spaces, names and types as a GPU has them."""

import re

import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx.core")
cindex = pytest.importorskip("clang.cindex", reason="needs libclang: pip install libclang")

import metal_shim
import mlx.core as mx
from tqai_plugins.metal_kernels.check import Case, draw
from tqai_plugins.metal_kernels.dequantize import dequantize
from tqai_plugins.metal_kernels.store import store

from tqai_plugins.core.kv_format import KVFormat

PRELUDE = """
typedef unsigned int uint; typedef unsigned short ushort; typedef unsigned long size_t;
typedef uint uint32_t; typedef int int32_t; typedef half float16_t;
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define thread __private
#define constant __constant
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
namespace metal {
bool simd_any(bool);
template <class T> T simd_sum(T); template <class T> T simd_max(T);
template <class T> T simd_shuffle(T, ushort); template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T max(T, T); template <class T> T min(T, T); template <class T> T clamp(T, T, T);
struct simdgroup_float8x8 { thread float* thread_elements() thread; };
void simdgroup_multiply_accumulate(
    thread simdgroup_float8x8&, thread simdgroup_float8x8&, thread simdgroup_float8x8&, thread simdgroup_float8x8&);
float exp2(float); float sqrt(float); float abs(float); float ceil(float);
}
using namespace metal;
template <class T, class U> T as_type_(U from) { return __builtin_bit_cast(T, from); }
#define as_type as_type_
"""


def launches() -> dict[str, list]:
    """Arguments of one launch of every kernel."""
    seen = {}

    def note(name, *arguments):
        seen[name] = arguments
        return metal_shim.launch(name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        metal_shim.install(patch, note)
        for fmt in (KVFormat(4, 2, 64), KVFormat(3, 8, 80), KVFormat(4, 2, 64, vector_values=True)):
            x = draw(1, 1, 2, 5, fmt.head_dim)
            dequantize(store(x, x, fmt), 5, fmt, mx.float16)
            Case(fmt, 2, (40, 7), 16, 4).run(0.1, extra=draw(2, 4))
            yield {f"{name}-{fmt.name}": (name, *arguments) for name, arguments in seen.items()}


def diagnostics(source: str) -> list[str]:
    """What clang says of a kernel that MLX generated."""
    kernel, name, values = metal_shim.not_a_template(source)
    kernel = re.sub(r"\s*\[\[(?!kernel)[^\]]*\]\]", "", kernel).replace("[[kernel]] void", "kernel void")
    index = cindex.Index.create()
    # Metal has no pointers to any address space: without generic ones, clang has none either.
    strict = "-cl-ext=-__opencl_c_generic_address_space,-__opencl_c_pipes,-__opencl_c_device_enqueue"
    options = ["-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc", "-target", "spir64", "-Xclang", strict, "-Wall", "-Wno-unused"]
    unit = index.parse("kernel.clcpp", args=options, unsaved_files=[("kernel.clcpp", PRELUDE + kernel)])
    assert name in kernel and values
    return [str(problem) for problem in unit.diagnostics]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {key: metal_shim.generated(*arguments) for some in launches() for key, arguments in some.items()}


def test_clang_has_nothing_to_say(sources):
    assert len(sources) == 12
    assert {name: said for name, source in sources.items() if (said := diagnostics(source))} == {}


@pytest.mark.parametrize(
    "planted, said",
    [
        ("float* wrong = sums;", "cannot initialize a variable of type '__private float"),
        ("undeclared(1);", "undeclared"),
        ("threadgroup float* wrong = &its.top;", "cannot initialize a variable of type '__local float"),
    ],
)
def test_planted_mistakes_are_found(sources, planted, said):
    source = sources["decode_attention-tqai_k4v2"]
    mark = "    if (exact) {\n"
    assert mark in source
    found = diagnostics(source.replace(mark, planted + "\n" + mark, 1))
    assert any(said in problem for problem in found), found

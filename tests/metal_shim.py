"""Runs kernels of tqai_plugins.metal_kernels on the CPU: the text that MLX generates for Metal, compiled against metal_shim.h,
or that for CUDA against cuda_shim.h.

`install` puts them in the place of what metal_kernels.launch has. MLX prints its text when a call is exported, even
without a Metal device.
"""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqai_plugins.metal_kernels import launch as real

HERE = Path(__file__).parent
COMPILER = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing"]
BUILDS = Path(tempfile.gettempdir()) / "tqai-metal-shim"
TYPES = {mx.uint32: "uint", mx.int32: "int"}
ATTRIBUTES = {
    "threadgroup_position_in_grid": "at", "threadgroups_per_grid": "shim::grid", "thread_index_in_simdgroup": "i % 32",
    "simdgroup_index_in_threadgroup": "i / 32", "thread_index_in_threadgroup": "i",
}  # fmt: skip


def generated(name, inputs, outputs, template, groups, simdgroups, edit=lambda text: text) -> str:
    """The Metal source that MLX makes of this launch; `edit` changes the kernel's body before."""
    header = real.header()
    kernel = mx.fast.metal_kernel(
        name=f"tqai_{name}", input_names=list(inputs), output_names=list(outputs), source=edit(real._text(f"{name}.metal")),
        header=header,
    )  # fmt: skip

    def call(*arrays):
        return tuple(
            kernel(
                inputs=list(arrays), template=list(template.items()), grid=(groups[0] * 32 * simdgroups, *groups[1:]),
                threadgroup=(32 * simdgroups, 1, 1), output_shapes=[shape for shape, _ in outputs.values()],
                output_dtypes=[dtype for _, dtype in outputs.values()], verbose=True,
            )
        )

    with tempfile.TemporaryFile() as printed, tempfile.NamedTemporaryFile(suffix=".mlxfn") as unused:
        stdout = os.dup(1)
        ctypes.CDLL(None).fflush(None)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(unused.name, call, *inputs.values())
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
        printed.seek(0)
        text = printed.read().decode()
    body = re.search(r"```\n(.*)\n```", text, re.DOTALL)[1]
    return body if header.strip() in body else header + body


def not_a_template(source: str) -> tuple[str, str, str]:
    """(the kernel with its template's values as constants, its name, the values)."""
    kernel, _, instance = source.partition("\ntemplate [[host_name")
    name, values = re.search(r"decltype\((\w+)<(.*?)>\)", instance, re.DOTALL).groups()
    parameters = re.search(r"template <([^<>]*)>\n\[\[kernel\]\]", kernel)
    given = ""
    for parameter, value in zip(parameters[1].split(","), values.split(","), strict=True):
        kind, parameter = parameter.split()
        given += f"using {parameter} = {value};\n" if kind == "typename" else f"constexpr {kind} {parameter} = {value};\n"
    return kernel.replace(parameters[0], given + "[[kernel]]"), name, values


def metal(source: str) -> tuple[str, str, list[str]]:
    """What `build` needs of MLX's Metal source."""
    # Not a template any more, or g++ would forget in which section its static variables lie.
    kernel, name, _ = not_a_template(source)
    signature = re.search(r"\[\[kernel\]\] void \w+\((.*?)\) \{", kernel, re.DOTALL)[1]
    arguments, buffers = [], 0
    for parameter in signature.split(",\n"):
        kind, attribute = re.search(r"^(.*?)\s*\w+ \[\[(\w+)", parameter.strip()).groups()
        if attribute == "buffer":
            pointer = kind.replace("&", "").replace("*", "").strip() + "*"
            arguments.append(f"{'*' if '&' in kind else ''}({pointer})buffers[{buffers}]")
            buffers += 1
        else:
            arguments.append(ATTRIBUTES[attribute])
    return f'#include "{HERE}/metal_shim.h"\n{kernel}', name, arguments


def cuda(name, inputs, outputs, template) -> tuple[str, str, list[str]]:
    """What `build` needs of our CUDA source, whose PTX becomes calls: asm("name ..." : "=r"(x) : "r"(y)) is name(x, y)."""
    before, body = real.cuda_text(name, tuple(template.items()))
    dtypes = [*(x.dtype for x in inputs.values()), *(dtype for _, dtype in outputs.values())]
    types = [TYPES.get(dtype) or real.CUDA_TYPES[dtype] for dtype in dtypes]
    parameters = ", ".join(f"{kind}* {n}" for kind, n in zip(types, [*inputs, *outputs], strict=True))
    text = f"{before}void kernel({parameters}) {{\n{body}}}\n"
    text = re.sub(r'#include "(.*)"', lambda found: Path(found[1]).read_text(), text)
    variables = lambda operands: re.sub(r'"[^"]*"', "", operands)
    call = lambda found: f"{found[1].replace('.', '_')}({variables(found[2])}, {variables(found[3])});"
    text = re.sub(r'asm(?: volatile)?\("([\w.]+) [^"]*"\s*:(.*?)\s:(.*?)\);', call, text, flags=re.DOTALL)
    return f'#include "{HERE}/cuda_shim.h"\n{text}', "kernel", [f"({kind}*)buffers[{i}]" for i, kind in enumerate(types)]


def build(text: str, name: str, arguments: list[str]) -> ctypes.CDLL:
    """Compile source as C++ with a loop over the grid."""
    code = f"""{text}
extern "C" const char* run(void** buffers, const uint* groups, uint threads, uint seed) {{
    shim::error.clear();
    shim::grid = {{groups[0], groups[1], groups[2]}};
    for (uint z = 0; z < groups[2]; z++) for (uint y = 0; y < groups[1]; y++) for (uint x = 0; x < groups[0]; x++) {{
        const uint3 at = shim::place = {{x, y, z}};
        shim::body = [&](uint i) {{ (void)at; {name}({", ".join(arguments)}); }};
        shim::run_threadgroup(threads, seed ? seed + x + 131 * y + 7919 * z : 0);
        if (!shim::error.empty()) return shim::error.c_str();
    }}
    return nullptr;
}}
"""
    everything = code + "".join((HERE / f"{gpu}_shim.h").read_text() for gpu in ("metal", "cuda"))
    digest = hashlib.sha256(everything.encode()).hexdigest()[:20]
    library = BUILDS / f"{digest}.so"
    if not library.exists():
        BUILDS.mkdir(exist_ok=True)
        (BUILDS / f"{digest}.cpp").write_text(code)
        made = BUILDS / f"{digest}.{os.getpid()}.so"
        subprocess.run([*COMPILER, str(BUILDS / f"{digest}.cpp"), "-o", str(made)], check=True)
        made.replace(library)
    run = ctypes.CDLL(str(library))
    run.run.restype = ctypes.c_char_p
    return run


_libraries: dict = {}


def to_numpy(x: mx.array) -> np.ndarray:
    """The array's own bytes; bfloat16, which numpy lacks, as uint16."""
    return np.ascontiguousarray(np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x))


def launch(name, inputs, outputs, template, groups, simdgroups, seed=0, edit=None, as_cuda=False) -> list[mx.array]:
    """As metal_kernels.launch.launch, on the CPU. RuntimeError for what a GPU would hang or race on."""
    key = (
        name, tuple((n, x.dtype, x.size < 8, x.ndim) for n, x in inputs.items()), tuple(d for _, d in outputs.values()),
        tuple(template.items()), simdgroups, edit, as_cuda,
    )  # fmt: skip
    if key not in _libraries:
        if as_cuda:
            text, source = cuda(name, inputs, outputs, template), ""
        else:
            source = generated(name, inputs, outputs, template, groups, simdgroups, edit or (lambda text: text))
            text = metal(source)
        _libraries[key] = build(*text), source
    library, source = _libraries[key]
    buffers = []
    for n, x in inputs.items():
        buffers.append(to_numpy(x))
        if f"{n}_shape [[" in source:
            buffers.append(np.array(x.shape, np.int32))
    results = []
    for shape, dtype in outputs.values():
        raw = np.full(max(int(np.prod(shape)) * dtype.size, 1), 0xFF, np.uint8)  # NaN, unless written
        results.append(raw)
    pointers = (ctypes.c_void_p * (len(buffers) + len(results)))(*(x.ctypes.data for x in buffers + results))
    error = library.run(pointers, (ctypes.c_uint * 3)(*groups), ctypes.c_uint(32 * simdgroups), ctypes.c_uint(seed))
    if error:
        raise RuntimeError(f"{name}: {error.decode()}")
    return [_to_mlx(raw, shape, dtype) for raw, (shape, dtype) in zip(results, outputs.values())]


def _to_mlx(raw: np.ndarray, shape, dtype) -> mx.array:
    return mx.array(raw).view(dtype).reshape(shape)


@functools.wraps(real.available)
def available() -> bool:
    return True


def traced(function, plan, *arrays):
    """As metal_kernels.launch.traced, at once: `launch` reads numbers, which a trace lacks."""
    return function(plan, *arrays)


def install(monkeypatch, launch=launch) -> None:
    """Let metal_kernels launch by `launch`, which calls this module's, for as long as the patch lasts."""
    for name, stand_in in (("launch", launch), ("traced", traced), ("available", available)):
        monkeypatch.setattr(real, name, stand_in)

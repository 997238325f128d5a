"""Compile the Triton kernels for an H100 on a machine without one: python tests/compile_for_gpu.py [FORMAT[:KERNEL] ...]

One line of JSON a kernel: registers, bytes of stack (spills), shared memory, seconds. Triton's interpreter runs none of their byte
permutes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import torch
import triton
from tqai.cli.benchmark_kernels import _key_mean
from tqai_plugins.triton_kernels import decode_attention as decode
from tqai_plugins.triton_kernels import device_tables
from tqai_plugins.triton_kernels.dequantize import dequantize
from tqai_plugins.triton_kernels.merge import merge
from tqai_plugins.triton_kernels.prepare import TILINGS, prepare
from tqai_plugins.triton_kernels.recent import RecentPages
from tqai_plugins.triton_kernels.workspace import Workspace
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tqai_plugins.core import key_mean
from tqai_plugins.core.kv_format import COPIED_PAGES, KVFormat

HEAD_DIM, KV_HEADS, Q_HEADS, SEQUENCES, PAGE = 128, 8, 32, 32, 64
OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDriver:
    """What Triton asks a GPU's driver before it compiles."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_device_interface = staticmethod(lambda: torch.cuda)


def usage(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([OBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    return {"registers": int(found[1]), "stack": int(found[2])}


def compiled(launch) -> list[dict]:
    """Of each kernel that a call would launch."""
    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        seconds = round(time.perf_counter() - start, 2)
        found.append({"kernel": self.__name__, "shared": kernel.metadata.shared, "seconds": seconds} | usage(kernel.asm["cubin"]))

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return found


def launches(name: str) -> dict:
    """What a server of this format launches, by name, on tensors that no kernel touches."""
    fmt = KVFormat.from_name(name, HEAD_DIM)
    workspace = Workspace.allocate(SEQUENCES, Q_HEADS, HEAD_DIM, SEQUENCES * Q_HEADS * decode.MAX_SPLITS, "cpu")
    vectors = lambda heads: torch.zeros(SEQUENCES, heads, HEAD_DIM, dtype=torch.bfloat16)
    pages = torch.zeros(1, KV_HEADS, fmt.page_layout(PAGE).page_bytes, dtype=torch.uint8)
    copies = torch.zeros(1, KV_HEADS, RecentPages.layout(HEAD_DIM).page_bytes, dtype=torch.uint8)
    table, lengths = torch.zeros(SEQUENCES, 4, dtype=torch.int32), torch.zeros(SEQUENCES, dtype=torch.int32)
    slots = torch.zeros(SEQUENCES, dtype=torch.int64)
    recent = RecentPages(copies, lengths, torch.zeros(SEQUENCES, COPIED_PAGES, dtype=torch.int32))
    mean = _key_mean(SimpleNamespace(kv_heads=KV_HEADS, head_dim=HEAD_DIM), 256, "cpu") if key_mean.may_pay(fmt) else None
    query, key = vectors(Q_HEADS), vectors(KV_HEADS)
    store = lambda tiling: lambda: prepare(
        query, key, key, pages, slots, workspace, fmt, PAGE, 1.0, recent=recent, positions=slots, mean=mean, tiling=tiling
    )
    return {f"prepare from {n} vectors": store(tiling) for n, tiling in TILINGS.items()} | {
        "decode": lambda: decode.decode_attention(
            workspace, pages, table, lengths, query, fmt, PAGE, recent=recent, mean=mean, ptx=True, num_splits=6
        ),
        "merge": lambda: merge(workspace.partial, workspace.lse, lengths, query, decode.MAX_SPLITS),
        "dequantize": lambda: dequantize(pages, table, lengths, lengths, lengths, key, key, fmt, PAGE, 1, rotated=False, mean=mean),
    }  # fmt: skip


if __name__ == "__main__":
    driver.set_active(NoDriver())
    back_matrix = device_tables.back_matrix
    device_tables.back_matrix = lambda dim, padded, _, device: back_matrix(dim, padded, torch.bfloat16, device)  # as on a GPU
    for word in sys.argv[1:] or ["tqai_k4v2", "tqai_k4v4", "tqai_k3v3", "tqai_k8v8"]:
        name, _, only = word.partition(":")
        for what, launch in launches(name).items():
            if what.startswith(only):
                for kernel in compiled(launch):
                    print(json.dumps({"format": name, "what": what} | kernel), flush=True)

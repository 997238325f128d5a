"""What Triton makes of the kernels for an H100: they compile with their byte permutes, and as many run at once as is counted on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
triton = pytest.importorskip("triton")
from tqai_plugins.triton_kernels.decode_attention import tuning

from tqai_plugins.core.kv_format import KVFormat

DECODED = ["tqai_k4v4", "tqai_k3v3", "tqai_k8v8"]
SHARED, REGISTERS = 228 * 1024, 64 * 1024  # of a multiprocessor; each program takes 1 KB of its shared memory besides


@pytest.fixture(scope="module")
def kernels():
    script = Path(__file__).with_name("compile_for_gpu.py")
    words = ["tqai_k4v2", *(f"{name}:decode" for name in DECODED)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_all_kernels_of_a_format_compile(kernels):
    assert {kernel["kernel"] for kernel in kernels} == {f"_{name}_kernel" for name in ("prepare", "decode", "merge", "dequantize")}
    # A few spilled words are ptxas' choice at a cap of registers; more are a kernel that has grown too large.
    assert max(kernel["stack"] for kernel in kernels) <= 64, kernels


@pytest.mark.parametrize("name", ["tqai_k4v2", *DECODED])
def test_decode_has_room_for_the_programs_that_splits_are_chosen_by(kernels, name):
    """One too few, and the last ones run in a second wave: nearly twice the time."""
    tuned = tuning(KVFormat.from_name(name, 128), 4)
    (kernel,) = (k for k in kernels if k["format"] == name and k["kernel"] == "_decode_kernel")
    assert tuned.resident * (kernel["shared"] + 1024) <= SHARED, kernel
    assert tuned.resident * 32 * tuned.warps * -(-kernel["registers"] // 8) * 8 <= REGISTERS, kernel

"""Launches of kernels that MLX replays from a trace: where they are told apart, and that a replay reads this step's numbers."""

import itertools
import shutil
import threading
import zlib

import numpy as np
import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx.core")
if shutil.which("g++") is None:
    pytest.skip("needs g++, with which MLX compiles traces for the CPU", allow_module_level=True)

import metal_shim
import mlx.core as mx
from tqai_plugins.metal_kernels import launch
from tqai_plugins.metal_kernels.check import Case, draw
from tqai_plugins.metal_kernels.decode_attention import decode_attention
from tqai_plugins.metal_kernels.store import store, store_and_join

from tqai_plugins.core.kv_format import KVFormat

K4V2 = KVFormat(4, 2, 64)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(launch, "_traces", launch._Traces())
    monkeypatch.setattr(launch, "available", lambda: True)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of launches by a stand-in, whose outputs differ with every input and everything else that it is told."""
    names = []

    def run(name, inputs, outputs, template, groups, simdgroups):
        names.append(name)
        told = zlib.crc32(repr((name, list(inputs), outputs, template, groups, simdgroups)).encode())
        read = mx.concatenate([mx.array([told], mx.uint32), *(x.view(mx.uint8).reshape(-1) for x in inputs.values())])
        number = (read.astype(mx.int32) * (mx.arange(read.size) % 1009 + 1)).sum() % 251
        return [mx.broadcast_to(number, shape).astype(dtype) for shape, dtype in outputs.values()]

    monkeypatch.setattr(launch, "launch", run)
    return names


def cases() -> list:
    """Calls that differ in one thing each."""
    made, more = [], {"extra": draw(2, 4), "bias": draw(3, 2, 4, 40, dtype=mx.float32)}
    for lengths, window, sinks, dtype in itertools.product([(40, 7), (39, 7)], [16, 0], [4, 0], [mx.float16, mx.bfloat16]):
        case = Case(K4V2, 2, lengths, window, sinks, dtype)
        made += [(case, {}), (case, {"splits": 2}), (case, {"first": 9})]
    made += [(case, {name: x}) for name, x in more.items()] + [(Case(KVFormat(3, 3, 64), 2, (40, 7), 16, 4), {})]
    return made


def test_replays_give_what_launches_give(launched, monkeypatch):
    calls = [lambda case=case, more=more, scale=scale: case.run(scale, **more) for case, more in cases() for scale in (0.1, 0.2)]
    inputs = [draw(i, 1, 2, n, 64) for i, n in enumerate((1, 1, 5))]
    calls += [lambda x=x, run=run: np.array(run(x, -x, K4V2)[0]) for x in inputs for run in (store, store_and_join)]
    found = [call() for call in calls + calls]
    monkeypatch.setattr(launch, "traced", metal_shim.traced)
    expected = [call() for call in calls]
    assert all(np.array_equal(*pair) for pair in zip(found, expected + expected))
    assert len({x.tobytes() for x in expected}) > 40, "the stand-in tells calls apart"


def test_layers_and_steps_share_a_trace(launched):
    case = Case(K4V2, 2, (40, 7), 16, 4)
    for case.total, case.ring in ((33, 0), (34, 1), (35, 2), (35, 2)):
        case.run(0.1)
    assert launched == ["decode_attention", "merge"]
    case.run(0.1, splits=2)
    assert launched == ["decode_attention", "merge"] * 2


def test_threads_have_traces_of_their_own_and_keep_few(launched, monkeypatch):
    monkeypatch.setattr(launch, "TRACES", 2)
    inputs = [draw(n, 1, 2, n, 64) for n in range(1, 6)]
    expected = [np.array(store(x, x, K4V2)) for x in inputs]
    found = {}

    def work(name):
        found[name] = [np.array(store(x, x, K4V2)) for _ in range(3) for x in inputs]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(np.array_equal(*pair) for some in found.values() for pair in zip(some, expected * 3))
    assert len(launched) == 5 + 3 * 15


def test_mlx_replays_its_kernels(monkeypatch, tmp_path):
    """Without a device MLX makes nodes of Metal kernels while a function is exported; nothing of them can be evaluated."""
    if launch.backend() is None:
        monkeypatch.setattr(launch, "backend", lambda: "metal")
    seen, run = [], launch.launch
    monkeypatch.setattr(launch, "launch", lambda name, *rest: seen.append(name) or run(name, *rest))
    case, x = Case(K4V2, 2, (40, 7), 16, 4), draw(1, 2, 2, 1, 64)

    def export(unused):
        for length in (33, 34, 35):
            slots = store(x, x, K4V2)
            out = decode_attention(
                case.queries, case.slots, length, K4V2, case.rows, scale=0.1, recent=case.recent, ring=length % 16, sinks=case.sinks,
            )  # fmt: skip
            assert slots.shape == (2, 2, 1, K4V2.slot_bytes // 4) and slots.dtype == mx.uint32
            assert out.shape == case.queries.shape and out.dtype == mx.float16
        return unused

    mx.export_function(str(tmp_path / "unused.mlxfn"), export, mx.zeros(1))
    assert seen == ["store", "decode_attention", "merge"]

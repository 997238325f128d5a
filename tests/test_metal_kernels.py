"""The Metal kernels, run on the CPU as the text that MLX generates for Metal, and as that for CUDA (see metal_shim.py)."""

import functools
import shutil

import numpy as np
import pytest
from golden_vectors import assert_matches, load

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx.core")
if shutil.which("g++") is None:
    pytest.skip("needs g++ to compile Metal source for the CPU", allow_module_level=True)

import metal_shim
import mlx.core as mx
from hypothesis import given
from hypothesis import strategies as st
from operations import done, sized
from tqai_plugins.metal_kernels import codec, launch
from tqai_plugins.metal_kernels.check import Case, draw, relative_error
from tqai_plugins.metal_kernels.dequantize import dequantize
from tqai_plugins.metal_kernels.store import store, store_and_join

from tqai_plugins.core import reference
from tqai_plugins.core.kv_format import KVFormat

HEAD_DIMS = (64, 80, 96, 128, 192, 256, 512)
VECTOR = [KVFormat(k, 2, d, vector_values=True) for k, d in ((4, 64), (3, 80), (4, 128), (8, 256))]
# Every width for keys and for values at every head_dim in turn.
FORMATS = [KVFormat(k, v, d) for i, d in enumerate(HEAD_DIMS) for k, v in [((4, 2), (3, 3), (8, 8), (2, 4))[j % 4] for j in (i, i + 1)]]
FORMATS += VECTOR
name = lambda fmt: f"D{fmt.head_dim}-{fmt.name}"


@pytest.fixture(autouse=True)
def shim(monkeypatch):
    metal_shim.install(monkeypatch)


@pytest.mark.parametrize(
    "fmt, dtype",
    [(fmt, mx.float16) for fmt in FORMATS] + [(KVFormat(4, 2, 80), mx.bfloat16), (KVFormat(3, 3, 128), mx.float32)],
    ids=lambda x: name(x) if isinstance(x, KVFormat) else str(x).split('.')[-1],
)
def test_store_writes_the_references_codes_and_dequantize_reads_them(fmt, dtype):
    keys, values = draw(1, 2, 3, 7, fmt.head_dim, dtype=dtype), draw(2, 2, 3, 7, fmt.head_dim, dtype=dtype)
    keys[0, 0, 0], keys[0, 0, 1], values[1, 2, 3] = 0, np.nan, np.inf
    slots = store(keys, values, fmt)
    packed = np.array(slots).view(np.uint8)
    scales = packed[..., -4:].view(np.float16)
    for x, bits, codes, scale, vector in (
        (keys, fmt.bits_k, packed[..., : fmt.k_bytes], scales[..., 0], False),
        (values, fmt.bits_v, packed[..., fmt.k_bytes : -4], scales[..., 1], fmt.vector_values),
    ):
        assert_matches(np.array(x.astype(mx.float32)), bits, codes, scale, vector)
    again, joined = store_and_join(keys, values, fmt)
    assert mx.array_equal(again, slots) and mx.array_equal(joined, mx.concatenate([keys, values], 1), equal_nan=True)
    room = mx.pad(slots, [(0, 0), (0, 0), (0, 5), (0, 0)])
    for found, plain in zip(dequantize(room, 6, fmt, dtype), codec.load(slots[:, :, :6], fmt)):
        assert found.dtype == dtype and found.shape == (2, 3, 6, fmt.head_dim)
        assert mx.allclose(found.astype(mx.float32), plain, rtol=5e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("fmt", VECTOR, ids=name)
def test_the_kernel_writes_the_golden_vector_values(fmt):
    x, expected, scales = load(fmt.head_dim, 2, vector=True)
    slots = store(mx.array(x)[None, None], mx.array(x)[None, None], fmt)
    packed = np.array(slots)[0, 0].view(np.uint8)
    assert np.array_equal(packed[:, fmt.k_bytes : -4], expected)
    assert_matches(x, 2, expected, packed[:, -2:].copy().view(np.float16)[:, 0], vector=True)


def close(found, expected, tolerance=2e-3) -> bool:
    return relative_error(found, expected) < tolerance


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_decode_attention_over_the_grid(fmt):
    group = {64: 1, 80: 3, 96: 4, 128: 4, 192: 2, 256: 5, 512: 8}[fmt.head_dim]
    case = Case(fmt, group, (77, 40, 3), 16, 4, heads=1 if fmt.head_dim == 512 else 2)
    assert close(case.run(0.1, splits=2), case.expected(0.1))


@pytest.mark.parametrize(
    "fmt, group, dtype, tolerance",
    [
        (KVFormat(4, 2, 64), 4, mx.float16, 2e-3), (KVFormat(2, 3, 128), 12, mx.float16, 2e-3), (KVFormat(3, 4, 80), 1, mx.bfloat16, 1e-2),
        (KVFormat(8, 8, 192), 8, mx.float32, 2e-5), (KVFormat(4, 4, 256), 2, mx.float16, 2e-3), (KVFormat(4, 2, 128), 4, mx.float32, 2e-5),
        (KVFormat(3, 2, 64, vector_values=True), 3, mx.float16, 2e-3),
    ],
    ids=lambda x: name(x) if isinstance(x, KVFormat) else None,
)  # fmt: skip
def test_the_text_for_cuda(monkeypatch, fmt, group, dtype, tolerance):
    monkeypatch.setattr(launch, "launch", functools.partial(metal_shim.launch, as_cuda=True))
    case = Case(fmt, group, (77, 40, 3), 16, 4, dtype)
    assert close(case.run(0.1, splits=2), case.expected(0.1), tolerance)
    assert np.mean(np.array(store(case.keys, case.values, fmt) != case.slots[:, :, : case.total])) < 0.01
    for found, plain in zip(dequantize(case.slots, 70, fmt, mx.float32), codec.load(case.slots[:, :, :70], fmt)):
        assert mx.allclose(found, plain, rtol=1e-6)


K4V2 = KVFormat(4, 2, 64)


@pytest.mark.parametrize(
    "group, lengths, window, sinks",
    [
        (4, (1,), 128, 4), (4, (2, 1), 128, 4), (1, (5,), 0, 0), (7, (129, 128, 127), 128, 4), (2, (300,), 0, 4),
        (2, (131, 4, 133), 128, 0), (16, (33,), 8, 2), (4, (200, 9, 64, 65, 1), 32, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_odd_lengths_windows_and_groups(group, lengths, window, sinks, splits):
    case = Case(K4V2, group, lengths, window, sinks)
    assert close(case.run(0.125, splits=splits), case.expected(0.125))


def test_more_splits_than_merge_asks_for_at_once():
    case = Case(KVFormat(4, 2, 128), 1, (40, 7), 0, 0, heads=1)
    assert close(case.run(0.1, splits=70), case.expected(0.1))


@pytest.mark.parametrize("first", [0, 30, 90, 99])
def test_sliding_windows_and_learned_sinks(first):
    case, extra = Case(K4V2, 4, (100, 80), 16, 4), draw(7, 8)
    assert close(case.run(0.125, first=first), case.expected(0.125, first))
    assert close(case.run(0.125, first=first, extra=extra), case.expected(0.125, first, np.array(extra)))


@pytest.mark.parametrize("fmt, group, lengths", [(K4V2, 3, (100, 80)), (KVFormat(3, 3, 128), 4, (60, 3, 41)), (KVFormat(4, 4, 80), 1, (50,))])
@pytest.mark.parametrize("first", [0, 30])
def test_scores_of_codes_gain_by_their_place(fmt, group, lengths, first):
    case = Case(fmt, group, lengths, 16, 4)
    bias = 2 * draw(8, len(lengths), 2 * group, max(lengths), dtype=mx.float32)
    expected = case.expected(0.125, first, bias=bias)
    assert close(case.run(0.125, first=first, bias=bias), expected)
    assert not close(case.run(0.125, first=first), expected, 0.05)


@sized(1 / 20, 25)
@given(
    fmt=st.sampled_from([K4V2, KVFormat(3, 3, 128), VECTOR[0]]), group=st.sampled_from([1, 4]), window=st.integers(0, 130),
    sinks=st.integers(0, 5), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4), splits=st.integers(1, 3),
    first=st.one_of(st.just(0), st.integers(0, 199)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_random_batches(fmt, group, window, sinks, lengths, splits, first, seed):
    """What lies behind the last token is NaN, so that it shows if it is read."""
    case = Case(fmt, group, tuple(lengths), window, sinks, seed=seed)
    done["batches by Metal kernels"] += len(lengths)
    first = min(first, max(lengths) - 1)
    assert close(case.run(0.125, splits=splits, first=first), case.expected(0.125, first))


@pytest.mark.parametrize("dtype, tolerance", [(mx.bfloat16, 1e-2), (mx.float32, 2e-6)])
def test_dtypes(dtype, tolerance):
    case = Case(KVFormat(4, 2, 80), 3, (50, 20), 16, 4, dtype)
    assert close(case.run(0.125), case.expected(0.125), tolerance)


def test_large_scores_do_not_overflow():
    case = Case(K4V2, 2, (90, 30), 16, 4)
    assert close(case.run(40.0), case.expected(40.0), 1e-2)


def run_seeds(monkeypatch, edit=None, kernel="decode_attention") -> list[np.ndarray]:
    results = []
    for seed in (0, 1, 2, 3):
        change = lambda name, *a, seed=seed: metal_shim.launch(name, *a, seed=seed, edit=edit if name == kernel else None)
        monkeypatch.setattr(launch, "launch", change)
        results.append(Case(K4V2, 4, (150, 80), 16, 4).run(0.125, splits=2))
    return results


def test_the_order_of_threads_does_not_matter(monkeypatch):
    results = run_seeds(monkeypatch)
    assert all(np.array_equal(result, results[0]) for result in results)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def without_last_barrier(text: str) -> str:
    assert BARRIER in text
    return "".join(text.rsplit(BARRIER, 1))


def without_first_barrier(text: str) -> str:
    return text.replace(BARRIER, "", 1)


@pytest.mark.parametrize("kernel", ["decode_attention", "merge"])
@pytest.mark.parametrize("edit", [without_first_barrier, without_last_barrier])
def test_a_missing_barrier_is_caught(monkeypatch, kernel, edit):
    results = run_seeds(monkeypatch, edit, kernel)
    assert any(not np.array_equal(result, results[0], equal_nan=True) or np.isnan(result).any() for result in results)


def divergent(text: str) -> str:
    reduction = "const float total = row_sum(its.total);"
    assert reduction in text
    return text.replace(reduction, "float total = 0.0f; if (lane < 7) total = row_sum(its.total);")


def half_a_barrier(text: str) -> str:
    return text.replace(BARRIER, f"if (simdgroup_index_in_threadgroup == 0) {BARRIER}")


@pytest.mark.parametrize("edit, said", [(divergent, "divergent|deadlock"), (half_a_barrier, "deadlock|divergent|after a thread")])
def test_divergent_collectives_are_caught(monkeypatch, edit, said):
    with pytest.raises(RuntimeError, match=f"decode_attention: .*({said})"):
        run_seeds(monkeypatch, edit)


def test_codes_of_the_kernel_read_by_the_reference():
    fmt = KVFormat(3, 4, 96)
    x = draw(5, 1, 1, 20, 96, dtype=mx.float32)
    slots = np.array(store(x, x, fmt))[0, 0].view(np.uint8)
    scales = slots[:, -4:].view(np.float16)
    back = reference.dequantize(slots[:, : fmt.k_bytes], scales[:, 0], 3, 96)
    error = np.linalg.norm(back - np.array(x)[0, 0]) / np.linalg.norm(np.array(x))
    assert 0.1 < error < 0.2

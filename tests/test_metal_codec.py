"""Slots in plain mx operations hold the golden bytes."""

import numpy as np
import pytest
from golden_vectors import CASES, HEAD_DIMS, assert_matches, load

from tqai_plugins.core import reference
from tqai_plugins.core.kv_format import SERVED_WIDTHS, KVFormat
from tqai_plugins.core.vector_codebook import VECTOR

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")
from tqai_plugins.metal_kernels import codec

SERVED = [(d, b) for d, b in CASES if b in SERVED_WIDTHS]


@pytest.mark.parametrize("head_dim, bits", SERVED)
def test_codes_and_scales_are_the_golden_ones(head_dim, bits):
    x, packed, _ = load(head_dim, bits)
    words, scales = codec.quantize(mx.array(x), bits)
    assert np.array_equal(np.array(words).view(np.uint8), packed)
    assert_matches(x, bits, np.array(words).view(np.uint8), np.array(scales))


@pytest.mark.parametrize("head_dim, bits", [*SERVED, (512, 2), (512, 3), (512, 4), (512, 8)])
def test_random_vectors_read_back_as_the_reference_reads_them(head_dim, bits):
    x = np.random.default_rng(head_dim + bits).standard_normal((50, head_dim)).astype(np.float16)
    words, scales = codec.quantize(mx.array(x), bits)
    packed = np.array(words).view(np.uint8)
    assert_matches(x, bits, packed, np.array(scales))
    expected = reference.dequantize(packed, np.array(scales), bits, head_dim)
    found = np.array(codec.rotate_back(codec.dequantize(words, scales, bits, head_dim)))
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_vector_values_are_the_golden_ones_and_read_back_as_the_reference_reads_them(head_dim):
    x, packed, _ = load(head_dim, 2, vector=True)
    words, scales = codec.quantize(mx.array(x), 2, vector=True)
    assert np.array_equal(np.array(words).view(np.uint8), packed)
    assert_matches(x, 2, packed, np.array(scales), vector=True)
    x = np.random.default_rng(head_dim).standard_normal((50, head_dim)).astype(np.float16)
    words, scales = codec.quantize(mx.array(x), 2, vector=True)
    expected = reference.dequantize(np.array(words).view(np.uint8), np.array(scales), 2, head_dim, codebook=VECTOR)
    found = np.array(codec.rotate_back(codec.dequantize(words, scales, 2, head_dim, vector=True)))
    assert np.abs(found - expected).max() < 1e-5 and np.square(found - x).mean() < 0.105


@pytest.mark.parametrize("bits", SERVED_WIDTHS)
def test_what_cannot_be_stored_reads_as_nan_and_zeros_as_zeros(bits):
    x = np.ones((4, 64), np.float32)
    x[0, 3], x[1, 5], x[2], x[3] = np.nan, np.inf, 1e6, 0
    words, scales = codec.quantize(mx.array(x), bits)
    back = np.array(codec.dequantize(words, scales, bits, 64))
    assert np.isnan(back[:3]).all() and (back[3] == 0).all()


def test_a_slot_is_as_long_as_the_format_says():
    fmt = KVFormat(4, 2, 80)
    rng = np.random.default_rng(0)
    keys, values = (mx.array(rng.standard_normal((2, 3, 5, 80)).astype(np.float16)) for _ in range(2))
    slots = codec.store(keys, values, fmt)
    assert slots.shape == (2, 3, 5, codec.slot_words(fmt)) and slots.nbytes == 30 * fmt.slot_bytes
    for found, x, bits in zip(codec.load(slots, fmt), (keys, values), (4, 2)):
        error = mx.square(codec.rotate_back(found) - x).sum() / mx.square(x.astype(mx.float32)).sum()
        assert error.item() < {4: 0.01, 2: 0.12}[bits]


@pytest.mark.parametrize("bits, head_dim", [(5, 64), (4, 100)])
def test_formats_that_slots_cannot_hold_are_refused(bits, head_dim):
    with pytest.raises(ValueError, match="allowed are bits_k and bits_v of 2, 3, 4, 8"):
        codec.check_served(KVFormat(bits, 4, head_dim))

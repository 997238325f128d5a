"""Formats, codebooks, rotation, packing and the NumPy codec."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai_plugins.core import bit_packing, qjl, reference, solve_codebook
from tqai_plugins.core.codebook import TOP, Codebook
from tqai_plugins.core.kv_format import (
    HEAD_DIMS,
    SERVED_NAMES,
    SERVED_WIDTHS,
    WIDTHS,
    KVFormat,
    is_tqai,
    packed_bytes,
    parse_name,
)
from tqai_plugins.core.rotation import Rotation

COMMON = solve_codebook.COMMON_HEAD_DIMS


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- formats


def test_default_is_k4v2_and_names_round_trip():
    assert parse_name("tqai") == (4, 2)
    for name in SERVED_NAMES[1:]:
        assert KVFormat.from_name(name, 128).name == name
    assert is_tqai("tqai_k9v2") and not is_tqai("fp8") and not is_tqai(None)


@pytest.mark.parametrize("name, near", [("tqai_k9v2", "tqai_k"), ("tqai-k4v3", "'tqai_k4v3'"), ("tquai", "'tqai'")])
def test_an_unknown_name_is_refused_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=near):
        parse_name(name)


@pytest.mark.parametrize("bits_k, bits_v, head_dim", [(0, 2, 128), (4, 9, 128), (4, 2, 7), (4, 2, 513), (4.0, 2, 128), (True, 2, 64)])
def test_out_of_range_formats_are_refused(bits_k, bits_v, head_dim):
    with pytest.raises(ValueError, match="allowed"):
        KVFormat(bits_k, bits_v, head_dim)


def test_sizes_count_everything():
    fmt = KVFormat(4, 2, 128)
    assert (fmt.k_bytes, fmt.v_bytes, fmt.slot_bytes) == (64, 32, 100)
    assert fmt.bits_per_element == 3.125 and fmt.compression == pytest.approx(5.12)
    layout = fmt.page_layout(64)
    assert (layout.v_codes, layout.k_scales, layout.v_scales, layout.page_bytes) == (4096, 6144, 6272, 6400)


# --- codebooks


def mass_and_moment(head_dim, edges):
    """Of sqrt(head_dim) * |coordinate| between consecutive edges, in closed form (scipy's incomplete Beta function)."""
    special = pytest.importorskip("scipy.special")
    t = np.clip(np.asarray(edges) / np.sqrt(head_dim), 0, 1)
    mass = np.diff(special.betainc(0.5, (head_dim - 1) / 2, t * t))
    moment = -np.diff((1 - t * t) ** ((head_dim - 1) / 2)) * 2 / (head_dim - 1)
    return mass, moment * np.sqrt(head_dim) / special.beta(0.5, (head_dim - 1) / 2)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [8, 9, 64, 100, 128, 512])
def test_levels_are_the_centroids_of_their_cells(head_dim, bits):
    """Lloyd-Max's condition, by an integration of another kind."""
    levels = solve_codebook.lloyd_max_levels(head_dim, bits)
    mass, moment = mass_and_moment(head_dim, [0, *(levels[1:] + levels[:-1]) / 2, np.sqrt(head_dim)])
    np.testing.assert_allclose(levels, moment / mass, atol=1e-9)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("head_dim", COMMON)
def test_the_unit_fits_its_own_cells(head_dim, bits):
    book = Codebook.lloyd_max(head_dim, bits)
    magnitudes = np.array(book.magnitudes)
    mass, moment = mass_and_moment(head_dim, [0, *np.multiply(book.boundaries, book.unit), np.sqrt(head_dim)])
    assert book.unit == pytest.approx((moment * magnitudes).sum() / (mass * magnitudes**2).sum(), rel=1e-6)
    if bits in (1, 5, 6, 7):  # the levels are Lloyd-Max's own
        assert book.unit * TOP == pytest.approx(solve_codebook.lloyd_max_levels(head_dim, bits)[-1], rel=1e-6)


@pytest.mark.parametrize("head_dim", COMMON)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_integer_grid_costs_less_than_a_fifth_of_a_percent(head_dim, bits):
    book = Codebook.lloyd_max(head_dim, bits)
    best = solve_codebook.distortion(head_dim, solve_codebook.lloyd_max_levels(head_dim, bits))
    loss = solve_codebook.distortion(head_dim, book.magnitudes) / best - 1
    print(f"head_dim {head_dim}, {bits} bits: {100 * loss:.4f} %")
    assert -1e-4 < loss < 2e-3
    assert all(m == i + 0.5 and 0 <= i <= 127 for m, i in zip(book.magnitudes, book.integers))


def test_the_shipped_tables_are_what_the_solver_makes():
    shipped = json.loads(Path(solve_codebook.__file__).with_name("codebook_tables.json").read_text())
    for key, entry in shipped.items():
        solved = solve_codebook.solve(*map(int, key.split("/")))
        np.testing.assert_allclose(solved["magnitudes"], entry["magnitudes"], rtol=1e-6)
        assert solved["unit"] == pytest.approx(entry["unit"], rel=1e-6)


@pytest.mark.parametrize("head_dim", [8, 57, 104, 511])
def test_an_uncommon_size_is_solved_in_milliseconds(head_dim):
    for bits in range(1, 9):
        seconds = []
        for _ in range(3):  # the best of three: other work may share the machine
            start = time.perf_counter()
            solve_codebook.solve(head_dim, bits)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.1


@pytest.mark.slow
def test_every_size_and_width_has_a_codebook():
    for head_dim in HEAD_DIMS:
        for bits in WIDTHS:
            book = Codebook.lloyd_max(head_dim, bits)
            assert len(book.magnitudes) == 1 << (bits - 1) and 0 < book.magnitudes[0] and book.magnitudes[-1] <= TOP
            assert all(a < b for a, b in zip(book.magnitudes, book.magnitudes[1:]))
            assert bits not in SERVED_WIDTHS or all(m == i + 0.5 for m, i in zip(book.magnitudes, book.integers))


# --- rotation


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 100, 112, 128, 192, 256])
def test_rotation_is_orthogonal_and_rotate_back_undoes_it(head_dim, kind):
    rotation = Rotation(head_dim, kind)
    matrix = reference.rotation_matrix(rotation).astype(float)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), atol=2e-6)
    x = random(5, head_dim)
    np.testing.assert_allclose(reference.rotate(x, rotation), x @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(reference.rotate_back(reference.rotate(x, rotation), rotation), x, atol=1e-5)


def test_a_rotation_is_its_seed():
    for kind in ("hadamard", "haar"):
        one, other = (reference.rotation_matrix(Rotation(64, kind, seed)) for seed in (1, 2))
        reference.rotation_matrix.cache_clear()
        assert np.array_equal(one, reference.rotation_matrix(Rotation(64, kind, 1))) and not np.array_equal(one, other)
    for arguments, message in (((64, "hadamar"), "allowed are hadamard, haar"), ((5,), "head_dim is 5")):
        with pytest.raises(ValueError, match=message):
            Rotation(*arguments)


def test_blocks_cut_a_size_into_powers_of_two():
    assert Rotation(80).blocks == (64, 16) and Rotation(112).blocks == (64, 32, 16) and Rotation(128).blocks == (128,)


# --- packing


@settings(max_examples=200, deadline=None)
@given(st.integers(8, 300), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_packing_round_trips_at_every_width(head_dim, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, head_dim), dtype=np.uint8)
    packed = bit_packing.pack(codes, bits)
    assert packed.shape == (3, packed_bytes(head_dim, bits)) and packed.dtype == np.uint8
    np.testing.assert_array_equal(bit_packing.unpack(packed, bits, head_dim), codes)


def test_signs_of_three_bits_lie_where_the_rule_says():
    for coordinate, byte, bit in ((0, 0, 2), (3, 0, 7), (5, 1, 3), (16, 0, 0), (30, 3, 4), (32, 4, 2), (63, 7, 5)):
        codes = np.zeros(64, np.uint8)
        codes[coordinate] = 4
        packed = bit_packing.pack(codes, 3)
        assert packed[16 + byte] == 1 << bit and np.count_nonzero(packed) == 1


def test_every_code_bit_has_a_place_of_its_own():
    """No two code bits share a packed bit, whatever the width."""
    for bits in range(1, 9):
        ones = [np.unpackbits(bit_packing.pack(code[None], bits)) for code in np.eye(64, dtype=np.uint8)]
        assert np.stack(ones).any(1).all()


# --- quantize


@pytest.mark.parametrize("bits, limit", [(8, 1e-4), (4, 0.0081), (3, 0.0320), (2, 0.1146)])
def test_error_on_random_vectors(bits, limit):
    x = random(8000, 128, seed=1)
    back = reference.dequantize(*reference.quantize(x, bits), bits, 128)
    assert (((back - x) ** 2).sum(-1) / (x**2).sum(-1)).mean() <= limit


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_searching_never_points_further_away(bits):
    y, book = random(500, 64), Codebook.lloyd_max(64, bits)

    def error(search):
        codes, scales = reference.encode(y, book, search=search)
        packed = bit_packing.pack(codes, bits), (scales * 64).astype(np.float16)
        return ((reference.dequantize_rotated(*packed, bits, book) - y) ** 2).sum(-1).mean()

    assert error(True) <= error(False) * (1 + 1e-3)


def test_scale_modes_keep_what_they_say():
    x = random(300, 128)
    norm = np.linalg.norm(x, axis=-1)
    exact = reference.dequantize(*reference.quantize(x, 2, scale="exact_norm"), 2, 128)
    np.testing.assert_allclose(np.linalg.norm(exact, axis=-1), norm, rtol=1e-3)
    fitted = reference.dequantize(*reference.quantize(x, 2), 2, 128)
    np.testing.assert_allclose(((x - fitted) * fitted).sum(-1), 0, atol=0.1)  # least squares: orthogonal error
    with pytest.raises(ValueError, match="least_squares"):
        reference.quantize(x, 2, scale="best")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_tiny_and_large_vectors(bits):
    rows = [np.zeros(64), np.full(64, 1e-30), random(64) * 1e-40, random(64) * 1e-12, random(64) * 1e-6, random(64) * 1e4]
    x = np.stack(rows).astype(np.float32)  # the third is of float32 subnormals, the fifth has a float16 subnormal scale
    back = reference.dequantize(*reference.quantize(x, bits), bits, 64)
    assert (back[:4] == 0).all()
    for i in (4, 5):
        assert np.linalg.norm(back[i] - x[i]) < 0.5 * np.linalg.norm(x[i])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6, 3e38])
@pytest.mark.parametrize("bits", [2, 8])
def test_what_cannot_be_stored_raises_or_is_flagged(bad, bits):
    x = random(3, 64)
    x[1] = bad
    with pytest.raises(ValueError, match="1 of 3 vectors"):
        reference.quantize(x, bits)
    packed, scales = reference.quantize(x, bits, on_invalid="flag")
    back = reference.dequantize(packed, scales, bits, 64)
    assert np.isnan(back[1]).all() and np.isfinite(back[[0, 2]]).all() and not packed[1].any()


def test_attention_in_the_rotated_basis_is_attention():
    fmt = KVFormat(4, 3, 64)
    q, k, v = random(5, 4, 64), random(40, 2, 64, seed=1), random(40, 2, 64, seed=2)
    ck, cv = reference.quantize(k, 4), reference.quantize(v, 3)
    got = reference.attention(q, ck, cv, fmt, softmax_scale=0.125)
    kd = reference.dequantize(*ck, 4, 64).astype(float).repeat(2, 1)
    vd = reference.dequantize(*cv, 3, 64).astype(float).repeat(2, 1)
    for t in range(5):
        score = np.einsum("hd,thd->ht", q[t].astype(float), kd[: 36 + t]) * 0.125
        p = np.exp(score - score.max(-1, keepdims=True))
        np.testing.assert_allclose(got[t], np.einsum("ht,thd->hd", p / p.sum(-1, keepdims=True), vd[: 36 + t]), atol=1e-5)


# --- QJL


def test_the_sketch_of_qjl_is_unbiased():
    r = random(64, seed=3)
    size = 1 << 16  # many signs: what is left is the standard error, about 1 / sqrt(size) of |r|^2 a coordinate
    guess = qjl.estimate(*qjl.sketch(r, size), size, 64)
    assert np.linalg.norm(guess - r) < 0.05 * np.linalg.norm(r)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_qjl_costs_more_than_the_bit_of_code_it_replaces(bits):
    """What core.qjl's docstring says: five to six times the squared error of inner products."""
    x, q = random(4000, 128, seed=1), random(4000, 128, seed=2)
    codes = reference.dequantize(*reference.quantize(x, bits), bits, 128)
    first = reference.dequantize(*reference.quantize(x, bits - 1), bits - 1, 128)
    sketched = first + qjl.estimate(*qjl.sketch(x - first, 128), 128, 128)
    harm = ((q * (sketched - x)).sum(-1) ** 2).mean() / ((q * (codes - x)).sum(-1) ** 2).mean()
    assert 5 <= harm <= 7

"""The key mean: NumPy's definition, the same as tensors, and what it is worth on pages."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tqai_plugins.core import key_mean
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.torch_kernels import paged
from tqai_plugins.torch_kernels.key_mean import KeyMean

HEADS, HEAD_DIM, POSITIONS = 3, 64, 256


def rope(positions=POSITIONS, head_dim=HEAD_DIM):
    angles = np.arange(positions)[:, None] * 1e4 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    return np.cos(angles), np.sin(angles)


def turned(x, cos, sin):
    """RoPE of [tokens, heads, head_dim]."""
    a, b = np.split(x, 2, -1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def some_means():
    means = 0.3 * np.random.default_rng(1).standard_normal((HEADS, HEAD_DIM))
    means[:, [5, 9, 30]] = means[:, HEAD_DIM // 2 + 9] = 7
    return means


@pytest.mark.parametrize("unit", [1.0, 1.3])
def test_the_term_is_the_turned_mean_of_the_kept_pairs(unit):
    cos, sin = (unit * x for x in rope())
    means = some_means()
    pairs = key_mean.choose_pairs(key_mean.energy(means))
    assert len(pairs) == key_mean.MEAN_PAIRS and {5, 9} <= set(pairs)
    table = key_mean.make_table(cos, sin, pairs)
    got = key_mean.term(table, key_mean.coefficients(means, pairs, unit), pairs, HEAD_DIM)
    kept = np.zeros(HEAD_DIM)
    kept[pairs] = kept[pairs + HEAD_DIM // 2] = 1
    expected = turned(np.broadcast_to(means * kept, (POSITIONS, HEADS, HEAD_DIM)), cos, sin)
    assert (got[: key_mean.FIRST_TOKEN] == 0).all()
    np.testing.assert_allclose(got[4:], expected[4:], atol=unit * np.abs(means).max() / key_mean.TABLE_TOP)
    tensors = KeyMean.make(means, pairs, torch.from_numpy(table), unit)
    np.testing.assert_allclose(tensors.term(torch.arange(POSITIONS)).numpy(), got, rtol=1e-6, atol=1e-7)


def test_keys_before_rope_are_found_again():
    cos, sin = (1.2 * x for x in rope())
    keys = np.random.default_rng(0).standard_normal((POSITIONS, HEADS, HEAD_DIM))
    np.testing.assert_allclose(key_mean.before_rope(turned(keys, cos, sin), cos, sin), keys, atol=1e-12)


def test_attention_over_keys_with_a_mean_is_far_closer_with_it():
    fmt, page, length = KVFormat(3, 8, HEAD_DIM), 16, 200
    cos, sin = rope()
    means = some_means()
    g = torch.Generator().manual_seed(0)
    k = torch.from_numpy(turned(means + torch.randn(length, HEADS, HEAD_DIM, generator=g).numpy(), cos[:length], sin[:length])).float()
    v, q = torch.randn(length, HEADS, HEAD_DIM, generator=g), torch.randn(2, 2 * HEADS, HEAD_DIM, generator=g)
    pairs = key_mean.choose_pairs(key_mean.energy(means))
    mean = KeyMean.make(means, pairs, torch.from_numpy(key_mean.make_table(cos, sin, pairs)), 1.0)
    exact, errors = paged.dense_attention(q, k, v, 0.125), []
    table, slots = torch.arange(13).flip(0), torch.arange(length)
    slots = table[slots // page] * page + slots % page
    for used in (None, mean):
        pages = torch.zeros(13, HEADS, fmt.page_layout(page).page_bytes, dtype=torch.uint8)
        paged.store(k, v, pages, slots, fmt, page, positions=torch.arange(length), mean=used)
        out = paged.attention(q, pages, table, length, fmt, page, 0.125, mean=used)
        errors.append(((out - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.5 * errors[0], errors


def test_a_mean_pays_where_scores_are_noisier_than_values():
    means = np.zeros((2, HEAD_DIM))
    means[:, 3] = 10
    layer = lambda energy: key_mean.LayerMeans(means, np.array([energy, energy]), np.ones((2, HEAD_DIM // 2)))
    pairs = key_mean.choose_pairs(key_mean.energy(means))
    assert key_mean.kept_energy(layer(0.2), pairs) == pytest.approx(20)
    pays = lambda k, v, energy: key_mean.pays(KVFormat(k, v, HEAD_DIM), key_mean.kept_energy(layer(energy), pairs))
    assert key_mean.noise(HEAD_DIM, 4) == pytest.approx(0.0071, rel=0.05) and key_mean.noise(HEAD_DIM, 2) == pytest.approx(0.114, rel=0.05)
    # 4-bit keys lose 0.14 of variance, which 4-bit values do not hide but 2-bit values do; ten times as much they do not.
    assert pays(4, 4, 0.2) and not pays(4, 2, 0.2) and pays(4, 2, 2.0)
    assert pays(3, 3, 0.2) and not pays(4, 4, 0.01) and not key_mean.may_pay(KVFormat(8, 4, HEAD_DIM))


def test_keys_need_8_bits_where_more_is_left_of_their_mean_than_tells_them_apart():
    means = np.zeros((2, HEAD_DIM))
    means[:, : key_mean.MEAN_PAIRS + 4] = 10  # in four pairs more than are kept
    pairs = key_mean.choose_pairs(key_mean.energy(means))
    for scatter, needs in ((100, True), (300, False)):
        squares = np.zeros((2, HEAD_DIM // 2))
        squares[1, 0] = (means[0] ** 2).sum() + scatter
        layer = key_mean.LayerMeans(means, np.array([0.2, 0.2]), squares)
        lost, found = key_mean.lost_energy(layer, pairs), key_mean.scatter_energy(layer)
        assert (lost, found) == (pytest.approx(0.2 * 400), pytest.approx(0.2 * scatter))
        assert key_mean.cannot_hold(KVFormat(4, 4, HEAD_DIM), lost, found) is needs
        assert not key_mean.cannot_hold(KVFormat(8, 4, HEAD_DIM), lost, found)
    assert not key_mean.cannot_hold(KVFormat(4, 4, HEAD_DIM), 1.0, 0.0), "queries hardly look there"


def test_tokens_to_measure_with():
    text = list(range(1000))
    assert key_mean.choose_tokens(text, 50, 10_000) == text[: key_mean.TOKENS] and key_mean.choose_tokens(text, 50, 100) == text[:100]
    for unknown in ([], [7] * 1000):
        found = key_mean.choose_tokens(unknown, 50, 10_000)
        assert len(found) == key_mean.TOKENS and set(found) <= set(range(50)) and len(set(found)) > 40

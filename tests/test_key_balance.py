"""The balance of keys and queries: what it is worth, and that scores stay what they are."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tqai_plugins.core import key_balance
from tqai_plugins.torch_kernels import codec

HEAD_DIM = 64


def of_gains(queries, keys):
    """For vectors whose coordinates have these root mean squares."""
    return key_balance.exponents(*(key_balance.pair_squares(x) for x in (queries, keys)))


def test_it_takes_noise_from_scores_and_leaves_them_as_they_are():
    g = torch.Generator().manual_seed(0)
    gain = torch.logspace(-1, 1, HEAD_DIM // 2).repeat(2)
    q, k = torch.randn(256, HEAD_DIM, generator=g) / gain, torch.randn(256, HEAD_DIM, generator=g) * gain
    exponents = of_gains(1 / gain, gain)
    s = torch.from_numpy(key_balance.factors(exponents)).float()
    assert (exponents == np.sort(exponents)).all() and s.min() == 0.125 and s.max() == 8
    assert torch.equal((q.bfloat16() * s) * (k.bfloat16() / s), q.bfloat16().float() * k.bfloat16().float()), "nothing is rounded"
    read = lambda x: codec.dequantize(*codec.quantize(x, 4), 4, HEAD_DIM)
    noise, balanced = (((q * by) @ read(k / by).T - q @ k.T).square().mean().item() for by in (torch.ones(1), s))
    assert balanced < 0.1 * noise


def test_pairs_that_rope_turns_share_theirs():
    q, k = np.random.default_rng(0).random((2, HEAD_DIM))
    s = key_balance.factors(of_gains(q, k))
    assert (s[: HEAD_DIM // 2] == s[HEAD_DIM // 2 :]).all()


def test_unused_coordinates_and_balanced_ones_are_no_trouble():
    q, k = np.ones((2, HEAD_DIM))
    assert not of_gains(q, k).any() and not of_gains(0 * q, 0 * k).any()
    q[:40] = 0
    assert np.abs(of_gains(q, k)).max() <= key_balance.LARGEST
    q, k = np.exp(np.random.default_rng(1).standard_normal((2, HEAD_DIM)))
    s = key_balance.factors(of_gains(q, k))
    assert not of_gains(q * s, k / s).any(), "done again, it changes nothing"

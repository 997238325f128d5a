"""torch_kernels.codec gives the reference's codes, scales and numbers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tqai_plugins.core import reference
from tqai_plugins.core.codebook import SEARCH, Codebook
from tqai_plugins.core.rotation import Rotation
from tqai_plugins.torch_kernels import codec

HEAD_DIMS = (8, 9, 64, 80, 96, 100, 112, 128, 192, 256, 512)
TIE = 2**-16


def vectors(head_dim: int, count: int = 300) -> np.ndarray:
    rng = np.random.default_rng(head_dim)
    return (rng.standard_normal((count, head_dim)) * np.exp(2 * rng.standard_normal((count, 1)))).astype(np.float32)


def merits(x: np.ndarray, bits: int) -> np.ndarray:
    """Squared cosine between a rotated vector and its codes on each grid of the search, best last, in float64."""
    book = Codebook.lloyd_max(x.size, bits)
    size = np.abs(reference.rotate(x, Rotation(x.size)).astype(np.float64))
    grids = np.sqrt(np.mean(size**2)) * np.array(SEARCH) * book.unit
    levels = np.array(book.magnitudes)[np.searchsorted(book.boundaries, size / grids[:, None])]
    return np.sort((levels @ size) ** 2 / (levels**2).sum(-1) / (size**2).sum())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_codes_are_the_references(head_dim, bits):
    x = vectors(head_dim)
    packed, scales = reference.quantize(x, bits)
    ours, our_scales = (t.numpy() for t in codec.quantize(torch.from_numpy(x), bits))
    differ = (packed != ours).any(-1)
    assert differ.mean() < 0.02
    for i in np.flatnonzero(differ):  # the tie rule of reference.encode: two grids as good as each other
        best = merits(x[i], bits)
        assert best[-1] - best[-2] <= TIE * best[-1]
    assert np.abs(scales.view(np.int16).astype(int) - our_scales.view(np.int16))[~differ].max() <= 1


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dequantize_is_the_references_bit_for_bit(head_dim, bits):
    packed, scales = reference.quantize(vectors(head_dim), bits)
    tensors = torch.from_numpy(packed), torch.from_numpy(scales)
    expected = reference.dequantize(packed, scales, bits, head_dim)
    assert np.array_equal(codec.dequantize(*tensors, bits, head_dim).numpy(), expected)
    half = codec.dequantize_rotated(*tensors, bits, head_dim, torch.bfloat16)
    assert torch.equal(half, codec.dequantize_rotated(*tensors, bits, head_dim).bfloat16())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_the_references_bit_for_bit(head_dim):
    x = vectors(head_dim)
    turned = codec.rotate(torch.from_numpy(x))
    assert np.array_equal(turned.numpy(), reference.rotate(x, Rotation(head_dim)))
    assert np.array_equal(codec.rotate_back(turned).numpy(), reference.rotate_back(turned.numpy(), Rotation(head_dim)))


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("search", [True, False])
def test_options(scale, search):
    x = vectors(64)
    for kind in ("hadamard", "haar"):
        rotation = Rotation(64, kind)
        packed, scales = reference.quantize(x, 4, rotation=rotation, scale=scale, search=search)
        ours, our_scales = codec.quantize(torch.from_numpy(x), 4, rotation=rotation, scale=scale, search=search)
        same = (packed == ours.numpy()).all(-1)
        assert same.mean() > 0.98
        np.testing.assert_allclose(our_scales.numpy()[same], scales[same], rtol=2e-3)
        back = codec.dequantize(ours, our_scales, 4, 64, rotation=rotation)
        assert (back - torch.from_numpy(x)).norm() < 0.12 * np.linalg.norm(x)


def test_shapes_tiles_and_empty_input(monkeypatch):
    monkeypatch.setattr(codec, "TILE", 64 * 7)  # many tiles, the last one not full
    x = torch.from_numpy(vectors(64, 60)).view(2, 3, 10, 64)
    packed, scales = codec.quantize(x.transpose(1, 2), 3)
    assert packed.shape == (2, 10, 3, 24) and scales.shape == (2, 10, 3)
    whole, _ = codec.quantize(x.reshape(-1, 64), 3)
    assert torch.equal(packed.transpose(1, 2).reshape(-1, 24), whole)
    none = codec.quantize(x[:, :, :0], 3)
    assert none[0].shape == (2, 3, 0, 24) and codec.dequantize(*none, 3, 64).shape == (2, 3, 0, 64)


def test_zero_tiny_and_invalid_vectors():
    x = torch.ones(6, 64)
    x[0], x[1], x[2, 3], x[3, 4], x[4] = 0, 1e-20, torch.nan, torch.inf, 1e30
    with pytest.raises(ValueError, match="3 of 6 vectors hold NaN"):
        codec.quantize(x, 4)
    packed, scales = codec.quantize(x, 4, on_invalid="flag")
    expected = reference.quantize(x.numpy(), 4, on_invalid="flag")
    assert np.array_equal(packed.numpy(), expected[0])
    assert np.array_equal(scales.numpy(), expected[1], equal_nan=True)
    back = codec.dequantize(packed, scales, 4, 64)
    assert (back[:2] == 0).all() and back[2:5].isnan().all() and back[5].isfinite().all()


@pytest.mark.parametrize("option", [{"scale": "max"}, {"on_invalid": "ignore"}, {"bits": 9}, {"bits": 0}])
def test_bad_options_are_named(option):
    with pytest.raises(ValueError, match="allowed are"):
        codec.quantize(torch.ones(1, 64), **{"bits": 4, **option})


def test_tables_made_in_inference_mode_serve_autograd():
    rotation = Rotation(72)  # a size nothing else uses, so that its tables are made here
    with torch.inference_mode():
        codec.rotate(torch.ones(72), rotation)
    x = torch.ones(72, requires_grad=True)
    codec.rotate(x, rotation).sum().backward()
    assert x.grad.norm() > 0

"""The reference, and every backend that is here, write the golden bytes."""

import numpy as np
import pytest
from golden_vectors import CASES, FOLDER, VECTOR_HEAD_DIMS, assert_matches, load, make_all

from tqai_plugins.core import reference
from tqai_plugins.core.bit_packing import pack, pack_patterns, unpack, unpack_patterns
from tqai_plugins.core.kv_format import SERVED_WIDTHS, KVFormat
from tqai_plugins.core.vector_codebook import VECTOR


def test_the_files_are_what_the_script_makes():
    assert {file.name: file.read_text() for file in FOLDER.glob("*.json")} == make_all()


@pytest.mark.parametrize("head_dim, bits", CASES)
def test_the_reference_writes_the_golden_bytes(head_dim, bits):
    x, packed, scales = load(head_dim, bits)
    found = reference.quantize(x, bits)
    assert np.array_equal(found[0], packed) and np.array_equal(found[1], scales)


@pytest.mark.parametrize("head_dim, bits", CASES)
def test_torch_writes_the_golden_bytes(head_dim, bits):
    torch = pytest.importorskip("torch")
    from tqai_plugins.torch_kernels import codec

    x, packed, _ = load(head_dim, bits)
    ours, our_scales = codec.quantize(torch.from_numpy(x), bits)
    assert np.array_equal(ours.numpy(), packed)
    assert_matches(x, bits, ours.numpy(), our_scales.numpy())


@pytest.mark.parametrize("head_dim", VECTOR_HEAD_DIMS)
def test_the_reference_and_torch_write_the_golden_bytes_of_vector_values(head_dim):
    x, packed, scales = load(head_dim, 2, vector=True)
    found = reference.quantize(x, 2, codebook=VECTOR)
    assert np.array_equal(found[0], packed) and np.array_equal(found[1], scales)
    torch = pytest.importorskip("torch")
    from tqai_plugins.torch_kernels import codec

    ours, our_scales = codec.quantize(torch.from_numpy(x), 2, vector=True)
    assert np.array_equal(ours.numpy(), packed)
    assert_matches(x, 2, ours.numpy(), our_scales.numpy(), vector=True)


@pytest.mark.parametrize("head_dim, bits", [(d, b) for d, b in CASES if b in SERVED_WIDTHS])
def test_triton_writes_the_golden_bytes(head_dim, bits):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from tqai_plugins.triton_kernels.prepare import prepare
    from tqai_plugins.triton_kernels.workspace import Workspace

    x, packed, _ = load(head_dim, bits)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fmt, key = KVFormat(bits, bits, head_dim), torch.from_numpy(x)[:, None].to(device)
    layout = fmt.page_layout(16)
    pages = torch.zeros(1, 1, layout.page_bytes, dtype=torch.uint8, device=device)
    slots = torch.arange(len(x), device=device)
    prepare(None, key, key, pages, slots, Workspace.allocate(1, 1, head_dim, 1, device), fmt, 16, 1.0)
    page = pages.cpu().numpy()[0, 0]
    keys = page[: layout.v_codes].reshape(16, -1)[: len(x)]
    values = page[layout.v_codes : layout.k_scales].reshape(-1, 16).T[: len(x)]
    found = page[layout.k_scales :].view(np.float16).reshape(2, 16)[:, : len(x)]
    assert np.array_equal(keys, packed) and np.array_equal(values, packed)
    assert_matches(x, bits, keys, found[0])
    assert_matches(x, bits, values, found[1])


@pytest.mark.parametrize("head_dim, bits", [(128, b) for b in range(1, 9)])
def test_the_comparison_takes_the_reference_and_refuses_one_wrong_code(head_dim, bits):
    """assert_matches can fail: one code moved by one step, one sign, one scale."""
    x = np.random.default_rng(bits).standard_normal((40, head_dim)).astype(np.float32)
    packed, scales = reference.quantize(x, bits)
    assert_matches(x, bits, packed, scales)
    for flip in {1, 1 << (bits - 1)}:
        codes = unpack(packed, bits, head_dim)
        codes[7, 5] ^= flip
        with pytest.raises(AssertionError, match="vector 7"):
            assert_matches(x, bits, pack(codes, bits), scales)
    scales = scales.copy()
    scales[3] *= np.float16(1.01)
    with pytest.raises(AssertionError, match="vector 3"):
        assert_matches(x, bits, packed, scales)


@pytest.mark.parametrize("wrong", ["pattern", "sign"])
def test_the_comparison_refuses_one_wrong_pattern_or_sign_of_vector_values(wrong):
    x = np.random.default_rng(1).standard_normal((40, 128)).astype(np.float32)
    packed, scales = reference.quantize(x, 2, codebook=VECTOR)
    assert_matches(x, 2, packed, scales, vector=True)
    index, negative = unpack_patterns(packed)
    if wrong == "pattern":
        index[7, 5] ^= 1
    else:
        negative[7, 5] ^= True
    with pytest.raises(AssertionError, match="vector 7"):
        assert_matches(x, 2, pack_patterns(index, negative), scales, vector=True)

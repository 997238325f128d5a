"""2-bit values coded four coordinates at once: the codebook, the codecs, and the transformers cache."""

import copy
import warnings

import numpy as np
import pytest

from tqai_plugins.core import bit_packing, reference, solve_vector_codebook, vector_codebook
from tqai_plugins.core.codebook import TOP, Codebook
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.core.vector_codebook import VECTOR, codebook_of

HEAD_DIMS = (64, 80, 100, 128, 256, 512)


def vectors(head_dim: int, count: int = 400) -> np.ndarray:
    rng = np.random.default_rng(head_dim)
    return (rng.standard_normal((count, head_dim)) * np.exp(2 * rng.standard_normal((count, 1)))).astype(np.float32)


def test_the_shipped_numbers_are_what_the_solver_makes():
    patterns, unit = solve_vector_codebook.solve()
    assert patterns.tolist() == [list(pattern) for pattern in vector_codebook.PATTERNS] and unit == vector_codebook.UNIT


def test_magnitudes_lie_on_the_grid_that_int8_holds():
    magnitudes = np.array(VECTOR.patterns)
    assert magnitudes.shape == (16, 4) and (magnitudes % 1 == 0.5).all()
    assert 0 < magnitudes.min() and magnitudes.max() == TOP


def test_every_byte_is_packed_and_unpacked_as_the_layout_says():
    every = np.arange(256, dtype=np.uint8)[:, None]
    index, negative = bit_packing.unpack_patterns(every)
    assert np.array_equal(bit_packing.pack_patterns(index, negative), every)
    assert index[0xA3] == 3 and negative[0xA3].tolist() == [False, True, False, True]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_error_is_a_tenth_below_that_of_two_bits_a_coordinate_in_as_many_bytes(head_dim):
    x = np.random.default_rng(1).standard_normal((500, head_dim)).astype(np.float32)
    error, size = [], []
    for codebook in (codebook_of(head_dim, 2), codebook_of(head_dim, 2, vector=True)):
        packed, scales = reference.quantize(x, 2, codebook=codebook)
        error.append(np.square(reference.dequantize(packed, scales, 2, head_dim, codebook=codebook) - x).mean())
        size.append(packed.shape)
    assert error[1] < 0.9 * error[0] and size[0] == size[1] == (500, KVFormat(4, 2, head_dim, True).v_bytes)


@pytest.mark.parametrize("head_dim", (8, *HEAD_DIMS))
def test_torch_gives_the_references_codes_and_numbers(head_dim):
    torch = pytest.importorskip("torch")
    from golden_vectors import assert_matches

    from tqai_plugins.torch_kernels import codec

    x = vectors(head_dim)
    packed, scales = codec.quantize(torch.from_numpy(x), 2, vector=True)
    assert_matches(x, 2, packed.numpy(), scales.numpy(), vector=True)
    expected = reference.dequantize(packed.numpy(), scales.numpy(), 2, head_dim, codebook=VECTOR)
    assert np.array_equal(codec.dequantize(packed, scales, 2, head_dim, vector=True).numpy(), expected)


def test_zero_tiny_and_invalid_vectors_are_as_at_other_widths():
    x = np.ones((6, 64), np.float32)
    x[0], x[1], x[2, 3], x[3, 4], x[4] = 0, 1e-20, np.nan, np.inf, 1e30
    with pytest.raises(ValueError, match="3 of 6 vectors hold NaN"):
        reference.quantize(x, 2, codebook=VECTOR)
    packed, scales = reference.quantize(x, 2, codebook=VECTOR, on_invalid="flag")
    back = reference.dequantize(packed, scales, 2, 64, codebook=VECTOR)
    assert (back[:2] == 0).all() and np.isnan(back[2:5]).all() and np.isfinite(back[5]).all()
    torch = pytest.importorskip("torch")
    from tqai_plugins.torch_kernels import codec

    ours = codec.quantize(torch.from_numpy(x), 2, vector=True, on_invalid="flag")
    assert np.array_equal(ours[0].numpy(), packed) and np.array_equal(ours[1].numpy(), scales, equal_nan=True)


def test_the_references_attention_reads_them():
    rng, fmt = np.random.default_rng(0), KVFormat(8, 2, 64, vector_values=True)
    q, k, v = (rng.standard_normal((n, 2, 64)).astype(np.float32) for n in (1, 30, 30))
    stored = reference.quantize(v, 2, codebook=VECTOR)
    found = reference.attention(q, reference.quantize(k, 8), stored, fmt, softmax_scale=0.3)
    values = reference.dequantize(*stored, 2, 64, codebook=VECTOR)
    weights = np.exp(0.3 * np.einsum("qhd,thd->hqt", q, k))
    expected = np.einsum("hqt,thd->qhd", weights / weights.sum(-1, keepdims=True), values)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: KVFormat(4, 4, 64, vector_values=True), "vector_values is True but bits_v is 4; .*2 bits alone: set bits_v to 2, or"),
        (lambda: KVFormat(4, 2, 66, vector_values=True), "vector_values is True but head_dim is 66; allowed are multiples of 4"),
        (lambda: codebook_of(66, 2, True), "head_dim is 66; allowed are multiples of 4"),
        (lambda: codebook_of(64, 3, True), "bits is 3; it is allowed with 2 bits alone"),
    ],
)
def test_formats_without_a_codebook_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_the_digest_is_another_than_that_of_two_bits_a_coordinate():
    assert len({VECTOR.digest, *(Codebook.lloyd_max(d, 2).digest for d in HEAD_DIMS)}) == 1 + len(HEAD_DIMS)


# ---- the transformers cache

STRATEGIES = {
    "residual": {"residual_window": 8},
    "full": {"cache_strategy": "full", "sink_tokens": 2},
    "incremental": {"cache_strategy": "incremental"},
    "key means": {"residual_window": 8, "key_means": "made"},
    "key factors": {"residual_window": 8, "key_factors": {0: (2.0, 0.5) * 16}},
    "qjl": {"residual_window": 8, "use_qjl": True},
}


def cache_of(**options):
    pytest.importorskip("transformers")
    import made_means
    from test_transformers_cache import SIZES
    from transformers import LlamaConfig

    from tqai_plugins.transformers_plugin import Cache

    if options.get("key_means"):
        options["key_means"] = made_means.make(3, 2, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Cache(LlamaConfig(**SIZES), bits_k=4, bits_v=2, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cache_gives_back_the_codecs_values_whatever_is_done_to_it(strategy):
    """Every value is the given one or what the codec makes of it; keys are those of a cache without vector values."""
    torch = pytest.importorskip("torch")
    from tqai_plugins.torch_kernels import codec

    cache, plain = (cache_of(vector_values=vector, **STRATEGIES[strategy]) for vector in (True, False))
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(2, 2, count, 32, generator=generator)
    given = draw(0)
    for step, count in enumerate((90, 1, 40, 1)):
        if step == 2:
            cache = copy.deepcopy(cache)
        k, v = draw(count), draw(count)
        (keys, values), (plain_keys, _) = (c.update(k, v, 0) for c in (cache, plain))
        given = torch.cat([given, v], 2)
        if step:
            coded = codec.dequantize(*codec.quantize(given, 2, vector=True), 2, 32, vector=True)
            exact = (values + 0 == given).all(-1)
            assert (values + 0 - torch.where(exact[..., None], given, coded)).abs().max() < 1e-5
            assert 60 < (~exact[0, 0]).sum() <= given.shape[2] and torch.equal(keys + 0, plain_keys + 0)
        rows = torch.tensor([1, 0])
        for c in (cache, plain):
            c.crop(-5)
            c.reorder_cache(rows)
        given = given[rows, :, :-5]
    assert cache.nbytes == plain.nbytes


def test_generation_is_closer_to_the_uncompressed_model():
    """Over a whole prompt that is read as codes, the logits' error falls by a part that is no chance."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import tqai
    from test_transformers_cache import SIZES

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    ids, error = torch.randint(2, 97, (8, 100)), []
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        for vector in (False, True):
            cache = tqai.patch(model, bits_k=8, bits_v=2, cache_strategy="full", vector_values=vector)
            error.append((model(ids, past_key_values=cache).logits - exact).norm().item())
    assert error[1] < 0.97 * error[0]


def test_head_dimensions_that_four_does_not_divide_are_refused_before_anything_is_stored():
    torch = pytest.importorskip("torch")
    cache = cache_of(vector_values=True)
    with pytest.raises(ValueError, match="but head_dim is 30; allowed are multiples of 4: leave vector_values out"):
        cache.update(torch.ones(1, 2, 5, 30), torch.ones(1, 2, 5, 30), 0)
    assert cache.get_seq_length() == 0


def test_a_codebook_file_of_two_bits_goes_with_keys_alone(tmp_path):
    """With vector values a file for 2 bits would be used for nothing, unless keys have 2 bits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import tqai
    from test_transformers_cache import SIZES

    file = tmp_path / "book.json"
    book = codebook_of(32, 2)
    book.write(file, {})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="this cache has head_dim 32 with 4 bits: it would not be used"):
        tqai.patch(model, codebook=str(file), vector_values=True)
    tqai.patch(model, bits_k=2, codebook=str(file), vector_values=True)

"""The key mean: NumPy's definition, the same as tensors, and what it is worth on pages and in the transformers cache."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import tqai

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
    got = key_mean.term(table, key_mean.coefficients(means, pairs, unit), pairs)
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


def model_with_means(name="Llama", **more):
    """A small model whose keys have a large mean before RoPE, by the biases of their projections."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes | {"head_dim": HEAD_DIM, "num_hidden_layers": 2, "attention_bias": True} | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[torch.arange(0, 2 * HEAD_DIM, 4)] = 4.0
        layer.self_attn.q_proj.weight.data *= 5
        layer.self_attn.k_proj.weight.data *= 2
    return model


def reader(text):
    return types.SimpleNamespace(input_ids=[ord(letter) % 64 for letter in text])


CODED = {"bits_k": 3, "bits_v": 8, "cache_strategy": "full"}


def test_a_transformers_model_with_learned_means_is_far_closer():
    from tqai_plugins.transformers_plugin import key_means

    model = model_with_means()
    learned = key_means.learn(model, reader)
    tokens = torch.randint(0, 64, (2, 300), generator=torch.Generator().manual_seed(0))
    exact, errors = model(tokens).logits, []
    for given in (None, learned):
        cache = tqai.patch(model, **CODED, key_means=given)
        assert cache.key_mean_layers == (2 if given else 0)
        logits = [model(part, past_key_values=cache).logits for part in (tokens[:, :250], *tokens[:, 250:].split(1, 1))]
        errors.append((torch.cat(logits, 1) - exact).norm())
    assert errors[1] < 0.5 * errors[0], errors


def test_what_codes_and_attention_over_them_give_back_is_exact_but_for_their_noise():
    """The error of keys is that of what is left when the mean is off, wherever a row begins; scores are those of dense keys."""
    from tqai_plugins.transformers_plugin import key_means

    model = model_with_means()
    means = key_means.of(model, key_means.learn(model, reader))
    assert means[0].rope is means[1].rope, "one table for all layers"
    cos, sin = rope(1200)
    noise = 0.1 * np.random.default_rng(2).standard_normal((1200, 2, HEAD_DIM))
    on = lambda shift: turned(means[0].measured.means + noise, np.roll(cos, shift, 0), np.roll(sin, shift, 0))
    v, q = torch.randn(1, 2, 1200, HEAD_DIM), torch.randn(1, 4, 1, HEAD_DIM)
    errors = []
    for shift in (0, 7):  # as with 7 of left padding
        k = torch.from_numpy(on(shift)).float().transpose(0, 1)[None]
        cache = tqai.patch(model, **CODED, key_means=means)
        keys, values = cache.update(k, v, 0)
        errors.append(((keys.dense - k).norm() / k.norm()).item())
        attend = lambda keys, values: torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        torch.testing.assert_close(attend(keys, values), attend(keys.dense, values.dense), rtol=1e-4, atol=1e-5)
    assert errors[0] < 0.05 and errors[0] < errors[1] < 0.3, errors


def test_who_has_means_and_who_is_refused():
    from tqai_plugins.transformers_plugin import key_means

    model = model_with_means()
    learned = key_means.learn(model, reader)
    layers = lambda **options: [layer.means is not None for layer in tqai.patch(model, key_means=learned, **options).layers]
    assert layers(**CODED) == [True, True] and layers(bits_k=8, bits_v=8) == [False, False]
    assert layers(**CODED, layer_formats={0: "tqai_k8v8"}) == [False, True]
    assert layers(**CODED, key_factors={1: (2.0,) * HEAD_DIM}) == [True, False], "balance leaves nothing to take"
    assert tqai.patch(model, **CODED).key_mean_layers == 0, "only if asked for"
    assert "2 layers compressed, 2 with key means" in repr(tqai.patch(model, key_means=learned, **CODED))
    x = torch.zeros(1, 1, 1, HEAD_DIM)
    with pytest.raises(ValueError, match="key_means has 2 heads of 64 coordinates for a layer of 1 of 64"):
        tqai.patch(model, key_means=learned, **CODED).update(x, x, 0)
    with pytest.raises(ValueError, match="cohere models have no RoPE of the common form"):
        key_means.of(model_with_means("Cohere"), learned)  # it turns neighbouring coordinates


@pytest.mark.parametrize("kind", [{"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}])
def test_a_table_grows_and_what_was_in_it_stays(kind):
    """Also where RoPE depends on how long the sequence is, which the model itself does not notice."""
    from tqai_plugins.transformers_plugin.rope import Rope

    model = model_with_means(max_position_embeddings=512, rope_parameters={"rope_theta": 1e4} | kind)
    before = model.model.rotary_emb.inv_freq.clone()
    one, other = (Rope(model, None, HEAD_DIM) for _ in range(2))
    parts = [one.rows(start, start + 100, torch.device("cpu")).clone() for start in range(0, 3000, 100)]
    assert torch.equal(torch.cat(parts), other.rows(0, 3000, torch.device("cpu"))), "whoever asks, and in whatever steps"
    assert not parts[0][: key_mean.FIRST_TOKEN].any() and parts[0][5].any()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)

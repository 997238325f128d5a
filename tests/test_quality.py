"""What `tqai benchmark quality` measures, and that it cannot pass without reading codes."""

import itertools
import json
import math

import pytest
import small_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tqai import Cache, fidelity, models
from tqai.cli import main
from transformers import DynamicCache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small_model.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder, torch.float32)[0]


def test_scores_are_the_textbook_formulas():
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 5, 7, generator=generator)
    targets = torch.tensor([0, 1, 2, 3, 4])
    score = fidelity.Score()
    score.add(logits, reference, targets)
    p, q = (x.double().softmax(-1) for x in (reference, logits))
    torch.testing.assert_close(torch.tensor(score.kld).double(), (p * (p / q).log()).sum(-1), rtol=1e-6, atol=1e-8)
    summary = score.summary()
    assert math.isclose(math.log(summary["perplexity"]), torch.nn.functional.cross_entropy(logits, targets), rel_tol=1e-5)
    assert summary["top1_agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean()


def test_the_error_is_that_of_block_means():
    values = torch.randn(4 * fidelity.BLOCK, generator=torch.Generator().manual_seed(0)).tolist()
    mean, error = fidelity.mean_and_error(values)
    means = torch.tensor(values, dtype=torch.float64).view(4, -1).mean(1)
    assert math.isclose(mean, means.mean()) and math.isclose(error, means.std() / 2)
    assert math.isnan(fidelity.mean_and_error(values[:10])[1])


def test_the_reference_scores_as_one_forward_pass_does(model):
    tokens = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    scores = {"plain": fidelity.Score(), "again": fidelity.Score()}
    caches = {name: DynamicCache(config=model.config) for name in scores}
    fidelity.teacher_forced(model, tokens, 20, caches, scores, 7)
    with torch.inference_mode():
        logits = model(tokens).logits[0, 19:-1]
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 20:], reduction="none")
    torch.testing.assert_close(torch.tensor(scores["plain"].nll), expected, rtol=1e-3, atol=1e-3)
    assert max(scores["again"].kld) == 0 and min(scores["again"].same) == 1


def test_every_scored_token_reads_codes_through_generates_cache(model):
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = Cache(model.config, cache_strategy="full")
    caches = {"plain": DynamicCache(config=model.config), "tqai": cache}
    reads = []
    scores = {name: fidelity.Score() for name in caches}
    fidelity.teacher_forced(model, tokens, 20, caches, scores, 4, lambda _: reads.append(cache.vectors_dequantized))
    assert all(later > earlier for earlier, later in itertools.pairwise(reads)) and len(reads) == 6
    assert fidelity.coded_tokens(cache) == 39 and cache.vectors_quantized == 39 * 4
    assert min(scores["tqai"].kld) > 0
    assert fidelity.stored_bits(cache)["code_bits"] == fidelity.stored_bits(cache)["bits"] == 3 + 16 / 32


def test_exact_tokens_count_16_bits(model):
    cache = Cache(model.config, bits_k=4, bits_v=4, sink_tokens=4, residual_window=16)
    with torch.inference_mode():
        model(torch.zeros(1, 100, dtype=torch.long), past_key_values=cache)
    coded = fidelity.coded_tokens(cache)
    assert coded == 80
    assert math.isclose(fidelity.stored_bits(cache)["bits"], (80 * 4.5 + 20 * 16) / 100)


def test_yardsticks_are_what_they_are_called():
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fidelity.to_bf16(x), x.bfloat16().float())
    assert len(fidelity.to_fp8(x).unique()) <= 255 and fidelity.to_fp8(torch.tensor([1e6])).item() == 448
    coded = fidelity.to_int4(x)
    assert max(len(row.unique()) for row in coded) == 16
    assert (coded - x).abs().max() < 0.6 * (x.amax(1) - x.amin(1)).max() / 15


def test_the_command_writes_its_table_and_plot(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot, text = tmp_path / "q.json", tmp_path / "q.png", tmp_path / "text.txt"
    text.write_text("The bees were on the south side of the tower. " * 30)
    argv = ["benchmark", "quality", "--model", folder, "--text", str(text), "--context", "256", "--windows", "2"]
    assert main([*argv, "--formats", "k8v8:full,k4v4:4:16,k1v1:full,k1v8:full,k1v8:full+mean,k8v2:full,k8v2:full+vector", "--json", str(out), "--plot", str(plot)]) == 0
    data = json.loads(out.read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == ["uncompressed", "bf16", "fp8", "int4_g64", "k8v8:full", "k4v4:4:16", "k1v1:full", "k1v8:full", "k1v8:full+mean", "k8v2:full", "k8v2:full+vector"]
    assert rows["k8v2:full+vector"]["kld"] != rows["k8v2:full"]["kld"] and rows["k8v2:full+vector"]["bits"] == rows["k8v2:full"]["bits"]
    assert rows["k8v2:full+vector"]["options"]["vector_values"] and not rows["k8v2:full"]["options"]["vector_values"]
    assert rows["uncompressed"]["kld"] == 0 and rows["uncompressed"]["tokens"] == 2 * 128
    assert 0 < rows["k8v8:full"]["kld"] < 0.01 < rows["k1v1:full"]["kld"]
    assert rows["k8v8:full"]["vectors_quantized"] == 2 * 255 * 4
    assert rows["k1v8:full"]["key_mean_layers"] == 0 < rows["k1v8:full+mean"]["key_mean_layers"]
    assert rows["k1v8:full"]["kld"] != rows["k1v8:full+mean"]["kld"]
    assert rows["k4v4:4:16"]["options"]["residual_window"] == 16
    assert plot.read_bytes().startswith(b"\x89PNG") and "KL divergence" in capsys.readouterr().out


def test_a_cache_that_was_not_read_fails(folder, capsys):
    argv = ["benchmark", "quality", "--model", folder, "--context", "64", "--windows", "1", "--formats", "k4v2"]
    assert main(argv) == 1
    assert "the compressed cache was never read (k4v2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (("--formats", "q4"), "--formats has 'q4'; expected k<bits>v<bits>"),
        (("--formats", "k4v4+vector"), "vector_values is True but bits_v is 4"),
        (("--context", "1"), "--context is 1; allowed are 4 and more"),
        (("--text", "/no/such/text"), "No such file or directory: /no/such/text"),
        (("--context", "100000"), "the text has"),
    ],
)
def test_bad_options_are_one_sentence(argv, sentence, folder, capsys):
    assert main(["benchmark", "quality", "--model", folder, *argv]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tqai: {sentence}")

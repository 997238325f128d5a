"""`tqai run`, `tqai compare` and `tqai demo` as a user calls them."""

import json

import pytest
import small_model

pytest.importorskip("torch")
pytest.importorskip("transformers")
from tqai.cli import main
from tqai.cli.compare import first_difference

PROMPT = "The lighthouse was built by a woman who had never seen the sea. " * 4  # 256 bytes, a token each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small_model.write(tmp_path_factory.mktemp("model")))


def output(capsys, *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_streams_what_json_reports(folder, capsys):
    argv = ("run", PROMPT, "--model", folder, "--max-tokens", "8")
    data = output(capsys, *argv)
    assert data["coded_tokens"] > 90 and data["new_tokens"] <= 8
    assert main([*argv]) == 0
    assert data["text"] in capsys.readouterr().out
    plain = output(capsys, *argv, "--no-tqai")
    assert plain["cache"] == "uncompressed" and plain["coded_tokens"] == 0
    assert plain["cache_bytes"] > data["cache_bytes"]


def test_options_reach_the_cache(folder, capsys):
    argv = ("run", PROMPT, "--model", folder, "--max-tokens", "2")
    data = output(capsys, *argv, "--config", "tqai_k3v3", "--cache-strategy", "full", "--sink-tokens", "2")
    for option in ("bits_k=3", "bits_v=3", "cache_strategy='full'", "sink_tokens=2"):
        assert option in data["cache"]
    assert data["coded_tokens"] == data["prompt_tokens"] + data["new_tokens"] - 1 - 2


def test_vector_values_from_the_command_line(folder, capsys):
    argv = ("run", PROMPT, "--model", folder, "--max-tokens", "2", "--cache-strategy", "full")
    plain, vector = output(capsys, *argv), output(capsys, *argv, "--vector-values")
    assert "vector_values=True" in vector["cache"] and "vector_values=True" not in plain["cache"]
    assert vector["cache_bytes"] == plain["cache_bytes"]


def test_named_configurations_and_qjl(folder, capsys):
    argv = ("run", PROMPT, "--model", folder, "--max-tokens", "2")
    data = output(capsys, *argv, "--config", "aggressive", "--use-qjl", "--qjl-sketch-size", "32")
    for option in ("bits_k=3", "bits_v=2", "use_qjl=True", "qjl_sketch_size=32"):
        assert option in data["cache"]
    assert data["activations"] == {"compress_hidden": True, "bits_hidden": 6, "compress_ffn": True, "bits_ffn": 6}


def test_compare_applies_activations_to_one_side_only(folder, capsys):
    argv = ("compare", PROMPT, "--model", folder, "--max-tokens", "8", "--dtype", "float32")
    widths = ("--bits-k", "8", "--bits-v", "8")
    plain, hidden = output(capsys, *argv, *widths), output(capsys, *argv, *widths, "--compress-hidden", "--bits-hidden", "4")
    assert plain["baseline"]["text"] == hidden["baseline"]["text"] and plain["kld"] < hidden["kld"] / 4
    assert output(capsys, *argv, "--config", "kv+hidden6")["activations"]["bits_hidden"] == 6


def test_compare_is_near_zero_at_8_bits_and_worse_at_1(folder, capsys):
    found = {}
    for bits in ("8", "1"):
        argv = ("compare", PROMPT, "--model", folder, "--max-tokens", "12", "--cache-strategy", "full")
        found[bits] = output(capsys, *argv, "--bits-k", bits, "--bits-v", bits, "--dtype", "float32")
    good, bad = found["8"], found["1"]
    assert good["kld"] < 0.01 < bad["kld"]
    assert good["top1_agreement"] >= bad["top1_agreement"]
    assert good["ratio"] < bad["ratio"]
    assert good["vectors_quantized"] == good["coded_tokens"] * 2 * 2  # keys and values of two layers, one head each
    assert good["vectors_dequantized"] > good["vectors_quantized"]
    assert good["scored_tokens"] == good["baseline"]["tokens"]


def test_compare_prints_tables(folder, capsys):
    assert main(["compare", "Short.", "--model", folder, "--max-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "times smaller" in out and "nothing was compressed" in out


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (("--bits-k", "9"), "bits_k is 9; allowed are the whole numbers 1 to 8"),
        (("--config", "tqai_k4v9"), "unknown KV cache format 'tqai_k4v9'"),
        (("--config", "tqai", "--bits-k", "4"), "config 'tqai' already says bits_k; leave out one of them"),
        (("--config", "all9"), "config is 'all9'; expected one of kv-only, kv+hidden8"),
        (("--compress-ffn", "--bits-ffn", "1"), "bits_ffn is 1; allowed are the whole numbers 2 to 8"),
        (("--vector-values", "--bits-v", "4"), "vector_values is True but bits_v is 4; it is allowed with 2 bits alone"),
        (("--cache-strategy", "best"), "cache_strategy is 'best'; allowed are"),
        (("--max-tokens", "0"), "--max-tokens is 0; allowed are 1 and more"),
        (("--backend", "mlx"), "backend is 'mlx'"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(argv, sentence, capsys):
    assert main(["run", "Hello", "--model", "/no/such/model", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"tqai: {sentence}")


def test_an_empty_prompt(folder, capsys):
    assert main(["run", " ", "--model", folder]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_reads_codes_and_answers_alike(capsys):
    data = output(capsys, "demo", "--max-tokens", "24")
    assert data["coded_tokens"] > 400 and data["ratio"] > 2
    assert data["kld"] < 0.1 and data["top1_agreement"] > 0.8
    assert "Clara Hedley" in data["baseline"]["text"] and "Clara Hedley" in data["tqai"]["text"]

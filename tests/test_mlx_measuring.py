"""What measures: fidelity through the caches, tqai doctor, and the speed table where there is a GPU."""

import argparse
import functools
import json
import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_models
import tqai
from mlx_lm.models.cache import make_prompt_cache
from tqai.cli import _benchmark_kernels_mlx as benchmark
from tqai.cli import main
from tqai_plugins.metal_kernels import check, launch

from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.mlx_lm_plugin import fidelity, speed


def test_fidelity_falls_with_the_bits_and_leaves_the_model_as_it_was():
    model, _ = mlx_models.load("llama32")
    windows = np.random.default_rng(0).integers(5, 250, (2, 1100))
    entries = {f"k{k}v{v}": {"bits_k": k, "bits_v": v, "cache_strategy": "full"} for k, v in ((8, 8), (4, 4), (2, 2))}
    *_, rows = fidelity.measure(model, windows, entries)
    by_name = {row["name"]: row for row in rows}
    assert [row["name"] for row in rows] == ["uncompressed", "k8v8", "k4v4", "k2v2"]
    assert by_name["uncompressed"]["kld"] == 0 and by_name["uncompressed"]["top1_agreement"] == 1
    assert 0 < by_name["k8v8"]["kld"] < by_name["k4v4"]["kld"] < by_name["k2v2"]["kld"]
    assert by_name["k4v4"]["tokens"] == 1100 and by_name["k4v4"]["kld_error"] > 0
    assert by_name["k4v4"]["bits"] == pytest.approx(KVFormat(4, 4, 64).bits_per_element, rel=0.02)
    assert "make_cache" not in vars(model)


def test_the_command_measures_the_cache_and_fails_if_no_code_was_read(capsys, tmp_path):
    command = ["benchmark", "quality", "--backend", "mlx", "--model", str(mlx_models.folder_of("llama32")), "--context", "256"]
    assert main([*command, "--windows", "1", "--formats", "k8v8:full,k2v2:2:16,k2v8:full,k2v8:full+mean", "--json", str(tmp_path / "q.json")]) == 0
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["uncompressed", "k8v8:full", "k2v2:2:16", "k2v8:full", "k2v8:full+mean"] and 0 < rows[1]["kld"] < rows[2]["kld"]
    assert [row["key_mean_layers"] for row in rows[1:]] == [0, 0, 0, 2] and rows[3]["kld"] != rows[4]["kld"]
    capsys.readouterr()
    assert main([*command, "--windows", "1", "--formats", "k4v2:4:256"]) == 1
    assert "the compressed cache was never read (k4v2:4:256)" in capsys.readouterr().err
    assert main([*command, "--formats", "k5v4"]) == 2
    assert "bits_k is 5; on MLX allowed are 2, 3, 4, 8" in capsys.readouterr().err


def test_a_chunk_sees_what_generation_sees():
    """Teacher-forced chunks give the probabilities of token by token."""
    model, _ = mlx_models.load("llama32")
    tqai.patch(model, residual_window=16)
    tokens = np.random.default_rng(1).integers(5, 250, 60)
    whole = fidelity.log_probabilities(model, tokens, 30, make_prompt_cache(model))
    cache, single = make_prompt_cache(model), []
    for token in tokens[:-1]:
        logits = model(mx.array([[int(token)]]), cache=cache)[0, -1]
        single.append(np.array(logits - mx.logsumexp(logits)))
    tqai.unpatch(model)
    assert np.abs(np.array(single)[29:] - whole).max() < 2e-3


def test_doctor_checks_every_kernel(monkeypatch, capsys, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile Metal source for the CPU")
    import metal_shim

    monkeypatch.setattr(launch, "backend", lambda: "metal")
    metal_shim.install(monkeypatch)
    monkeypatch.setattr(check, "SHAPES", check.SHAPES[:2])
    assert main(["doctor", "--mlx", "--head-dims", "80", "--no-speed", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["kernel"] for row in report["checks"]} == {"store", "dequantize", "decode_attention"}
    assert all(row["ok"] and row["head_dim"] == 80 for row in report["checks"]) and len(report["checks"]) > 20

    def wrong(name, *arguments):
        outputs = metal_shim.launch(name, *arguments)
        return [outputs[0] * 1.01] if name == "merge" else outputs

    monkeypatch.setattr(launch, "launch", wrong)
    assert main(["doctor", "--mlx", "--head-dims", "80", "--no-speed"]) == 1
    out = capsys.readouterr().out
    assert "FAILED decode_attention tqai_k4v2 head_dim 80" in out and "checks passed" in out


@pytest.mark.skipif(launch.available(), reason="there is a GPU here")
def test_without_a_gpu_both_say_so(capsys):
    assert main(["doctor", "--mlx"]) == 2
    assert "MLX has no GPU here" in capsys.readouterr().err
    args = argparse.Namespace(shapes="1x128", formats="tqai", q_heads=4, kv_heads=2, head_dim=64, json=None)
    with pytest.raises(ValueError, match="MLX has no GPU here"):
        benchmark.run(args)


TINY = speed.SMOLLM2_135M | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 99}


def test_the_speed_table_through_the_shim(monkeypatch, capsys):
    """Not its times, which are a CPU's, but that every row is measured through the real caches."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile Metal source for the CPU")
    import metal_shim

    launched = []
    metal_shim.install(monkeypatch, lambda name, *a: launched.append(name) or metal_shim.launch(name, *a))
    monkeypatch.setattr(speed, "time_of", lambda call, query, **_: mx.eval(call(query)) or (1.0, 2.0))
    monkeypatch.setattr(speed, "decode_rates", functools.partial(speed.decode_rates, sizes=TINY, prompt=9, tokens=2, repeats=1))
    data = benchmark.measure("1x40", "tqai_k4v2,tqai_k8v8", 4, 2, 64)
    assert [row["name"] for row in data["rows"]] == ["mx.fast SDPA float16", "mlx-lm 4-bit affine", "tqai_k4v2", "tqai_k8v8"]
    assert data["rows"][2]["bytes"] == 40 * 2 * KVFormat(4, 2, 64).slot_bytes
    assert {"store", "decode_attention", "merge"} <= set(launched)
    assert [row["name"] for row in data["models"]] == ["stock", "tqai_k4v2", "tqai_k8v8"]
    assert all(row["tokens_s"] > 0 for row in data["models"])
    benchmark.show(data)
    out = capsys.readouterr().out
    assert "tqai_k8v8" in out and "Tokens a second" in out

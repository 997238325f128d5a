"""Codebook solvers, their files, and that no code is read by another codebook than wrote it."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tqai.cli import main

from tqai_plugins.core import codebook, codebook_solvers, reference
from tqai_plugins.core.codebook import TOP, Codebook, shipped, use
from tqai_plugins.core.solve_codebook import lloyd_max_levels


@pytest.fixture
def file(tmp_path):
    """A codebook that is plainly worse than the shipped one, so that its use shows."""
    crowded = Codebook(48, 2, (100.5, 127.5), shipped(48, 2).unit, "")
    book = Codebook(48, 2, crowded.magnitudes, crowded.unit, f"test-{crowded.digest}")
    book.write(tmp_path / "book.json", {"solver": "hand"})
    return tmp_path / "book.json"


def test_fuzzy_c_means_ends_at_lloyd_max_when_it_is_cold():
    for head_dim, bits in ((64, 2), (128, 4)):
        np.testing.assert_allclose(
            codebook_solvers.fuzzy_levels(head_dim, bits), lloyd_max_levels(head_dim, bits), atol=2e-3
        )


@pytest.mark.parametrize("solver", codebook_solvers.SOLVERS)
@pytest.mark.parametrize("objective", codebook_solvers.OBJECTIVES)
def test_every_solver_reaches_lloyd_max_on_its_own_samples(solver, objective):
    if solver == "cmaes":
        pytest.importorskip("cma")
    seen = []
    book = codebook_solvers.solve(64, 2, solver, objective, 3, lambda count, best: seen.append((count, best)))
    measure = codebook_solvers.Measure(objective, 64, 3)
    assert measure(book) <= measure(shipped(64, 2)) * (1 + 1e-9)
    assert book.name == f"{solver}-{objective}-64-2-{book.digest}"
    assert all(m % 1 == 0.5 for m in book.magnitudes) and book.magnitudes[-1] <= TOP
    if solver == "cmaes" or objective == "attention":
        assert [count for count, _ in seen] == list(range(1, len(seen) + 1))
        assert all(b <= a for (_, a), (_, b) in itertools.pairwise(seen))


def test_cmaes_is_the_same_for_a_seed():
    pytest.importorskip("cma")
    first, second = (codebook_solvers.solve(64, 2, "cmaes", "mse", 5) for _ in range(2))
    assert first == second


def test_the_objectives_see_a_bad_codebook():
    bad = Codebook(64, 2, (100.5, 127.5), shipped(64, 2).unit)
    for objective in codebook_solvers.OBJECTIVES:
        measure = codebook_solvers.Measure(objective, 64, 0)
        assert measure(bad) > 1.5 * measure(shipped(64, 2))
    x = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    packed, scales = reference.quantize(x, 4)
    turned = reference.rotate(x, reference.Rotation(64))
    expected = reference.dequantize_rotated(packed, scales, 4, shipped(64, 4))
    np.testing.assert_allclose(codebook_solvers.decoded(shipped(64, 4), turned), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((64, 8), "nothing to solve for 8 bits"), ((64, 4, "magic"), "solver is 'magic'; allowed are lloyd_max, cmaes"),
        ((64, 4, "fuzzy", "joy"), "objective is 'joy'; allowed are mse, attention"), ((3, 4), "head_dim is 3"),
    ],
)  # fmt: skip
def test_bad_requests(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        codebook_solvers.solve(*arguments)


def test_build_writes_what_read_reads(tmp_path, capsys):
    pytest.importorskip("rich")
    out = tmp_path / "book.json"
    argv = ["codebook", "build", "--solver", "fuzzy", "--head-dim", "64", "--bits", "3", "--out", str(out)]
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    book = Codebook.read(out)
    assert book.name == data["name"] and (book.head_dim, book.bits) == (64, 3) and abs(data["mse_change"]) < 0.001
    assert json.loads(out.read_text())["made"] == {"solver": "fuzzy", "objective": "mse", "seed": 0}
    assert main(argv) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"magnitudes": [99.5, 127.5]}, "not those that were written"),
        ({"magnitudes": [127.5, 99.5]}, "do not rise"), ({"magnitudes": [1.25, 9.5]}, "whole numbers plus one half"),
        ({"magnitudes": [1.5, float("nan")]}, "no numbers"), ({"magnitudes": ["1.5", 9.5]}, "no numbers"),
        ({"magnitudes": [0.5] * 3}, "do not rise"), ({"magnitudes": None}, "no codebook file"),
        ({"unit": -1}, "no numbers"), ({"unit": float("inf")}, "no numbers"), ({"bits": 9}, "bits is 9"),
        ({"head_dim": True}, "head_dim is True"), ({"tqai_codebook": 2}, "of version 2"), ({"more": 1}, "other keys"),
    ],
)  # fmt: skip
def test_files_that_are_refused(file, change, sentence):
    given = json.loads(file.read_text()) | change
    file.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=sentence):
        Codebook.read(file)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00"])
def test_files_that_are_something_else(file, text):
    file.write_text(text)
    with pytest.raises(ValueError, match="no codebook file of tqai"):
        Codebook.read(file)


def test_a_process_has_one_codebook_for_a_head_dim_and_width(file, monkeypatch):
    monkeypatch.setattr(codebook, "_in_use", {})  # as in a fresh process, whatever other tests used
    book = Codebook.read(file)
    assert Codebook.lloyd_max(40, 2) == shipped(40, 2)
    with pytest.raises(ValueError, match="comes too late: this process already uses 'lloyd_max' for head_dim 40"):
        use(Codebook(40, 2, book.magnitudes, book.unit, "other"))
    use(book)
    use(book)
    assert Codebook.lloyd_max(48, 2) == book != shipped(48, 2)


CODE = """
import sys, torch, transformers, tqai
config = transformers.LlamaConfig(vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=48)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config).eval()
options = {"codebook": sys.argv[1]} if len(sys.argv) > 1 else {}
cache = tqai.patch(model, bits_k=2, bits_v=2, cache_strategy="full", **options)
with torch.inference_mode():
    print(model(torch.arange(50)[None], past_key_values=cache).logits.double().sum().item())
"""


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CODE, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_patch_and_the_environment_use_it(file):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    plain, patched, by_environment = run(), run(str(file)), run(TQAI_CODEBOOK=str(file))
    assert patched.stdout == by_environment.stdout != plain.stdout and plain.returncode == 0
    other = Codebook.read(file)
    named = Codebook(64, 2, other.magnitudes, other.unit)
    Codebook(64, 2, other.magnitudes, other.unit, f"x-{named.digest}").write(file, {})
    assert "it would not be used" in run(str(file)).stderr


@pytest.mark.slow
def test_the_report_reads_a_model_with_each_codebook(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    import small_model

    monkeypatch.setattr("tqai.cli.codebook.SOLVERS", ("lloyd_max",))
    model = str(small_model.write(tmp_path / "model"))
    argv = ["codebook", "report", "--bits", "3", "--model", model, "--context", "64", "--windows", "2", "--head-dims"]
    assert main([*argv, "32", "--json"]) == 0
    plain, other = json.loads(capsys.readouterr().out)["rows"]
    assert (plain["objective"], plain["kld_more"]) == ("mse", 0) and plain["kld"] > 0.1
    assert other["magnitudes"] != plain["magnitudes"] and other["kld"] == pytest.approx(plain["kld"] + other["kld_more"])
    assert other["kld_more"] != 0
    assert main([*argv, "64"]) == 2 and "has head_dim 32; give --head-dims 32" in capsys.readouterr().err

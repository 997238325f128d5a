"""`tqai benchmark forward` as a user calls it, on a small random model."""

import json

import pytest
import small_model

pytest.importorskip("torch")
pytest.importorskip("transformers")
from tqai.cli import main

from tqai_plugins.core.activations import CONFIGS


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    folder = small_model.write(tmp_path_factory.mktemp("model"))
    return ["benchmark", "forward", "--model", str(folder), "--context", "384", "--windows", "1", "--tokens", "8"]


def test_all_configurations_side_by_side(argv, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "forward.json"
    assert main([*argv, "--all-configs", "--json", str(file), "--plot", str(tmp_path / "forward.png")]) == 0
    assert "it costs time and saves no memory" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "forward.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["baseline", *CONFIGS]
    assert rows["baseline"]["kld"] == 0 and rows["baseline"]["same_tokens"] == 1
    assert 0 < rows["kv-only"]["kld"] < rows["all6"]["kld"] < rows["aggressive"]["kld"]
    assert rows["aggressive"]["cache_bytes"] < rows["kv-only"]["cache_bytes"] < rows["baseline"]["cache_bytes"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--configs", "all9"), "--configs has 'all9'; known are kv-only, "),
        (("--tokens", "1"), "--tokens is 1; allowed are 2 and more"),
        (("--context", "5000"), "the text has "),
    ],
)
def test_refused(argv, options, sentence, capsys):
    assert main([*argv, *options]) == 2
    assert f"tqai: {sentence}" in capsys.readouterr().err

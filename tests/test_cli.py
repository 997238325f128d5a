"""The `tqai` command: what it prints, and how it refuses."""

import json
import subprocess
import sys

import pytest
from tqai.cli import build_parser, main


def output(capsys, *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("argv", [(), ("benchmark",), ("info",), ("benchmark", "forward"), ("benchmark", "needle"), ("recommend",)])
def test_help_of_every_command(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([*argv, "--help"])
    assert stop.value.code == 0 and "usage: tqai" in capsys.readouterr().out


def test_help_and_version_load_no_runtime():
    code = (
        "import sys; from tqai.cli import build_parser, main; build_parser(); assert main(['--version']) == 0\n"
        "print({'torch', 'triton', 'vllm', 'mlx', 'transformers', 'numpy', 'rich', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, modules = done.stdout.splitlines()
    assert version.startswith("tqai ") and modules == "set()"


def test_info_says_what_is_here_and_what_formats_cost(capsys):
    pytest.importorskip("rich")
    data = json.loads(output(capsys, "info", "--json"))
    assert data["formats"]["tqai_k4v2"] == {
        "bytes_per_token_and_head": 100, "bits_per_element": 3.125, "compression": 5.12
    }  # fmt: skip
    for plugin in data["plugins"].values():
        assert plugin["usable"] == (plugin["why_not"] is None)
    table = output(capsys, "info")
    assert "tqai_k4v2" in table and all(name in table for name in data["plugins"])


def test_benchmark_codec_reaches_its_aims_and_writes_what_it_is_asked_for(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot, out = tmp_path / "codec.png", tmp_path / "codec.json"
    table = output(capsys, "benchmark", "codec", "--json", str(out), "--plot", str(plot))
    rows = {row["bits"]: row for row in json.loads(out.read_text())["rows"]}
    for bits, aim in {2: 0.1146, 3: 0.0320, 4: 0.0081, 8: 0.0001}.items():
        assert rows[bits]["nmse"] <= aim and f"{rows[bits]['nmse']:.6f}" in table
        assert rows[bits]["shannon"] < rows[bits]["nmse"] < rows[bits]["with_qjl"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (("benchmark", "codec", "--head-dim", "5"), "head_dim is 5; allowed are the whole numbers 8 to 512"),
        (("benchmark", "codec", "--vectors", "0"), "--vectors is 0; allowed are 1 and more"),
        (("info", "--json", "/no/such/folder/x.json"), "No such file or directory: /no/such/folder/x.json"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(argv, sentence, capsys):
    assert main(list(argv)) == 2
    assert capsys.readouterr().err == f"tqai: {sentence}\n"


def test_the_module_runs_as_the_command():
    command = [sys.executable, "-m", "tqai", "info", "--head-dim", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("tqai: head_dim is 1") and "Traceback" not in done.stderr


def test_plots_are_drawn_from_the_results_of_this_project(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from tqai import results

    drawn = output(capsys, "benchmark", "plots", "--out", str(tmp_path)).split()
    assert {file.stem for file in tmp_path.iterdir()} == {path.rsplit("/")[-1][:-4] for path in drawn}
    assert {"quality_smollm2", "kernels_h100"} <= {file.stem for file in tmp_path.iterdir()} <= {
        file.stem for file in results.folder().glob("*.json")
    }  # fmt: skip
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())
    assert main(["benchmark", "plots", "/no/such/folder"]) == 2
    assert main(["benchmark", "plots", str(tmp_path)]) == 2
    assert "has no results: no file called codebooks_*.json" in capsys.readouterr().err

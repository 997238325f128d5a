"""`tqai doctor`: faults that are planted are found, named, and decide the exit code."""

import json
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")
import torch
from tqai import doctor
from tqai.cli import info, main

from tqai_plugins.torch_kernels import codec


def examined(capsys, *options: str) -> tuple[int, dict]:
    code = main(["doctor", "--json", *options])
    data = json.loads(capsys.readouterr().out)
    return code, {finding["check"]: finding for finding in data["findings"]}


def test_a_sound_machine(capsys, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    code, findings = examined(capsys)
    assert findings["codes on the CPU"]["level"] == findings["canary"]["level"] == "ok"
    assert code == any(finding["level"] == "stop" for finding in findings.values())
    assert all(finding["advice"] for finding in findings.values() if finding["level"] == "warning")


def test_report_for_an_issue(capsys):
    main(["doctor", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("`tqai doctor`, Python") and lines[2] == "| | check | found | advice |"
    assert any(line.startswith("| ok | canary |") for line in lines)
    main(["doctor"])
    assert "canary" in capsys.readouterr().out


def test_plugins_that_vllm_may_not_load(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    code, findings = examined(capsys)
    assert code == 1 and findings["VLLM_PLUGINS"]["level"] == "stop" and "unset" in findings["VLLM_PLUGINS"]["advice"]


@pytest.mark.parametrize("files, level", [(("other.py",), "warning"), (("matmul_ogs.py",), "ok")])
def test_another_package_called_triton_kernels(tmp_path, monkeypatch, files, level):
    package = tmp_path / "triton_kernels"
    package.mkdir()
    for name in ("__init__.py", *files):
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.name_clash()[0].level == level


def test_a_codec_that_writes_other_bytes(capsys, monkeypatch):
    right = codec.quantize

    def wrong(x, bits, **options):
        packed, scales = right(x, bits, **options)
        return packed ^ 1, scales

    monkeypatch.setattr(codec, "quantize", wrong)
    code, findings = examined(capsys)
    assert code == 1 and findings["codes on the CPU"]["level"] == "stop"


def test_a_cache_that_compresses_nothing(monkeypatch):
    from tqai import fidelity

    whole = fidelity.Cache
    monkeypatch.setattr(fidelity, "Cache", lambda config, **options: whole(config, residual_window=10_000))
    assert doctor.canary()[0].level == "stop"


def test_versions_outside_the_tested_range(capsys, monkeypatch):
    monkeypatch.setattr(info, "installed", lambda name: "99.0" if name == "transformers" else None)
    _, findings = examined(capsys)
    finding = findings["version of transformers"]
    assert finding["level"] == "warning" and "99.0" in finding["found"] and finding["advice"]


def test_an_unusable_runtime_stops(monkeypatch):
    plugins = {"vLLM": {"usable": False, "why_not": "vLLM 9.9 is not between 0.26 and 0.33"}}
    levels = {f.check: f.level for f in doctor.runtimes(plugins, {"vllm": {"version": "9.9", "note": ""}})}
    assert levels == {"plugin for vLLM": "stop", "runtimes": "stop"}
    absent = doctor.runtimes(plugins, {"vllm": {"version": None, "note": "not installed"}})
    assert absent[0].level == "ok"


def test_the_self_test_of_the_triton_kernels_sees_an_error(monkeypatch):
    """By Triton's interpreter; on a CUDA machine the same function runs what was compiled."""
    pytest.importorskip("triton")
    if torch.cuda.is_available() or sys.platform != "linux":
        pytest.skip("interpreter only where there is no GPU")
    from tqai_plugins.torch_kernels import paged

    assert doctor.triton_error(torch.device("cpu"), torch.float16, head_dim=64, length=70) < 5e-3
    right = paged.attention
    monkeypatch.setattr(paged, "attention", lambda *args: right(*args[:3], args[3] - 9, *args[4:]))
    assert doctor.triton_error(torch.device("cpu"), torch.float16, head_dim=64, length=70) > 5e-3

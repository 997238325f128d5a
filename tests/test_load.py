"""A short version of tests/load.py: many clients at once, some of which leave, and every answer right."""

import importlib.util

import follower_model
import load
import pytest

pytestmark = pytest.mark.slow


def check(found: dict, least: int) -> None:
    assert found["wrong answers"] == found["errors"] == 0
    assert found["requests"] >= least and found["left by their clients"] > 0


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM; it is not installed here")
def test_vllm(tmp_path):
    found = load.vllm(follower_model.write(tmp_path / "model"), "tqai", tmp_path / "log", load.Load(32, 40, 0.2))
    check(found, 20)
    assert found["blocks in use afterwards"] == found["canary"]["failures"] == 0 < found["canary"]["checks"]


@pytest.mark.mlx
@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="needs mlx-lm; it is not installed here")
def test_mlx(tmp_path):
    check(load.mlx(follower_model.write(tmp_path / "model"), "tqai", tmp_path / "log", load.Load(6, 30, 0.3)), 3)

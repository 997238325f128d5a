"""`ruff check` and `mypy`, as pyproject.toml says, find nothing."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize("command", [["ruff", "check", "--output-format", "concise"], ["mypy"]], ids=lambda c: c[0])
def test_it_finds_nothing(command):
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}, which pip install '.[test]' brings")
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

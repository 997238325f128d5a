"""`ruff check`, with the rules of pyproject.toml, finds nothing."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(not shutil.which("ruff"), reason="needs ruff, which pip install '.[test]' brings")
def test_ruff_finds_nothing():
    done = subprocess.run(
        ["ruff", "check", "--output-format", "concise"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

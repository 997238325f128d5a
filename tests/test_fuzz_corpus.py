"""What fuzzing kept (tests/fuzz): each input again, without atheris."""

import importlib.util
from pathlib import Path

import pytest

from tqai_plugins.core import codebook

FUZZ = Path(__file__).parent / "fuzz"
spec = importlib.util.spec_from_file_location("fuzz_parsers", FUZZ / "parsers.py")
parsers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parsers)


@pytest.mark.parametrize("target", parsers.TARGETS)
def test_every_input_is_taken_or_refused(target, monkeypatch):
    monkeypatch.setattr(codebook, "_in_use", {})
    inputs = sorted((FUZZ / "corpus" / target).iterdir())
    taken = [parsers.once(target, file.read_bytes()) for file in inputs]
    assert len(taken) > 5 and (target == "words" or {True, False} == set(taken))

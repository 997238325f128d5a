"""Where models come from, and the one sentence for each way in which there is none."""

import hashlib
import shutil
from dataclasses import replace

import pytest
import small_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tqai import models
from tqai.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model.write(tmp_path_factory.mktemp("model"))


def test_a_folder_is_loaded_in_bfloat16_unless_told_otherwise(folder):
    model, tokenizer = models.load(str(folder))
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer("Bees.").input_ids) == "Bees."
    assert models.load(str(folder), torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("no/such/folder", None, "there is no model"),
        ("nothing.gguf", None, "there is no file"),
        ("page.gguf", b"<html>", "is not a GGUF file"),
        ("cut.gguf", b"GGUF\x03\0\0\0", "cannot be read, it is damaged"),
        ("notes.txt", b"x", "is a file, but no GGUF file"),
    ],
)
def test_what_is_no_model_is_one_sentence_and_exit_code_2(name, content, sentence, tmp_path, capsys):
    if content:
        (tmp_path / name).write_bytes(content)
    assert main(["run", "Hello", "--model", str(tmp_path / name)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert sentence in lines[-1] and lines[-1].startswith("tqai: ") and "Traceback" not in "".join(lines)


def test_a_folder_without_or_with_a_broken_config(tmp_path, folder):
    with pytest.raises(ValueError, match="has no config.json"):
        models.load(str(tmp_path))
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read, it is damaged"):
        models.load(str(broken))


def test_a_model_of_the_hub_that_cannot_be_reached():
    with pytest.raises(OSError, match="not in the Hugging Face cache and could not be downloaded"):
        models.load("nobody-at-all/no-such-model")


def test_too_little_disk_and_a_damaged_file_of_the_demo_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    demo = models.PACKAGED["demo"]
    with pytest.raises(OSError, match="SmolLM2-135M-Instruct needs .* MB free; make room"):
        models.packaged_folder(replace(demo, disk=10**18))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    monkeypatch.setattr(models, "_installed_parts", lambda model: [bad])
    with pytest.raises(ValueError, match="is damaged or another version: its sha256 is"):
        models.packaged_folder(demo)
    assert list((tmp_path / "tqai").iterdir()) == []


def test_a_file_in_parts_is_joined_in_order(tmp_path, monkeypatch):
    halves = [b"GGUF, first half", b", second half"]
    for name, content in zip(("half_a", "half_b"), halves):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "model.part").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read = []

    def convert(gguf, folder):
        read.append(gguf.read_bytes())
        folder.mkdir()

    monkeypatch.setattr(models, "convert_gguf", convert)
    sha256 = hashlib.sha256(b"".join(halves)).hexdigest()
    model = models.Packaged("halves", {"half-a": "half_a/model.part", "half-b": "half_b/model.part"}, sha256, 1, 1)
    assert models.packaged_folder(model) == tmp_path / "tqai" / f"halves-{sha256[:8]}"
    assert read == [b"".join(halves)]
    assert not models._installed_parts(replace(model, parts={"half-a": "half_a/model.part", "half-c": "half_c/model.part"}))

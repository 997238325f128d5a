"""Converted folders: what is written is what every runtime reads, and what was changed is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import tqai
from tqai import conversion, models
from tqai.cli import main

from tqai_plugins.core import converted_folder, key_mean_file

PROMPT = "The lighthouse was built by a woman who had never seen the sea. " * 3


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return small_model.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original, tmp_path):
    conversion.convert(str(original), tmp_path / "converted", "tqai_k4v3")
    return tmp_path / "converted"


def run(capsys, model, *options: str) -> dict:
    assert main(["run", PROMPT, "--model", str(model), "--max-tokens", "8", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_says_what_it_wrote_and_saved(original, tmp_path, capsys):
    pytest.importorskip("rich")
    argv = ["convert", "--model", str(original), "--output", str(tmp_path / "c"), "--format", "tqai_k8v4"]
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "tqai_k8v4" and data["seconds_after"] > 0 and data["seconds_before"] > 0
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tqai.json"} <= {p.name for p in (tmp_path / "c").iterdir()}
    assert main(argv) == 2 and "is there already" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"], "nothing is left beside it"


def test_ropes_entries_have_their_older_names_too(tmp_path):
    """mlx-lm's llama reads only those; transformers reads the same from both."""
    from transformers import AutoConfig, LlamaConfig

    scaled = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }  # fmt: skip
    LlamaConfig(rope_parameters=dict(scaled)).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    models.write_config(tmp_path, {})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 5e5 and written["rope_scaling"]["factor"] == 8.0 and "rope_theta" not in written["rope_scaling"]
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before


def test_run_and_patch_take_its_format_unless_told_otherwise(folder, original, capsys):
    converted, plain = run(capsys, folder), run(capsys, original, "--bits-k", "4", "--bits-v", "3")
    assert "bits_k=4, bits_v=3" in converted["cache"] and converted["text"] == plain["text"]
    assert "bits_k=8, bits_v=8" in run(capsys, folder, "--config", "tqai_k8v8")["cache"]
    model, _ = models.load(str(folder))
    assert (tqai.patch(model).options.bits_k, tqai.patch(model).options.bits_v) == (4, 3)
    assert tqai.patch(model, bits_v=2).options.bits_v == 2


def test_key_means_are_those_of_the_keys_before_rope(original, tmp_path, capsys):
    from tqai_plugins.core.texts import PROSE

    assert main(["convert", "--model", str(original), "--output", str(tmp_path / "c"), "--key-means", "--no-timing", "--dtype", "float32"]) == 0
    capsys.readouterr()
    model, tokenizer = models.load(str(tmp_path / "c"), torch.float32)  # its sum is checked too
    seen = []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    model(tokenizer(PROSE, return_tensors="pt").input_ids[:, :512])
    layers = key_mean_file.read(tmp_path / "c")
    queries, keys = sorted((x[0] for x in seen), key=lambda x: -x.shape[-1])
    assert sorted(layers) == [0, 1] and layers[1].means.shape == (1, 32)
    torch.testing.assert_close(torch.tensor(layers[1].means[0]).float(), keys[4:].mean(0), rtol=1e-3, atol=1e-4)
    # Two query heads of 32 coordinates, and scores are divided by the root of 32.
    assert layers[1].query_energy[0] == pytest.approx(queries.square().sum(-1).mean().item() / 2 / 32**2, rel=1e-3)
    # Of both coordinates of each pair that RoPE turns; it leaves them as they are.
    squares = [x.square().mean(0).view(-1, 2, 16).sum(1).mean(0) for x in (queries, keys[4:])]
    torch.testing.assert_close(torch.from_numpy(layers[1].squares).float(), torch.stack(squares), rtol=1e-3, atol=1e-5)


def test_patch_takes_the_folders_key_means_unless_told_otherwise(original, tmp_path):
    conversion.convert(str(original), tmp_path / "c", "tqai_k3v4", key_means=True)
    model, _ = models.load(str(tmp_path / "c"))
    cache = tqai.patch(model)
    held = key_mean_file.read(tmp_path / "c")
    assert sorted(cache.options.key_means) == [0, 1] and (cache.options.key_means[1].measured.means == held[1].means).all()
    assert tqai.patch(model, key_means=None).options.key_means is None
    conversion.convert(str(original), tmp_path / "without", "tqai_k3v4")
    assert tqai.patch(models.load(str(tmp_path / "without"))[0]).options.key_means is None
    (tmp_path / "c" / key_mean_file.NAME).write_text("{}")
    with pytest.raises(ValueError, match="key_means.json is damaged"):
        tqai.patch(model)


def test_damaged_key_means_are_refused(tmp_path):
    assert key_mean_file.read(tmp_path) is None
    for text in ("[]", "{}", '{"version": 2, "layers": {}}', '{"version": 1, "layers": []}', '{"version": 1, "layers": {"0": [1]}}',
                 '{"version": 1, "layers": {"0": {"means": [[NaN, 1]], "query_energy": [1], "squares": [[1], [1]]}}}',
                 '{"version": 1, "layers": {"0": {"means": [[1, 1]], "query_energy": [1, 2], "squares": [[1], [1]]}}}',
                 '{"version": 1, "layers": {"0": {"means": [[1, 1]], "query_energy": [1], "squares": [[1]]}}}',
                 '{"version": 1, "layers": {"0": {"means": [[1, 1]], "query_energy": [1]}}}',
                 '{"version": 1, "layers": {"x": {"means": [[1, 1]], "query_energy": [1], "squares": [[1], [1]]}}}'):  # fmt: skip
        (tmp_path / key_mean_file.NAME).write_text(text)
        with pytest.raises(ValueError, match="key_means.json is damaged: .*; convert the model again"):
            key_mean_file.read(tmp_path)


def test_refused_before_anything_is_written(original, tmp_path, capsys):
    for options, sentence in (
        (("--format", "tqai_k9v2"), "unknown KV cache format"),
        (("--model", str(tmp_path / "none")), "there is no model"),
        (("--output", str(original)), "is the model itself"),
    ):
        argv = ["convert", "--model", str(original), "--output", str(tmp_path / "c"), "--no-timing", *options]
        assert main(argv) == 2 and sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replace_by_link(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


DAMAGE = {
    "a truncated file": (lambda f: os.truncate(f / "model.safetensors", 1000), "has 1000 bytes instead of"),
    "one bit of a weight": (lambda f: flip(f / "model.safetensors", -1), "SHA-256 sum differs"),
    "one bit of the tokenizer": (lambda f: flip(f / "tokenizer.json", 100), "SHA-256 sum differs"),
    "an edited config": (lambda f: edit(f / "config.json", lambda d: d.update(rms_norm_eps=1)), "config.json"),
    "a missing file": (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "a link": (replace_by_link, "not a plain file"),
    "a newer folder": (lambda f: edit(f / "tqai.json", lambda d: d.update(version=2)), "version 2, this tqai reads 1; update"),
    "a path that leads out": (
        lambda f: edit(f / "tqai.json", lambda d: d["files"].update({"../x": {"bytes": 1, "sha256": ""}})), "not a plain file",
    ),
    "no list": (lambda f: edit(f / "tqai.json", lambda d: d.update(files=[])), "damaged"),
    "an empty list": (lambda f: edit(f / "tqai.json", lambda d: d.update(files={})), "damaged"),
    "no JSON": (lambda f: (f / "tqai.json").write_text("{"), "damaged"),
    "a deep JSON": (lambda f: (f / "tqai.json").write_text("[" * 100_000), "damaged"),
    "a huge manifest": (lambda f: (f / "tqai.json").write_text(" " * (2 << 20)), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_changed_folder_is_refused_with_one_sentence(folder, what, capsys):
    damage, sentence = DAMAGE[what]
    damage(folder)
    assert main(["run", "Hello", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    with pytest.raises(ValueError):
        converted_folder.verify(folder)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"version": 9}, "its version is 9, this tqai reads 1; update tqai"), ({"format_version": 7}, "its format_version is 7"),
        ({"format": "tqai_k4v9"}, "unknown KV cache format"), ({"format": "tqai_k3v2"}, "its codebooks are not those of"),
        ({"rotation": {"kind": "haar", "seed": 1}}, "another rotation"), ({"codebooks": []}, "not made by"),
        ({"codebooks": [{}]}, "other keys"), ({"codebooks": None}, "not made by"),
    ],
)  # fmt: skip
def test_an_entry_that_this_version_does_not_know(folder, change, sentence):
    entry = json.loads((folder / "config.json").read_text())["tqai"]
    assert converted_folder.format_of(entry) == "tqai_k4v3"
    with pytest.raises(ValueError, match=sentence):
        converted_folder.format_of(entry | change)
    with pytest.raises(ValueError, match="is a list"):
        converted_folder.format_of([])


def convert_with_a_crowded_codebook(model: Path, head_dim: int, folder: Path) -> None:
    """In a process of its own, since it keeps its codebook."""
    from tqai_plugins.core.codebook import Codebook, shipped

    numbers = tuple(m + 0.5 for m in (3, 9, 20, 30, 50, 70, 90, 120))
    book = folder.with_suffix(".json")
    Codebook(head_dim, 4, numbers, shipped(head_dim, 4).unit, "crowded").write(book, {})
    code = "import sys; from tqai.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "convert", "--model", model, "--output", folder, "--format", "tqai_k4v4"]
    environment = os.environ | {"TQAI_CODEBOOK": str(book)}
    subprocess.run([*map(str, command), "--no-timing", "--json"], check=True, env=environment, capture_output=True)


def test_a_folder_brings_its_codebook(original, tmp_path):
    """A process that knows nothing of it decodes with it."""
    convert_with_a_crowded_codebook(original, 32, tmp_path / "c")
    look = (
        "import sys, tqai; from tqai import models; from tqai_plugins.core.codebook import Codebook\n"
        "tqai.patch(models.load(sys.argv[1])[0]); print(Codebook.lloyd_max(32, 4).name)"
    )
    done = subprocess.run([sys.executable, "-c", look, str(tmp_path / "c")], check=True, capture_output=True, text=True)
    assert done.stdout == "crowded\n"


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_takes_its_format_from_the_folder(tmp_path):
    """The real server with --kv-cache-dtype left at auto."""
    pytest.importorskip("vllm")
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = small_model.write(tmp_path / "source")
    config = LlamaConfig(
        vocab_size=257, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(source)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    convert_with_a_crowded_codebook(tmp_path / "plain", 64, tmp_path / "converted")
    log = tmp_path / "log"
    command = [
        Path(sys.executable).with_name("vllm"), "serve", tmp_path / "converted", "--enforce-eager",
        "--kv-cache-memory-bytes", 8 << 20, "--max-model-len", 512, "--port", 0,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2"}
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while "KV cache size" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "was converted for tqai_k4v4" in log.read_text()
    assert "tqai: KV cache tqai_k4v4" in log.read_text()
    assert re.search(r"Worker.* tqai: codebooks of the converted folder: crowded", log.read_text())

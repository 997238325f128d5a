"""Presets and codebook files in the real vLLM: layers of several formats in one server, and what is refused at the start."""

import json
import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")

from tqai import models
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm_server import serve

from tqai_plugins.core import codebook_solvers
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.core.preset import Preset

load_general_plugins()
LAYERS, KV_HEADS, HEAD_DIM, BLOCK, BLOCKS = 30, 3, 64, 64, 40  # of SmolLM2
FORMATS = tuple((layer, "tqai_k8v4" if layer % 3 else "tqai_k8v8") for layer in range(LAYERS))
COUNT = f"Count: {', '.join(map(str, range(1, 60)))},"  # some 180 tokens


@pytest.fixture(scope="module")
def smol() -> str:
    return str(models.packaged_folder(models.PACKAGED["demo"]))


@pytest.fixture
def preset(tmp_path) -> Path:
    Preset("SmolLM2", LAYERS, HEAD_DIM, FORMATS).write(tmp_path / "preset.json", {})
    return tmp_path / "preset.json"


@pytest.fixture
def codebook(tmp_path) -> Path:
    codebook_solvers.solve(HEAD_DIM, 4, "fuzzy").write(tmp_path / "book.json", {})
    return tmp_path / "book.json"


def test_a_server_gives_each_layer_its_format_and_reads_the_codebook(smol, preset, codebook, tmp_path):
    token_bytes = sum(KV_HEADS * KVFormat.from_name(name, HEAD_DIM).slot_bytes for _, name in FORMATS)
    additional = {"tqai": {"preset": str(preset), "codebook": str(codebook), "recent_memory": 0}}
    options = [
        "--kv-cache-dtype", "tqai_k2v2", "--dtype", "float32", "--block-size", BLOCK, "--max-model-len", 1024,
        "--kv-cache-memory-bytes", BLOCKS * BLOCK * token_bytes, "--additional-config", json.dumps(additional),
    ]  # fmt: skip
    with serve(smol, tmp_path / "log", *options) as server:
        assert "tqai: KV cache of several formats, 20 layers tqai_k8v4, 10 layers tqai_k8v8: 30 layers of full attention" in server.log
        assert "tqai: codebook fuzzy-mse-64-4-" in server.log
        assert server.tokens == BLOCKS * BLOCK, "pages have the bytes of their layers' formats, without padding"
        assert server.metric("tqai_token_bytes") == token_bytes
        assert server.metric("tqai_cache_info", format="several") == 1
        # With the run's own 2 bits and without key means this model counts no further than a few numbers.
        assert server.complete(COUNT, 24).startswith(" 60, 61, 62, 63, 64, 65")
        assert server.complete(COUNT, 24).startswith(" 60, 61, 62, 63, 64, 65"), "from the prefix cache"
    options[-1] = json.dumps({"tqai": {"recent_memory": 0, "key_mean": False}})
    with serve(smol, tmp_path / "plain", *options) as server:
        assert not server.complete(COUNT, 24).startswith(" 60, 61, 62, 63, 64, 65")


def started(smol: str, options: dict, **arguments):
    arguments = {"kv_cache_dtype": "tqai", "enforce_eager": True, "additional_config": {"tqai": options}} | arguments
    return EngineArgs(model=smol, **arguments).create_engine_config()


def test_what_is_refused_before_weights_are_loaded(smol, preset, codebook, tmp_path):
    other, odd, few = (tmp_path / name for name in ("other.json", "odd.json", "few.json"))
    Preset("another", 12, HEAD_DIM, ((0, "tqai"),)).write(other, {})
    Preset("SmolLM2", LAYERS, HEAD_DIM, tuple((i, "tqai_k5v5") for i in range(LAYERS))).write(odd, {})
    Preset("SmolLM2", LAYERS, HEAD_DIM, ((0, "tqai"), (1, "tqai_k8v8"))).write(few, {})
    os.symlink(preset, tmp_path / "link.json")
    assert started(smol, {"preset": str(tmp_path / "link.json")}).additional_config
    for options, sentence in (
        ({"preset": "/no/such/file"}, "option preset is '/no/such/file'; expected a file of `tqai recommend`"),
        ({"preset": 3}, "option preset is 3; expected"),
        ({"preset": str(codebook)}, "is no preset of `tqai recommend`"),
        ({"preset": str(other)}, "the preset is for another with 12 layers"),
        ({"preset": str(odd)}, "gives layer 0 the format tqai_k5v5, which vLLM cannot serve; allowed are tqai, "),
        ({"preset": str(few)}, "cannot serve a preset together with layers of several kinds"),
        ({"codebook": str(preset)}, "is no codebook file of tqai"),
        ({"codebook": 7}, "option codebook is 7; expected a file of `tqai codebook build`"),
        ({"presets": str(preset)}, "tqai options .'presets'.; allowed are recent_memory, key_mean, preset, codebook"),
        ([], "tqai options .*; expected names and values in braces"),
    ):
        with pytest.raises(ValueError, match=sentence):
            started(smol, options)
    with pytest.raises(ValueError, match="is for head_dim 64 at 4 bits, but this cache has head_dim 64 with 3 bits"):
        started(smol, {"codebook": str(codebook)}, kv_cache_dtype="tqai_k3v3")

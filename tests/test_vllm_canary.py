"""The canary of the vLLM plugin: silent while all is well, and loud when a page, a copy or attention is wrong."""

import json
import os
import random
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")

import follower_model
from vllm_server import CUDA, ENV, serve

# On a GPU it looks at steps that read prompts, and roundings are those of bfloat16.
OPTIONS = [
    "--kv-cache-memory-bytes", 40 * 64 * 400, "--max-model-len", 512, "--max-num-seqs", 4, "--block-size", 64,
    "--dtype", "bfloat16" if CUDA else "float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return follower_model.write(tmp_path_factory.mktemp("follower"))


@pytest.mark.parametrize("name", ["tqai", "tqai_k8v8"])
def test_it_counts_checks_and_finds_nothing_in_a_server(model, tmp_path, name):
    """Prompts in chunks, decoding, 8-bit copies and key means; every step of both layers is checked."""
    more = {"tqai": {"canary": 1, "recent_memory": 0.5}}
    options = [*OPTIONS, "--kv-cache-dtype", name, "--max-num-batched-tokens", 128, "--additional-config", json.dumps(more)]
    with serve(model, tmp_path / "log", *options) as server:
        checks = lambda what: server.metric("tqai_canary_checks_total", what=what)
        before = {
            what: checks(what) for what in ("keys", "values", "attention")
        }  # CUDA tries a step at the start
        for length in (20, 150, 400):
            prompt = follower_model.draw(random.Random(length), length)
            said = server.complete(prompt, 16, extra_body={"ignore_eos": True})
            assert said.split() == follower_model.text(follower_model.answer(prompt, 16)).split()
        steps = 1 + 2 + 4 + (0 if CUDA else 3 * 15)
        for what in before:
            assert checks(what) - before[what] == follower_model.LAYERS * steps
            assert server.metric("tqai_canary_failures_total", what=what) == 0
        assert server.metric("tqai_canary_error", what="attention") < (1e-3 if CUDA else 1e-8)
        assert (1e-3 < server.metric("tqai_canary_error", what="values") < 0.5) is (name == "tqai")
        assert "canary" not in re.sub(r"non-default args.*|.*additional_config.*", "", server.log)


# In a process of its own: what an engine leaves behind in a process is not to be another's.
DAMAGED = """
import sys
import torch
from vllm import LLM, SamplingParams
from tqai_plugins.torch_kernels import paged
from tqai_plugins.vllm_plugin import cpu_backend, metrics

def flip(x):
    x.bitwise_xor_(torch.randint(0, 256, x.shape, dtype=torch.uint8))

what, model, prompt = sys.argv[1], sys.argv[2], list(map(int, sys.argv[3].split(",")))
stored, attend = cpu_backend.Impl.do_kv_cache_update, paged.attention

def store(self, layer, key, value, kv_cache, slots):
    stored(self, layer, key, value, kv_cache, slots)
    flip(kv_cache[int(slots[0]) // kv_cache.shape[2]])

def attention(query, pages, table, length, *args, **more):
    return attend(query, pages, table.flip(0) if len(query) == 1 else table, length, *args, **more)

if what == "page":
    cpu_backend.Impl.do_kv_cache_update = store
if what == "table":
    paged.attention = attention
llm = LLM(
    model, kv_cache_dtype="tqai", enforce_eager=True, max_model_len=512, max_num_seqs=2, kv_cache_memory_bytes=40 * 64 * 400, block_size=64,
    dtype="float32", enable_prefix_caching=False, additional_config={"tqai": {"canary": 1, "recent_memory": 0}},
)
llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
print("counted:", sorted({dict(at[1:])["what"] for at, n in metrics._of_process(None).values.items() if at[0] == "tqai_canary_failures" and n}))
"""


@pytest.mark.skipif(CUDA, reason="damages the backend of the CPU build")
@pytest.mark.parametrize("what, found", [("nothing", []), ("page", ["keys", "values"]), ("table", ["attention"])])
def test_damage_is_found_logged_once_and_counted(model, what, found):
    """Bytes of a page that change after they were stored, and a step that reads other pages than the request's."""
    prompt = ",".join(map(str, follower_model.draw(random.Random(0), 200)))
    environment = os.environ | ENV | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run([sys.executable, "-c", DAMAGED, what, str(model), prompt], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.findall(r"the canary found (\w+) with a relative squared error of .*, in layer \S+, format tqai_k4v2", done.stdout + done.stderr)
    counted = re.findall(r"'(\w+)'", done.stdout.split("counted: ")[1])
    assert sorted(said) == sorted(counted) and set(found) <= set(said) and bool(found) == bool(said)

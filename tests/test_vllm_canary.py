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

# On a GPU roundings are those of bfloat16.
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
        steps = range(7 + 3 * 14, 7 + 3 * 16) if CUDA else [7 + 3 * 15]  # a GPU checks decoding at the next step, if there is one
        for what in before:
            assert checks(what) - before[what] in [follower_model.LAYERS * n for n in steps]
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


def test_what_a_replayed_step_left_is_checked_before_the_next(monkeypatch):
    """The parts that CUDA graphs need, without one: a row of two layers, then the same with another table, a byte of a page, a wrong output."""
    from types import SimpleNamespace

    from tqai_plugins.core.kv_format import KVFormat
    from tqai_plugins.torch_kernels import paged
    from tqai_plugins.vllm_plugin import canary, decode_canary

    found = {}
    monkeypatch.setattr(canary.metrics, "count_canary", lambda _, what, checks, failed, worst: found.setdefault(what, []).append(failed))
    config = SimpleNamespace(
        additional_config={"tqai": {"canary": 1}}, speculative_config=None, kv_transfer_config=None,
        model_config=SimpleNamespace(dtype=torch.float32),
    )  # fmt: skip
    fmt, page_tokens, length = KVFormat(4, 2, 64), 16, 37
    new = lambda: SimpleNamespace(
        num_heads=4, num_kv_heads=2, head_size=64, fmt=fmt, key_mean=None, recent_pages=None, window=None, scale=0.125, soft_cap=None,
        sinks=None, config=config, left=None,
    )  # fmt: skip
    layers = {"first": new(), "second": new()}
    for impl in layers.values():
        impl.owner = impl
    looking = decode_canary.DecodeCanary(config, layers, page_tokens, torch.device("cpu"))
    table = torch.tensor([[5, 1, 3], [0, 2, 4]])
    slots = torch.stack([row[torch.arange(length) // page_tokens] * page_tokens + torch.arange(length) % page_tokens for row in table])
    pages, vectors = {}, {}
    for name in layers:
        pages[name] = torch.zeros(6, 2, page_tokens * fmt.slot_bytes, dtype=torch.uint8)
        key, value = torch.randn(2, 2, length, 2, 64)
        for i in range(2):
            paged.store(key[i], value[i], pages[name], slots[i], fmt, page_tokens)
        query = torch.randn(2, 4, 64)
        out = torch.stack([paged.attention(query[i : i + 1], pages[name], table[i], length, fmt, page_tokens, 0.125)[0] for i in range(2)])
        vectors[name] = query, key[:, -1], value[:, -1], out
    meta = SimpleNamespace(
        num_decodes=2, query_len=1, seq_lens=torch.tensor([length] * 2), block_table=table, slot_mapping=slots[:, -1],
        positions=torch.tensor([length - 1] * 2), recent=None,
    )  # fmt: skip

    def step(damage=lambda: None) -> dict:
        found.clear()
        looking.plan(meta)
        for name, impl in layers.items():
            impl.left.take(*vectors[name], pages[name])
        damage()
        looking.look()
        return {what: sum(failures) for what, failures in found.items() if len(failures) == 2}

    fine = {"keys": 0, "values": 0, "attention": 0}
    for _ in range(8):  # either request
        assert step() == fine
    found.clear()
    looking.look()
    assert not found, "no step was planned"
    assert step(lambda: [impl.left.vectors[3].neg_() for impl in layers.values()]) == fine | {"attention": 2}
    assert step(lambda: pages["first"].bitwise_xor_(255))["keys"] == 1

"""What goes wrong around a server: killed processes, clients that leave, requests at every limit. Nobody hangs, nothing stays in use.

On vLLM's CPU build with the model of follower_model.py, whose every answer is known.
"""

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")
openai = pytest.importorskip("openai")

import follower_model
from vllm_server import serve

from tqai_plugins.core.kv_format import KVFormat

BLOCK, LIMIT = 64, 256
TOKEN_BYTES = follower_model.LAYERS * follower_model.KV_HEADS * KVFormat.from_name("tqai", follower_model.HEAD_DIM).slot_bytes
OPTIONS = [
    "--kv-cache-dtype", "tqai", "--dtype", "float32", "--block-size", BLOCK, "--max-model-len", LIMIT, "--max-num-seqs", 8,
    "--max-num-batched-tokens", 128,
]  # fmt: skip
BLOCKS = ["--kv-cache-memory-bytes", 40 * BLOCK * TOKEN_BYTES]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return follower_model.write(tmp_path_factory.mktemp("follower"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("server") / "log", *OPTIONS, *BLOCKS) as server:
        yield server


def ask(server, prompt: list[int], count: int, **more):
    return server.client.completions.create(
        model="m", prompt=prompt, max_tokens=count, temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True}, **more
    )


def check(server, seed: int, length: int = 40, count: int = 8) -> None:
    """A request of its own, whose answer has to be the known one."""
    prompt = follower_model.draw(random.Random(seed), length)
    assert list(ask(server, prompt, count).choices[0].token_ids) == follower_model.answer(prompt, count)


def eventually(found, seconds: float = 60) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def keep_asking(server, seed: int) -> None:
    """Until the server is gone: on a busy machine the first of several clients may be done before the last has begun."""
    while True:
        check(server, seed, 40, 200)


def idle(server) -> bool:
    return not any(server.metric(f"vllm:{name}") for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_a_hundred_clients_that_leave(server):
    """In every state of a request: while it waits, while its prompt is read, after some tokens."""

    def leave(i: int) -> None:
        prompt = follower_model.draw(random.Random(i), 30 + i)
        with ask(server, prompt, 100, stream=True, timeout=60) as stream:
            for _, event in zip(range(i % 4), stream):
                assert event.choices[0].token_ids == follower_model.answer(prompt, 100)[: len(event.choices[0].token_ids)] or i % 4 > 1

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(100)))
    eventually(lambda: idle(server))
    for seed in range(3):
        check(server, seed)


@pytest.mark.parametrize("length", [LIMIT - 1, LIMIT - 9, BLOCK, BLOCK + 1, BLOCK - 1])
def test_a_request_up_to_the_context_limit(server, length):
    prompt = follower_model.draw(random.Random(length), length)
    choice = ask(server, prompt, LIMIT - length).choices[0]
    assert list(choice.token_ids) == follower_model.answer(prompt, LIMIT - length) and choice.finish_reason == "length"


@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1, 10 * LIMIT])
def test_a_prompt_beyond_the_context_limit_is_refused(server, length):
    """And more tokens than fit behind a prompt are cut to those that do."""
    prompt = [2 * (i % follower_model.WORDS) for i in range(length)]
    with pytest.raises(openai.BadRequestError, match="maximum context length|max_tokens must be at least 1, got 0"):
        ask(server, prompt, 1)
    prompt = follower_model.draw(random.Random(1), LIMIT - 9)
    assert list(ask(server, prompt, 10).choices[0].token_ids) == follower_model.answer(prompt, 9)


def test_two_thousand_requests_leave_nothing_behind(server):
    """Allocators and caches of kernels by shape settle, as with the stock cache (examples/results/load_cpu.json)."""
    held = []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for seeds in (range(start, start + 500) for start in range(0, 2000, 500)):
            list(pool.map(lambda seed: check(server, seed, 4 + seed % 60, 2), seeds))
            held.append(server.megabytes())
    eventually(lambda: idle(server))
    print(f"megabytes of the worker after each 500 requests: {held}")
    assert held[3] - held[2] < 12


def test_layers_of_different_head_dimensions(tmp_path):
    """A small Gemma 4: sliding windows of head_dim 64, full attention of 128."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "vocab_size": 320, "hidden_size": 256,
        "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "global_head_dim": 128, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 0, "max_position_embeddings": 1024, "torch_dtype": "bfloat16",
    }))  # fmt: skip
    options = ["--load-format", "dummy", "--skip-tokenizer-init", "--kv-cache-memory-bytes", 8 << 20, *OPTIONS]
    with serve(tmp_path, tmp_path / "log", *options) as server:
        assert "2 layers of sliding window of 64, 2 layers of full attention; 608 bytes a token in all layers" in server.log
        answers = [list(ask(server, list(range(200)), 9).choices[0].token_ids) for _ in range(2)]
        assert answers[0] == answers[1] and len(answers[0]) == 9


def test_the_smallest_cache_serves_the_longest_request_and_a_smaller_one_is_refused(model, tmp_path):
    """vLLM keeps one block for itself."""
    smallest = (LIMIT // BLOCK + 1) * BLOCK * TOKEN_BYTES
    with pytest.raises(AssertionError):
        with serve(model, tmp_path / "refused", *OPTIONS, "--kv-cache-memory-bytes", smallest - BLOCK * TOKEN_BYTES):
            pass
    assert "larger than the available KV cache memory" in (tmp_path / "refused").read_text()
    with serve(model, tmp_path / "log", *OPTIONS, "--kv-cache-memory-bytes", smallest) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: check(server, seed, LIMIT - 20, 20), range(4)))
        assert idle(server)


def test_kill_9_in_the_middle_of_requests_and_a_new_start(model, tmp_path):
    """Clients get an error at once, and the next server answers as if nothing had been. (vLLM's engine outlives a server that
    is killed alone: serve() kills the group, as a container does.)"""
    with concurrent.futures.ThreadPoolExecutor(4) as pool, serve(model, tmp_path / "log", *OPTIONS, *BLOCKS) as server:
        running = [pool.submit(keep_asking, server, seed) for seed in range(4)]
        eventually(lambda: server.metric("vllm:num_requests_running") == 4)
        os.kill(server.pid, signal.SIGKILL)
        for future in running:
            with pytest.raises(openai.APIConnectionError):
                future.result(timeout=30)
    with serve(model, tmp_path / "again", *OPTIONS, *BLOCKS) as server:
        check(server, 0)


@pytest.mark.parametrize("name", ["EngineCore", "Worker"])
def test_a_process_that_dies_is_an_error_for_clients_and_ends_the_server(model, tmp_path, name):
    with concurrent.futures.ThreadPoolExecutor(4) as pool, serve(model, tmp_path / "log", *OPTIONS, *BLOCKS) as server:
        running = [pool.submit(keep_asking, server, seed) for seed in range(4)]
        eventually(lambda: server.metric("vllm:num_requests_running") == 4)
        os.kill(server.process(name), signal.SIGKILL)
        for future in running:
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                future.result(timeout=60)
        eventually(lambda: not alive(server.pid))

"""The real `vllm serve --kv-cache-dtype tqai` on vLLM's CPU build: SmolLM2 as a folder, and small random models."""

import concurrent.futures
import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")
pytest.importorskip("openai")

from tqai import models
from vllm_server import serve

from tqai_plugins.core.kv_format import KVFormat

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 30, 3, 64, 64  # of SmolLM2, and tokens of a page
TOKEN_BYTES = LAYERS * KV_HEADS * KVFormat.from_name("tqai", HEAD_DIM).slot_bytes
BLOCKS = 420  # of the server that most tests ask: half of them hold four copies for each of 16 sequences
OPTIONS = ["--kv-cache-dtype", "tqai", "--dtype", "float32", "--block-size", BLOCK, "--max-num-batched-tokens", 256]
# What the model continues without a doubt, so that rounding in batches of another size does not change its choice.
COUNTS = [f"Count: {', '.join(str(n) for n in range(first, first + 6))}," for first in range(1, 33, 2)]


@pytest.fixture(scope="session")
def smol() -> str:
    return str(models.packaged_folder(models.PACKAGED["demo"]))


@pytest.fixture(scope="session")
def server(smol, tmp_path_factory):
    options = [
        "--kv-cache-memory-bytes", BLOCKS * BLOCK * TOKEN_BYTES, "--max-model-len", 1024, "--max-num-seqs", 16,
        "--additional-config", json.dumps({"tqai": {"recent_memory": 0.5}}), "--max-logprobs", 256,
        "--logits-processors", "tqai_plugins.vllm_plugin.forced_tokens:ForcedTokens",
    ]  # fmt: skip
    with serve(smol, tmp_path_factory.mktemp("server") / "log", *OPTIONS, *options) as server:
        yield server


@pytest.fixture(scope="session")
def alone(server):
    """Answers of the server with nothing else to do."""
    return [server.complete(prompt, 16) for prompt in COUNTS]


def test_three_tensor_parallel_ranks_answer_as_one(smol, tmp_path):
    """One KV head a rank; the ranks must agree on the pairs of the key mean."""
    answers = {}
    for ranks in (1, 3):
        options = ["--kv-cache-dtype", "tqai_k3v3", *OPTIONS[2:], "--max-model-len", 512, "--max-num-seqs", 4]
        memory = ["--kv-cache-memory-bytes", 100 * BLOCK * TOKEN_BYTES // ranks, "--tensor-parallel-size", ranks]
        with serve(smol, tmp_path / f"{ranks}.log", *options, *memory) as server:
            # The first layer's keys make little noise.
            assert server.log.count(f"the keys of {LAYERS - 1} of {LAYERS} layers are stored less their mean, by 16 pairs") == ranks
            assert server.metric("tqai_key_mean_layers", rank="0") == LAYERS - 1 and server.tokens == 100 * BLOCK
            answers[ranks] = [server.complete(prompt, 16) for prompt in COUNTS[:6]]
    assert answers[3] == answers[1]


def test_a_converted_folder_brings_its_format_and_key_means(smol, tmp_path):
    """Layers whose keys lie where the text says, so that the server need not read it."""
    from tqai import conversion

    conversion.convert(smol, tmp_path / "folder", "tqai_k3v3", key_means=True)
    options = [*OPTIONS[2:], "--max-model-len", 512, "--max-num-seqs", 4, "--kv-cache-memory-bytes", 100 * BLOCK * TOKEN_BYTES]
    with serve(tmp_path / "folder", tmp_path / "log", *options) as server:
        assert "was converted for tqai_k3v3" in server.log
        assert re.search(f"the keys of {LAYERS - 1} of {LAYERS} layers are stored less their mean, .*; read from the folder in", server.log)
        assert server.complete(COUNTS[0], 12).startswith(" 7, 8, 9")


def test_the_log_and_the_gauges_say_what_is_compressed(server):
    assert (
        f"tqai: KV cache tqai_k4v2, 4-bit keys and 2-bit values: {LAYERS} layers of full attention; {TOKEN_BYTES:,} bytes a token"
        in server.log
    )
    assert len(re.findall("tqai: KV cache tqai_k4v2, ", server.log)) == 1
    assert "copies of pages" in server.log and "enough for 16 running sequences" in server.log
    assert server.metric("tqai_token_bytes") == TOKEN_BYTES
    assert server.metric("tqai_cache_tokens") == server.tokens == BLOCKS * BLOCK
    assert server.metric("tqai_layers", kind="full attention") == LAYERS
    assert server.metric("tqai_cache_info", format="tqai_k4v2", kernels="plain PyTorch on the CPU") == 1


def test_the_counters_prove_that_codes_are_written_and_read(server):
    before = {name: server.metric(f"tqai_{name}_total") for name in ("vectors_quantized", "tokens_read", "recent_pages_read")}
    answer = server.client.completions.create(model="m", prompt="Once upon a time", max_tokens=70, temperature=0, extra_body={"ignore_eos": True})
    prompt, written = answer.usage.prompt_tokens, answer.usage.completion_tokens - 1  # the last is not read again
    more = {name: server.metric(f"tqai_{name}_total") - was for name, was in before.items()}
    assert more["vectors_quantized"] == 2 * LAYERS * KV_HEADS * (prompt + written)
    assert more["tokens_read"] == LAYERS * sum(range(prompt, prompt + written))
    steps_on_two_pages = prompt + written - BLOCK
    assert more["recent_pages_read"] == 1 + written + steps_on_two_pages
    assert server.metric("tqai_fallbacks_total", reason="recent_page_without_copy") == 0


def test_chat_and_streaming(server):
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    chat = server.client.chat.completions.create(model="m", messages=messages, max_tokens=8, temperature=0)
    assert "Paris" in chat.choices[0].message.content
    stream = server.client.completions.create(model="m", prompt=COUNTS[0], max_tokens=24, temperature=0, stream=True)
    pieces = [event.choices[0].text for event in stream]
    assert len(pieces) > 5 and "".join(pieces) == server.complete(COUNTS[0])


def test_the_example_client(server):
    command = [sys.executable, Path(__file__).parents[1] / "examples/vllm/client.py", server.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Paris" in done.stdout and "tqai_vectors_quantized_total{" in done.stdout


def test_sixteen_at_once_answer_as_alone(server, alone):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda prompt: server.complete(prompt, 16), COUNTS)) == alone
    assert len(set(alone)) == len(COUNTS) and all(re.match(r" \d+, \d+", text) for text in alone)


def test_a_long_prompt_in_chunks_then_from_the_prefix_cache(server):
    """900 tokens in chunks of 256, near the limit of 1,024; the second time most of it is there as codes."""
    prompt = f"Count: {', '.join(map(str, range(1, 195)))},"
    first = server.complete(prompt, 16)
    hits = server.metric("vllm:prefix_cache_hits_total")
    assert server.complete(prompt, 16) == first and first.startswith(" 195, 196, 197")
    usage = server.client.completions.create(model="m", prompt=prompt, max_tokens=1).usage
    assert 850 < usage.prompt_tokens < 1008
    assert server.metric("vllm:prefix_cache_hits_total") >= hits + 2 * (usage.prompt_tokens // BLOCK - 1) * BLOCK


def test_an_abandoned_stream_is_stopped_and_its_pages_are_free(server):
    stream = server.client.completions.create(model="m", prompt="Tell me a story.", max_tokens=900, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") or server.metric("vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert server.complete(COUNTS[0]) == server.complete(COUNTS[0])


def test_quality_is_that_of_the_transformers_cache(server, smol):
    """A forced continuation of 96 tokens after 256, beside the cache of generate() that keeps 4 and 64 tokens exact."""
    import torch
    from tqai import Cache, fidelity
    from tqai.cli import _benchmark_quality_vllm as benchmark
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tqai_plugins.core.texts import PROSE

    window = AutoTokenizer.from_pretrained(smol)(PROSE).input_ids[:352]
    count = 256
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    caches = {"exact": fidelity.DynamicCache(config=model.config)}
    caches["codes"] = Cache(model.config, bits_k=4, bits_v=2, sink_tokens=4, residual_window=64)
    tops = {name: _tops(model, window, count, cache) for name, cache in caches.items()}
    answer = server.client.completions.create(
        model="m", prompt=window[:count], max_tokens=len(window) - count, temperature=0, logprobs=256,
        extra_body={
            "ignore_eos": True, "return_tokens_as_token_ids": True,
            "vllm_xargs": {"tqai_forced": ",".join(map(str, window[count:]))},
        },
    )  # fmt: skip
    tops["server"] = [
        {int(t.removeprefix("token_id:")): x for t, x in top.items()} for top in answer.choices[0].logprobs.top_logprobs
    ]
    scores = {name: fidelity.Score() for name in ("codes", "server")}
    for name, score in scores.items():
        for target, found, expected in zip(window[count:], tops[name], tops["exact"], strict=True):
            benchmark._add(score, target, found, expected)
    means = {name: score.summary()["kld"] for name, score in scores.items()}
    assert 0 < means["server"] <= 1.15 * means["codes"], means


def _tops(model, window: list[int], count: int, cache) -> list[dict[int, float]]:
    """As a server returns them: log-probabilities of the 256 likeliest tokens and of the true one."""
    import torch

    found = []
    with torch.inference_mode():
        for start, end in [(0, count), *((i, i + 1) for i in range(count, len(window) - 1))]:
            logits = model(torch.tensor([window[start:end]]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
            values = logits.log_softmax(-1)
            kept = {*values.topk(256).indices.tolist(), window[end]}
            found.append({token: values[token].item() for token in kept})
    return found


@pytest.fixture(scope="session")
def crowded(smol, tmp_path_factory):
    """Ten pages, one of which vLLM keeps, and n-gram speculation."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    options = [
        "--kv-cache-memory-bytes", 10 * BLOCK * TOKEN_BYTES, "--max-model-len", 512, "--max-num-seqs", 8,
        "--speculative-config", json.dumps(speculation), "--additional-config", json.dumps({"tqai": {"recent_memory": 0.5}}),
    ]  # fmt: skip
    with serve(smol, tmp_path_factory.mktemp("crowded") / "log", *OPTIONS, *options) as server:
        yield server


def test_speculation_writes_the_same_tokens(crowded, server):
    assert [crowded.complete(prompt, 24) for prompt in COUNTS[:2]] == [server.complete(prompt, 24) for prompt in COUNTS[:2]]
    assert crowded.metric("vllm:spec_decode_num_accepted_tokens_total") > 0


def test_preempted_requests_finish_with_the_same_tokens(crowded, server):
    """Prompts of most of a page that grow into a second one: eight times two pages, of which nine are there."""
    prompts = [f"Count: {', '.join(map(str, range(first, first + 13)))}," for first in range(10, 26, 2)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [list(pool.map(functools.partial(each.complete, max_tokens=26), prompts)) for each in (server, crowded)]
    assert answers[0] == answers[1]
    assert server.metric("vllm:num_preemptions_total") == 0 < crowded.metric("vllm:num_preemptions_total")


SIZES = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
DUMMY = ["--load-format", "dummy", "--skip-tokenizer-init", "--kv-cache-memory-bytes", 32 << 20, "--max-model-len", 2048, "--max-num-seqs", 8]


def folder(path, config: dict):
    (path / "config.json").write_text(json.dumps(SIZES | config))
    return path


def test_at_head_dim_128_five_times_the_tokens_of_bf16_fit(tmp_path):
    model = folder(tmp_path, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4})
    with serve(model, tmp_path / "log", *DUMMY, "--kv-cache-dtype", "tqai", until="KV cache size: ") as server:
        tokens = server.tokens
    bf16_tokens = (32 << 20) / (4 * 2 * 128 * 2 * 2)
    assert tokens >= 5.0 * bf16_tokens
    assert "4.92 times smaller" not in server.log and "5.12 times smaller than 16 bits" in server.log


def test_sliding_windows_and_skipped_layers(tmp_path):
    """A small Gemma 3 (five layers in six see 64 tokens) whose first layer is left to vLLM."""
    model = folder(tmp_path, {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 64,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "query_pre_attn_scalar": 128,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    })  # fmt: skip
    with serve(model, tmp_path / "log", *DUMMY, "--kv-cache-dtype", "tqai", "--kv-cache-dtype-skip-layers", "0") as server:
        assert (
            "1 layers of sliding window of 64, not compressed, 4 layers of sliding window of 64, 1 layers of full attention"
            in server.log
        )
        prompt = [(7 * n) % 256 for n in range(300)]
        answers = [server.client.completions.create(model="m", prompt=prompt, max_tokens=9, temperature=0, extra_body={
            "ignore_eos": True, "return_token_ids": True,
        }) for _ in range(2)]  # fmt: skip
        assert len(answers[0].choices[0].token_ids) == 9
        assert answers[0].choices[0].token_ids == answers[1].choices[0].token_ids
        read = 5 * sum(range(300, 308))  # by four windows and the full layer; the windows see 64 tokens of it
        assert server.metric("tqai_layers", kind="sliding window of 64") == 4
        assert 0 < server.metric("tqai_tokens_read_total") < 2 * read

"""The real `vllm serve --kv-cache-dtype tqai`, on vLLM's CPU build, with a tiny random model at head_dim 128."""

import concurrent.futures
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tqai_plugins.core.kv_format import KVFormat

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
vllm = pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 128, 128
CACHE_BYTES = 32 << 20
ENV = {
    **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "2",
}  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    hidden, inner, vocab, q_heads = 256, 512, 320, 8
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": LAYERS, "num_attention_heads": q_heads,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 256, "eos_token_id": 257,
    }))  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape, size: torch.randn(*shape, generator=generator) * size  # noqa: E731
    weights = {
        "model.embed_tokens.weight": draw(vocab, hidden, size=1.0), "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": draw(vocab, hidden, size=4 / hidden**0.5),
    }  # fmt: skip
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name, out, into in (
            ("self_attn.q_proj", q_heads * HEAD_DIM, hidden), ("self_attn.k_proj", KV_HEADS * HEAD_DIM, hidden),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, hidden), ("self_attn.o_proj", hidden, q_heads * HEAD_DIM),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            weights[f"{at}{name}.weight"] = draw(out, into, size=1 / into**0.5)
        weights[at + "input_layernorm.weight"] = weights[at + "post_attention_layernorm.weight"] = torch.ones(hidden)
    save_file({name: w.clone() for name, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def serve(model: Path, log: Path, *options: str) -> tuple[subprocess.Popen, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        Path(sys.executable).with_name("vllm"), "serve", model, "--host", "127.0.0.1", "--port", port, "--served-model-name",
        "tiny", "--enforce-eager", "--kv-cache-memory-bytes", CACHE_BYTES, "--max-num-seqs", 8, "--dtype", "float32",
        "--max-model-len", 2048, "--max-num-batched-tokens", 256, *options,
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=ENV)
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    process, url = serve(model, log, "--kv-cache-dtype", "tqai")
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(url + "/health", timeout=5)
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
    yield url, log
    process.terminate()
    process.wait(60)


def complete(url: str, prompt: str, max_tokens: int = 24) -> str:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=300)
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0)
    return answer.choices[0].text


def test_the_log_says_what_is_compressed_and_the_capacity_is_the_arithmetic(server):
    text = server[1].read_text()
    assert "tqai: KV cache tqai_k4v2: 100 bytes a token and KV head" in text
    tokens = int(re.search(r"KV cache size: ([\d,]+) tokens", text)[1].replace(",", ""))
    token_bytes = LAYERS * KV_HEADS * KVFormat.from_name("tqai", HEAD_DIM).slot_bytes
    bf16_tokens = CACHE_BYTES / (LAYERS * KV_HEADS * HEAD_DIM * 2 * 2)
    assert CACHE_BYTES // token_bytes - BLOCK <= tokens <= CACHE_BYTES // token_bytes
    assert tokens >= 5.0 * bf16_tokens


def test_concurrent_requests_answer_as_they_do_alone(server):
    """Chunked prefill (256 tokens), continuous batching and prefix hits: the same text."""
    url = server[0]
    shared = "A long common beginning. " * 12
    prompts = [shared + "x" * n + " end" for n in (1, 3, 40, 200, 500, 900)] + ["short", "another one", shared] * 3
    alone = [complete(url, p) for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda p: complete(url, p), prompts))
    assert together == alone
    assert len(set(alone)) > 5


def test_a_prompt_near_the_limit(server):
    assert isinstance(complete(server[0], "y" * 2000, max_tokens=40), str)


@pytest.mark.parametrize("name", ["tqai_k9v2", "tquai"])
def test_an_unknown_dtype_stops_at_start(model, tmp_path, name):
    log = tmp_path / "log"
    process, _ = serve(model, log, "--kv-cache-dtype", name)
    assert process.wait(180) != 0
    assert "tqai_k4v2" in log.read_text(), "the message names what is allowed"

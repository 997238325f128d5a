"""`tqai plan`: model shapes from configs alone, and the arithmetic of what fits, against servers that ran."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

pytest.importorskip("transformers")
from tqai import model_shape, plan, results
from tqai.cli import main
from tqai.model_shape import CacheLayer

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
TINY = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 4096}
TINY |= {"torch_dtype": "bfloat16", "bos_token_id": 256, "eos_token_id": 257}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}
TINY_LLAMA = TINY | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
TINY_GEMMA = TINY | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 256, "query_pre_attn_scalar": 64,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
TINY_MOE = TINY | EXPERTS | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 96, "norm_topk_prob": True, "mlp_only_layers": [],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
TINY_HYBRID = TINY | EXPERTS | {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "shared_expert_intermediate_size": 128, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
# What `vllm serve` 0.32.0 logged on CPU with 64 MiB of cache, 2,048 tokens of context and 256 batched tokens.
LOGGED = [
    (TINY_LLAMA, "bf16", 16_384), (TINY_LLAMA, "tqai", 83_840), (TINY_MOE, "tqai_k8v4", 37_760),
    (TINY_GEMMA, "bf16", 82_241), (TINY_GEMMA, "tqai_k4v4", 309_609), (TINY_HYBRID, "tqai", 191_146),
]  # fmt: skip
NAMES = [f"{config['model_type']}-{name}" for config, name, _ in LOGGED]


@pytest.fixture
def shape_of(tmp_path):
    def read(config: dict):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_shape.read(str(tmp_path / "config.json"))

    return read


def planned(shape, name: str) -> plan.Row:
    use = plan.Use(plan.RUNTIMES["vllm-cpu"], 2048, batched_tokens=256, cache_bytes=64 << 20)
    return plan.plan(shape, None, use, name)


@pytest.mark.parametrize("config, name, logged", LOGGED, ids=NAMES)
def test_the_plan_is_what_vllm_logged(shape_of, config, name, logged):
    assert planned(shape_of(config), name).tokens == pytest.approx(logged, rel=0.02)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("config, name, logged", LOGGED, ids=NAMES)
def test_what_vllm_logs_is_still_that(shape_of, tmp_path, config, name, logged):
    """The same from the servers themselves: start, read the line, stop."""
    pytest.importorskip("vllm")
    planned_tokens = planned(shape_of(config), name).tokens
    log = tmp_path / "log"
    command = [
        os.path.join(os.path.dirname(sys.executable), "vllm"), "serve", tmp_path, "--enforce-eager", "--kv-cache-memory-bytes",
        64 << 20, "--max-model-len", 2048, "--max-num-batched-tokens", 256, "--load-format", "dummy",
        "--skip-tokenizer-init", "--kv-cache-dtype", "auto" if name == "bf16" else name, "--port", 0,
        "--mamba-ssm-cache-dtype", "float32",  # vLLM's choice where the CPU has AMX
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2"}
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not (found := re.search(r"KV cache size: ([\d,]+) tokens", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # one that is still starting does not listen to milder words
        process.wait()
    assert planned_tokens == pytest.approx(int(found[1].replace(",", "")), rel=0.02)


@pytest.mark.parametrize("name, tokens", [("bf16", 412_496), ("fp8", 824_992), ("tqai", 2_112_000)])
def test_the_plan_is_what_an_h100_had(shape_of, name, tokens):
    """Stock vLLM 0.26.0, Llama-3.1-8B, 0.85 of one H100 80GB, 16,384 batched tokens."""
    use = plan.Use(plan.RUNTIMES["vllm"], 66_000, utilization=0.85, batched_tokens=16_384)
    assert plan.plan(shape_of(LLAMA_8B), plan.MACHINES["h100"], use, name).tokens == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(
    "model_type, layers",
    [
        ("mixtral", {CacheLayer(8, 128): 32}),
        ("gemma3n_text", {CacheLayer(2, 256, 512): 16, CacheLayer(2, 256): 4}),  # 15 of 35 read other layers' keys
        ("gemma4_text", {CacheLayer(4, 256, 512): 25, CacheLayer(4, 512): 5}),
        ("gpt_oss", {CacheLayer(8, 64, 128): 18, CacheLayer(8, 64): 18}),
        ("qwen3_next", {CacheLayer(state_bytes=2_162_688): 36, CacheLayer(2, 256): 12}),
        ("falcon_h1", {CacheLayer(8, 128, state_bytes=1_060_864): 32}),
        ("mistral3", {CacheLayer(8, 128): 40}),
    ],
)
def test_layers_of_models_by_their_config_alone(shape_of, model_type, layers):
    assert Counter(shape_of({"model_type": model_type}).layers) == layers


def test_weights_and_what_a_step_reads(shape_of):
    llama = shape_of(LLAMA_8B)
    assert llama.weight_bytes == 2 * 8_030_261_248
    assert llama.read_bytes(1) == llama.read_bytes(64) == llama.weight_bytes - 2 * 128256 * 4096
    mixtral = shape_of({"model_type": "mixtral"})
    assert mixtral.read_bytes(1) == pytest.approx(25.6e9, rel=0.02)  # 12.9 of 46.7 billion are active
    assert mixtral.read_bytes(1) < mixtral.read_bytes(2) < mixtral.read_bytes(1000) <= mixtral.weight_bytes
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    assert shape_of(LLAMA_8B | quantized).weight_bytes == pytest.approx(5.7e9, rel=0.02)


def test_ranks_share_weights_and_heads(shape_of):
    llama = shape_of(LLAMA_8B)
    one, two, sixteen = (
        plan.plan(llama, plan.MACHINES["h100"], plan.Use(plan.RUNTIMES["vllm"], 8192, ranks), "tqai") for ranks in (1, 2, 16)
    )
    assert two.token_bytes == one.token_bytes / 2 and sixteen.token_bytes == one.token_bytes / 8
    assert two.weight_bytes == one.weight_bytes / 2 and two.tokens > 2 * one.tokens
    with pytest.raises(ValueError, match="8 KV heads cannot be split over --tensor-parallel 3"):
        plan.heads_of_rank(8, 3)


def test_twins_take_their_share_of_coded_caches_only(shape_of):
    llama = shape_of(LLAMA_8B)
    rows = {
        (name, twins): plan.plan(llama, plan.MACHINES["h100"], plan.Use(plan.RUNTIMES["vllm"], 8192, twins=twins), name)
        for name in ("bf16", "tqai") for twins in (0, 0.02)
    }  # fmt: skip
    assert rows["tqai", 0.02].tokens == pytest.approx(0.98 * rows["tqai", 0].tokens, rel=1e-4)
    assert rows["bf16", 0.02].tokens == rows["bf16", 0].tokens


def test_transformers_counts_the_exact_tokens_of_each_request(shape_of):
    use = plan.Use(plan.RUNTIMES["transformers"], 1024)
    row = plan.plan(shape_of(LLAMA_8B), plan.MACHINES["h100"], use, "tqai")
    assert row.request_bytes == 32 * 8 * (100 * (1024 - 148) + 512 * 148)


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"model_type": "deepseek_v3"}, "multi-head latent attention"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "no_such"}, "no model configuration that transformers knows"),
        ([], "no model configuration that transformers knows"),
    ],
)
def test_models_that_are_refused(shape_of, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        shape_of(config)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--machine", "h1000"), "--machine is 'h1000'; known are"),
        (("--memory", "lots"), "memory is 'lots'; expected a size such as 24GB"),
        (("--memory", "8GB"), "does not fit 8GB: its weights are 16.1 GB"),
        (("--context", "1000000"), "--context is 1000000"),
        (("--formats", "tqai_k9v2"), "unknown KV cache format 'tqai_k9v2'"),
        (("--twins", "70"), "--twins is 70.0; allowed are 0 to 50 percent"),
        (("--concurrency", "0"), "--concurrency is 0"),
    ],
)
def test_bad_options_are_one_sentence(shape_of, tmp_path, capsys, options, sentence):
    shape_of(LLAMA_8B)
    assert main(["plan", "--model", str(tmp_path / "config.json"), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_prints_a_table_json_and_a_plot(shape_of, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    shape_of(LLAMA_8B)
    argv = ["plan", "--model", str(tmp_path / "config.json"), "--machine", "h100", "--concurrency", "100"]
    assert main([*argv, "--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png")]) == 0
    table = capsys.readouterr().out
    data = json.loads((tmp_path / "plan.json").read_text())
    rows = {row["format"]: row for row in data["rows"]}
    assert rows["tqai_k4v2"]["token_bytes"] == 25_600 and f"{rows['tqai_k4v2']['tokens']:,}" in table
    assert rows["bf16"]["concurrency"] < 100 == rows["tqai_k4v2"]["concurrency"]
    assert "100 requests do not fit with bf16" in table
    (served,) = results.read("served_smollm2.json").values()
    measured = {row["name"]: row["continuation"]["kld"] for row in served["rows"]}
    assert all(rows[name]["kld"] == measured[name.removeprefix("tqai_")] for name in ("fp8", "tqai_k4v4", "tqai_k4v2"))
    assert rows["fp8"]["fidelity"] == "as fp8" and rows["tqai_k4v4"]["fidelity"] == "better than fp8"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")

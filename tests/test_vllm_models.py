"""Kinds of model and of serving in the real vLLM, on a GPU or its CPU build: with 8-bit codes each answers as with its own cache.

The models are small and random with weights so large that the next token depends on what attention sees: a wrong window, cap,
sink, mean or page changes log-probabilities by tenths of a nat and more, 8-bit codes by hundredths.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")
import follower_model
import transformers
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform
from vllm_server import ENV

CUDA = torch.cuda.is_available()
SIZES = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_hidden_layers": 4, "max_position_embeddings": 1024, "initializer_range": 0.08,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
TURNS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
KINDS = {
    "full": ("Llama", {}),
    "windows": ("Gemma3Text", TURNS | {"query_pre_attn_scalar": 4}),
    "soft_cap": ("Gemma2", TURNS | {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 5.0}),
    "sinks": ("Llama", {}),
    "shared_layers": ("Gemma3nText", TURNS | {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
        "intermediate_size": [256] * 6, "activation_sparsity_pattern": [0.0] * 6, "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 320, "laurel_rank": 8, "altup_num_inputs": 2,
    }),
}  # fmt: skip
# Prompts in one chunk and in several, two with a common beginning of three pages, one longer than windows.
PROMPTS = [[(7 * i * i + 3 * i + n) % 320 for i in range(length)] for n, length in enumerate((3, 70, 200, 333))]
PROMPTS.append(PROMPTS[-1][:250] + PROMPTS[0] * 9)
TOKENS = 8
# Without torch.compile, which takes half a minute for each of these models.
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}}
CLOSE = 0.2  # nats


def write(folder: Path, kind: str) -> str:
    name, changes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).to(torch.bfloat16)
    # vLLM 0.26 wants a norm of keys even where there are none.
    shared = range(config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0), config.num_hidden_layers)
    ones = torch.ones(config.head_dim, dtype=torch.bfloat16)
    norms = {f"model.layers.{layer}.self_attn.k_norm.weight": ones.clone() for layer in shared}
    model.save_pretrained(folder, state_dict={**model.state_dict(), **norms})
    return str(folder)


@contextlib.contextmanager
def engine(model: str, dtype: str, **options):
    os.environ.update(ENV | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    more = {"block_size": 64, "kv_cache_memory_bytes": 64 << 20} | (GRAPHS if CUDA else {"enforce_eager": True}) | options
    llm = LLM(
        model, kv_cache_dtype=dtype, dtype="bfloat16" if CUDA else "float32", skip_tokenizer_init=True, max_model_len=512,
        max_num_seqs=8, max_num_batched_tokens=128, disable_log_stats=False, gpu_memory_utilization=0.1, **more,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        type(current_platform)._global_graph_pool = None  # no engine after this one can use its pool of CUDA graphs


def give_sinks(model) -> None:
    """What gpt-oss' weights bring: a logit a head that takes its share of attention."""
    for number, layer in enumerate(model.model.layers):
        impl = layer.self_attn.attn.impl
        sinks = torch.linspace(-1, 3, impl.num_heads) + number
        like = next(layer.parameters())
        impl.sinks = sinks.to(like.device, torch.float32 if impl.kv_cache_dtype.startswith("tqai") else like.dtype)


def generate(llm, prompts=PROMPTS, **options) -> list:
    params = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=5, detokenize=False, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, **options)


def said(requests: list) -> list:
    """Of each request, its tokens and the log-probabilities of the likeliest ones at each step."""
    return [(x.outputs[0].token_ids, [{t: p.logprob for t, p in top.items()} for top in x.outputs[0].logprobs]) for x in requests]


def answers(llm, prompts=PROMPTS, **options) -> list:
    return said(generate(llm, prompts, **options))


def distance(some: list, others: list) -> float:
    """The largest difference of log-probabilities of a likely token, as long as the answers are the same."""
    largest = 0.0
    for (tokens, steps), (other_tokens, other_steps) in zip(some, others):
        for i, (step, other) in enumerate(zip(steps, other_steps)):
            if tokens[:i] != other_tokens[:i]:
                break
            for token, likelihood in step.items():
                if likelihood > -3 and token in other:
                    largest = max(largest, abs(likelihood - other[token]))
    return largest


def gauge(llm, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_answer_as_the_models_own_cache(folders, kind):
    found = {}
    options = {"additional_config": {"tqai": {"recent_memory": 0}}}  # two bits, not copies with eight
    options |= {"enforce_eager": True} if kind == "sinks" else {}
    for dtype in ("auto", "tqai_k8v8", "tqai_k2v2"):
        with engine(folders[kind], dtype, **options) as llm:
            if kind == "sinks":
                plain = answers(llm)
                llm.reset_prefix_cache()
                llm.apply_model(give_sinks)
            found[dtype] = answers(llm)
            assert kind != "sinks" or distance(plain, found[dtype]) > 0.3
    eight, two = (distance(found["auto"], found[name]) for name in ("tqai_k8v8", "tqai_k2v2"))
    assert eight < min(CLOSE, two / 4)


def test_the_same_requests_get_the_same_answers(folders):
    """Bit for bit, on a GPU too: which of a request's splits is done last decides nothing."""
    with engine(folders["full"], "tqai") as llm:
        first = answers(llm)
        for _ in range(3):
            llm.reset_prefix_cache()
            assert answers(llm) == first


def adapter(folder: Path, model: str) -> str:
    """A LoRA that changes keys, values and queries of every layer."""
    from safetensors.torch import save_file

    config = json.loads((Path(model) / "config.json").read_text())
    out = {"q_proj": 4 * 64, "k_proj": 2 * 64, "v_proj": 2 * 64}
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.1
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in out.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights |= {f"{at}.lora_A.weight": draw(8, 256), f"{at}.lora_B.weight": draw(size, 8)}
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    held = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(out), "task_type": "CAUSAL_LM", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(held))
    return str(folder)


def test_lora(folders, tmp_path):
    from vllm.lora.request import LoRARequest

    request = LoRARequest("changed", 1, adapter(tmp_path / "adapter", folders["full"]))
    found = {}
    for dtype in ("auto", "tqai_k8v8"):
        with engine(folders["full"], dtype, enable_lora=True, max_lora_rank=8) as llm:
            found[dtype], plain = answers(llm, lora_request=request), answers(llm)
            assert distance(found[dtype], plain) > 1, "the adapter changes nothing"
    assert distance(found["auto"], found["tqai_k8v8"]) < CLOSE


def test_a_draft_model_writes_the_same_tokens(tmp_path):
    """The model drafts for itself, so that nearly all is accepted; what is right is known, and right by far."""
    model = str(follower_model.write(tmp_path / "follower"))
    prompts = [follower_model.draw(random.Random(length), length) for length in (20, 64, 200, 333)]
    speculation = {"model": model, "method": "draft_model", "num_speculative_tokens": 3}
    with engine(model, "tqai", speculative_config=speculation) as llm:
        found = [tokens for tokens, _ in answers(llm, prompts)]
        accepted = gauge(llm, "vllm:spec_decode_num_accepted_tokens")
    assert [list(tokens) for tokens in found] == [follower_model.answer(prompt, TOKENS) for prompt in prompts]
    assert accepted >= len(prompts)


def test_pages_come_back_from_the_hosts_memory(folders):
    """A connector moves whole pages; when they are needed again they are loaded, not computed as without it."""
    store = {"cpu_bytes_to_use": 64 << 20} | ({} if CUDA else {"spec_name": "PageStore", "spec_module_path": "page_store"})
    transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": store}
    pages = 4 * 2 * 64 * 132 * 24  # layers, heads, tokens, bytes
    for connector, loaded in ((None, 0), (transfer, 5 * 64)):
        with engine(folders["full"], "tqai_k8v8", kv_transfer_config=connector, kv_cache_memory_bytes=pages) as llm:
            first = answers(llm, PROMPTS[-2:-1])
            for n in range(4):  # push them out
                answers(llm, [[(11 * i + n) % 320 for i in range(400)]])
            again = generate(llm, PROMPTS[-2:-1])
        assert [request.num_cached_tokens for request in again] == [loaded]
        assert distance(first, said(again)) < CLOSE


@pytest.mark.cuda
def test_sleep_and_wake(folders):
    with engine(folders["full"], "tqai_k4v4", enable_sleep_mode=True) as llm:
        first = answers(llm)
        llm.sleep(level=1)
        llm.wake_up()
        assert distance(first, answers(llm)) < CLOSE
        with pytest.raises(Exception, match="at level 1 only"):
            llm.sleep(level=2)


def tell_turboquant(model: str) -> None:
    """Print whether our plugin is there, and what vLLM's own TurboQuant answers, in all layers, as a build without
    FlashAttention-2 needs it."""
    from unittest import mock

    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends import turboquant_attn

    everywhere = mock.patch.object(TurboQuantConfig, "get_boundary_skip_layers", lambda *a, **k: [])
    with everywhere, mock.patch.object(turboquant_attn, "get_flash_attn_version", lambda **k: 3):
        with engine(model, "turboquant_4bit_nc") as llm:
            print(json.dumps(["tqai_plugins.vllm_plugin" in sys.modules, [list(tokens) for tokens, _ in answers(llm)]]))


@pytest.mark.cuda
def test_vllms_own_turboquant_answers_the_same_beside_this_plugin(folders):
    code = "import sys, test_vllm_models; test_vllm_models.tell_turboquant(sys.argv[1])"
    found = []
    for plugins in ("none", "tqai"):
        env = os.environ | {"VLLM_PLUGINS": plugins}
        done = subprocess.run(
            [sys.executable, "-c", code, folders["full"]], env=env, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (absent, alone), (present, beside) = found
    assert present and not absent
    assert alone == beside and len(set(map(tuple, alone))) == len(PROMPTS)


@pytest.mark.cuda
@pytest.mark.parametrize("runner", ["0", "1"])
def test_both_model_runners(folders, monkeypatch, runner):
    found = {}
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    for eager in (False, True):
        with engine(folders["full"], "tqai_k8v8", **({"enforce_eager": True} if eager else {})) as llm:
            found[eager] = answers(llm)
    assert distance(found[False], found[True]) < CLOSE


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_gpus_answer_as_one(folders, monkeypatch, how):
    """One KV head a rank, or two layers."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    found = {}
    for gpus in (1, 2):
        with engine(folders["full"], "tqai_k8v8", **{how: gpus}) as llm:
            found[gpus] = answers(llm)
    assert distance(found[1], found[2]) < CLOSE

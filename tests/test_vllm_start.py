"""What `--kv-cache-dtype tqai` refuses before any weight is loaded, each in one sentence, and that other dtypes still work."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")

from tqai import models
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_server import ENV

from tqai_plugins.vllm_plugin import compat

load_general_plugins()
EXAMPLES = Path(__file__).parents[1] / "examples" / "vllm"
SIZES = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2, "head_dim": 128}
MLA = SIZES | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 64, "q_lora_rank": None,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "first_k_dense_replace": 2,
}  # fmt: skip
BLOOM = {
    "architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 320, "hidden_size": 256, "n_layer": 2,
    "n_head": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
BERT = SIZES | {"architectures": ["BertModel"], "model_type": "bert"}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": 64, "vocab_size": 320,
    "is_encoder_decoder": True, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


def configured(tmp_path, config: dict, **options):
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "kv_cache_dtype": "tqai", **options}
    return EngineArgs(model=str(tmp_path), **arguments).create_engine_config()


def parsed(name: str) -> str:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--model", "m", "--kv-cache-dtype", name]).kv_cache_dtype


@pytest.mark.parametrize("name", ["tqai", "tqai_k8v4", "tqai_k3v3", "auto", "fp8", "turboquant_4bit_nc"])
def test_names_that_are_served(name):
    assert parsed(name) == name


@pytest.mark.parametrize(
    "name, near", [("tqai_k9v2", "tqai_k"), ("tqai-k4v4", "tqai_k4v4"), ("tqai_k4v5", "tqai_k4v"), ("TQAI_K3V3", "tqai_k3v3")]
)
def test_unknown_names_stop_with_the_nearest(tmp_path, capsys, name, near):
    with pytest.raises(SystemExit):
        parsed(name)
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"unknown KV cache dtype {name!r}; tqai serves" in message and f"e.g. '{near}" in message
    with pytest.raises(ValueError, match=f"unknown KV cache dtype {name!r}.*e.g. '{near}"):
        configured(tmp_path, LLAMA, kv_cache_dtype=name)


@pytest.mark.parametrize(
    "config, what",
    [(MLA, "multi-head latent attention"), (BLOOM, "ALiBi"), (BERT, "encoder-only"), (WHISPER, "cross attention")],
    ids=["mla", "alibi", "encoder-only", "cross-attention"],
)
def test_models_that_are_refused(tmp_path, config, what):
    with pytest.raises(ValueError, match=f"--kv-cache-dtype tqai does not serve models with .*{what}.*; use"):
        configured(tmp_path, config)


def test_fast_prefill_of_shared_layers_stops(tmp_path):
    with pytest.raises(ValueError, match="--kv-cache-dtype tqai does not serve --kv-sharing-fast-prefill; leave that out"):
        configured(tmp_path, LLAMA, kv_sharing_fast_prefill=True)


@pytest.mark.parametrize("value", [2, -0.1, "much", True])
def test_a_bad_share_for_copies_stops(tmp_path, value):
    with pytest.raises(ValueError, match=f"recent_memory is {value!r}; allowed is a fraction"):
        configured(tmp_path, LLAMA, additional_config={"tqai": {"recent_memory": value}})
    with pytest.raises(ValueError, match="recent_memori"):
        configured(tmp_path, LLAMA, additional_config={"tqai": {"recent_memori": 0.02}})


@pytest.mark.parametrize("value", [-1, True, 0.5, "often"])
def test_a_bad_canary_stops(tmp_path, value):
    with pytest.raises(ValueError, match=f"canary is {value!r}; allowed are whole numbers"):
        configured(tmp_path, LLAMA, additional_config={"tqai": {"canary": value}})


def test_a_version_outside_the_range_is_refused_unless_overridden(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.40.1")
    assert "set TQAI_VLLM_ANY_VERSION=1 to try" in compat.why_unsupported()
    monkeypatch.setenv("TQAI_VLLM_ANY_VERSION", "1")
    assert compat.why_unsupported() is None


def test_versions_that_serve_on_a_gpu_only_say_so_on_a_cpu(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.27.1")
    refusal = "tqai supports vLLM 0.28 to 0.33 on a CPU, this is 0.27.1; install a supported release"
    assert (compat.why_unsupported() or "").startswith(refusal) is current_platform.is_cpu()


IN_A_NEW_PROCESS = """
import sys, vllm
vllm.__version__ = sys.argv[1]
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
for name in ("fp8", "tqai"):
    print(parser.parse_args(["--model", "m", "--kv-cache-dtype", name]).kv_cache_dtype)
"""


@pytest.mark.parametrize(
    "version, plugins, said",
    [
        ("0.40.1", "tqai", "this is 0.40.1; install a supported release"),
        ("0.32.0", "another", "invalid choice: 'tqai'"),  # none of our code runs; `tqai doctor` explains it
    ],
    ids=["unsupported", "left-out"],
)
def test_without_the_dtype_others_work_and_tqai_is_one_sentence(version, plugins, said):
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, version]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"VLLM_PLUGINS": plugins}, check=False)
    assert done.returncode == 2 and done.stdout.split()[-1:] == ["fp8"] and said in done.stderr.splitlines()[-1]


def commands() -> dict[str, list[str]]:
    """The arguments of `vllm serve` in the examples."""
    import yaml

    serve = (EXAMPLES / "serve.sh").read_text().split("exec vllm serve ")[1].replace("\\\n", " ").replace('"${@:2}"', "")
    compose = yaml.safe_load((EXAMPLES / "docker-compose.yaml").read_text())["services"]["vllm"]["command"][0]
    deployment = next(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    return {
        "serve.sh": shlex.split(serve)[1:],
        "docker-compose.yaml": shlex.split(compose.split("vllm serve ")[1].replace("${MODEL:?set MODEL}", "m"))[1:],
        "kubernetes.yaml": deployment["spec"]["template"]["spec"]["containers"][0]["args"][1:],
    }


@pytest.mark.parametrize("name", ["serve.sh", "docker-compose.yaml", "kubernetes.yaml"])
def test_vllm_takes_the_arguments_of_the_examples(name):
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", "m", *commands()[name], "--tensor-parallel-size", "4"])
    assert (arguments.kv_cache_dtype, arguments.port, arguments.tensor_parallel_size) == ("tqai", 8000, 4)


def test_the_offline_example():
    smol = str(models.packaged_folder(models.PACKAGED["demo"]))
    command = [sys.executable, str(EXAMPLES / "offline.py"), smol]
    environment = os.environ | ENV | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "The capital of France is Paris" in done.stdout and "5, 6, 7, 8" in done.stdout, done.stderr[-2000:]


def test_sleep_that_gives_the_kernels_tables_away_is_refused(monkeypatch):
    from vllm.v1.worker.gpu_worker import Worker

    slept = []
    monkeypatch.setattr(Worker, "sleep", lambda self, level=1: slept.append(level))
    compat.refuse_deep_sleep.__wrapped__()
    Worker.sleep(None)
    Worker.sleep(None, 1)
    with pytest.raises(ValueError, match="sleeps at level 1 only, not at level 2"):
        Worker.sleep(None, level=2)
    assert slept == [1, 1]

"""Does the plugin fit a vLLM release? `python tests/vllm_releases.py 0.26.0 0.33.0`, without a GPU and without its kernels.

In a process of its own, with empty modules in place of the compiled ones and a platform that says it is an H100, the
release (see releases.py) loads the plugin and everything that the plugin builds on is looked at. Needs an environment
with vLLM's requirements (.ci/run vllm). No kernel runs.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import inspect
import subprocess
import sys
import types
from pathlib import Path

import releases

OLDEST, BETWEEN, NEWEST = "0.26.0", "0.29.0", "0.33.0"
COMPILED = (
    "vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C",
)  # fmt: skip


def run(release: str) -> subprocess.CompletedProcess:
    """The checks of one release; their findings are on stdout, a failed one ends with a traceback."""
    return releases.run("vllm", release, [Path(__file__), "--check", release])


class _Compiled(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of the compiled ones."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in COMPILED else None

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        pass


def pretend_h100() -> None:
    import torch
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    answers = {
        "get_device_capability": DeviceCapability(9, 0), "get_device_name": "NVIDIA H100", "device_count": 1,
        "get_device_total_memory": 80 << 30, "is_fully_connected": True, "check_if_supports_dtype": None,
        "num_compute_units": 132, "has_device_capability": True,
    }  # fmt: skip
    methods = {name: classmethod(lambda cls, *_, _value=value, **__: _value) for name, value in answers.items()}
    vllm.platforms._current_platform = type("H100", (NonNvmlCudaPlatform,), methods)()
    for question in ("cutlass_scaled_mm_supports_block_fp8", "cutlass_scaled_mm_supports_fp8", "cutlass_group_gemm_supported"):
        setattr(torch.ops._C, question, lambda capability: False)  # asked of the compiled modules on import


def check(release: str) -> None:
    sys.meta_path.insert(0, _Compiled())
    import vllm

    assert vllm.__version__.startswith(release), f"this is {vllm.__version__}"
    pretend_h100()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for part, look in PARTS.items():
        look()
        print(f"vllm {release}: {part} ok")


def check_arguments() -> None:
    from pydantic import ValidationError
    from vllm.config import CacheConfig
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def parse(name):
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        return parser.parse_args(["--model", "m", "--kv-cache-dtype", name]).kv_cache_dtype

    for name in ("tqai", "tqai_k4v4", "tqai_k3v3", "auto", "fp8", "turboquant_4bit_nc"):
        assert parse(name) == name
        assert CacheConfig(cache_dtype=name).cache_dtype == name
    try:
        parse("tqai_k9v2")
        raise AssertionError("tqai_k9v2 was taken")
    except SystemExit:
        pass
    try:
        CacheConfig(cache_dtype="bogus")
        raise AssertionError("bogus was taken")
    except ValidationError:
        pass
    try:
        EngineArgs(model=str(Path(__file__).parent), kv_cache_dtype="tqai_k9v2").create_engine_config()
        raise AssertionError("tqai_k9v2 was taken")
    except ValueError as error:
        assert "e.g. 'tqai_k" in str(error)


def check_selection() -> None:
    """Our backend for tqai, vLLM's own for the others, and pages of our size."""
    import torch
    from vllm.config import CacheConfig, VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    from tqai_plugins.vllm_plugin import attention_backend, compat

    config = VllmConfig(cache_config=CacheConfig(cache_dtype="tqai"))
    config.cache_config.block_size = 16
    with set_current_vllm_config(config):
        ours = get_attn_backend(128, torch.bfloat16, "tqai")
        assert ours is attention_backend.Backend
        assert ours.get_builder_cls() is attention_backend.Builder
        assert get_attn_backend(128, torch.bfloat16, "auto").get_name() == "FLASH_ATTN"
        assert get_attn_backend(128, torch.bfloat16, "turboquant_4bit_nc") is ours  # which hands them on
        sizes = {"block_size": 16, "num_kv_heads": 8, "head_size": 128}
        dense = FullAttentionSpec(**sizes, dtype=torch.bfloat16).page_size_bytes
        if hasattr(AttentionBackend, "customize_spec"):
            mode = get_kv_quant_mode("tqai")
            spec = ours.customize_spec(FullAttentionSpec(**sizes, dtype=torch.uint8, kv_quant_mode=mode))
        else:
            from vllm.model_executor.layers.attention.attention import Attention

            layer = types.SimpleNamespace(kv_cache_dtype="tqai", num_kv_heads=8, head_size=128, kv_cache_torch_dtype=torch.uint8)
            spec = Attention.get_kv_cache_spec(layer, config)
            compat._active = "tqai"  # as its first layer does
            assert ours.get_kv_cache_shape(100, 16, 8, 128, "auto") == (100, 8, 16, 100)
        assert spec.page_size_bytes == 16 * 8 * 100, spec
        assert dense / spec.page_size_bytes == 5.12


def check_what_is_built_on() -> None:
    """Names and parameters of vLLM that the plugin uses beyond its hooks."""
    from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    import tqai_plugins.vllm_plugin.forced_tokens  # noqa: F401  (vllm.v1.sample.logits_processor)
    from tqai_plugins.vllm_plugin import attention_backend, cpu_backend

    fields = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
    assert fields >= {
        "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_actual_tokens", "max_query_len", "max_seq_len",
        "block_table_tensor", "slot_mapping", "seq_lens_cpu_upper_bound",
    }, fields  # fmt: skip
    ours = {f.name for f in dataclasses.fields(cpu_backend.Metadata)}
    assert ours > {f.name for f in dataclasses.fields(CPUAttentionMetadata)}
    stock = inspect.signature(AttentionMetadataBuilder.__init__).parameters
    assert list(stock)[1:5] == ["kv_cache_spec", "layer_names", "vllm_config", "device"]
    for method in ("build", "build_for_cudagraph_capture", "build_for_drafting", "_init_reorder_batch_threshold"):
        assert hasattr(AttentionMetadataBuilder, method), method
    for builder in (attention_backend.Builder, cpu_backend.Builder):
        assert list(inspect.signature(builder.build).parameters)[1:3] == ["common_prefix_len", "common_attn_metadata"]
    assert hasattr(AttentionImpl, "process_weights_after_loading")


PARTS = {"arguments": check_arguments, "backends and pages": check_selection, "what is built on": check_what_is_built_on}


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--check"]:
        check(arguments[1])
        return 0
    failed = 0
    for release in arguments or (OLDEST, BETWEEN, NEWEST):
        done = run(release)
        failed += done.returncode != 0
        print(done.stdout or done.stderr[-3000:], end="" if done.returncode == 0 else f"\n{done.stderr[-3000:]}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

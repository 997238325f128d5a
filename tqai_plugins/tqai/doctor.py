"""Checks of this machine: each gives findings that say what was found, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

OK, WARNING, STOP = "ok", "warning", "stop"


@dataclass(frozen=True)
class Finding:
    """level: ok; warning, which may surprise; or stop, which keeps a server from serving rightly."""

    check: str
    level: str
    found: str
    advice: str = ""


def versions(packages: dict[str, dict]) -> list[Finding]:
    """Of the runtimes, as cli.info.packages() gives them: in the range that was tested or not."""
    findings = []
    for name, entry in packages.items():
        found = f"{entry['version'] or ''} {entry['note']}".strip()
        outside = entry["note"].startswith("not tested")
        advice = f"install a tested release of {name}, or run `pytest` of tqai's checkout here" if outside else ""
        findings.append(Finding(f"version of {name}", WARNING if outside else OK, found, advice))
    return findings


def runtimes(plugins: dict[str, dict], packages: dict[str, dict]) -> list[Finding]:
    """Of installed runtimes, as cli.info.plugins() gives them: whether their plugin can work."""
    package_of = {"transformers": "transformers", "vLLM": "vllm", "mlx-lm": "mlx-lm"}
    findings = []
    for name, plugin in plugins.items():
        here = name not in package_of or packages.get(package_of[name], {}).get("version") is not None
        level = OK if plugin["usable"] or not here or name not in package_of else STOP
        findings.append(Finding(f"plugin for {name}", level, "usable" if plugin["usable"] else plugin["why_not"]))
    if not any(plugin["usable"] for name, plugin in plugins.items() if name in package_of):
        message = "no runtime can use tqai here"
        findings.append(Finding("runtimes", STOP, message, "pip install 'tqai[torch]', 'tqai[vllm]' or 'tqai[mlx]'"))
    return findings


def installation() -> list[Finding]:
    """The distribution, its entry point, and other programs' files under our names."""
    findings = []
    try:
        version = importlib.metadata.version("tqai")
        findings.append(Finding("distribution", OK, f"tqai {version}"))
    except importlib.metadata.PackageNotFoundError:
        findings.append(Finding("distribution", WARNING, "tqai is on the path but not installed", "pip install it"))
    folder = Path(sys.modules["tqai"].__file__).parent
    if (folder / "quantizer.py").exists():  # the tqai 0.x of PyPI
        advice = "pip uninstall tqai (until it says it is not installed), then install this one from its checkout"
        findings.append(Finding("other tqai", STOP, f"another program's tqai lies in {folder}", advice))
    entries = list(importlib.metadata.entry_points(group="vllm.general_plugins", name="tqai"))
    vllm_here = importlib.util.find_spec("vllm") is not None
    if entries:
        findings.append(Finding("vLLM entry point", OK, entries[0].value))
    elif vllm_here:
        advice = "install tqai with pip into vLLM's environment"
        findings.append(Finding("vLLM entry point", STOP, "not found, so that vLLM does not load tqai", advice))
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "tqai" not in allowed.split(","):
        advice = "add tqai to VLLM_PLUGINS, or unset it"
        findings.append(Finding("VLLM_PLUGINS", STOP, f"is {allowed!r}, which leaves tqai out", advice))
    return findings


def name_clash() -> list[Finding]:
    """vLLM takes any top-level `triton_kernels` for OpenAI's kernels for mixture-of-experts models."""
    found = importlib.util.find_spec("triton_kernels")
    if found is None:
        return [Finding("triton_kernels", OK, "no top-level package of this name")]
    folder = Path((found.submodule_search_locations or [found.origin])[0])
    if (folder / "decode_attention.py").exists() and (folder / "prepare.py").exists():
        return [Finding(
            "triton_kernels", WARNING, f"tqai's folder is importable by this name ({folder.parent} is on the path)",
            "start servers from another folder and take the checkout off PYTHONPATH: vLLM looks for OpenAI's package there",
        )]  # fmt: skip
    if not (folder / "matmul_ogs.py").exists():
        advice = "pip uninstall triton-kernels, unless you know what needs it"
        return [Finding("triton_kernels", WARNING, f"{folder} is not OpenAI's, which vLLM expects there", advice)]
    return [Finding("triton_kernels", OK, f"OpenAI's, {folder}")]


def device() -> list[Finding]:
    """The accelerator that kernels would run on."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, compute capability {properties.major}.{properties.minor}"
        if (properties.major, properties.minor) < (8, 0):
            return [Finding("device", WARNING, found, "the integer kernels were written for compute capability 8.0 and newer")]
        return [Finding("device", OK, found)]
    return [Finding("device", OK, "no CUDA device: PyTorch on the CPU, for tests and small models")]


def codec_on_cpu() -> list[Finding]:
    """PyTorch's codes against the NumPy reference's, byte for byte."""
    import numpy as np
    import torch

    from tqai_plugins.core import reference
    from tqai_plugins.core.kv_format import SERVED_WIDTHS
    from tqai_plugins.torch_kernels import codec

    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    worst = 0.0
    for bits in SERVED_WIDTHS:
        expected, _ = reference.quantize(x, bits)
        got, _ = codec.quantize(torch.from_numpy(x), bits)
        worst = max(worst, float((got.numpy() != expected).mean()))
    # Sums in another order may move a coordinate that lies on a boundary: reference.encode's tie rule.
    good = worst <= 0.001
    found = f"{len(SERVED_WIDTHS)} widths, at most {worst:.3%} of the bytes differ from the reference"
    return [Finding("codes on the CPU", OK if good else STOP, found, "" if good else REPORT)]


REPORT = "report this with the output of `tqai doctor --markdown`; do not serve with it"


def triton_kernels() -> list[Finding]:
    """Prepare and decode_attention compiled for this device, against plain PyTorch over the same pages."""
    import torch

    if not torch.cuda.is_available():
        return [Finding("Triton kernels", OK, "not run: no CUDA device")]
    try:
        error = triton_error(torch.device("cuda"), torch.bfloat16)
    except Exception as failure:
        return [Finding("Triton kernels", STOP, f"do not run: {type(failure).__name__}: {str(failure)[:200]}", REPORT)]
    good = error < 5e-3
    return [Finding("Triton kernels", OK if good else STOP, f"error {error:.1e} against PyTorch", "" if good else REPORT)]


def triton_error(where, dtype, head_dim: int = 128, length: int = 150) -> float:
    """Relative error of one decode step's output against plain PyTorch over the pages that the kernel wrote."""
    import torch

    from tqai_plugins.core.kv_format import KVFormat
    from tqai_plugins.torch_kernels import paged
    from tqai_plugins.triton_kernels.decode_attention import decode_attention
    from tqai_plugins.triton_kernels.prepare import prepare
    from tqai_plugins.triton_kernels.workspace import Workspace

    fmt, page, heads, kv_heads, scale = KVFormat.from_name("tqai", head_dim), 64, 8, 2, head_dim**-0.5
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(where, dtype)
    count = -(-length // page)
    pages = torch.zeros(count, kv_heads, fmt.page_layout(page).page_bytes, dtype=torch.uint8, device=where)
    table = torch.randperm(count, generator=generator).int().to(where)[None]
    token = torch.arange(length, device=where)
    slots = table[0].long()[token // page] * page + token % page
    query, key, value = draw(1, heads, head_dim), draw(length, kv_heads, head_dim), draw(length, kv_heads, head_dim)
    workspace = Workspace.allocate(1, heads, head_dim, heads * 16, where)
    prepare(query, key, value, pages, slots, workspace, fmt, page, scale)
    out = torch.full_like(query, torch.nan)
    lengths = torch.tensor([length], dtype=torch.int32, device=where)
    decode_attention(workspace, pages, table, lengths, out, fmt, page)
    expected = paged.attention(query.float().cpu(), pages.cpu(), table[0].cpu(), length, fmt, page, scale)
    return float((out.float().cpu() - expected).norm() / expected.norm())


def canary() -> list[Finding]:
    """A small random model's predictions with the compressed cache beside those with the library's own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from . import fidelity

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 256, (1, 160))
    caches = {"reference": fidelity.DynamicCache(config=config)}
    for bits in (8, 4, 1):
        caches[bits] = fidelity.Cache(config, bits_k=bits, bits_v=bits, cache_strategy="full")
    scores = {name: fidelity.Score() for name in caches}
    fidelity.teacher_forced(model, tokens, 96, caches, scores, 16)
    eight, four, one = (scores[bits].summary()["kld"] for bits in (8, 4, 1))
    read = caches[8].vectors_dequantized
    found = f"KL divergence {eight:.4f} at 8 bits, {four:.3f} at 4, {one:.2f} at 1; {read:,} vectors read from codes"
    good = eight < 0.01 and eight < four < one and read > 0
    return [Finding("canary", OK if good else STOP, found, "" if good else REPORT)]


def examine(packages: dict, plugins: dict) -> list[Finding]:
    """All findings; what cannot be checked for want of a package is a warning."""
    findings = [*installation(), *versions(packages), *runtimes(plugins, packages), *name_clash()]
    for check in (device, codec_on_cpu, triton_kernels, metal_kernels, canary):
        try:
            findings += check()
        except ModuleNotFoundError as error:
            findings.append(Finding(check.__name__.replace("_", " "), WARNING, f"not checked: {error}", "pip install 'tqai[torch]'"))
    return findings


def metal_kernels() -> list[Finding]:
    """The Metal kernels, where there is a Metal device."""
    if importlib.util.find_spec("mlx") is None:
        return [Finding("Metal kernels", OK, "not run: mlx is not installed")]
    import mlx.core as mx

    if not mx.metal.is_available():
        return [Finding("Metal kernels", OK, "not run: no Metal device")]
    return [Finding("Metal kernels", WARNING, "not run: this version has no self-test for them", "run `pytest -m mlx`")]

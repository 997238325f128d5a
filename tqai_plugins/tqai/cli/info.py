"""`tqai info`: what is installed here, which plugins can work, and what the formats cost."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys

from tqai_plugins.core.kv_format import KVFormat

# Releases this version was tested with: first and last, inclusive by their leading numbers.
TESTED = {
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.17", "5.23"),
    "vllm": ("0.26", "0.26"),
    "mlx-lm": None,
}
SHOWN_FORMATS = ("tqai_k8v8", "tqai_k8v4", "tqai_k4v4", "tqai_k4v3", "tqai_k4v2", "tqai_k3v3", "tqai_k3v2")


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("info", help="versions, plugins and formats")
    parser.add_argument("--head-dim", type=int, default=128, help="head dimension for the table of formats (128)")
    add_json(parser)
    return parser


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def packages() -> dict[str, dict]:
    """Each runtime: installed version or None, and whether it lies in the tested range."""
    found = {}
    for name, span in TESTED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = {"version": None, "note": "not installed"}
            continue
        if span is None:
            note = "no plugin for it yet"
        elif _numbers(span[0]) <= _numbers(version) <= _numbers(span[1]):
            note = "tested"
        else:
            note = f"untested: outside {span[0]} to {span[1]}"
        found[name] = {"version": version, "note": note}
    return found


def plugins() -> dict[str, str]:
    """Entry points found for each runtime."""
    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    mine = [entry.value for entry in entries if entry.name == "tqai"]
    return {"vllm.general_plugins": mine[0] if mine else "not found: install tqai with pip, or vLLM will not see it"}


def run(args) -> int:
    from . import emit

    formats = [KVFormat.from_name(name, args.head_dim) for name in SHOWN_FORMATS]
    data = {
        "tqai": importlib.metadata.version("tqai"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "plugins": plugins(),
        "cuda": _cuda(),
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

        console = Console()
        console.print(f"tqai {data['tqai']}, Python {data['python']}, {data['platform']}, CUDA: {data['cuda']}")
        table = Table("package", "version", "note")
        for name, entry in data["packages"].items():
            table.add_row(name, entry["version"] or "-", entry["note"])
        for group, value in data["plugins"].items():
            table.add_row(group, "", value)
        console.print(table)
        table = Table("format", "bytes a token and KV head", "bits an element", "smaller than bf16", title=f"head_dim {args.head_dim}")
        for f in formats:
            table.add_row(f.name, str(f.slot_bytes), f"{f.bits_per_element:.3f}", f"{f.compression:.2f} x")
        console.print(table)

    emit(args, data, show)
    return 0


def _cuda() -> str:
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"

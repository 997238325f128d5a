"""`tqai benchmark kernels --backend mlx`: decode attention on MLX's GPU, beside mlx-lm's own caches."""

from __future__ import annotations

import datetime
import platform

DEFAULT_SHAPES = "1x8192,1x32768,8x8192"


def run(args) -> int:
    """args: shapes, formats, q_heads, kv_heads, head_dim and json, as benchmark_kernels has them."""
    from . import emit

    data = measure(args.shapes or DEFAULT_SHAPES, args.formats, args.q_heads, args.kv_heads, args.head_dim)
    emit(args, data, lambda: show(data))
    return 0


def measure(shapes: str, formats: str, q_heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> dict:
    """The table as data. Raises ValueError where MLX has no GPU."""
    from tqai_plugins.mlx_lm_plugin import speed

    from . import _parse

    names = formats.split(",")
    rows = list(speed.measure(names, _parse.shapes(shapes), q_heads, kv_heads, head_dim))
    shape = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return machine() | shape | {"rows": rows, "models": list(speed.decode_rates(names))}


def machine() -> dict:
    """This machine and its versions, for a report."""
    from importlib.metadata import version

    import mlx.core as mx

    from tqai_plugins.metal_kernels import launch

    info = mx.device_info()
    return {
        "device": str(info.get("device_name") or info.get("architecture") or platform.machine()), "backend": launch.backend(),
        "mlx": mx.__version__, "mlx_lm": version("mlx-lm"), "system": platform.platform(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def show(data: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "sequences x context", "cache", "attention, us", "x SDPA", "token stored and attended, us", "x SDPA", "building the call, us",
        title=f"{data['device']} ({data['backend']}), mlx {data['mlx']}; {data['q_heads']} query heads, "
        f"{data['kv_heads']} KV heads, head_dim {data['head_dim']}",
    )  # fmt: skip
    stock = {(r["sequences"], r["context"]): r for r in data["rows"] if "SDPA" in r["name"]}
    for r in data["rows"]:
        base = stock[r["sequences"], r["context"]]
        table.add_row(
            f"{r['sequences']} x {r['context']}", r["name"], f"{r['us']:.0f}", f"{base['us'] / r['us']:.2f}",
            *((f"{r['step_us']:.0f}", f"{base['step_us'] / r['step_us']:.2f}") if r["step_us"] else ("-", "-")),
            f"{r['build_us']:.0f}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print("Times of the device, in chains of calls that are queued before it comes to them; building a call in Python goes on beside it.")
    rates = ", ".join(f"{r['name']} {r['tokens_s']:.0f}" for r in data["models"])
    console.print(f"Tokens a second of SmolLM2-135M's sizes with random weights, one request: {rates}.")

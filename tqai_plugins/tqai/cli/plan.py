"""`tqai plan`: what fits a machine in each cache format, how fast it can be at most, and what was measured of its fidelity."""

from __future__ import annotations

import math
from pathlib import Path

from tqai_plugins.core.kv_format import DEFAULT_BITS, DEFAULT_NAME, SERVED_NAMES, format_name, parse_name

DEFAULT = format_name(*DEFAULT_BITS)
SHOWN = "bf16,fp8,tqai_k8v8,tqai_k8v4,tqai_k4v4,tqai_k4v3,tqai_k4v2,tqai_k3v3,tqai_k3v2,tqai_k2v2"


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("plan", help="what fits a machine, in each cache format")
    parser.add_argument("--model", required=True, help="Hugging Face id, folder, config.json, GGUF file or demo")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--machine", help="such as h100, a100-80, rtx4090, m4max-64 (the GPU here, else h100)")
    where.add_argument("--memory", help="GPU memory instead, such as 24GiB")
    where.add_argument("--cache-memory", help="memory of the cache alone, as vLLM's --kv-cache-memory-bytes")
    parser.add_argument("--bandwidth", type=float, help="GB/s that a copy reaches on the GPU, with --memory")
    parser.add_argument("--context", type=int, help="tokens of a request (8192, or less if the model reads less)")
    parser.add_argument("--concurrency", type=int, help="requests at once, for the speed (all that fit)")
    parser.add_argument("--runtime", default="vllm", choices=("vllm", "vllm-cpu", "transformers", "mlx"))
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share the model (1)")
    parser.add_argument("--utilization", type=float, help="share of the memory that the runtime takes (vLLM: 0.9)")
    parser.add_argument("--batched-tokens", type=int, help="tokens of a prefill step (vLLM: 8192)")
    parser.add_argument("--weight-bits", type=int, default=16, choices=(16, 32), help="of unquantized weights (16)")
    parser.add_argument("--twins", type=float, default=0, help="percent of the cache's memory for copies of recent pages (0)")
    parser.add_argument("--formats", default=SHOWN, help="comma-separated, or all (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of tokens and speed")
    add_json(parser)
    return parser


def run(args) -> int:
    from . import emit

    data = make(args)
    emit(args, data, lambda: show(data))
    if args.plot:
        plot(data, args.plot)
    return 0


def make(args) -> dict:
    """The plan as data; ValueError for arguments that are no good."""
    from tqai import model_shape, plan, results

    for name in ("context", "concurrency", "tensor_parallel", "batched_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed are 1 and more")
    if not 0 <= args.twins < 50:
        raise ValueError(f"--twins is {args.twins}; allowed are 0 to 50 percent")
    if args.utilization is not None and not 0 < args.utilization <= 1:
        raise ValueError(f"--utilization is {args.utilization}; allowed are numbers above 0 and up to 1")
    if args.bandwidth is not None and not 0 < args.bandwidth < math.inf:
        raise ValueError(f"--bandwidth is {args.bandwidth}; allowed are GB/s above 0")
    machine = _machine(args, plan)
    shape = model_shape.read(args.model, args.weight_bits // 8)
    use = plan.Use(
        plan.RUNTIMES[args.runtime], args.context or min(8192, shape.max_context), args.tensor_parallel, args.twins / 100,
        args.batched_tokens, args.utilization, plan.parse_bytes(args.cache_memory) if args.cache_memory else None,
    )  # fmt: skip
    where, divergences = results.divergences(served=args.runtime.startswith("vllm"))
    rows = []
    for name in _formats(args.formats):
        row = plan.plan(shape, machine, use, name)
        fits = int(row.requests)
        served = min(fits, args.concurrency or fits)
        divergence = 0.0 if name == "bf16" else divergences.get(DEFAULT if name == DEFAULT_NAME else name)
        rows.append(vars(row) | {
            "concurrency": served,
            "tokens_per_second_alone": plan.tokens_per_second(shape, machine, use, row, 1) if fits else None,
            "tokens_per_second": plan.tokens_per_second(shape, machine, use, row, served) if served else None,
            "kld": divergence,
            "fidelity": None if divergence is None else results.fidelity_class(divergence, divergences["fp8"]),
        })  # fmt: skip
    return {
        "model": args.model, "machine": machine.name, "memory_bytes": machine.memory, "bandwidth": machine.bandwidth,
        "runtime": args.runtime, "context": use.context, "tensor_parallel": args.tensor_parallel,
        "wanted_concurrency": args.concurrency, "fidelity_measured_on": where, "rows": rows,
        "layers": _count(shape),
    }  # fmt: skip


def _machine(args, plan):
    if args.memory:
        memory = plan.parse_bytes(args.memory)
        return plan.Machine(args.memory, memory, (args.bandwidth or 1000) * plan.GB)
    if args.machine:
        if args.machine not in plan.MACHINES:
            raise ValueError(f"--machine is {args.machine!r}; known are {', '.join(plan.MACHINES)}; or give --memory")
        return plan.MACHINES[args.machine]
    import torch

    if torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        known = [m for m in plan.MACHINES.values() if m.name.split("-")[0] in here.name.lower().replace(" ", "")]
        rate = min(known, key=lambda m: abs(m.memory - here.total_memory)).bandwidth if known else 1000 * plan.GB
        return plan.Machine(here.name, here.total_memory, rate)
    return plan.MACHINES["h100"]


def _formats(given: str) -> list[str]:
    if given == "all":
        return ["bf16", "fp8", *SERVED_NAMES[1:]]
    names = given.split(",")
    for name in names:
        if name not in ("bf16", "fp8"):
            parse_name(name)
    return names


def _count(shape) -> dict:
    kinds = {"full attention": 0, "sliding window": 0, "recurrent": 0}
    for layer in shape.layers:
        kinds["full attention"] += bool(layer.heads and layer.window is None)
        kinds["sliding window"] += bool(layer.heads and layer.window is not None)
        kinds["recurrent"] += bool(layer.state_bytes)
    return {kind: count for kind, count in kinds.items() if count}


def show(data: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    kinds = ", ".join(f"{count} {kind}" for kind, count in data["layers"].items())
    gpus = f"{data['tensor_parallel']} x {data['machine']}" if data["tensor_parallel"] > 1 else data["machine"]
    each = " a GPU" if data["tensor_parallel"] > 1 else ""
    first, last = data["rows"][0], data["rows"][-1]
    table = Table(
        "cache", "bytes", "tokens", "requests", "alone", "together", "fidelity", box=box.SIMPLE, padding=(0, 1), pad_edge=False,
        title=f"{Path(data['model']).name} ({kinds} layers), {gpus}, {data['runtime']}, requests of {data['context']:,}",
    )  # fmt: skip
    for column in table.columns[1:6]:
        column.justify = "right"
    for row in data["rows"]:
        speeds = ["-" if row[key] is None else f"{row[key]:,.0f}" for key in ("tokens_per_second_alone", "tokens_per_second")]
        known = row["kld"] is not None
        table.add_row(
            row["format"], f"{row['token_bytes']:,.0f}", f"{row['tokens']:,}", f"{row['requests']:,.1f}", *speeds,
            f"{row['fidelity']} {row['kld']:.4f}" if known else "not measured",
        )  # fmt: skip
    console = Console()
    console.print(table)
    lines = [
        f"Weights {first['weight_bytes'] / 1e9:.2f} GB{each}, cache {last['cache_bytes'] / 1e9:.2f} GB{each}.",
        "bytes: of one token; tokens: that fit; requests: at once; alone, together: tokens/s of one request, and of all that fit"
        + (f" (at most {data['wanted_concurrency']})" if data["wanted_concurrency"] else "")
        + ", if reading memory took all the time.",
    ]
    if data["fidelity_measured_on"]:
        lines.append(f"fidelity: mean KL divergence, nats, measured on {data['fidelity_measured_on']}.")
    short = [row["format"] for row in data["rows"] if row["concurrency"] < (data["wanted_concurrency"] or 0)]
    if short:
        lines.append(f"{data['wanted_concurrency']} requests do not fit with {', '.join(short)}.")
    console.print("\n".join(lines), highlight=False)


def plot(data: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = data["rows"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    names = [row["format"] for row in rows]
    colors = ["tab:blue" if name.startswith("tqai") else "tab:gray" for name in names]
    for axes, key, title in ((left, "tokens", "tokens that fit"), (right, "tokens_per_second", "tokens/s at most")):
        values = [row[key] or 0 for row in rows]
        bars = axes.barh(names, values, color=colors)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axes.set(title=title, xlim=(0, max(values) * 1.25))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.xaxis.set_major_locator(pyplot.MaxNLocator(4))
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    figure.suptitle(f"{Path(data['model']).name} on {data['machine']}, {data['runtime']}, requests of {data['context']:,} tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=130)

"""`tqai recommend`: how much each layer suffers from fewer bits, and a preset that says which gets how many."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

from tqai_plugins.core import json_file

CHECKED = ("full", "residual")


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("recommend", help="find which layers deserve more bits, and write a preset")
    parser.add_argument("--model", required=True, help="Hugging Face id, folder, GGUF file, demo or demo-gemma")
    parser.add_argument("--text", type=Path, help="text to read (a built-in one, long enough for two windows of 512)")
    parser.add_argument("--out", type=Path, default=Path("tqai-preset.json"), metavar="FILE", help="(%(default)s)")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--like", default="tqai_k4v2", metavar="FORMAT", help="as many bytes as this format (%(default)s)"
    )
    goal.add_argument("--budget", type=float, metavar="NATS", help="the fewest bytes within this mean KL divergence")
    parser.add_argument("--widths", default="2,3,4,8", help="widths to choose from (%(default)s)")
    parser.add_argument("--sink-tokens", type=int, default=0, help="first tokens that stay exact in the sweep (0)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window (512)")
    parser.add_argument("--windows", type=int, default=1, help="windows of the sweep (1)")
    parser.add_argument(
        "--check-windows", type=int, default=1, help="other windows, on which the preset is checked (1)"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw the sweep")
    add_json(parser)
    return parser


def run(args) -> int:
    import torch
    from tqai import models, sensitivity
    from tqai.configurations import head_dim_of

    from tqai_plugins.core.kv_format import KVFormat, format_name
    from tqai_plugins.core.preset import Preset

    from . import benchmark_quality, emit

    widths = _widths(args.widths)
    KVFormat.from_name(args.like, 64)
    limits = (
        ("--context", args.context, 64),
        ("--windows", args.windows, 1),
        ("--check-windows", args.check_windows, 0),
    )
    for name, value, lowest in limits:
        if value < lowest:
            raise ValueError(f"{name} is {value}; allowed are {lowest} and more")
    if args.budget is not None and not 0 < args.budget < math.inf:
        raise ValueError(f"--budget is {args.budget}; expected a number of nats above 0")
    if args.out.exists():
        raise ValueError(f"--out {args.out} is there already; give another name or remove it")
    text = benchmark_quality.read_text(args.text)
    model, tokenizer = models.load(args.model, torch.float32)
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = benchmark_quality.split_windows(tokens, args.context, args.windows + args.check_windows).to(model.device)
    head_dim, layers = head_dim_of(model.config), sensitivity.compressed_layers(model.config)

    settings = {
        "model": args.model, "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:16], "context": args.context,
        "windows": args.windows, "sink_tokens": args.sink_tokens,
    }  # fmt: skip
    wanted = sensitivity.trials(layers, widths)
    measured = _measure(args, model, windows[: args.windows], wanted, settings)
    mixes = sensitivity.best_mixes(sensitivity.costs(measured), head_dim)
    like = KVFormat.from_name(args.like, head_dim)
    if args.budget is None:
        mix = sensitivity.within_bytes(mixes, len(layers) * like.slot_bytes)
    else:
        mix = sensitivity.within_divergence(mixes, args.budget)
    formats = tuple((layer, format_name(*pair)) for layer, pair in mix.widths.items())
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    preset = Preset(Path(args.model).name, num_layers, head_dim, formats)
    uniform = [like] if args.budget is None else []
    data = settings | {
        "widths": widths, "num_layers": num_layers, "layers": dict(formats), "bits": preset.bits_per_element, "expected": mix.expected,
        "like": like.name if uniform else None, "like_bits": like.bits_per_element if uniform else None,
        "budget": args.budget,
        "sensitivity": {trial.key: measured[trial] for trial in wanted}, "machine": benchmark_quality.machine(),
        "check": _check(model, windows[args.windows :], mix.widths, uniform),
    }  # fmt: skip
    preset.write(args.out, {"command": args.command, **data})
    _partial(args.out).unlink(missing_ok=True)
    emit(args, {"out": str(args.out), **data}, lambda: show(data, args.out))
    if args.plot:
        plot(data, args.plot)
    return 0


def _widths(text: str) -> list[int]:
    from tqai_plugins.core.kv_format import SERVED_WIDTHS

    widths = sorted({int(part) for part in text.split(",") if part.isdigit()})
    if len(widths) != len(text.split(",")) or not set(widths) <= set(SERVED_WIDTHS) or 8 not in widths:
        allowed = ", ".join(map(str, SERVED_WIDTHS))
        raise ValueError(f"--widths is {text!r}; expected some of {allowed} with commas between, 8 among them")
    return widths


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def _measure(args, model, windows, wanted: list, settings: dict) -> dict:
    """All trials; those that an interrupted sweep has measured are read from its file."""
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn
    from tqai import sensitivity

    partial = _partial(args.out)
    state = {"settings": settings, "measured": {}}
    if partial.exists():
        try:
            state = json_file.read(partial)
        except ValueError as error:
            raise ValueError(f"{partial} is no part of a sweep ({error}); remove it, or give another --out") from error
        if state.get("settings") != settings:
            raise ValueError(f"{partial} is of a sweep with other settings; remove it, or give another --out")
    done = {trial: state["measured"][trial.key] for trial in wanted if trial.key in state["measured"]}
    left = [trial for trial in wanted if trial not in done]
    console = Console(stderr=True)
    if done:
        console.print(f"{len(done)} of {len(wanted)} measurements are in {partial}", soft_wrap=True)
    with Progress(*Progress.get_default_columns()[:3], TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("Measuring layers", total=len(wanted), completed=len(done))
        for trial, value in sensitivity.sweep(
            model, windows, left, {"cache_strategy": "full", "sink_tokens": args.sink_tokens}
        ):
            done[trial] = state["measured"][trial.key] = value
            fresh = partial.with_suffix(".new")
            fresh.write_text(json.dumps(state))
            os.replace(fresh, partial)
            progress.advance(task)
    return done


def _check(model, windows, widths: dict, uniform: list) -> list[dict]:
    """Divergence of the preset, and of a uniform format, on other windows: without and with exact tokens."""
    from tqai import Cache, fidelity

    from tqai_plugins.core.kv_format import format_name

    if not len(windows):
        return []
    options = {"preset": {"layer_formats": {layer: format_name(*pair) for layer, pair in widths.items()}}}
    options |= {fmt.name: {"bits_k": fmt.bits_k, "bits_v": fmt.bits_v} for fmt in uniform}
    kinds = {
        (name, strategy): given | {"cache_strategy": strategy}
        for name, given in options.items()
        for strategy in CHECKED
    }
    scores = {kind: fidelity.Score() for kind in (None, *kinds)}
    for window in windows:
        caches = {None: fidelity.DynamicCache(config=model.config)}
        caches |= {kind: Cache(model.config, **given) for kind, given in kinds.items()}
        fidelity.teacher_forced(model, window[None], len(window) // 2, caches, scores, 32)
    rows = []
    for name, strategy in kinds:
        row = {"name": name, "cache_strategy": strategy, **fidelity.stored_bits(caches[name, strategy])}
        row |= scores[name, strategy].summary()
        if name != "preset":
            pairs = zip(scores["preset", strategy].kld, scores[name, strategy].kld)
            row["more_than_preset"], row["more_error"] = fidelity.mean_and_error([b - a for a, b in pairs])
        rows.append(row)
    return rows


def show(data: dict, out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    by_format: dict[str, list[str]] = {}
    for layer, name in data["layers"].items():
        by_format.setdefault(name, []).append(str(layer))
    table = Table("format", "layers", box=box.SIMPLE)
    for name in sorted(by_format, reverse=True):
        table.add_row(name, ", ".join(by_format[name]))
    console.print(table)
    console.print(
        f"{out}: {data['bits']:.3f} bits an element, {data['expected']:.4f} nats expected. Use it with --config {out}, "
        f"tqai serve --mlx MODEL --kv-cache-dtype {out}{_vllm_use(data, out)}"
    )
    if not data["check"]:
        return
    table = Table(
        "on other text",
        "bits",
        "KL divergence, no exact tokens",
        "with the exact tokens of transformers",
        box=box.SIMPLE,
    )
    rows = {(row["name"], row["cache_strategy"]): row for row in data["check"]}
    for name in dict.fromkeys(name for name, _ in rows):
        both = [rows[name, strategy] for strategy in CHECKED]
        table.add_row(name, f"{both[0]['bits']:.3f}", *(f"{row['kld']:.5f} ± {row['kld_error']:.5f}" for row in both))
    console.print(table)
    for (name, strategy), row in rows.items():
        if "more_than_preset" in row:
            how = "no exact tokens" if strategy == "full" else "exact tokens"
            console.print(f"{how}: {verdict(row, name)}")


def _vllm_use(data: dict, out: Path) -> str:
    if data["num_layers"] != len(data["layers"]):
        return ". vLLM cannot serve it, since this model has layers of several kinds"
    return f""" or vllm serve MODEL --kv-cache-dtype tqai --additional-config '{{"tqai": {{"preset": "{out}"}}}}'"""


def verdict(row: dict, name: str) -> str:
    """Whether the preset is better than the uniform format of this row, by two standard errors of their difference."""
    more, error = row["more_than_preset"], row["more_error"]
    said = f"{name} diverges by {more:+.5f} ± {error:.5f} nats more"
    if not abs(more) > 2 * error:
        return f"no difference to be sure of ({said})"
    return f"the preset is {'better' if more > 0 else 'worse'} ({said})"


def plot(data: dict, path: str) -> None:
    """Draw what the command printed as JSON, or a preset file."""
    data = data.get("made", data)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, chosen = [int(layer) for layer in data["layers"]], list(data["layers"].values())
    figure, both = pyplot.subplots(2, 1, figsize=(9, 5), sharex=True)
    for axes, side, title in zip(both, "kv", ("keys", "values")):
        for bits in data["widths"]:
            name = f"tqai_k{bits}v8" if side == "k" else f"tqai_k8v{bits}"
            axes.semilogy(layers, [data["sensitivity"][f"{i} {name}"] for i in layers], ".-", label=f"{bits} bits")
        at = [int(name[6 if side == "k" else 8]) for name in chosen]
        names = [f"tqai_k{bits}v8" if side == "k" else f"tqai_k8v{bits}" for bits in at]
        heights = [data["sensitivity"][f"{i} {name}"] for i, name in zip(layers, names)]
        axes.semilogy(layers, heights, "o", markersize=11, markerfacecolor="none", color="black", label="chosen")
        axes.set(ylabel=f"{title}: KL divergence, nats")
        axes.grid(alpha=0.3)
    both[0].legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    both[1].set(xlabel="the one layer that is compressed", xticks=layers)
    figure.tight_layout()
    figure.savefig(path, dpi=130)

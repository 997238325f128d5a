"""`tqai benchmark forward`: the named configurations of cache and activations, their fidelity and speed.

Compressed activations are simulated: quantized and dequantized on their way, which costs time and saves no memory.
"""

from __future__ import annotations

import time
from pathlib import Path

from tqai_plugins.core.activations import CONFIGS, Activations

BASELINE = "baseline"


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser(
        "forward", help="named configurations of cache and activations: fidelity and speed", description=__doc__
    )
    parser.add_argument("--model", default="demo", help="Hugging Face id, folder, GGUF file, demo or demo-gemma (demo)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--configs", default=",".join(CONFIGS), help="(%(default)s)")
    chosen.add_argument("--all-configs", action="store_true", help="all of them, which is the default")
    parser.add_argument("--text", type=Path, help="text to read (a built-in one, long enough for --context 512)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window, the second half is scored (512)")
    parser.add_argument("--windows", type=int, default=2, help="windows, evenly spaced in the text (2)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens generated to measure speed (48)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of KL divergence and speed")
    add_json(parser)
    return parser


def run(args) -> int:
    import torch
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn
    from tqai import models

    from . import benchmark_quality, emit

    names = list(CONFIGS) if args.all_configs else args.configs.split(",")
    for name in names:
        if name not in CONFIGS:
            raise ValueError(f"--configs has {name!r}; known are {', '.join(CONFIGS)}")
    for name, value, lowest in (
        ("--context", args.context, 4),
        ("--windows", args.windows, 1),
        ("--tokens", args.tokens, 2),
    ):
        if value < lowest:
            raise ValueError(f"{name} is {value}; allowed are {lowest} and more")
    text = benchmark_quality.read_text(args.text)
    model, tokenizer = models.load(args.model, getattr(torch, args.dtype))
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = benchmark_quality.split_windows(tokens, args.context, args.windows).to(model.device)
    columns = *Progress.get_default_columns()[:3], TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Reading", total=windows.numel() - args.windows)
        rows = fidelity_rows(model, windows, names, lambda count: progress.advance(task, count))
        task = progress.add_task("Generating", total=len(rows))
        for row in rows:
            row |= speed_row(model, tokenizer, windows[:1], row["name"], args.tokens)
            progress.advance(task)
    for row in rows:
        row["same_tokens"] = sum(a == b for a, b in zip(row["generated"], rows[0]["generated"])) / args.tokens
    for row in rows:
        del row["generated"]
    data = {
        "model": args.model, "text": args.text.name if args.text else "built-in", "context": args.context,
        "windows": args.windows, "generated": args.tokens, "dtype": args.dtype, "machine": benchmark_quality.machine(),
        "rows": rows,
    }  # fmt: skip
    emit(args, data, lambda: show(data))
    if args.plot:
        plot(data, args.plot)
    return 0


def fidelity_rows(model, windows, names: list[str], step) -> list[dict]:
    """Perplexity and divergence of each configuration through the cache that generate() uses; the baseline first."""
    from tqai import Cache, fidelity

    split = {name: Activations.split(CONFIGS[name]) for name in names}
    scores = {name: fidelity.Score() for name in (BASELINE, *names)}
    for window in windows:
        caches = {BASELINE: fidelity.DynamicCache(config=model.config)}
        caches |= {name: Cache(model.config, **options) for name, (options, _) in split.items()}
        activations = {name: chosen for name, (_, chosen) in split.items()}
        fidelity.teacher_forced(model, window[None], len(window) // 2, caches, scores, 32, step, activations)
    rows = []
    for name, score in scores.items():
        stored = fidelity.stored_bits(caches[name]) if name in split else {"bits": 8.0 * model.dtype.itemsize}
        rows.append({"name": name, "options": CONFIGS.get(name, {}), **stored, **score.summary()})
    return rows


def speed_row(model, tokenizer, ids, name: str, count: int) -> dict:
    """Greedy generation of `count` tokens after `ids` [1, tokens]: seconds for the prompt, then tokens a second."""
    import torch
    from tqai import fidelity, patch, unpatch

    from ._generate import Clock

    cache = fidelity.DynamicCache(config=model.config) if name == BASELINE else patch(model, config=name)
    clock = Clock(lambda tokens: None)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, min_new_tokens=count, max_new_tokens=count,
            do_sample=False, streamer=clock, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip
    unpatch(model)
    return {
        "prompt_seconds": clock.times[1] - start, "tokens_per_second": (count - 1) / (clock.times[-1] - clock.times[1]),
        "cache_bytes": fidelity.cache_bytes(cache), "generated": out[0, ids.shape[1] :].tolist(),
    }  # fmt: skip


def show(data: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "perplexity", "change", "KL", "top-1", "same text", "tokens/s", "cache MB",
        box=box.SIMPLE, padding=(0, 1), pad_edge=False,
        title=f"{data['model']}: {data['windows']} windows of {data['context']} tokens, {data['generated']} generated",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    base = data["rows"][0]["perplexity"]
    for row in data["rows"]:
        table.add_row(
            row["name"], f"{row['perplexity']:.3f}", f"{row['perplexity'] / base - 1:+.2%}", f"{row['kld']:.5f}",
            f"{row['top1_agreement']:.1%}", f"{row['same_tokens']:.0%}", f"{row['tokens_per_second']:.1f}",
            f"{row['cache_bytes'] / 1e6:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print("KL: mean divergence from the baseline, nats; same text: generated tokens equal to the baseline's.")
    console.print(
        "Activations (hidden, ffn) are quantized and dequantized on their way: it costs time and saves no memory."
    )


def plot(data: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = data["rows"]
    names = [row["name"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    bars = left.barh(names, [row["kld"] for row in rows], xerr=[row["kld_error"] for row in rows], color="tab:blue")
    left.bar_label(bars, [f"{row['kld']:.4f}" for row in rows], padding=4, fontsize=8)
    left.set(xlabel="mean KL divergence, nats", xlim=(0, 1.3 * max(row["kld"] for row in rows)))
    colors = ["tab:gray"] + ["tab:blue"] * (len(rows) - 1)
    bars = right.barh(names, [row["tokens_per_second"] for row in rows], color=colors)
    right.bar_label(bars, [f"{row['tokens_per_second']:.1f}" for row in rows], padding=4, fontsize=8)
    right.set(xlabel="tokens a second", xlim=(0, 1.2 * max(row["tokens_per_second"] for row in rows)))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    figure.suptitle(f"{data['model']}, {data['dtype']}, {data['windows']} windows of {data['context']} tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=130)

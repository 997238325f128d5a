"""`tqai benchmark quality`: perplexity, KL divergence and top-1 agreement through the cache that generate() uses."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REFERENCE = "uncompressed"
DEFAULT_FORMATS = "k8v8,k4v4,k4v4:full,k4v2,k3v3"


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser(
        "quality", help="perplexity, KL divergence and top-1 agreement against the uncompressed model"
    )
    parser.add_argument(
        "--runtime", "--backend", default="transformers", choices=("transformers", "vllm", "mlx"),
        help="whose cache: transformers' (transformers), mlx-lm's, or that of `vllm serve`, which this starts for each format",
    )  # fmt: skip
    parser.add_argument("--model", default="demo", help="Hugging Face id, folder, GGUF file or demo (demo)")
    parser.add_argument("--text", type=Path, help="text to read (a built-in one, long enough for --context 512)")
    parser.add_argument(
        "--formats",
        help="k<bits>v<bits>, each with an optional :strategy or :sinks:window of its own and an optional "
        f"+mean: keys less their mean, learned first if the model's folder brings none, and +vector: vector_values ({DEFAULT_FORMATS}); for vllm a KV cache dtype with an optional :recent_memory",
    )  # fmt: skip
    parser.add_argument("--strategy", default="residual", choices=("residual", "full", "incremental"))
    parser.add_argument("--sink-tokens", type=int, help="4 with residual, else 0")
    parser.add_argument("--residual-window", type=int, default=128)
    parser.add_argument("--context", type=int, help="tokens of a window, the second half is scored (2048)")
    parser.add_argument("--windows", type=int, help="windows, evenly spaced in the text (4)")
    # 32 is the block in which the cache codes, so that every token sees what it would see in generation.
    parser.add_argument("--chunk", type=int, default=32, help="scored tokens are read so many at a time (32)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of KL divergence against bits")
    parser.add_argument(
        "--top-logprobs", type=int, default=1024, help="vllm: most probable tokens that are compared (%(default)s)"
    )
    parser.add_argument(
        "--ways", default=["prompt", "continuation"], type=lambda text: text.split(","), help="vllm: prompt,continuation or one of them"
    )
    parser.add_argument("--parallel", type=int, default=1, help="vllm: windows that are asked at once (1)")
    parser.add_argument("--server-args", default="", help="vllm: more arguments of `vllm serve`, as one string")
    add_json(parser)
    return parser


@dataclass(frozen=True)
class Entry:
    """One format of the list: the options of its cache, and whether it has key means."""

    name: str
    options: dict
    mean: bool

    @classmethod
    def parse(cls, text: str, args) -> Entry:
        """From a word of --formats; ValueError says what is expected."""
        found = re.fullmatch(r"(?:tqai_)?k([1-8])v([1-8])(?::(?:(\d+):(\d+)|(full|residual|incremental)))?(\+mean)?(\+vector)?", text)
        if not found:
            raise ValueError(
                f"--formats has {text!r}; expected k<bits>v<bits> with 1 to 8 bits, such as k4v2, k4v2:full "
                "or, for 4 sinks and a window of 64, k4v4:4:64; any of them with +mean, then +vector"
            )
        bits_k, bits_v, sinks, window, strategy, mean, vector = found.groups()
        options = {
            "bits_k": int(bits_k), "bits_v": int(bits_v),
            "cache_strategy": strategy or ("residual" if window else args.strategy),
            "sink_tokens": int(sinks) if sinks else args.sink_tokens,
            "residual_window": int(window) if window else args.residual_window,
            "vector_values": vector is not None,
        }  # fmt: skip
        return cls(text, options, mean is not None)


def run(args) -> int:
    if args.runtime == "vllm":
        from . import _benchmark_quality_vllm

        return _benchmark_quality_vllm.run(args)
    if args.runtime == "mlx":
        from . import _benchmark_quality_mlx

        return _benchmark_quality_mlx.run(args)
    import torch
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn
    from tqai import models

    from tqai_plugins.transformers_plugin import CacheOptions

    from . import emit, keep

    entries = [Entry.parse(text, args) for text in (args.formats or DEFAULT_FORMATS).split(",")]
    for entry in entries:
        CacheOptions.of(**entry.options)  # refuse before the model is loaded
    context = args.context or (2048 if args.text else 512)
    windows = args.windows or (4 if args.text else 2)
    for name, value, lowest in (("--context", context, 4), ("--windows", windows, 1), ("--chunk", args.chunk, 1)):
        if value < lowest:
            raise ValueError(f"{name} is {value}; allowed are {lowest} and more")
    text = read_text(args.text)
    model, tokenizer = models.load(args.model, getattr(torch, args.dtype))
    tokens = split_windows(tokenizer(text, return_tensors="pt").input_ids[0], context, windows).to(model.device)

    head = {
        "model": args.model, "text": args.text.name if args.text else "built-in", "context": context,
        "chunk": args.chunk, "dtype": args.dtype, "machine": machine(),
    }  # fmt: skip
    start = time.perf_counter()
    with Progress(*Progress.get_default_columns()[:3], TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("Reading", total=windows * (context - 1))
        new = makers(model, tokenizer, entries)
        measured = measure(model, tokens, entries, new, args.chunk, lambda done: progress.advance(task, done))
        for index, rows in enumerate(measured):
            seconds = time.perf_counter() - start
            data = head | {"windows": index + 1, "seconds": seconds, "rows": rows}
            keep(args, data)
            if not progress.console.is_terminal:
                progress.console.print(f"window {index + 1} of {windows} read, {seconds:.0f} s", soft_wrap=True)
    emit(args, data, lambda: show(data))
    if args.plot:
        plot(data, args.plot)
    unread = [row["name"] for row in rows if not row.get("vectors_dequantized", 1)]
    if unread:
        message = f"tqai: the compressed cache was never read ({', '.join(unread)}): the window covers the context"
        print(message, file=sys.stderr)
    return 1 if unread else 0


def makers(model, tokenizer, entries: list[Entry]) -> dict:
    """Name -> what makes a new cache of an entry for the model; key means are those of its folder, or learned now."""
    from tqai import Cache

    from tqai_plugins.transformers_plugin import key_balance, key_means

    factors, means = key_balance.of(model), None
    if any(entry.mean for entry in entries):
        means = key_means.of(model, key_means.stored(model) or key_means.learn(model, tokenizer))
    make = lambda e: functools.partial(Cache, model.config, key_factors=factors, key_means=means if e.mean else None, **e.options)
    return {entry.name: make(entry) for entry in entries}


def measure(model, tokens, entries: list[Entry], new: dict, chunk: int, step):
    """After each window of `tokens` [windows, context]: the rows of the table over all windows so far. new: of makers."""
    from tqai import fidelity

    scores = {name: fidelity.Score() for name in (REFERENCE, *fidelity.YARDSTICKS, *(e.name for e in entries))}
    counts = {e.name: [0, 0] for e in entries}
    for window in tokens:
        others = {REFERENCE: fidelity.DynamicCache(config=model.config)}
        others |= {name: fidelity.yardstick(model.config, name) for name in fidelity.YARDSTICKS}
        compressed = {e.name: new[e.name]() for e in entries}
        fidelity.teacher_forced(model, window[None], len(window) // 2, others | compressed, scores, chunk, step)
        rows = [{"name": REFERENCE, "bits": 8.0 * model.dtype.itemsize} | scores[REFERENCE].summary()]
        rows += [{"name": n, "bits": bits} | scores[n].summary() for n, (_, bits) in fidelity.YARDSTICKS.items()]
        for entry in entries:
            cache, count = compressed[entry.name], counts[entry.name]
            count[0] += cache.vectors_quantized
            count[1] += cache.vectors_dequantized
            row = {"name": entry.name, "options": entry.options, **fidelity.stored_bits(cache)}
            row |= {"coded_tokens": fidelity.coded_tokens(cache), "key_mean_layers": cache.key_mean_layers, **scores[entry.name].summary()}
            rows.append(row | {"vectors_quantized": count[0], "vectors_dequantized": count[1]})
        yield rows


def read_text(path: Path | None) -> str:
    """The text of a file, or the built-in one."""
    if path is None:
        from tqai_plugins.core.texts import PROSE

        return PROSE
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 text") from error


def split_windows(tokens, context: int, windows: int):
    """[windows, context] of a token sequence, a tensor or an array: evenly spaced and not overlapping."""
    import numpy as np

    if len(tokens) < context * windows:
        raise ValueError(
            f"the text has {len(tokens)} tokens but {windows} windows of {context} need {context * windows}; "
            "give a longer --text, or less --windows or --context"
        )
    stride = len(tokens) // windows
    return tokens[np.arange(windows)[:, None] * stride + np.arange(context)]


def machine(*packages: str) -> dict:
    """This machine, and the versions of some packages (torch and transformers)."""
    versions = {name: importlib.metadata.version(name) for name in packages or ("torch", "transformers")}
    gpu = {}
    if "torch" in versions:
        import torch

        gpu = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu_cores": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), **gpu, **versions,
    }  # fmt: skip


def show(data: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    base = data["rows"][0]["perplexity"]
    table = Table(
        "cache", "bits", "perplexity", "change", "KL divergence", "top-1",
        title=f"{data['model']}: {data['windows']} windows of {data['context']} tokens, second halves scored",
    )  # fmt: skip
    for row in data["rows"]:
        table.add_row(
            row["name"], f"{row['bits']:.2f}", f"{row['perplexity']:.3f} ± {row['perplexity_error']:.2f}",
            f"{row['perplexity'] / base - 1:+.2%}", f"{row['kld']:.5f} ± {row['kld_error']:.5f}",
            f"{row['top1_agreement']:.1%}",
        )  # fmt: skip
    Console().print(table)


def plot(data: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for row in data["rows"][1:]:
        color = "tab:blue" if "vectors_quantized" in row else "tab:gray"
        axes.errorbar(row["bits"], row["kld"], yerr=row["kld_error"], fmt="o", color=color, capsize=3)
        axes.annotate(row["name"], (row["bits"], row["kld"]), textcoords="offset points", xytext=(6, 3), fontsize=8)
    axes.set(
        xlabel="stored bits an element, exact tokens included", ylabel="mean KL divergence, nats", yscale="log",
        title=f"{data['model']}, {data['windows']} windows of {data['context']} tokens",
    )  # fmt: skip
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)

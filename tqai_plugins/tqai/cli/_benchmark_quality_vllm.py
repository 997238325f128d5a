"""`tqai benchmark quality --runtime vllm`: one `vllm serve` after another, asked through its own HTTP API.

Two ways to read a window, both scored on its second half: as one prompt, whose chunks of --chunk tokens attend to
codes of what came before (prompt log-probabilities, of the --top-logprobs likeliest tokens), and as a forced continuation,
decoded token by token (all logits, which the server leaves in a folder).
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from ._vllm_server import Entry, Server, served_folder, stored_bits
from .benchmark_quality import REFERENCE, machine, read_text, split_windows

DEFAULT_FORMATS = "fp8,k8v8,k4v4,k4v4:0,k4v2,k4v2:0,k3v3"
WAYS = {"prompt": "as a prompt in chunks", "continuation": "as a forced continuation"}


def run(args) -> int:
    from tqai import fidelity
    from transformers import AutoTokenizer

    from . import emit, keep

    context, windows = args.context or (2048 if args.text else 512), args.windows or (4 if args.text else 2)
    entries = [Entry(REFERENCE, "auto"), *map(Entry.parse, (args.formats or DEFAULT_FORMATS).split(","))]
    folder = served_folder(args.model)
    ids = AutoTokenizer.from_pretrained(folder)(read_text(args.text), return_tensors="pt").input_ids[0]
    tokens = split_windows(ids, context, windows).tolist()
    head = {
        "model": args.model, "text": args.text.name if args.text else "built-in", "runtime": "vllm", "context": context,
        "chunk": args.chunk, "dtype": args.dtype, "windows": windows, "top_logprobs": args.top_logprobs,
        "parallel": args.parallel, "server_args": args.server_args, "machine": machine("torch", "vllm"),
    }  # fmt: skip
    ways = [way for way in WAYS if way in args.ways]
    forced = "continuation" in ways
    reference, rows, start = {}, [], time.perf_counter()
    for entry in entries:
        row = {"name": entry.name, "dtype": entry.dtype, **stored_bits(entry.dtype, folder, args.dtype)}
        try:
            with Server(folder, args, context, entry.options, forced) as server, ThreadPoolExecutor(args.parallel) as pool:
                for way in ways:
                    score = fidelity.Score()
                    found = pool.map(getattr(server, way), tokens)
                    for i, (window, mine) in enumerate(zip(tokens, found)):
                        _score(score, window[context // 2 :], mine, reference.setdefault((way, i), mine))
                    row[way] = score.summary()
                row |= server.counts()
        except OSError as error:
            row["why"] = str(error)
        rows.append(row)
        data = head | {"seconds": time.perf_counter() - start, "rows": rows}
        keep(args, data)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if entry.name == REFERENCE and "why" in row:
            raise OSError(f"the uncompressed server did not answer: {row['why']}")
    emit(args, data, lambda: show(data))
    if args.plot:
        plot(data, args.plot)
    return 1 if any("why" in row for row in rows if row["dtype"].startswith("tqai")) else 0


def _score(score, targets: list[int], found, expected) -> None:
    """Tokens that two servers predicted, from all logits [tokens, vocabulary] or the likeliest tokens of each."""
    import torch

    if isinstance(found, torch.Tensor):
        score.add(found, expected, torch.tensor(targets))
        return
    for target, mine, theirs in zip(targets, found, expected, strict=True):
        _add(score, target, mine, theirs)


def _add(score, target: int, found: dict[int, float], expected: dict[int, float]) -> None:
    """One predicted token; what either server did not name is one more outcome, so that the divergence is a lower
    bound (with 1,024 of SmolLM2's 49,152 tokens some 4 % low, with 256 some 11 %)."""
    import math

    both = found.keys() & expected.keys()
    rest = [max(1 - sum(math.exp(x[token]) for token in both), 1e-12) for x in (expected, found)]
    divergence = sum(math.exp(expected[token]) * (expected[token] - found[token]) for token in both)
    score.kld.append(divergence + rest[0] * math.log(rest[0] / rest[1]))
    score.nll.append(-found[target])
    score.same.append(float(max(found, key=found.get) == max(expected, key=expected.get)))


def show(data: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"vLLM {data['machine'].get('vllm')}, {data['model']}: {data['windows']} windows of {data['context']} tokens")
    ways = {way: words for way, words in WAYS.items() if way in data["rows"][0]}
    heads = ["cache", "bits", "tokens that fit", *(f"{words}: KL divergence (top-1)" for words in ways.values()), "from copies"]
    for name in heads:
        table.add_column(name)
    for row in data["rows"]:
        if "why" in row:
            table.add_row(row["name"], f"{row['bits']:.2f}", "", row["why"])
            continue
        scores = [f"{row[way]['kld']:.5f} ± {row[way]['kld_error']:.5f} ({row[way]['top1_agreement']:.1%})" for way in ways]
        share = f"{row['recent_from_copies']:.1%}" if "recent_from_copies" in row else "-"
        table.add_row(row["name"], f"{row['bits']:.2f}", f"{row.get('kv_tokens', 0):,}", *scores, share)
    Console(width=160).print(table)


def plot(data: dict, path: str) -> None:
    """KL divergence against bits, one colour for each way of reading."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = [row for row in data["rows"][1:] if "why" not in row]
    for way, words in ((way, words) for way, words in WAYS.items() if way in data["rows"][0]):
        line = axes.errorbar(
            [row["bits"] for row in rows], [row[way]["kld"] for row in rows], yerr=[row[way].get("kld_error", 0) for row in rows],
            fmt="o", capsize=3, label=words,
        )  # fmt: skip
        for row in rows:
            # What leaves a step out stands left of its point, so that it does not hide the format as it is.
            at = {"xytext": (-6, -3), "ha": "right"} if ":" in row["name"] else {"xytext": (6, 3)}
            at |= {"textcoords": "offset points", "fontsize": 8, "color": line[0].get_color()}
            axes.annotate(row["name"], (row["bits"], row[way]["kld"]), **at)
    axes.set(
        xlabel="stored bits an element", ylabel="mean KL divergence, nats", yscale="log",
        title=f"vLLM {data['machine'].get('vllm')}, {data['model']}, {data['windows']} windows of {data['context']} tokens",
    )  # fmt: skip
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)

"""`tqai benchmark needle`: is one sentence of a long text found again through a compressed cache?

A text of each length of --contexts has the sentence "The pass number of Bergen is 4817." at each of --depths. When the cache holds
it all, the sentence's beginning is given again, and the number is scored: whether each of its tokens is the likeliest, as it must be to be
written, and the probability of all. Beginning and number are read token by token or, by transformers, as one piece behind the prompt,
which is read once for all caches that see a prompt exactly.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqai_plugins.core.kv_format import is_tqai

from ._parse import fractions, numbers
from .benchmark_quality import REFERENCE, Entry, machine, makers, read_text

DEFAULT_FORMATS = {"transformers": "k8v8,k4v4,k4v2,k3v3", "vllm": "fp8,k8v8,k4v4,k4v2,k3v3"}
COUNTS = ("vectors_quantized", "vectors_dequantized")  # of a cache, which prove that codes were made and read
DEFAULT_CONTEXTS = "512,1024,2048,4096"
PLACES = ("Bergen", "Cork", "Delft", "Lugo", "Oslo", "Parma", "Riga", "Turku")


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("needle", help="find one sentence of a long text again, at every depth")
    parser.add_argument(
        "--runtime", default="transformers", choices=("transformers", "vllm"),
        help="whose cache: transformers' (transformers), or that of `vllm serve`, which this starts for each format",
    )  # fmt: skip
    parser.add_argument("--model", default="demo", help="Hugging Face id, folder or demo (demo)")
    parser.add_argument("--text", type=Path, help="the hay (a built-in text, again and again)")
    parser.add_argument("--formats", help="as of `tqai benchmark quality`")
    parser.add_argument("--contexts", help=f"tokens ({DEFAULT_CONTEXTS}, or those that the model reads)")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="from 0 to 1 (%(default)s)")
    parser.add_argument("--needles", type=int, default=4, help="sentences at each place, one at a time (4)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--chunk", type=int, default=512, help="vllm: prompts are read so many tokens at a time (512)")
    parser.add_argument("--parallel", type=int, default=1, help="vllm: texts that are asked at once (1)")
    parser.add_argument("--server-args", default="", help="vllm: more arguments of `vllm serve`, as one string")
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of what was found where")
    parser.set_defaults(strategy="residual", sink_tokens=None, residual_window=128, top_logprobs=1)
    add_json(parser)
    return parser


@dataclass(frozen=True)
class Case:
    """A text with a needle, the beginning of its sentence, and the tokens that are to follow."""

    context: int
    depth: float
    prompt: list[int]
    asked: list[int]
    answer: list[int]


def make_cases(encode: Callable[[str], list[int]], hay: str, contexts: list[int], depths: list[float], needles: int) -> list[Case]:
    """So many for each context and depth. ValueError for a context with no room for hay, and for no hay."""
    tokens, source, cases = encode(hay), random.Random(0), []
    if not tokens:
        raise ValueError("--text has no text")
    for context, depth, i in itertools.product(contexts, depths, range(needles)):
        asked = f"\nThe pass number of {PLACES[i % len(PLACES)]} is"
        question, whole, needle = map(encode, (asked, f"{asked} {(number := source.randint(1000, 9999))}", f"{asked} {number}.\n"))
        room = context - len(needle) - len(whole)
        if room < len(needle):
            raise ValueError(f"--contexts has {context}, which has no room for hay; give {2 * len(needle) + len(whole)} and more")
        straw = list(itertools.islice(itertools.cycle(tokens), room))
        at = round(depth * room)
        cases.append(Case(context, depth, straw[:at] + needle + straw[at:], question, whole[len(question) :]))
    return cases


def run(args) -> int:
    from . import emit, keep

    if args.needles < 1:
        raise ValueError(f"--needles is {args.needles}; allowed are 1 and more")
    contexts, depths = numbers(args.contexts, "--contexts") if args.contexts else None, fractions(args.depths, "--depths")
    hay = read_text(args.text)
    head = {
        "model": args.model, "text": args.text.name if args.text else "built-in", "runtime": args.runtime, "needles": args.needles,
        "dtype": args.dtype, "machine": machine("torch", args.runtime),
    }  # fmt: skip
    make = lambda tokenizer, config: make_cases(_encoder(tokenizer), hay, _contexts(contexts, config), depths, args.needles)
    for done in (_served if args.runtime == "vllm" else _generated)(args, make):
        data = head | done
        keep(args, data)
    emit(args, data, lambda: show(data))
    if args.plot:
        plot(data, args.plot)
    rows = data["rows"]
    unread = [row["name"] for row in rows if 0 in (row.get("vectors_dequantized"), row.get("tokens_read"))]
    if unread:
        print(f"tqai: no codes were read ({', '.join(unread)}): the exact tokens cover the contexts", file=sys.stderr)
    return int(bool(unread) or any("why" in row and row["name"] != "fp8" for row in rows))


def _encoder(tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def _contexts(wanted: list[int] | None, config) -> list[int]:
    """Those, or the default ones that a model of this config reads; ValueError for more than it reads."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if wanted and max(wanted) > most:
        raise ValueError(f"--contexts has {max(wanted)}, but the model reads at most {most} tokens")
    return wanted or [context for context in numbers(DEFAULT_CONTEXTS, "--contexts") if context <= most] or [most]


def _generated(args, make) -> Iterator[dict]:
    """After each needle the rows of all caches of transformers over the needles so far, at every place."""
    import torch
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn
    from tqai import models

    entries = [Entry.parse(text, args) for text in (args.formats or DEFAULT_FORMATS["transformers"]).split(",")]
    model, tokenizer = models.load(args.model, getattr(torch, args.dtype))
    cases = make(tokenizer, model.config)
    new = makers(model, tokenizer, entries)
    read: list[Case] = []
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in (REFERENCE, *new)}
    counts = {name: dict.fromkeys(COUNTS, 0) for name in new}
    with Progress(*Progress.get_default_columns()[:3], TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("Reading", total=sum(case.context for case in cases))
        for i in range(args.needles):
            for case in cases[i :: args.needles]:
                for name, (logits, cache) in answers(model, case, new).items():
                    scores[name].append(score(case, logits))
                    for count in counts.get(name, ()):
                        counts[name][count] += getattr(cache, count)
                read.append(case)
                progress.advance(task, case.context)
            rows = [{"name": name, "cells": cells(read, found), **counts.get(name, {})} for name, found in scores.items()]
            if not progress.console.is_terminal:
                shares = ", ".join(f"{row['name']} {mean(row['cells'], 'found'):.1%}" for row in rows)
                progress.console.print(f"{i + 1} of {args.needles} needles: {shares}", soft_wrap=True)
            yield {"needles": i + 1, "rows": rows}


def answers(model, case: Case, new: dict[str, Callable]) -> dict[str, tuple]:
    """Logits [answer tokens, vocabulary] of a text through a new cache of each kind, and that cache; the uncompressed one first."""
    import torch
    from tqai import fidelity

    prompt, forced = (torch.tensor([tokens], device=model.device) for tokens in (case.prompt, case.asked + case.answer[:-1]))
    with torch.inference_mode():
        exact = fidelity.DynamicCache(config=model.config)
        model(prompt, past_key_values=exact, logits_to_keep=1)
        caches = {REFERENCE: exact} | {name: fidelity.after_prompt(make(), model, prompt, exact) for name, make in new.items()}
        ask = lambda cache: model(forced, past_key_values=cache, logits_to_keep=len(case.answer)).logits[0]
        return {name: (ask(cache), cache) for name, cache in caches.items()}


def _served(args, make) -> Iterator[dict]:
    """After each server the rows so far, with why where one did not answer."""
    from transformers import AutoConfig, AutoTokenizer

    from ._vllm_server import Entry, Server, served_folder

    entries = [Entry.parse(text) for text in (args.formats or DEFAULT_FORMATS["vllm"]).split(",")]
    folder = served_folder(args.model)
    cases = make(AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder))
    longest = max(case.context for case in cases)
    ask = lambda server, case: score(case, server.write(case.prompt, case.asked + case.answer)[-len(case.answer) :])
    rows: list[dict] = []
    for entry in (Entry(REFERENCE, "auto"), *entries):
        try:
            with Server(folder, args, longest, entry.options) as server, ThreadPoolExecutor(args.parallel) as pool:
                found = cells(cases, list(pool.map(ask, itertools.repeat(server), cases)))
                rows.append({"name": entry.name, "cells": found, **(server.counts() if is_tqai(entry.dtype) else {})})
                print(f"{entry.name}: {mean(found, 'found'):.1%}", file=sys.stderr, flush=True)
        except OSError as error:
            if entry.name == REFERENCE:
                raise
            rows.append({"name": entry.name, "why": str(error)})
            print(f"{entry.name}: {error}", file=sys.stderr, flush=True)
        yield {"rows": rows}


def score(case: Case, logits) -> tuple[float, float]:
    """By the logits [answer tokens, vocabulary]: 1 if the number would be written, else 0, and its log-probability, in nats."""
    import torch

    answer = torch.tensor(case.answer, device=logits.device)
    return float((logits.argmax(-1) == answer).all()), logits.float().log_softmax(-1).gather(1, answer[:, None]).sum().item()


def cells(cases: list[Case], scores: list[tuple[float, float]]) -> list[dict]:
    """Of each context and depth the share of needles that were found and the mean log-probability of their numbers."""
    places: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for case, found in zip(cases, scores, strict=True):
        places.setdefault((case.context, case.depth), []).append(found)
    averages = {at: [sum(x) / len(x) for x in zip(*found)] for at, found in places.items()}
    return [{"context": c, "depth": d, "found": found, "logprob": logprob} for (c, d), (found, logprob) in averages.items()]


def mean(found: list[dict], what: str, **where) -> float:
    """Of "found" or "logprob" over the cells where context or depth are as given."""
    values = [cell[what] for cell in found if all(cell[name] == value for name, value in where.items())]
    return sum(values) / len(values)


def show(data: dict) -> None:
    """Found, and log-probability, by cache and context."""
    from rich.console import Console
    from rich.table import Table

    contexts = dict.fromkeys(cell["context"] for cell in data["rows"][0]["cells"])
    table = Table("cache", *(f"{context:,} tokens" for context in contexts), title=f"{data['model']}, {data['runtime']}: found (log-probability)")
    for row in data["rows"]:
        if "why" in row:
            table.add_row(row["name"], row["why"])
            continue
        of = lambda context, what, found=row["cells"]: mean(found, what, context=context)
        table.add_row(row["name"], *(f"{of(c, 'found'):.1%} ({of(c, 'logprob'):.2f})" for c in contexts))
    Console(width=160).print(table)


def plot(data: dict, path: str) -> None:
    """A map of depths and contexts for each cache: the share found as its colour and number, and the log-probability."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in data["rows"] if "why" not in row]
    contexts, depths = (list(dict.fromkeys(cell[name] for cell in rows[0]["cells"])) for name in ("context", "depth"))
    figure, maps = pyplot.subplots(1, len(rows), figsize=(1 + 2.2 * len(rows), 3.6), sharey=True, squeeze=False, layout="constrained")
    for axes, row in zip(maps[0], rows, strict=True):
        of = lambda what, c, d, found=row["cells"]: mean(found, what, context=c, depth=d)
        axes.imshow([[of("found", c, d) for c in contexts] for d in depths], vmin=0, vmax=1, cmap="RdYlGn", alpha=0.6, aspect="auto")
        for (y, d), (x, c) in itertools.product(enumerate(depths), enumerate(contexts)):
            axes.text(x, y, f"{of('found', c, d):.0%}\n{of('logprob', c, d):.1f}", ha="center", va="center", fontsize=8)
        axes.set(title=row["name"], xlabel="tokens", xticks=range(len(contexts)), xticklabels=contexts, yticks=range(len(depths)), yticklabels=depths)
    maps[0][0].set_ylabel("depth")
    figure.suptitle(f"{data['model']}, {data['runtime']}: found of {data['needles']} needles at each place, and mean log-probability of their numbers")
    figure.savefig(path, dpi=130)

"""`tqai compare`: one prompt with the uncompressed and with the compressed cache, side by side."""

from __future__ import annotations

from ._generate import activations_of, add_cache_options, add_model, cache_options, generate, load, prompt_tokens


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("compare", help="both answers, memory, speed and fidelity for one prompt")
    parser.add_argument("prompt", metavar="PROMPT")
    add_model(parser)
    add_cache_options(parser, max_tokens=128)
    add_json(parser)
    return parser


def run(args) -> int:
    from . import emit

    data = compare(args, args.prompt)
    emit(args, data, lambda: show(data))
    return 0


def compare(args, prompt: str) -> dict:
    """Generate with both caches, then feed both the baseline's own text, token by token, to compare predictions."""
    options, activations = cache_options(args), activations_of(args)
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from tqai import fidelity, patch, unpatch
    from transformers import DynamicCache

    model, tokenizer = load(args)
    ids = prompt_tokens(model, tokenizer, prompt)
    new_caches = {
        "baseline": lambda: DynamicCache(config=model.config),
        "tqai": lambda: patch(model, **options),
    }
    answers = {}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name, new_cache in new_caches.items():
            task = progress.add_task(f"Answering ({name})", total=args.max_tokens + 1)
            step = lambda tokens, task=task: progress.advance(task)
            answers[name] = generate(model, tokenizer, ids, new_cache(), args.max_tokens, step)
            progress.update(task, total=len(answers[name].tokens) + 1)
        caches = {name: new_cache() for name, new_cache in new_caches.items()}
        unpatch(model)  # the hooks on activations: from here on they are for one of the two
        own = torch.tensor([answers["baseline"].tokens], device=ids.device)
        forced = torch.cat([ids, own], 1)
        task = progress.add_task("Comparing predictions", total=forced.shape[1] - 1)
        scores = {name: fidelity.Score() for name in caches}
        fidelity.teacher_forced(
            model, forced, ids.shape[1], caches, scores, 1, lambda count: progress.advance(task, count),
            {"tqai": activations},
        )  # fmt: skip
    summary = scores["tqai"].summary()
    stored = {name: fidelity.cache_bytes(cache) for name, cache in caches.items()}
    cache = caches["tqai"]
    first, second = (answer.tokens for answer in answers.values())
    return {
        "model": args.model, "dtype": args.dtype, "cache": repr(cache), "activations": vars(activations),
        "prompt_tokens": ids.shape[1],
        "first_differing_token": first_difference(first, second),
        "cached_tokens": forced.shape[1] - 1, "coded_tokens": fidelity.coded_tokens(cache),
        "vectors_quantized": cache.vectors_quantized, "vectors_dequantized": cache.vectors_dequantized,
        "ratio": stored["baseline"] / stored["tqai"],
        "kld": summary["kld"], "kld_error": summary["kld_error"], "top1_agreement": summary["top1_agreement"],
        "scored_tokens": summary["tokens"],
        **{name: {
            "text": answer.text, "tokens": len(answer.tokens), "prompt_seconds": answer.prompt_seconds,
            "tokens_per_second": answer.tokens_per_second, "cache_bytes": stored[name],
        } for name, answer in answers.items()},
    }  # fmt: skip


def first_difference(first: list[int], second: list[int]) -> int | None:
    """Index of the first token in which two answers differ, None if they are the same."""
    if first == second:
        return None
    same = (a == b for a, b in zip(first, second))
    return next((i for i, equal in enumerate(same) if not equal), min(len(first), len(second)))


def show(data: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    answers = Table("uncompressed", "tqai", title=f"{data['model']}, {data['prompt_tokens']} tokens of prompt")
    answers.add_row(escape(data["baseline"]["text"]), escape(data["tqai"]["text"]))
    numbers = Table("", "uncompressed", "tqai")
    baseline, tqai = data["baseline"], data["tqai"]
    numbers.add_row("tokens answered", str(baseline["tokens"]), str(tqai["tokens"]))
    speeds = (side["tokens_per_second"] for side in (baseline, tqai))
    numbers.add_row("tokens/s after the first", *("-" if speed is None else f"{speed:.1f}" for speed in speeds))
    numbers.add_row(
        f"cache of {data['cached_tokens']} tokens", f"{baseline['cache_bytes'] / 1e6:.2f} MB",
        f"{tqai['cache_bytes'] / 1e6:.2f} MB, {data['ratio']:.2f} times smaller",
    )  # fmt: skip
    numbers.add_row("tokens read from codes", "-", str(data["coded_tokens"]))
    where = data["first_differing_token"]
    numbers.add_row("first differing token", "-", "none" if where is None else f"{where + 1}")
    kld, top1 = f"{data['kld']:.5f}", f"{data['top1_agreement']:.1%}"
    numbers.add_row(f"mean KL divergence ({data['scored_tokens']} tokens)", "-", kld)
    numbers.add_row("same most probable token", "-", top1)
    console = Console()
    console.print(answers)
    console.print(numbers)
    if any(data["activations"][name] for name in ("compress_hidden", "compress_ffn")):
        console.print("Activations were quantized and dequantized: it costs time and saves no memory.")
    if not data["coded_tokens"]:
        console.print(
            "The text fits into the exact window, so nothing was compressed: use a longer prompt or --max-tokens"
        )

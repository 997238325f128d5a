"""`tqai run`: a model answers a prompt, with the compressed cache or (--no-tqai) with the library's own."""

from __future__ import annotations

from ._generate import activations_of, add_cache_options, add_model, cache_options, generate, load, prompt_tokens


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("run", help="answer a prompt with a compressed cache")
    parser.add_argument("prompt", metavar="PROMPT")
    add_model(parser)
    add_cache_options(parser, max_tokens=256)
    parser.add_argument("--no-tqai", action="store_true", help="use the uncompressed cache of transformers instead")
    add_json(parser)
    return parser


def run(args) -> int:
    options = cache_options(args)
    from rich.console import Console
    from tqai import fidelity, patch
    from transformers import DynamicCache, TextStreamer

    from . import emit

    model, tokenizer = load(args)
    ids = prompt_tokens(model, tokenizer, args.prompt)
    cache = DynamicCache(config=model.config) if args.no_tqai else patch(model, **options)
    streamer = None if args.json == "-" else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    done = generate(model, tokenizer, ids, cache, args.max_tokens, streamer.put if streamer else lambda tokens: None)
    if streamer:
        streamer.end()
    data = {
        "model": args.model, "prompt_tokens": ids.shape[1], "text": done.text, "new_tokens": len(done.tokens),
        "prompt_seconds": done.prompt_seconds, "seconds": done.seconds, "tokens_per_second": done.tokens_per_second,
        "cache": repr(cache) if not args.no_tqai else "uncompressed", "cache_bytes": fidelity.cache_bytes(cache),
        "coded_tokens": 0 if args.no_tqai else fidelity.coded_tokens(cache),
        "activations": None if args.no_tqai else vars(activations_of(args)),
    }  # fmt: skip

    def show():
        speed = f"{done.tokens_per_second:.1f} tokens/s after the first, " if done.tokens_per_second else ""
        Console(stderr=True).print(
            f"{data['prompt_tokens']} + {data['new_tokens']} tokens, {speed}"
            f"cache {data['cache_bytes'] / 1e6:.2f} MB, {data['coded_tokens']} tokens of it as codes",
            style="dim",
        )

    emit(args, data, show)
    return 0

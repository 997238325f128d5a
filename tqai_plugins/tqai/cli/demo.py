"""`tqai demo`: the embedded model answers a built-in prompt, uncompressed and compressed."""

from __future__ import annotations

from ._generate import add_cache_options


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("demo", help="a small model answers with and without compression")
    add_cache_options(parser, max_tokens=48)
    add_json(parser)
    return parser


def run(args) -> int:
    from tqai import models

    from tqai_plugins.core.texts import DEMO_PROMPT

    from . import compare, emit

    args.model = models.DEMO
    data = compare.compare(args, DEMO_PROMPT)
    emit(args, data, lambda: compare.show(data))
    return 0

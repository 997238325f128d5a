"""`tqai serve --mlx MODEL`: mlx-lm's own server with compressed caches."""

from __future__ import annotations

import argparse


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "serve", help="serve a model with mlx-lm's own server (for vLLM: vllm serve MODEL --kv-cache-dtype tqai)"
    )
    parser.add_argument(
        "--mlx", nargs=argparse.REMAINDER, required=True, metavar="MODEL",
        help="the model, and then any flag of mlx_lm.server, --kv-cache-dtype, --sink-tokens, --residual-window, "
        "--vector-values, --cache-strategy; --mlx --help prints them",
    )  # fmt: skip
    return parser


def run(args) -> int:
    given = args.mlx
    if not given:
        raise ValueError("--mlx needs a model: tqai serve --mlx MODEL [flags of mlx_lm.server]")
    try:
        from tqai_plugins.mlx_lm_plugin import server

        server.main(given if given[0].startswith("-") else ["--model", *given])
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install mlx-lm with: pip install 'tqai[mlx]'") from error
    return 0

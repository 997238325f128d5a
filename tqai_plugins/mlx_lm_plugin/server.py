"""mlx-lm's own server with compressed caches: python -m tqai_plugins.mlx_lm_plugin.server --model MODEL ...

Every flag of mlx_lm.server works, and these:
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable

from ..core.kv_format import DEFAULT_NAME, parse_name

REPLACED = ("--kv-bits", "--kv-group-size", "--quantized-kv-start")  # mlx-lm's own quantized cache


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of the cache; the format's names are vLLM's."""
    parser.add_argument("--kv-cache-dtype", default=DEFAULT_NAME, help="tqai (4 and 2 bits) or tqai_k<bits>v<bits>")
    parser.add_argument("--sink-tokens", type=int, help="first tokens that stay exact (4)")
    parser.add_argument("--residual-window", type=int, default=128, help="newest tokens that stay exact (128)")
    parser.add_argument("--cache-strategy", default="auto", help="auto (residual), residual, full or incremental")


def cache_options(args: argparse.Namespace) -> dict:
    """Keyword arguments of install, checked; ValueError says what is wrong."""
    from .options import CacheOptions

    bits_k, bits_v = parse_name(args.kv_cache_dtype)
    options = {
        "bits_k": bits_k, "bits_v": bits_v, "sink_tokens": args.sink_tokens,
        "residual_window": args.residual_window, "cache_strategy": args.cache_strategy,
    }  # fmt: skip
    CacheOptions.of(**options)
    return options


def with_caches(load: Callable, options: dict, refused: Callable[[ValueError], None] | None = None) -> Callable:
    """mlx_lm's load or sharded_load, whose models get compressed caches."""
    from .patching import install

    @functools.wraps(load)
    def loaded(*args, **kwargs):
        result = load(*args, **kwargs)
        try:
            install(result[0], **options)
        except ValueError as error:
            if refused:
                refused(error)
            raise
        return result

    return loaded


def main(argv: list[str] | None = None) -> None:
    """Run the server. Ends the process with code 2 and one sentence if the model cannot be served."""
    parser = argparse.ArgumentParser(prog="tqai serve --mlx", description=__doc__, add_help=False, allow_abbrev=False)
    add_options(parser)
    argv = sys.argv[1:] if argv is None else argv
    args, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    for flag in rest:
        if flag.split("=")[0] in REPLACED:
            raise ValueError(f"{flag.split('=')[0]} asks for mlx-lm's quantized cache; leave it out, or run mlx_lm.server")
    options = cache_options(args)

    from mlx_lm import server

    from .compat import check_version

    check_version()

    def refused(error: ValueError) -> None:
        # The model is loaded in a thread, whose end the server would not notice.
        print(f"tqai: {error}", file=sys.stderr, flush=True)
        os._exit(2)

    server.load = with_caches(server.load, options, refused)
    server.sharded_load = with_caches(server.sharded_load, options, refused)
    sys.argv = ["mlx_lm.server", *rest]
    server.main()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError) as problem:
        sys.exit(f"tqai: {problem}")

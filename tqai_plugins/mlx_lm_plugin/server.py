"""mlx-lm's own server with compressed caches: python -m tqai_plugins.mlx_lm_plugin.server --model MODEL ...

Every flag of mlx_lm.server works, and these:
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..core import converted_folder, key_mean_file
from ..core.kv_format import parse_name
from ..core.preset import Preset

WAITING = 128  # connections that may wait to be served
REPLACED = ("--kv-bits", "--kv-group-size", "--quantized-kv-start")  # mlx-lm's own quantized cache


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of the cache; the format's names are vLLM's."""
    parser.add_argument(
        "--kv-cache-dtype", help="tqai (4 and 2 bits), tqai_k<bits>v<bits> or a preset file of `tqai recommend` "
        "(what a folder of `tqai convert` is for, or tqai)",
    )  # fmt: skip
    parser.add_argument(
        "--vector-values", action="store_true", help="code 2-bit values four coordinates at once, which is closer"
    )
    parser.add_argument("--sink-tokens", type=int, help="first tokens that stay exact (4)")
    parser.add_argument("--residual-window", type=int, default=128, help="newest tokens that stay exact (128)")
    parser.add_argument("--codebook", metavar="FILE", help="a file of `tqai codebook build` (the shipped codebooks)")
    parser.add_argument("--cache-strategy", default="auto", help="auto (residual), residual, full or incremental")


def cache_options(args: argparse.Namespace) -> dict:
    """Keyword arguments of install, checked; ValueError says what is wrong. Widths are in it if they were given."""
    from .options import CacheOptions

    options = {
        "sink_tokens": args.sink_tokens, "residual_window": args.residual_window, "cache_strategy": args.cache_strategy,
        "vector_values": args.vector_values,
    }  # fmt: skip
    if args.kv_cache_dtype and Path(args.kv_cache_dtype).is_file():
        options["layer_formats"] = dict(Preset.read(args.kv_cache_dtype).formats)
    elif args.kv_cache_dtype:
        options["bits_k"], options["bits_v"] = parse_name(args.kv_cache_dtype)
    CacheOptions.of(**options)
    return options | ({"codebook": args.codebook} if args.codebook else {})


def folder_widths(model: str) -> dict:
    """bits_k and bits_v that a folder of `tqai convert` is for, all of whose files are checked; nothing for others."""
    if not converted_folder.verify(model):
        return {}
    bits_k, bits_v = parse_name(converted_folder.folder_format(model))
    return {"bits_k": bits_k, "bits_v": bits_v}


def with_caches(load: Callable, options: dict, refused: Callable[[ValueError], None] | None = None) -> Callable:
    """mlx_lm's load or sharded_load, whose models get compressed caches."""
    from .patching import install

    @functools.wraps(load)
    def loaded(*args, **kwargs):
        model = args[0] if args else kwargs.get("path_or_hf_repo") or kwargs.get("repo")
        try:
            widths = folder_widths(model)
            result = load(*args, **kwargs)
            install(result[0], key_means=key_mean_file.read(model) if widths else None, **(widths | options))
        except ValueError as error:
            if refused:
                refused(error)
            raise
        return result

    return loaded


def main(argv: list[str] | None = None) -> None:
    """Run the server. ValueError for bad flags; ends the process with code 2 and one sentence if the model cannot be served."""
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
    # Python lets five wait: with more clients than that some lose their request to a busy server.
    server.ThreadingHTTPServer.request_queue_size = WAITING
    sys.argv = ["mlx_lm.server", *rest]
    server.main()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError) as problem:
        sys.exit(f"tqai: {problem}")

"""`tqai convert`: a model folder that loads faster, needs nothing at start, and says which cache it is for."""

from __future__ import annotations

import time
from pathlib import Path


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("convert", help="write a folder that starts faster and is checked when it is read")
    parser.add_argument("--model", required=True, help="Hugging Face id, folder, GGUF file or demo")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--format", default="tqai", help="KV cache format (tqai)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of weights (bfloat16)")
    parser.add_argument("--key-means", action="store_true", help="store each layer's mean key, which vLLM then need not learn and patch uses")
    parser.add_argument("--no-timing", action="store_true", help="do not load both to compare their times")
    add_json(parser)
    return parser


def run(args) -> int:
    import torch
    from tqai import conversion, models

    from . import emit

    if Path(args.model).expanduser().resolve() == args.output.expanduser().resolve():
        raise ValueError(f"--output {args.output} is the model itself; give another folder")
    dtype = getattr(torch, args.dtype)
    fmt = conversion.convert(args.model, args.output, args.format, dtype, args.key_means)
    files = list(args.output.expanduser().iterdir())
    data = {
        "output": str(args.output), "format": fmt.name, "head_dim": fmt.head_dim, "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }  # fmt: skip
    if not args.no_timing:  # the new folder first, so that whatever is only slow once counts against it
        data["seconds_after"] = _seconds(models.load, str(args.output), dtype)
        data["seconds_before"] = _seconds(models.load, args.model, dtype)

    def show():
        print(f"{args.output}: {data['files']} files, {data['bytes'] / 1e6:.0f} MB, for {fmt.name}")
        if not args.no_timing:
            before, after = data["seconds_before"], data["seconds_after"]
            print(f"Loading takes {after:.1f} s with all files checked; {args.model} takes {before:.1f} s")

    emit(args, data, show)
    return 0


def _seconds(load, *arguments) -> float:
    start = time.perf_counter()
    load(*arguments)
    return time.perf_counter() - start

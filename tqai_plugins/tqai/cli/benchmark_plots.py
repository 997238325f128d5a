"""`tqai benchmark plots`: draw the plots of a folder of results again, from their JSON files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

# The first word of a file's name -> the command whose --json wrote it, and whose --plot draws it.
COMMANDS = {
    "codebooks": "codebook", "codec": "benchmark_codec", "forward": "benchmark_forward", "kernels": "benchmark_kernels",
    "plan": "plan", "quality": "benchmark_quality", "recommend": "recommend",
    "served": "_benchmark_quality_vllm", "serving": "benchmark_serving",
}  # fmt: skip


def add_parser(subparsers):
    parser = subparsers.add_parser("plots", help="draw the plots of a folder of results from its JSON files")
    parser.add_argument(
        "folder", type=Path, nargs="?", help="(examples/results, or the results of the installed package)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the PNG files go (beside the JSON files)")
    return parser


def run(args) -> int:
    from tqai import results

    folder = args.folder or results.folder()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    out = args.out or folder
    files = [file for file in sorted(folder.glob("*.json")) if kind(file) in COMMANDS]
    if not files:
        raise ValueError(f"{folder} has no results: no file called {', '.join(f'{name}_*.json' for name in COMMANDS)}")
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        png = out / file.with_suffix(".png").name
        importlib.import_module(f"{__package__}.{COMMANDS[kind(file)]}").plot(json.loads(file.read_text()), str(png))
        print(png)
    return 0


def kind(file: Path) -> str:
    return file.stem.split("_")[0]

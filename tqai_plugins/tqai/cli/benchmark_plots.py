"""`tqai benchmark plots`: draw the plots of a folder of results again, from their JSON files."""

from __future__ import annotations

import importlib
from pathlib import Path

from tqai_plugins.core import json_file

# The first word of a file's name -> the command whose --json wrote it, and whose --plot draws it.
COMMANDS = {
    "codebooks": "codebook", "codec": "benchmark_codec", "forward": "benchmark_forward", "kernels": "benchmark_kernels", "needle": "benchmark_needle",
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
        command = importlib.import_module(f"{__package__}.{COMMANDS[kind(file)]}")
        try:
            command.plot(json_file.read(file), str(png))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{file} is no result of the command `tqai benchmark` that its name says ({error!r}); remove it") from error
        print(png)
    return 0


def kind(file: Path) -> str:
    """The first word of a file's name."""
    return file.stem.split("_")[0]

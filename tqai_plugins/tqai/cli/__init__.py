"""The `tqai` command: one module a command, each with add_parser(subparsers) and run(args) -> int."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

COMMANDS = ("info",)
BENCHMARKS = ("codec",)


def build_parser() -> argparse.ArgumentParser:
    """Every command's parser. Command modules import torch and the like only in run()."""
    parser = argparse.ArgumentParser(prog="tqai", description="TurboQuant KV caches: measure, run, compare.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND")
    _add(commands, __name__ + ".", COMMANDS)
    benchmark = commands.add_parser("benchmark", help="measure the codec, kernels, quality or serving speed")
    _add(benchmark.add_subparsers(metavar="WHAT", required=True), __name__ + ".benchmark_", BENCHMARKS)
    return parser


def _add(subparsers, prefix: str, names: tuple[str, ...]) -> None:
    for name in names:
        module = importlib.import_module(prefix + name)
        module.add_parser(subparsers).set_defaults(run=module.run)


def emit(args: argparse.Namespace, data: dict, show) -> None:
    """Print data as JSON with --json, else call show(). `--json FILE` writes the file and shows too."""
    if args.json == "-":
        print(json.dumps(data, indent=1))
        return
    show()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(data, file, indent=1)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON instead of a table, or also write it to FILE"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; what a user can mend ends in one sentence on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from tqai import __version__

        print(f"tqai {__version__}")
        return 0
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"tqai: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

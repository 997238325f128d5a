"""The `tqai` command.

Each module of this folder is a command with add_parser(subparsers) and run(args) -> int; those called
benchmark_<name> make `tqai benchmark <name>`, those that begin with an underscore are no commands.
They import torch and the like only in run(), so that `tqai --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import pkgutil
import shlex
import sys
import warnings


def build_parser() -> argparse.ArgumentParser:
    """The parsers of all commands."""
    parser = argparse.ArgumentParser(prog="tqai", description="TurboQuant KV caches: measure, run, compare.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND")
    benchmark = commands.add_parser("benchmark", help="measure the codec, kernels, quality or serving speed")
    benchmarks = benchmark.add_subparsers(metavar="WHAT", required=True)
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"):
        module = importlib.import_module(f"{__name__}.{name}")
        group = benchmarks if name.startswith("benchmark_") else commands
        module.add_parser(group).set_defaults(run=module.run)
    return parser


def emit(args: argparse.Namespace, data: dict, show) -> None:
    """Print data as JSON with --json, else call show(). `--json FILE` writes the file and shows too."""
    if args.json == "-":
        print(_text(args, data))
        return
    show()
    keep(args, data)


def keep(args: argparse.Namespace, data: dict) -> None:
    """Write the file of `--json FILE`, if there is one: after each step of long work, so that what is stopped keeps what is done."""
    if args.json not in (None, "-"):
        with open(args.json, "w") as file:
            file.write(_text(args, data))


def _text(args: argparse.Namespace, data: dict) -> str:
    return json.dumps({"command": args.command} | data, indent=1)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command --json [FILE]; see emit."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON instead of a table, or also write it to FILE"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; what a user can mend ends in one sentence on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    args.command = shlex.join(["tqai", *argv])
    # The oldest transformers that is served knows no other name; it goes with 5.40.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    try:
        if args.version:
            from tqai import __version__

            print(f"tqai {__version__}")
            return 0
        if not hasattr(args, "run"):
            parser.print_help(sys.stderr)
            return 2
        return args.run(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None
        return 0
    except importlib.metadata.PackageNotFoundError as error:
        message = f"{error}; install tqai with pip to have one"
    except ModuleNotFoundError as error:
        message = f"{error}; commands need: pip install 'tqai[demo]'"
    except OSError as error:
        message = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
    except (ValueError, ImportError) as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"tqai: {' '.join(message.split())}", file=sys.stderr)
    return 2

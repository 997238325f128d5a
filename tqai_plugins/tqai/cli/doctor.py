"""`tqai doctor`: does it work on this machine, and what to do if not; exit code 1 if something would stop serving."""

from __future__ import annotations

import platform


def add_parser(subparsers):
    from . import _doctor_mlx, add_json

    parser = subparsers.add_parser("doctor", help="check this machine, and say what to do")
    parser.add_argument("--markdown", action="store_true", help="a report to paste into an issue")
    add_json(parser)
    _doctor_mlx.add_options(parser)
    return parser


def run(args) -> int:
    if args.mlx:
        from . import _doctor_mlx

        return _doctor_mlx.run(args)
    if args.head_dims or args.no_speed:
        raise ValueError(f"{'--head-dims' if args.head_dims else '--no-speed'} is for the Metal kernels; give --mlx with it")
    from tqai import doctor

    from . import emit, info

    packages = info.packages()
    findings = doctor.examine(packages, info.plugins())
    stopped = any(finding.level == doctor.STOP for finding in findings)
    data = {
        "python": platform.python_version(), "platform": platform.platform(), "would_serve": not stopped,
        "findings": [vars(finding) for finding in findings],
    }  # fmt: skip
    emit(args, data, lambda: show_markdown(data) if args.markdown else show(data))
    return 1 if stopped else 0


def show(data: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("", "check", "found", box=box.SIMPLE)
    colors = {"ok": "green", "warning": "yellow", "stop": "bold red"}
    for finding in data["findings"]:
        advice = f"\n-> {finding['advice']}" if finding["advice"] else ""
        level = f"[{colors[finding['level']]}]{finding['level']}[/]"
        table.add_row(level, finding["check"], (finding["found"] + advice).replace("[", r"\["))
    console.print(f"Python {data['python']}, {data['platform']}")
    console.print(table)
    console.print("Nothing found that would stop serving." if data["would_serve"] else "Not fit to serve: see stop above.")


def show_markdown(data: dict) -> None:
    """Print the report for an issue."""
    print(f"`tqai doctor`, Python {data['python']}, {data['platform']}\n\n| | check | found | advice |\n|---|---|---|---|")
    for finding in data["findings"]:
        cells = (finding["level"], finding["check"], finding["found"], finding["advice"])
        print("| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |")

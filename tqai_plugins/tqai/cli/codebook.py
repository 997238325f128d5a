"""`tqai codebook`: solve a codebook and store it, or report what each solver gains over the shipped one."""

from __future__ import annotations

import time
from pathlib import Path

SOLVERS = ("lloyd_max", "cmaes", "fuzzy")
OBJECTIVES = ("mse", "attention")
HELD_OUT_SEED, HELD_OUT_SAMPLES = 1_000_003, 8192  # vectors that no solver has seen


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("codebook", help="solve codebooks: build one, or report what they gain")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    build = actions.add_parser("build", help="solve a codebook and store it")
    build.add_argument("--solver", default="lloyd_max", choices=SOLVERS)
    build.add_argument("--objective", default="mse", choices=OBJECTIVES, help="what the encoder shall keep (mse)")
    build.add_argument("--head-dim", type=int, required=True)
    build.add_argument("--bits", type=int, required=True, help="2 to 7")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file, for patch(codebook=FILE)")
    report = actions.add_parser("report", help="every solver and objective beside the shipped codebook")
    report.add_argument("--head-dims", default="64,128", help="(%(default)s)")
    report.add_argument("--bits", default="2,3,4", help="(%(default)s)")
    report.add_argument("--seed", type=int, default=0)
    report.add_argument("--plot", metavar="FILE", help="write a PNG of what each gains")
    for action, name in ((build, "build"), (report, "report")):
        add_json(action)
        action.set_defaults(action=name)
    return parser


def run(args) -> int:
    return {"build": build, "report": report}[args.action](args)


def build(args) -> int:
    from . import emit

    if args.out.exists():
        raise ValueError(f"--out {args.out} is there already; give another name or remove it")
    book, seconds = solved(args.head_dim, args.bits, args.solver, args.objective, args.seed)
    made = {"solver": args.solver, "objective": args.objective, "seed": args.seed}
    book.write(args.out, made)
    data = {"file": str(args.out), "name": book.name, "seconds": seconds, **compared(book)}

    def show():
        print(
            f"{book.name}: mean squared error {data['mse_change']:+.2%}, attention divergence {data['attention_change']:+.2%} "
            f"against the shipped codebook, on vectors it has not seen ({seconds:.1f} s)"
        )
        print(f"Use it with tqai.patch(model, codebook={str(args.out)!r}), or with TQAI_CODEBOOK={args.out} in any runtime.")

    emit(args, data, show)
    return 0


def solved(head_dim: int, bits: int, solver: str, objective: str, seed: int):
    """The codebook and the seconds it took, with a spinner on a terminal."""
    from rich.console import Console

    from tqai_plugins.core import codebook_solvers

    console = Console(stderr=True)
    start = time.perf_counter()
    with console.status(f"Solving ({solver}, {objective})") as status:
        step = lambda count, best: status.update(f"Solving ({solver}, {objective}): {count} tried, best {best:.6f}")
        book = codebook_solvers.solve(head_dim, bits, solver, objective, seed, step)
    return book, time.perf_counter() - start


def compared(book) -> dict:
    """Both objectives of a codebook and how they differ from the shipped one's, on held-out vectors."""
    from tqai_plugins.core import codebook_solvers
    from tqai_plugins.core.codebook import shipped

    found = {}
    for objective in OBJECTIVES:
        measure = codebook_solvers.Measure(objective, book.head_dim, HELD_OUT_SEED, samples=HELD_OUT_SAMPLES)
        found[objective] = measure(book)
        found[f"{objective}_change"] = found[objective] / measure(shipped(book.head_dim, book.bits)) - 1
    return found


def report(args) -> int:
    from . import emit
    from .benchmark_quality import machine

    rows = []
    for head_dim in _numbers(args.head_dims, "--head-dims"):
        for bits in _numbers(args.bits, "--bits"):
            for solver in SOLVERS:
                for objective in OBJECTIVES:
                    book, seconds = solved(head_dim, bits, solver, objective, args.seed)
                    head = {"head_dim": head_dim, "bits": bits, "solver": solver, "objective": objective}
                    rows.append({**head, "seconds": seconds, **compared(book), "magnitudes": book.magnitudes})
    data = {"seed": args.seed, "held_out_vectors": HELD_OUT_SAMPLES, "machine": machine("numpy"), "rows": rows}
    emit(args, data, lambda: show_report(rows))
    if args.plot:
        plot(data, args.plot)
    return 0


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; expected whole numbers with commas between") from error


def show_report(rows: list[dict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("head_dim", "bits", "solver", "objective", "mean squared error", "attention, KL", "s", box=box.SIMPLE)
    for row in rows:
        table.add_row(
            str(row["head_dim"]), str(row["bits"]), row["solver"], row["objective"],
            *(f"{row[o]:.5f} ({row[f'{o}_change']:+.2%})" for o in OBJECTIVES), f"{row['seconds']:.1f}",
        )  # fmt: skip
    Console().print(table)


def plot(data: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    names = [f"{solver}, {objective}" for solver in SOLVERS for objective in OBJECTIVES]
    for axes, objective, title in zip(both, OBJECTIVES, ("mean squared error", "attention divergence")):
        for row in data["rows"]:
            y = names.index(f"{row['solver']}, {row['objective']}")
            marker = {64: "o", 128: "s"}.get(row["head_dim"], "^")
            axes.plot(100 * row[f"{objective}_change"], y, marker, color=f"C{row['bits'] - 2}", alpha=0.7)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set(title=title, xlabel="change against the shipped codebook, %", yticks=range(len(names)), yticklabels=names)
        axes.grid(alpha=0.3)
    seen = sorted({(row["head_dim"], row["bits"]) for row in data["rows"]})
    for head_dim, bits in seen:
        both[1].plot([], [], {64: "o", 128: "s"}.get(head_dim, "^"), color=f"C{bits - 2}", label=f"head_dim {head_dim}, {bits} bits")
    both[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)

"""`tqai codebook`: solve a codebook and store it, or report what each solver gains over the shipped one."""

from __future__ import annotations

import itertools
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
    report.add_argument("--model", help="with the KL divergence of this model, keys and values of each width")
    report.add_argument("--text", type=Path, help="text that the model reads (a built-in one)")
    report.add_argument("--context", type=int, default=512, help="tokens of a window, the second half is scored (512)")
    report.add_argument("--windows", type=int, default=2, help="windows, evenly spaced in the text (2)")
    report.add_argument("--plot", metavar="FILE", help="write a PNG of what each gains")
    for action, name in ((build, "build"), (report, "report")):
        add_json(action)
        action.set_defaults(action=name)
    return parser


def run(args) -> int:
    return {"build": build, "report": report}[args.action](args)


def build(args) -> int:
    """`tqai codebook build`."""
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
    """`tqai codebook report`."""
    from . import _parse, emit
    from ._codebook_fidelity import Reading, add_divergences
    from .benchmark_quality import machine

    rows, books = [], []
    data = {"seed": args.seed, "held_out_vectors": HELD_OUT_SAMPLES, "machine": machine("numpy"), "rows": rows}
    head_dims = _parse.numbers(args.head_dims, "--head-dims")
    reading = args.model and Reading(args.model, args.text, args.context, args.windows)
    if reading:
        reading.check(head_dims)
        data |= {"machine": machine("numpy", "torch", "transformers"), **reading.as_json()}
    for head_dim, bits, solver, objective in itertools.product(
        head_dims, _parse.numbers(args.bits, "--bits"), SOLVERS, OBJECTIVES
    ):
        book, seconds = solved(head_dim, bits, solver, objective, args.seed)
        head = {"head_dim": head_dim, "bits": bits, "solver": solver, "objective": objective}
        rows.append({**head, "seconds": seconds, **compared(book), "magnitudes": book.magnitudes})
        books.append(book)
    if reading:
        add_divergences(rows, books, reading)
    emit(args, data, lambda: show_report(rows))
    if args.plot:
        plot(data, args.plot)
    return 0


def show_report(rows: list[dict]) -> None:
    """Print the rows as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    read = "kld" in rows[0]  # by a model, whose head_dim is that of all rows
    columns = ["bits", "solver", "objective", *(("error", "attention") if read else ("mean squared error", "attention, KL"))]
    columns = [*columns, "model KL", "more"] if read else ["head_dim", *columns, "s"]
    table = Table(*columns, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        cells = [str(row["bits"]), row["solver"], row["objective"]]
        changes = [f"{row[f'{objective}_change']:+.2%}" for objective in OBJECTIVES]
        cells += changes if read else [f"{row[o]:.5f} ({change})" for o, change in zip(OBJECTIVES, changes)]
        if read:
            cells += [f"{row['kld']:.4f}", f"{row['kld_more']:+.4f} ± {row['kld_more_error']:.4f}"]
        else:
            cells = [str(row["head_dim"]), *cells, f"{row['seconds']:.1f}"]
        table.add_row(*cells)
    Console().print(table)


def plot(data: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"mse": "mean squared error", "attention": "attention divergence"}
    if "kld" in data["rows"][0]:
        kinds["model"] = f"{data['model']}: KL divergence"
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(2 + 4 * len(kinds), 4), sharey=True)
    names = [f"{solver}, {objective}" for solver in SOLVERS for objective in OBJECTIVES]
    for axes, (kind, title) in zip(panels, kinds.items()):
        for row in data["rows"]:
            y = names.index(f"{row['solver']}, {row['objective']}") + (row["bits"] - 3) / 8
            change, error = _change(row, kind)
            marker = {64: "o", 128: "s"}.get(row["head_dim"], "^")
            axes.errorbar(100 * change, y, xerr=100 * error, fmt=marker, color=f"C{row['bits'] - 2}", alpha=0.7)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set(title=title, xlabel="change against the shipped codebook, %", yticks=range(len(names)), yticklabels=names)
        axes.grid(alpha=0.3)
    seen = sorted({(row["head_dim"], row["bits"]) for row in data["rows"]})
    for head_dim, bits in seen:
        panels[1].plot([], [], {64: "o", 128: "s"}.get(head_dim, "^"), color=f"C{bits - 2}", label=f"head_dim {head_dim}, {bits} bits")
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _change(row: dict, kind: str) -> tuple[float, float]:
    """By how much of the shipped codebook's figure this one's differs, and that difference's standard error."""
    if kind == "model":
        shipped = row["kld"] - row["kld_more"]
        return row["kld_more"] / shipped, row["kld_more_error"] / shipped
    return row[f"{kind}_change"], 0.0

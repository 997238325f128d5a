"""`tqai benchmark codec`: the error of quantizing random vectors, beside theory."""

from __future__ import annotations

import math
import time

from tqai_plugins.core.kv_format import WIDTHS


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("codec", help="error on random vectors, beside theory")
    parser.add_argument("--head-dim", type=int, default=128, help="dimension of the vectors (128)")
    parser.add_argument("--vectors", type=int, default=4096, help="how many (4096)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of error against bits")
    add_json(parser)
    return parser


def measure(head_dim: int, bits: int, vectors: int, seed: int) -> dict:
    """Normalized mean squared error E |x - x'|^2 / |x|^2 of the NumPy codec: as shipped, plain, and with QJL."""
    import numpy as np

    from tqai_plugins.core import qjl, reference

    x = np.random.default_rng(seed).standard_normal((vectors, head_dim)).astype(np.float32)

    def error(**options) -> float:
        packed, scales = reference.quantize(x, bits, **options)
        back = reference.dequantize(packed, scales, bits, head_dim)
        return float((((back - x) ** 2).sum(-1) / (x**2).sum(-1)).mean())

    def error_with_qjl() -> float:
        """At equal code bytes: one bit less for the codes, head_dim signs of their residual instead."""
        first = reference.dequantize(*reference.quantize(x, bits - 1), bits - 1, head_dim)
        back = first + qjl.estimate(*qjl.sketch(x - first, head_dim), head_dim, head_dim)
        return float((((back - x) ** 2).sum(-1) / (x**2).sum(-1)).mean())

    start = time.perf_counter()
    tuned = error()
    seconds = time.perf_counter() - start
    return {
        "bits": bits,
        "nmse": tuned,
        "with_qjl": error_with_qjl() if bits > 1 else None,
        "plain_turboquant": error(scale="norm", search=False),
        "paper_bound": math.sqrt(3) * math.pi / 2 * 4.0**-bits,
        "shannon": 4.0**-bits,
        "vectors_per_second": vectors / seconds,
    }


def run(args) -> int:
    from . import emit
    from .benchmark_quality import machine

    if args.vectors < 1:
        raise ValueError(f"--vectors is {args.vectors}; allowed are 1 and more")
    rows = [measure(args.head_dim, bits, args.vectors, args.seed) for bits in WIDTHS]

    def show():
        from rich.console import Console
        from rich.table import Table

        table = Table(
            "bits", "tqai", "plain TurboQuant", "with QJL", "paper's bound", "Shannon 4^-b", "vectors/s (NumPy)",
            title=f"normalized mean squared error of {args.vectors} random vectors, head_dim {args.head_dim}",
        )
        for r in rows:
            table.add_row(
                str(r["bits"]), f"{r['nmse']:.6f}", f"{r['plain_turboquant']:.6f}",
                "-" if r["with_qjl"] is None else f"{r['with_qjl']:.6f}",
                f"{r['paper_bound']:.6f}", f"{r['shannon']:.6f}", f"{r['vectors_per_second']:,.0f}",
            )
        Console().print(table)

    data = {"head_dim": args.head_dim, "vectors": args.vectors, "machine": machine("numpy"), "rows": rows}
    emit(args, data, show)
    if args.plot:
        plot(data, args.plot)
    return 0


def plot(data: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = data["rows"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    bits = [r["bits"] for r in rows]
    for key, label, style in (
        ("paper_bound", "TurboQuant's bound", ":"), ("plain_turboquant", "plain TurboQuant", "--o"),
        ("nmse", "tqai", "-o"), ("shannon", "Shannon's limit", ":"),
    ):
        axes.semilogy(bits, [r[key] for r in rows], style, label=label, markersize=4)
    axes.set(xlabel="bits a coordinate", ylabel="normalized mean squared error")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)

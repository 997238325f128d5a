"""`tqai doctor --mlx`: the whole kernel grid and the speed table on this machine, as a report to paste into an issue."""

from __future__ import annotations

import sys


def add_options(parser) -> None:
    """Give `tqai doctor` the options of this check."""
    group = parser.add_argument_group("the Metal kernels, on an Apple or NVIDIA GPU")
    group.add_argument("--mlx", action="store_true", help="run their whole grid and the speed table; a report for an issue")
    group.add_argument("--head-dims", help="only these, comma-separated (all)")
    group.add_argument("--no-speed", action="store_true", help="leave the speed table out")


def run(args) -> int:
    """0 if every check is within its limit, else 1."""
    try:
        from tqai_plugins.metal_kernels import check
        from tqai_plugins.mlx_lm_plugin.compat import check_version
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install mlx-lm with: pip install 'tqai[mlx]'") from error
    from . import _benchmark_kernels_mlx as benchmark
    from . import _parse, emit

    check_version()
    data = benchmark.machine()
    if data["backend"] is None:
        raise ValueError("MLX has no GPU here, Metal or CUDA; on a CPU tqai needs no kernels, only plain MLX operations")
    data["checks"] = []
    head_dims = tuple(_parse.numbers(args.head_dims, "--head-dims")) if args.head_dims else check.HEAD_DIMS
    for row in check.run_grid(head_dims):
        data["checks"].append(row)
        print("." if row["ok"] else "F", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if not args.no_speed:
        data |= benchmark.measure(benchmark.DEFAULT_SHAPES, "tqai_k4v2,tqai_k4v4,tqai_k3v3,tqai_k8v8")
    emit(args, data, lambda: show(data))
    return 0 if all(row["ok"] for row in data["checks"]) else 1


def show(data: dict) -> None:
    from . import _benchmark_kernels_mlx as benchmark

    failed = [row for row in data["checks"] if not row["ok"]]
    print(f"tqai doctor: {data['device']}, {data['backend']}, mlx {data['mlx']}, mlx-lm {data['mlx_lm']}, {data['system']}")
    print(f"{len(data['checks']) - len(failed)} of {len(data['checks'])} checks passed")
    for row in failed:
        print(f"FAILED {row['kernel']} {row['format']} head_dim {row['head_dim']}: {row['what']}: error {row['error']:.1e}, limit {row['limit']:.1e}")
    for kernel in dict.fromkeys(row["kernel"] for row in data["checks"]):
        print(f"{kernel}: largest error {max(row['error'] for row in data['checks'] if row['kernel'] == kernel):.1e}")
    if "rows" in data:
        benchmark.show(data)

"""`tqai benchmark kernels`: decode attention over codes on one GPU, beside FlashAttention-3 and vLLM's TurboQuant.

With --backend mlx: MLX's kernels, beside mlx-lm's own caches.
"""

from __future__ import annotations

import datetime
import functools
import time

from tqai_plugins.core.kv_format import KVFormat

SHAPES = "32x8192,64x2048,1x65536,4x1000,128x1024,8x131072"
FORMATS = "tqai_k4v2,tqai_k4v4,tqai_k3v3,tqai_k8v8"
CALLS_A_GRAPH = 10


def add_parser(subparsers):
    from . import _benchmark_kernels_mlx, add_json

    parser = subparsers.add_parser("kernels", help="decode attention kernels on a CUDA device, or on MLX's GPU")
    parser.add_argument("--backend", default="torch", choices=("torch", "mlx"), help="whose kernels (torch)")
    mlx_shapes = _benchmark_kernels_mlx.DEFAULT_SHAPES
    parser.add_argument("--shapes", help=f"sequences x context, comma-separated ({SHAPES}; with mlx {mlx_shapes})")
    parser.add_argument("--formats", default=FORMATS, help=f"cache formats ({FORMATS})")
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of times against bytes read")
    add_json(parser)
    return parser


def run(args) -> int:
    if args.backend == "mlx":
        from . import _benchmark_kernels_mlx

        return _benchmark_kernels_mlx.run(args)
    import torch

    from . import _parse, emit, keep

    shapes = _parse.shapes(args.shapes or SHAPES)
    for name in args.formats.split(","):
        KVFormat.from_name(name, args.head_dim)
    if not torch.cuda.is_available():
        raise ValueError("benchmark kernels needs a CUDA device; none is here")
    import triton

    rows: list[dict] = []
    data = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(), "copy_gb_s": copy_bandwidth(), "q_heads": args.q_heads,
        "kv_heads": args.kv_heads, "head_dim": args.head_dim, "rows": rows,
    }  # fmt: skip
    for sequences, context in shapes:
        rows += measure_peers(args, sequences, context)
        for name in args.formats.split(","):
            rows.append(measure_format(args, name, sequences, context, data["copy_gb_s"]))
            keep(args, data)
            torch.cuda.empty_cache()
    emit(args, data, lambda: show(data))
    if args.plot:
        plot(data, args.plot)
    return 0


def _time(call) -> float:
    """Microseconds a call, many calls in one CUDA graph, median of replays."""
    import torch
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_A_GRAPH):
            call()
    return do_bench(graph.replay, warmup=5, rep=60, return_mode="median") * 1e3 / CALLS_A_GRAPH


def copy_bandwidth() -> float:
    """GB/s of a large device-to-device copy, bytes read plus bytes written."""
    import torch
    from triton.testing import do_bench

    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / do_bench(lambda: b.copy_(a), return_mode="median") / 1e6


def measure_format(args, name: str, sequences: int, context: int, copy: float) -> dict:
    """One row of the table: a format at one shape."""
    import torch

    from tqai_plugins.core import key_mean
    from tqai_plugins.core.kv_format import COPIED_PAGES, KVFormat
    from tqai_plugins.torch_kernels.recent import RecentCopies
    from tqai_plugins.triton_kernels import decode_attention as decode
    from tqai_plugins.triton_kernels.first_calls import make_together
    from tqai_plugins.triton_kernels.merge import merge
    from tqai_plugins.triton_kernels.prepare import TILINGS, prepare
    from tqai_plugins.triton_kernels.recent import RecentPages, claim
    from tqai_plugins.triton_kernels.workspace import Workspace

    device, page = torch.device("cuda"), decode.TILE
    fmt = KVFormat.from_name(name, args.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device=device, generator=generator)
    blocks = -(-context // page)
    held = lambda count, layout: torch.zeros(count, args.kv_heads, layout.page_bytes, dtype=torch.uint8, device=device)
    pages = held(sequences * blocks, fmt.page_layout(page))
    table = torch.randperm(sequences * blocks, device=device, dtype=torch.int32).view(sequences, blocks)
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=device)
    rows = decode.max_partial_rows(sequences, args.q_heads, args.kv_heads, 1, fmt, device)
    workspace = Workspace.allocate(sequences, args.q_heads, args.head_dim, rows, device)
    scale = args.head_dim**-0.5
    token = torch.arange(context, device=device)
    copies = held(COPIED_PAGES * sequences, RecentPages.layout(args.head_dim))
    books = RecentCopies.allocate(COPIED_PAGES * sequences, sequences, max(context, sequences), device)
    recent = RecentPages(copies, books.slots, books.table)
    mean = _key_mean(args, blocks * page, device) if key_mean.may_pay(fmt) else None
    positions = lengths - 1
    query = draw(sequences, args.q_heads, args.head_dim)
    key, value = draw(sequences, args.kv_heads, args.head_dim), draw(sequences, args.kv_heads, args.head_dim)
    last = table[:, (context - 1) // page].long() * page + (context - 1) % page
    out = torch.full_like(query, torch.nan)
    store = lambda **more: prepare(query, key, value, pages, last, workspace, fmt, page, scale, positions=positions, **more)
    attend = lambda **more: decode.decode_attention(workspace, pages, table, lengths, out, fmt, page, **more)

    def step(recent=None, mean=None):
        store(recent=recent, mean=mean)
        attend(recent=recent, mean=mean)

    def seconds(*calls) -> float:
        """Of calls side by side, as a server makes its first ones: the time to compile what has not been compiled."""
        start = time.perf_counter()
        make_together(calls, device)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    merge(workspace.partial, workspace.lse, lengths, out, 1)  # serves all formats, and Triton takes a second to begin
    first_calls = seconds(attend, store)
    served = {"recent": recent, "mean": mean}
    tilings = (functools.partial(store, tiling=tiling, **served) for tiling in TILINGS.values())
    served_calls = seconds(functools.partial(attend, **served), *tilings)

    starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    for i in range(sequences):
        k, v = draw(context, args.kv_heads, args.head_dim), draw(context, args.kv_heads, args.head_dim)
        slots = table[i].long()[token // page] * page + token % page
        claim(books, slots, starts[:2] * context, lengths[:1], table[i : i + 1], page)
        prepare(None, k, v, pages, slots, workspace, fmt, page, scale, recent=recent)
    claim(books, last, starts, lengths, table, page)
    step()
    error = _error(query, out, pages, table, fmt, page, context, scale)
    kernel = _time(lambda: attend(merged=False))
    moved = sequences * context * args.kv_heads * fmt.slot_bytes
    return {
        "name": fmt.name, "sequences": sequences, "context": context, "us": kernel, "step_us": _time(step),
        "step_recent_us": _time(lambda: step(recent)), "step_mean_us": _time(lambda: step(recent, mean)), "gb_s": moved / kernel / 1e3,
        "share_of_copy": moved / kernel / 1e3 / copy, "error": error, "first_calls_s": first_calls,
        "served_first_calls_s": served_calls,
    }


def _key_mean(args, positions: int, device):
    """Some mean: what it costs does not depend on its values."""
    import numpy as np
    import torch

    from tqai_plugins.core import key_mean
    from tqai_plugins.torch_kernels.key_mean import KeyMean

    means = np.random.default_rng(0).standard_normal((args.kv_heads, args.head_dim))
    pairs = key_mean.choose_pairs(key_mean.energy(means))
    angles = np.arange(positions)[:, None] * 1e-4 ** (np.arange(args.head_dim // 2) / (args.head_dim // 2))
    table = key_mean.make_table(np.cos(angles), np.sin(angles), pairs)
    return KeyMean.make(means, pairs, torch.from_numpy(table).to(device), 1.0)


def _error(query, out, pages, table, fmt, page, context, scale) -> float:
    """Relative error of the last sequence's first KV head against float64 over the same codes."""
    import torch

    from tqai_plugins.core.reference import rotation_matrix
    from tqai_plugins.core.rotation import Rotation
    from tqai_plugins.triton_kernels.dequantize import dequantize

    device, heads, dim = query.device, pages.shape[1], fmt.head_dim
    k, v = torch.empty(2, context, heads, dim, device=device)
    one = lambda n: torch.tensor([n], dtype=torch.int32, device=device)
    dequantize(pages, table[-1:], one(0), one(context), one(0), k, v, fmt, page, context)
    turn = torch.from_numpy(rotation_matrix(Rotation(dim))).to(device).double()
    group = query.shape[1] // heads
    q = query[-1, :group].double() @ turn.T
    expected = ((q @ k[:, 0].double().T * scale).softmax(-1) @ v[:, 0].double()) @ turn
    return ((out[-1, :group].double() - expected).norm() / expected.norm()).item()


def measure_peers(args, sequences: int, context: int) -> list[dict]:
    """FlashAttention-3 bf16 and fp8 and vLLM's turboquant_4bit_nc, where vLLM has them."""
    import torch

    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return []
    device, page, dim = "cuda", 16, args.head_dim
    blocks = -(-context // page)
    table = torch.randperm(sequences * blocks, device=device, dtype=torch.int32).view(sequences, blocks)
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=device)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    q = torch.randn(sequences, args.q_heads, dim, dtype=torch.bfloat16, device=device)
    k, v = torch.randn(2, sequences * blocks, page, args.kv_heads, dim, dtype=torch.bfloat16, device=device)

    def flash(q, k, v, **scales):
        return flash_attn_varlen_func(
            q, k, v, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=context, seqused_k=lengths, block_table=table,
            softmax_scale=dim**-0.5, causal=True, fa_version=3, **scales,
        )

    rows = []

    def row(name, call):
        try:
            us = _time(call)
            rows.append({"name": name, "sequences": sequences, "context": context, "us": us})
        except Exception as error:
            rows.append({"name": name, "sequences": sequences, "context": context, "us": None, "why": str(error)[:200]})

    row("FlashAttention-3 bf16", lambda: flash(q, k, v))  # noqa: F821  called at once
    q8, k8, v8 = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    del k, v
    one = torch.ones(sequences, args.kv_heads, device=device)
    row("FlashAttention-3 fp8", lambda: flash(q8, k8, v8, q_descale=one, k_descale=one, v_descale=one))  # noqa: F821
    del k8, v8
    row("vLLM turboquant_4bit_nc", _upstream(q, table, lengths, args, sequences * blocks, page))
    return rows


def _upstream(q, table, lengths, args, num_blocks, page):
    import torch
    from vllm.model_executor.layers.quantization.turboquant import centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    dim = args.head_dim
    config = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", dim)
    shape = num_blocks, page, args.kv_heads, config.slot_size_aligned
    cache = torch.randint(0, 255, shape, dtype=torch.uint8, device="cuda")
    levels = centroids.solve_lloyd_max(dim, config.centroid_bits)[0].to("cuda")
    turn = torch.linalg.qr(torch.randn(dim, dim, device="cuda"))[0].contiguous()
    back = turn.T.contiguous()
    return lambda: triton_turboquant_decode_attention(
        q, cache, table, lengths, turn, levels, dim**-0.5, config.key_mse_bits or config.mse_bits,
        config.key_packed_size, config.value_quant_bits, key_fp8=config.key_fp8, norm_correction=config.norm_correction, PiT=back,
    )


def show(data: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "sequences x context", "kernel", "us", "share of copy", "error", "all launches, us", "and 8-bit copies, us",
        "and key mean, us",
        "x FA3 bf16", "x FA3 fp8",
        title=f"{data['device']}, torch {data['torch']}, triton {data['triton']}; copy {data['copy_gb_s']:.0f} GB/s; "
        f"{data['q_heads']} query heads, {data['kv_heads']} KV heads, head_dim {data['head_dim']}",
    )
    peers = [r for r in data["rows"] if "Flash" in r["name"]]
    flash = {(r["name"][-4:].strip(), r["sequences"], r["context"]): r["us"] for r in peers}
    number = lambda x, spec: "-" if x is None else format(x, spec)
    for r in data["rows"]:
        at = (r["sequences"], r["context"])
        ratio = [flash.get((kind, *at)) for kind in ("bf16", "fp8")]
        table.add_row(
            f"{at[0]} x {at[1]}", r["name"], number(r["us"], ".1f"), number(r.get("share_of_copy"), ".0%"),
            number(r.get("error"), ".1e"), *(number(r.get(key), ".1f") for key in ("step_us", "step_recent_us", "step_mean_us")),
            *(number(f / r["us"] if f and r["us"] else None, ".2f") for f in ratio),
        )
    console = Console(width=140)
    console.print(table)
    first: dict[str, str] = {}  # of the first shape, which compiles
    for r in data["rows"]:
        if "first_calls_s" in r:
            first.setdefault(r["name"], f"{r['name']} {r['first_calls_s']:.1f} / {r['served_first_calls_s']:.1f}")
    how = "Seconds to compile what Triton did not have on disk, a format alone / as a server has it (8-bit copies, key mean, all tilings):"
    console.print(how, ", ".join(first.values()))


def plot(data: dict, path: str) -> None:
    """Microseconds of each kernel, one group of bars a shape; all launches of a step where they are ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((r["sequences"], r["context"]) for r in data["rows"]))
    names = list(dict.fromkeys(r["name"] for r in data["rows"]))
    fig, axes = plt.subplots(1, len(shapes), figsize=(2.2 * len(shapes) + 2, 3.2), layout="constrained", squeeze=False)
    for ax, shape in zip(axes[0], shapes):
        rows = {r["name"]: r for r in data["rows"] if (r["sequences"], r["context"]) == shape}
        for i, name in enumerate(names):
            row = rows.get(name, {})
            time = row.get("step_mean_us") or row.get("step_recent_us") or row.get("step_us") or row.get("us")
            bar = ax.bar(i, time or 0, color=f"C{i}", label=name)
            ax.bar_label(bar, [f"{time:.0f}" if time else "-"], fontsize=7)
        ax.set_xticks([])
        ax.set_title(f"{shape[0]} x {shape[1]:,}", fontsize=9)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("us a layer and step")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    fig.suptitle(f"{data['device']}, head_dim {data['head_dim']}; tqai: all launches of a step, with copies and key mean", fontsize=10, wrap=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)

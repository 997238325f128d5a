"""`tqai benchmark prefill`: a chunk of a prompt over a cached context, on one GPU, beside FlashAttention-3 over bf16 pages."""

from __future__ import annotations

import datetime

from tqai_plugins.core.kv_format import KVFormat

SHAPES = "16384x65536,2048x65536,16384x16384"
FORMATS = "tqai_k4v2,tqai_k4v4"
PAGE = 64


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("prefill", help="a prompt's chunk over its cached tokens, on a CUDA device with vLLM")
    parser.add_argument("--shapes", default=SHAPES, help=f"chunk x cached tokens, comma-separated ({SHAPES})")
    parser.add_argument("--formats", default=FORMATS, help=f"cache formats ({FORMATS})")
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    add_json(parser)
    return parser


def run(args) -> int:
    import torch

    from . import _parse, emit

    shapes = _parse.shapes(args.shapes)
    formats = [KVFormat.from_name(name, args.head_dim) for name in args.formats.split(",")]
    if not torch.cuda.is_available():
        raise ValueError("benchmark prefill needs a CUDA device; none is here")
    import triton
    import vllm

    rows = []
    for chunk, context in shapes:
        rows.append(_flash(args, chunk, context))
        rows += [_format(args, fmt, chunk, context, rows[-1]["ms"]) for fmt in formats]
        torch.cuda.empty_cache()
    data = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "vllm": vllm.__version__,
        "date": datetime.date.today().isoformat(), "q_heads": args.q_heads, "kv_heads": args.kv_heads,
        "head_dim": args.head_dim, "rows": rows,
    }  # fmt: skip
    emit(args, data, lambda: show(data))
    return 0


def _draw(args, tokens: int, heads: int):
    import torch

    return torch.randn(tokens, heads, args.head_dim, dtype=torch.bfloat16, device="cuda")


def _ms(call) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=50, rep=400, return_mode="median")


def _flash(args, chunk: int, context: int) -> dict:
    """FlashAttention-3 over pages that hold context and chunk."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    total = chunk + context
    blocks = -(-total // PAGE)
    k, v = _draw(args, 2 * blocks * PAGE, args.kv_heads).view(2, blocks, PAGE, args.kv_heads, args.head_dim)
    as_int = lambda *x: torch.tensor(x, dtype=torch.int32, device="cuda")
    table = torch.randperm(blocks, device="cuda", dtype=torch.int32)[None]
    query, starts, length = _draw(args, chunk, args.q_heads), as_int(0, chunk), as_int(total)
    call = lambda: flash_attn_varlen_func(
        query, k, v, max_seqlen_q=chunk, cu_seqlens_q=starts, max_seqlen_k=total, seqused_k=length, block_table=table,
        softmax_scale=args.head_dim**-0.5, causal=True, fa_version=3,
    )  # fmt: skip
    return {"name": "FlashAttention-3 bf16", "chunk": chunk, "context": context, "ms": _ms(call)}


def _format(args, fmt: KVFormat, chunk: int, context: int, flash_ms: float) -> dict:
    """Our route: the chunk to itself, dense tiles of the context's codes, and the 8-bit copies of its first and last pages."""
    import torch

    from tqai_plugins.core.kv_format import COPIED_PAGES
    from tqai_plugins.torch_kernels.recent import RecentCopies
    from tqai_plugins.triton_kernels.prepare import prepare
    from tqai_plugins.triton_kernels.recent import RecentPages, claim
    from tqai_plugins.triton_kernels.workspace import Workspace
    from tqai_plugins.vllm_plugin import prefill

    device = torch.device("cuda")
    blocks = -(-context // PAGE)
    zeros = lambda count, layout: torch.zeros(count, args.kv_heads, layout.page_bytes, dtype=torch.uint8, device=device)
    pages, copies = zeros(blocks, fmt.page_layout(PAGE)), zeros(COPIED_PAGES, RecentPages.layout(args.head_dim))
    table = torch.randperm(blocks, device=device, dtype=torch.int32)[None]
    token = torch.arange(context, device=device)
    slots = table[0].long()[token // PAGE] * PAGE + token % PAGE
    books = RecentCopies.allocate(COPIED_PAGES, 1, context, device)
    starts = torch.tensor([0, context], dtype=torch.int32, device=device)
    claim(books, slots, starts, starts[1:], table, PAGE)
    prepare(
        None, _draw(args, context, args.kv_heads), _draw(args, context, args.kv_heads), pages, slots,
        Workspace.allocate(1, args.q_heads, args.head_dim, 1, device), fmt, PAGE, args.head_dim**-0.5,
        recent=RecentPages(copies, books.slots, books.table),
    )  # fmt: skip
    query, key, value = (_draw(args, chunk, heads) for heads in (args.q_heads, args.kv_heads, args.kv_heads))
    starts = torch.tensor([0, chunk], dtype=torch.int32, device=device)
    tokens = prefill.tile_tokens(args.kv_heads, args.head_dim, query.dtype)
    step = prefill.Prefill([0, chunk], [context], starts, table, books.table, tokens)
    out = torch.full_like(query, torch.nan)
    call = lambda: prefill.attend(
        query, key, value, pages, PAGE, copies, step, fmt, out, softmax_scale=args.head_dim**-0.5, fa_version=3,
        sliding_window=None, soft_cap=None, sinks=None, mean=None,
    )  # fmt: skip
    ms = _ms(call)
    workspace = prefill.reserve(tokens, args.kv_heads, args.head_dim, query.dtype, device)
    return {
        "name": fmt.name, "chunk": chunk, "context": context, "ms": ms, "of_flash": flash_ms / ms,
        "workspace_mib": workspace.nbytes / 2**20, "finite": bool(out.isfinite().all()),
    }  # fmt: skip


def show(data: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "chunk x cached", "attention", "ms", "speed of FA3 bf16", "workspace, MiB",
        title=f"{data['device']}, vLLM {data['vllm']}, torch {data['torch']}; {data['q_heads']} query heads, "
        f"{data['kv_heads']} KV heads, head_dim {data['head_dim']}",
    )  # fmt: skip
    for r in data["rows"]:
        share, space = (format(r[key], spec) if key in r else "" for key, spec in (("of_flash", ".2f"), ("workspace_mib", ".0f")))
        table.add_row(f"{r['chunk']} x {r['context']}", r["name"], f"{r['ms']:.2f}", share, space)
    Console(width=110).print(table)

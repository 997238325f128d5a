"""`tqai benchmark serving`: vLLM's own engine with each cache dtype: capacity, decode steps, prefill, full memory."""

from __future__ import annotations

import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqai_plugins.core.kv_format import is_tqai, parse_name
from tqai_plugins.vllm_plugin.options import Options

DTYPES = "auto,fp8,turboquant_4bit_nc,tqai_k4v4,tqai"
SHAPES = "8x512,1x32768,32x8192"
DECODE_STEPS = 32
STEP_TOKENS = 16384  # of prefill
# Llama-3.1-8B's shape, for random weights where no model is given.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "bos_token_id": 128000, "eos_token_id": 128001,
    "tie_word_embeddings": False,
}  # fmt: skip


def add_parser(subparsers):
    from . import add_json

    parser = subparsers.add_parser("serving", help="vLLM's engine with each cache dtype on this GPU")
    parser.add_argument("--model", help="a model folder; without it, random weights in Llama-3.1-8B's shape")
    parser.add_argument(
        "--dtypes", default=DTYPES, help=f"values of --kv-cache-dtype, of ours with optional :name=value, as in tqai:canary=10000 ({DTYPES})"
    )
    parser.add_argument("--shapes", default=SHAPES, help=f"requests x prompt tokens ({SHAPES})")
    parser.add_argument("--full", type=int, default=8192, help="prompt tokens of the run that fills memory; 0 for none")
    parser.add_argument("--max-requests", type=int, default=256, help="most requests of that run")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs (1)")
    parser.add_argument("--plot", type=Path, help="write a PNG")
    add_json(parser)
    return parser


def run(args) -> int:
    from . import _parse, emit, keep

    shapes = _parse.shapes(args.shapes) if args.shapes else []
    for word in args.dtypes.split(","):
        _dtype_and_options(word)
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("benchmark serving needs vLLM; install it with: pip install 'tqai[vllm]'")
    head = {"gpus": args.tensor_parallel_size, "date": datetime.date.today().isoformat(), "model": args.model or "random Llama-3.1-8B"}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or _random_llama(Path(scratch))
        for dtype in args.dtypes.split(","):
            rows.append(_in_a_process(args, shapes, model, dtype, bool(args.model)))
            head = rows[-1].pop("machine", {}) | head
            data = head | {"rows": rows}
            keep(args, data)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    emit(args, data, lambda: show(data))
    if args.plot:
        plot(data, args.plot)
    return 0 if all("why" not in row for row in rows) else 1


def _dtype_and_options(word: str) -> tuple[str, dict]:
    """The KV cache dtype and what --additional-config says to tqai; ValueError for what is not known."""
    dtype, *given = word.split(":")
    if is_tqai(dtype):
        parse_name(dtype)
    elif given:
        raise ValueError(f"--dtypes has {word!r}; only tqai's dtypes have options, as in tqai:canary=10000")
    try:
        options = {name: json.loads(value) for name, value in (option.split("=") for option in given)}
    except ValueError:
        raise ValueError(f"--dtypes has {word!r}; expected options as in {dtype}:canary=10000") from None
    Options.read(options)
    return dtype, options


def _random_llama(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(folder)


def _in_a_process(args, shapes: list[tuple[int, int]], model: str, dtype: str, weights: bool) -> dict:
    """One engine a process: vLLM frees its memory with it. A dtype that fails leaves its reason."""
    call = "import json, sys; from tqai.cli import benchmark_serving as b; b.measure(json.loads(sys.argv[1]))"
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        order = {
            "model": model, "dtype": dtype, "weights": weights, "full": args.full, "max_requests": args.max_requests,
            "shapes": shapes, "memory": args.gpu_memory_utilization, "result": result.name, "gpus": args.tensor_parallel_size,
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", call, json.dumps(order)], stdout=sys.stderr, check=False)
        text = result.read()
    return json.loads(text) if text else {"dtype": dtype, "why": f"ended with code {done.returncode}; its log is above"}


def measure(order: dict) -> None:
    """Write one dtype's row to a file; runs in a process of its own."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import vllm

    dtype, options = _dtype_and_options(order["dtype"])
    shapes = [tuple(shape) for shape in order["shapes"]]
    longest = max([order["full"], *(tokens for _, tokens in shapes)])
    batches = [batch for batch, _ in shapes]
    start = time.perf_counter()
    llm = vllm.LLM(
        model=order["model"], load_format="auto" if order["weights"] else "dummy", skip_tokenizer_init=True,
        kv_cache_dtype=dtype, additional_config={"tqai": options} if options else {}, max_model_len=longest + 512, gpu_memory_utilization=order["memory"],
        tensor_parallel_size=order["gpus"], max_num_batched_tokens=STEP_TOKENS, max_num_seqs=max(batches + [order["max_requests"]] * bool(order["full"])),
        enable_prefix_caching=False,
        compilation_config={  # no torch.compile: a minute less of starting, the same for every dtype
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted({1, 2, 4, 8, *range(16, order["max_requests"] + 1, 16), *batches}),
        },
    )  # fmt: skip
    cache = llm.llm_engine.vllm_config.cache_config
    row = {
        "dtype": order["dtype"], "start_s": time.perf_counter() - start,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size, "block_size": cache.block_size, "runs": [],
        "machine": {"device": torch.cuda.get_device_name(), "vllm": vllm.__version__, "torch": torch.__version__},
    }  # fmt: skip
    # What is compiled at first use: small and large chunks, those that go on, and those beside decodes.
    _serve(llm, 2, 100)
    _serve(llm, 3, min(longest, STEP_TOKENS * 2 // 3))
    for batch, tokens in shapes:
        row["runs"].append(_serve(llm, batch, tokens))
    if order["full"]:
        most = min(row["kv_tokens"] // order["full"], order["max_requests"])
        each = order["full"] + _new_tokens(most, order["full"]) + cache.block_size
        batch = min(row["kv_tokens"] // each, most)
        row["full"] = _serve(llm, batch // 16 * 16 or batch, order["full"])
    Path(order["result"]).write_text(json.dumps(row))


def _new_tokens(batch: int, tokens: int) -> int:
    """What each request generates: a token in every step while others prefill, then the measured steps."""
    return batch * tokens * 4 // 3 // STEP_TOKENS + 2 * DECODE_STEPS


def _serve(llm, batch: int, tokens: int) -> dict:
    """Prefill tokens a second until the last request's first token, then milliseconds of a pure decode step."""
    import random

    import torch
    from vllm import SamplingParams

    drawn = random.Random(batch * tokens)
    vocabulary = llm.llm_engine.model_config.get_vocab_size() - 1
    new_tokens = _new_tokens(batch, tokens)
    options = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0, detokenize=False)
    engine = llm.llm_engine
    for i in range(batch):
        prompt = {"prompt_token_ids": [drawn.randrange(vocabulary) for _ in range(tokens)]}
        engine.add_request(f"{batch}x{tokens}-{i}-{time.monotonic_ns()}", prompt, options)
    started: set[str] = set()
    torch.cuda.synchronize()
    start = time.perf_counter()
    while len(started) < batch:
        started |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    torch.cuda.synchronize()
    prefill = time.perf_counter() - start
    left = engine.get_num_unfinished_requests()
    for _ in range(4):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(DECODE_STEPS):
        engine.step()
    torch.cuda.synchronize()
    step = (time.perf_counter() - start) / DECODE_STEPS
    kept = engine.get_num_unfinished_requests()
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "batch": batch, "tokens": tokens, "prefill_tokens_s": batch * tokens / prefill, "step_ms": step * 1e3,
        "decode_tokens_s": batch / step, "all_ran": kept == left == batch,
    }  # fmt: skip


def _where(data: dict) -> str:
    gpus = data.get("gpus", 1)
    return f"{f'{gpus} ' if gpus > 1 else ''}{data.get('device', '?')}, vLLM {data.get('vllm', '?')}"


def show(data: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{_where(data)}, {data['model']}")
    done = [row for row in data["rows"] if "why" not in row]
    shapes = [(r["batch"], r["tokens"]) for r in done[0]["runs"]] if done else []
    heads = ["dtype", "KV tokens", *(f"{b} x {t}: ms a step (prefill tok/s)" for b, t in shapes), "full memory: requests, tok/s"]
    for head in heads:
        table.add_column(head)
    for row in data["rows"]:
        if "why" in row:
            table.add_row(row["dtype"], row["why"])
            continue
        mark = lambda r: "" if r["all_ran"] else " (not all ran together)"
        cells = [f"{r['step_ms']:.2f} ({r['prefill_tokens_s']:,.0f}){mark(r)}" for r in row["runs"]]
        full = row.get("full")
        cells.append(f"{full['batch']}, {full['decode_tokens_s']:,.0f}{mark(full)}" if full else "-")
        table.add_row(row["dtype"], f"{row['kv_tokens']:,}", *cells)
    Console(width=160).print(table)


def plot(data: dict, path: Path) -> None:
    """Decode tokens a second at full memory and at each shape, one bar a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in data["rows"] if "why" not in row]
    groups = [f"{r['batch']} x {r['tokens']}" for r in rows[0]["runs"]] + ["full memory"] * ("full" in rows[0])
    fig, ax = plt.subplots(figsize=(1.5 + 1.8 * len(groups), 4.2), layout="constrained")
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        rates = [r["decode_tokens_s"] for r in row["runs"]] + ([row["full"]["decode_tokens_s"]] if "full" in row else [])
        at = [g + (i - (len(rows) - 1) / 2) * width for g in range(len(groups))]
        bars = ax.bar(at, rates, width * 0.95, label=f"{row['dtype']} ({row['kv_tokens'] / 1e3:,.0f}k tokens fit)")
        ax.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=7)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylabel("decode tokens a second")
    ax.set_title(f"{data['model']}, {_where(data)}", fontsize=10)
    ax.legend(fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)

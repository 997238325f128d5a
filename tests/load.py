"""Many clients at once against a real server, every answer checked: `python tests/load.py --out FILE`, in an environment of
.ci/run: vLLM's CPU server where vLLM is, mlx-lm's server where that is.

Each client asks one request after the other, of mixed lengths; one in twenty is left in the middle of its answer. The model
is follower_model.py's, so that what is right is known for every prompt. The stock cache serves the same load in the same run,
with room for as many tokens.
"""

import argparse
import contextlib
import dataclasses
import datetime
import http.client
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import follower_model

LIMIT, BLOCK, BLOCKS = 512, 64, 60  # vLLM's: room for about a third of 64 clients' tokens


@dataclasses.dataclass(frozen=True)
class Load:
    """So many clients for so many seconds, of whose requests this share is left in the middle of the answer."""

    clients: int
    seconds: float
    left: float = 0.05


@dataclasses.dataclass
class Outcome:
    """Of a load: seconds until the first word and the last of each request that was answered, and what went wrong."""

    first: list[float] = dataclasses.field(default_factory=list)
    last: list[float] = dataclasses.field(default_factory=list)
    words: int = 0
    left: int = 0
    wrong: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)

    def summary(self, seconds: float) -> dict:
        share = lambda times, p: round(sorted(times)[min(int(p * len(times)), len(times) - 1)], 3) if times else None
        times = {
            f"{name} word, seconds": {f"p{round(100 * p)}": share(found, p) for p in (0.5, 0.9, 0.99)}
            for name, found in (("first", self.first), ("last", self.last))
        }
        return {
            "requests": len(self.last), "left by their clients": self.left, "wrong answers": self.wrong, "errors": len(self.errors),
            "seconds": round(seconds, 1), "words a second": round(self.words / seconds, 1), **times,
        }  # fmt: skip


def ask(port: int, body: dict):
    """Yields the pieces of text of a streamed completion; OSError with the status for another than 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"status {response.status}: {response.read()[:200]!r}")
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])["choices"][0]["text"]
    finally:
        connection.close()


def run(port: int, model: str, load: Load) -> dict:
    """Load the server; returns Outcome.summary."""
    outcome, lock, end = Outcome(), threading.Lock(), time.monotonic() + load.seconds

    def one(source: random.Random) -> None:
        length = source.choice([source.randint(4, 40), source.randint(40, 150), source.randint(150, LIMIT - 50)])
        prompt = follower_model.draw(source, length)
        count = source.randint(1, 32)
        leaves = source.randrange(count) if source.random() < load.left else None
        body = {"model": model, "prompt": follower_model.text(prompt), "max_tokens": count, "temperature": 0, "stream": True}
        expected, said, start, first = follower_model.text(follower_model.answer(prompt, count)).split(), "", time.monotonic(), None
        with contextlib.closing(ask(port, body)) as pieces:
            for piece in pieces:
                first = first or time.monotonic() - start
                said += piece
                if leaves is not None and len(said.split()) > leaves:
                    break
        with lock:
            outcome.wrong += said.split() != (expected if leaves is None else expected[: len(said.split())])
            outcome.words += len(said.split())
            outcome.left += leaves is not None
            if leaves is None:
                outcome.first.append(first or time.monotonic() - start)
                outcome.last.append(time.monotonic() - start)

    def client(number: int) -> None:
        source = random.Random(number)
        while time.monotonic() < end:
            try:
                one(source)
            except (OSError, http.client.HTTPException, ValueError) as error:
                with lock:
                    outcome.errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=client, args=(i,)) for i in range(load.clients)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if outcome.errors:
        print(*sorted(set(outcome.errors))[:5], sep="\n", file=sys.stderr)
    return outcome.summary(time.monotonic() - start)


def vllm(model: Path, dtype: str, log: Path, load: Load) -> dict:
    """vLLM's CPU server with this cache."""
    from vllm_server import serve

    from tqai_plugins.core.kv_format import KVFormat, is_tqai

    heads = follower_model.LAYERS * follower_model.KV_HEADS
    bytes_each = heads * (KVFormat.from_name(dtype, follower_model.HEAD_DIM).slot_bytes if is_tqai(dtype) else 2 * 4 * follower_model.HEAD_DIM)
    options = [
        "--kv-cache-dtype", dtype, "--dtype", "float32", "--block-size", BLOCK, "--max-model-len", LIMIT, "--max-num-seqs", 64,
        "--max-num-batched-tokens", 512, "--kv-cache-memory-bytes", BLOCKS * BLOCK * bytes_each,
    ]  # fmt: skip
    if is_tqai(dtype):
        options += ["--additional-config", json.dumps({"tqai": {"recent_memory": 0.1, "canary": 100}})]
    with serve(model, log, *options) as server:
        before = server.megabytes()
        found = run(int(server.url.rpartition(":")[2]), "m", load)
        found["megabytes of the worker"] = {"before": before, "after": server.megabytes()}
        found["preemptions"] = int(server.metric("vllm:num_preemptions_total"))
        if is_tqai(dtype):
            found["canary"] = {what: int(server.metric(f"tqai_canary_{what}_total")) for what in ("checks", "failures")}
        time.sleep(2)
        found["blocks in use afterwards"] = server.metric("vllm:kv_cache_usage_perc")
    return found


def mlx(model: Path, dtype: str, log: Path, load: Load) -> dict:
    """mlx-lm's server with this cache."""
    from test_mlx_server import Server

    stock = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model)]
    ours = [sys.executable, "-m", "tqai", "serve", "--mlx", str(model), "--kv-cache-dtype", dtype]
    server = Server(stock if dtype == "auto" else ours, log)
    try:
        return run(server.port, str(model), load)
    finally:
        server.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300, help="with each cache")
    parser.add_argument("--dtypes", default="tqai,auto")
    parser.add_argument("--out", type=Path, help="a JSON file, to which a runtime's figures are added")
    args = parser.parse_args(argv)
    name, serve = ("vllm", vllm) if importlib.util.find_spec("vllm") else ("mlx-lm", mlx)
    with tempfile.TemporaryDirectory() as work:
        model = follower_model.write(Path(work) / "model")
        load = Load(args.clients, args.seconds)
        found = {dtype: serve(model, dtype, Path(work) / f"{dtype}.log", load) for dtype in args.dtypes.split(",")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    row = {
        "command": f"python tests/load.py --clients {args.clients} --seconds {args.seconds:g} --dtypes {args.dtypes}",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, shared with other work", "commit": commit,
        "date": datetime.date.today().isoformat(), "versions": {p: version(p) for p in (name, "tqai")}, "caches": found,
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if args.out:
        held = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(held | {name: row}, indent=1) + "\n")
    return int(any(cache["wrong answers"] or cache["errors"] for cache in found.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Many clients at once against a real server, every answer checked: `python tests/load.py --out FILE`, in an environment of
.ci/run: vLLM's CPU server where vLLM is, mlx-lm's server where that is. On a machine with a GPU it is vLLM's CUDA server, which
long prompts are for: `--requests 530 --limit 32768 --answers 256 --kv-tokens 98304`.

Each client asks one request after the other, of mixed lengths; one in twenty is left in the middle of its answer. The model
is follower_model.py's, so that what is right is known for every prompt. The stock cache serves the same load in the same run,
with room for as many tokens: in as many bytes it would hold a fifth of them and run out of room where tqai does not, and its times
would tell of that; so both run out of it at the same load, and what differs is the cache.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import http.client
import importlib.util
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import follower_model

LIMIT, BLOCK, BLOCKS = 512, 64, 60  # vLLM's: room for about a third of 64 clients' tokens


@dataclasses.dataclass(frozen=True)
class Load:
    """So many clients for so many seconds, of whose requests this share is left in the middle of the answer. requests: so many
    instead of the seconds. limit: tokens of the longest prompt, the logarithms of whose lengths are uniform then. answers: words
    of the longest answer."""

    clients: int
    seconds: float
    left: float = 0.05
    requests: int | None = None
    limit: int | None = None
    answers: int = 32

    @property
    def words(self) -> int:
        """That the model has to know."""
        return max(follower_model.WORDS, self.limit or 0)

    @property
    def context(self) -> int:
        """Tokens of the longest prompt and its answer; whole blocks."""
        return -(-(self.limit + self.answers) // BLOCK) * BLOCK if self.limit else LIMIT


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked, the words of the whole answer, and after how many of them its client leaves, if it does."""

    prompt: list[int]
    expected: list[str]
    leaves: int | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of vLLM's server: tokens that fit into its cache, the model's dtype (None: what the machine is good at), tqai's options, and
    more arguments of `vllm serve`."""

    tokens: int = BLOCKS * BLOCK
    dtype: str | None = None
    options: str = '{"recent_memory": 0.1, "canary": 100}'
    more: str = ""


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


def draw(source: random.Random, load: Load, length: int | None = None) -> Request:
    """The next request, of this many tokens or of as many as the load has them."""
    if length is None and load.limit:
        length = round(4 * (load.limit / 4) ** source.random())
    length = length or source.choice([source.randint(4, 40), source.randint(40, 150), source.randint(150, LIMIT - 50)])
    prompt = follower_model.draw(source, length, words=load.words)
    count = source.randint(1, load.answers)
    leaves = source.randrange(count) if source.random() < load.left else None
    return Request(prompt, follower_model.text(follower_model.answer(prompt, count)).split(), leaves)


@functools.lru_cache(1)
def all_requests(load: Load) -> list[Request]:
    """Of a load that counts them, drawn before the clock starts; the first is as long as any can be."""
    return [draw(random.Random(i), load, None if i else load.limit) for i in range(load.requests)]


def until(end: float, source: random.Random, load: Load) -> Iterator[Request]:
    """One client's, of a load that goes by the clock."""
    while time.monotonic() < end:
        yield draw(source, load)


def run(port: int, model: str, load: Load, as_text: bool = True) -> dict:
    """Load the server, with the numbers of tokens if not as text; returns Outcome.summary."""
    outcome, lock = Outcome(), threading.Lock()

    def one(request: Request) -> None:
        expected, leaves = request.expected, request.leaves
        prompt = follower_model.text(request.prompt) if as_text else request.prompt
        body = {"model": model, "prompt": prompt, "max_tokens": len(expected), "temperature": 0, "stream": True}
        said, start, first = "", time.monotonic(), None
        with contextlib.closing(ask(port, body)) as pieces:
            for piece in pieces:
                first = first or time.monotonic() - start
                said += piece
                if leaves is not None and len(said.split()) > leaves:
                    break
        with lock:
            right = said.split() == (expected if leaves is None else expected[: len(said.split())])
            if not right and outcome.wrong < 5:
                print(f"{len(request.prompt)} tokens: {said[:200]!r} instead of {expected[:20]}", file=sys.stderr)
            outcome.wrong += not right
            outcome.words += len(said.split())
            outcome.left += leaves is not None
            if leaves is None:
                outcome.first.append(first or time.monotonic() - start)
                outcome.last.append(time.monotonic() - start)

    def client(requests: Iterable[Request]) -> None:
        for request in requests:
            try:
                one(request)
            except (OSError, http.client.HTTPException, ValueError) as error:
                with lock:
                    outcome.errors.append(f"{type(error).__name__}: {error}")

    shared = iter(all_requests(load)) if load.requests else None  # each client takes the next
    start = time.monotonic()
    own = lambda number: shared or until(start + load.seconds, random.Random(number), load)
    threads = [threading.Thread(target=client, args=(own(i),)) for i in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if outcome.errors:
        print(*sorted(set(outcome.errors))[:5], sep="\n", file=sys.stderr)
    return outcome.summary(time.monotonic() - start)


def gpu() -> str | None:
    """Its name, if there is one."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def token_bytes(cache: str, dtype: str) -> int:
    """Of one token in all layers and heads, with a model of this dtype."""
    from tqai_plugins.core.kv_format import KVFormat, is_tqai

    element = 1 if cache.startswith("fp8") else 4 if (cache, dtype) == ("auto", "float32") else 2
    head_dim = follower_model.HEAD_DIM
    each = KVFormat.from_name(cache, head_dim).slot_bytes if is_tqai(cache) else 2 * element * head_dim
    return follower_model.LAYERS * follower_model.KV_HEADS * each


def vllm(model: Path, dtype: str, log: Path, load: Load, settings: Settings = Settings()) -> dict:
    """vLLM's server with this cache: the CPU build's, or on a GPU the CUDA build's, which chooses its own steps and blocks."""
    from vllm_server import CUDA, serve

    from tqai_plugins.core.kv_format import is_tqai

    weights = settings.dtype or ("bfloat16" if CUDA else "float32")
    options = [
        "--kv-cache-dtype", dtype, "--dtype", weights, "--max-model-len", load.context, "--max-num-seqs", 64,
        "--kv-cache-memory-bytes", settings.tokens * token_bytes(dtype, weights),
    ]  # fmt: skip
    if not CUDA:
        options += ["--max-num-batched-tokens", 512]
    if not CUDA or is_tqai(dtype):
        options += ["--block-size", BLOCK]
    if is_tqai(dtype):
        options += ["--additional-config", json.dumps({"tqai": json.loads(settings.options)})]
    with serve(model, log, *options, *shlex.split(settings.more)) as server:
        before = server.megabytes()
        port, as_text = int(server.url.rpartition(":")[2]), load.limit is None  # vLLM refuses texts of more letters than it thinks fit
        found = {"tokens that fit": server.tokens, **run(port, "m", load, as_text)}
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


def about(*packages: str) -> dict:
    """This machine, the commit and the versions of some packages."""
    card, git = gpu(), ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        commit = ""
    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {
        "machine": f"{card}, {cores}" if card else f"{cores}, shared with other work", "commit": commit,
        "date": datetime.date.today().isoformat(), "versions": {p: version(p) for p in (*packages, *(["torch"] if card else []))},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300, help="with each cache")
    parser.add_argument("--requests", type=int, help="so many with each cache, the same for all, instead of --seconds")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="of the longest prompt; lengths are log-uniform from 4 to it")
    parser.add_argument("--answers", type=int, default=32, metavar="WORDS", help="of the longest answer")
    parser.add_argument("--dtypes", default="tqai,auto")
    parser.add_argument("--kv-tokens", type=int, default=Settings.tokens, help="vllm: room in every cache")
    parser.add_argument("--dtype", default=Settings.dtype, help="vllm: of the model (float32, on a GPU bfloat16)")
    parser.add_argument("--tqai-options", default=Settings.options, help="vllm: of --additional-config, in JSON")
    parser.add_argument("--server-args", default="", help="vllm: more arguments of `vllm serve`, as one string")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what the servers said there")
    parser.add_argument("--out", type=Path, help="a JSON file, to which a runtime's figures are added")
    args = parser.parse_args(argv)
    load = Load(args.clients, args.seconds, requests=args.requests, limit=args.limit, answers=args.answers)
    if load.context > follower_model.REACHES[-1].tokens:
        parser.error(f"--limit and --answers make {load.context} tokens; the model tells {follower_model.REACHES[-1].tokens} apart")
    name, serve = "mlx-lm", mlx
    if importlib.util.find_spec("vllm"):
        settings = Settings(args.kv_tokens, args.dtype, args.tqai_options, args.server_args)
        name, serve = "vllm", functools.partial(vllm, settings=settings)
    given = sys.argv[1:] if argv is None else argv
    row = {"command": shlex.join(["python", "tests/load.py", *given]), **about(name, "tqai"), "caches": {}}
    with tempfile.TemporaryDirectory() as work:
        model = follower_model.write(Path(work) / "model", load.words, max(1024, load.context))
        for dtype in args.dtypes.split(","):
            row["caches"][dtype] = serve(model, dtype, (args.logs or Path(work)) / f"{dtype}.log", load)
            if args.out:  # what is stopped keeps the caches that are done
                held = json.loads(args.out.read_text()) if args.out.exists() else {}
                args.out.write_text(json.dumps(held | {name: row}, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    bad = lambda cache: cache["wrong answers"] or cache["errors"] or cache.get("canary", {}).get("failures")
    return int(any(map(bad, row["caches"].values())))


if __name__ == "__main__":
    sys.exit(main())

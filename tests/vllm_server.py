"""A `vllm serve` for tests: of vLLM's CPU build, and where there is a GPU, of the CUDA build."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
# Without torch.compile, and with few graphs, a server on a GPU starts in a quarter of the time; memory is left for others.
CPU_OPTIONS = ["--enforce-eager"]
CUDA_OPTIONS = [
    "--gpu-memory-utilization", 0.5, "--compilation-config",
    '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}',
]  # fmt: skip
ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
if not CUDA:  # one thread, not bound to a core: several on a shared machine wait for each other at every small step
    ENV |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Server:
    def __init__(self, url: str, log: Path, pid: int):
        self.url, self.log_file, self.pid = url, log, pid

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def tokens(self) -> int:
        """That fit, by vLLM's own line."""
        return int(re.search(r"KV cache size: ([\d,]+) tokens", self.log)[1].replace(",", ""))

    @property
    def client(self):
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", timeout=900, max_retries=0)

    def complete(self, prompt, max_tokens: int = 24, **options) -> str:
        options = {"model": "m", "temperature": 0, "prompt": prompt, "max_tokens": max_tokens, **options}
        return self.client.completions.create(**options).choices[0].text

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over its other labels."""
        text = urllib.request.urlopen(self.url + "/metrics", timeout=30).read().decode()
        found = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.M)
        assert found, f"{name} is not shown"
        return sum(float(x) for held, x in found if all(f'{k}="{v}"' in held for k, v in labels.items()))

    def processes(self) -> dict[int, str]:
        """The server, and what it and those started: number -> name."""
        found, waiting = {}, [self.pid]
        while waiting:
            pid = waiting.pop()
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip() + Path(f"/proc/{pid}/cmdline").read_text()
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def process(self, name: str) -> int:
        """EngineCore, or Worker, which holds the model and the cache; on one GPU EngineCore does."""
        return next(pid for pid, called in self.processes().items() if f"VLLM::{name}" in called)

    def megabytes(self) -> float:
        """Memory of its own of the worker."""
        status = Path(f"/proc/{self.process('EngineCore' if CUDA else 'Worker')}/status").read_text()
        return round(int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024, 1)


@contextlib.contextmanager
def serve(model, log: Path, *options, until: str | None = None):
    """The server once it answers, or once its log says `until`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1", "--port", port,
        "--served-model-name", "m", *(CUDA_OPTIONS if CUDA else CPU_OPTIONS), *options,
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENV, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", log, process.pid)
    try:
        deadline = time.monotonic() + 300
        while not (until in server.log if until else _answers(server)):
            assert process.poll() is None and time.monotonic() < deadline, server.log[-3000:]
            time.sleep(0.5)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # one that is still starting does not listen to milder words
        process.wait()


def _answers(server: Server) -> bool:
    try:
        urllib.request.urlopen(server.url + "/health", timeout=5)
        return True
    except OSError:
        return False

"""A `vllm serve` for a benchmark, asked through its own HTTP API."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqai_plugins.vllm_plugin.options import FORCED_TOKENS, KEPT_LOGITS, LOGITS_FOLDER

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Entry:
    """One server: its cache dtype, the share of its memory for 8-bit copies of recent pages (None: the default), and
    whether keys are stored less their mean or in balance."""

    name: str
    dtype: str
    recent_memory: float | None = None
    key_mean: bool = True

    @classmethod
    def parse(cls, text: str) -> Entry:
        """From a word of --formats; ValueError says what is expected."""
        from tqai_plugins.vllm_plugin.start_checks import name_check

        found = re.fullmatch(r"((?:tqai_)?(k\dv\d)|[a-z0-9_]+?)(?::([0-9.]+))?(:nomean)?", text)
        if not found:
            raise ValueError(
                f"--formats has {text!r}; expected a KV cache dtype such as fp8 or k4v2, k4v2:0 "
                "without 8-bit copies, or k4v2:nomean without key mean and balance"
            )
        dtype = f"tqai_{found[2]}" if found[2] else found[1]
        return cls(text, name_check(None)(dtype), float(found[3]) if found[3] else None, not found[4])

    @property
    def options(self) -> list[str]:
        """Arguments of `vllm serve`."""
        options = {} if self.recent_memory is None else {"recent_memory": self.recent_memory}
        options |= {} if self.key_mean else {"key_mean": False}
        return ["--kv-cache-dtype", self.dtype, *(["--additional-config", json.dumps({"tqai": options})] if options else [])]


def served_folder(model: str) -> str:
    """The folder or Hugging Face id that a server takes; ValueError for a GGUF file."""
    from tqai import models

    folder, extra = models._locate(model)
    if extra:
        raise ValueError(f"--runtime vllm serves model folders and Hugging Face ids; {model} is a GGUF file")
    return folder


def stored_bits(dtype: str, folder: str, model_dtype: str) -> dict:
    """Bits an element, of codes and scales, the model's for `auto`; for vLLM's own turboquant_* without its layers that stay uncompressed."""
    from transformers import AutoConfig

    from tqai_plugins.core.kv_format import KVFormat, is_tqai

    config = AutoConfig.from_pretrained(folder).get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if is_tqai(dtype):
        return {"bits": KVFormat.from_name(dtype, head_dim).bits_per_element}
    if dtype.startswith("turboquant"):
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        return {"bits": 4.0 * TurboQuantConfig.from_cache_dtype(dtype, head_dim).slot_size_aligned / head_dim}
    kept = model_dtype if dtype == "auto" else dtype
    return {"bits": 8.0 if kept.startswith("fp8") else 32.0 if kept == "float32" else 16.0}


class Server:
    """A `vllm serve` of its own, stopped when the block ends; OSError with the end of its log if it does not start. Answers can be
    forced only where asked for: vLLM 0.26 takes its older runner for it, in which its own turboquant_* do not start."""

    def __init__(self, model: str, args, context: int, options: list[str], forced: bool = True):
        self.scored_from, self.named = context // 2, args.top_logprobs
        self.names = itertools.count()
        self.folder = tempfile.TemporaryDirectory(prefix="tqai-logits-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = tempfile.NamedTemporaryFile("w+", prefix="tqai-vllm-", suffix=".log", delete=False)
        self.command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1", "--port", str(self.port),
            "--served-model-name", "model", "--skip-tokenizer-init", "--dtype", args.dtype, "--max-model-len", str(context + 1),
            "--max-num-seqs", str(args.parallel), "--max-num-batched-tokens", str(args.chunk), "--max-logprobs", str(args.top_logprobs),
            "--no-enable-prefix-caching", "--enforce-eager", "--kv-cache-memory-bytes", str(CACHE_BYTES),
            *(["--logits-processors", "tqai_plugins.vllm_plugin.forced_tokens:ForcedTokens"] if forced else []),
            *options, *shlex.split(args.server_args),
        ]  # fmt: skip

    def __enter__(self) -> Server:
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", LOGITS_FOLDER: self.folder.name}
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while not self._answers():
                if self.process.poll() is not None:
                    raise OSError(f"vllm serve ended with code {self.process.returncode}: {self._reason()}")
                time.sleep(1)
        except BaseException:  # a server that is still starting is not left behind
            self.__exit__()
            raise
        Path(self.log.name).unlink()  # kept where it has something to say
        return self

    def _answers(self) -> bool:
        try:
            self._get("/health")
            return True
        except OSError:
            return False

    def __exit__(self, *_) -> None:
        self.folder.cleanup()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def _reason(self) -> str:
        lines = Path(self.log.name).read_text().splitlines()
        errors = [line for line in lines if re.search(r"\w*(Error|error): ", line)]
        return f"{(errors or lines or ['no log'])[-1].strip()} (log: {self.log.name})"

    def _get(self, path: str) -> bytes:
        return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10).read()

    def _complete(self, **body) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps({"model": "model", "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            return json.loads(urllib.request.urlopen(request).read())["choices"][0]
        except urllib.error.HTTPError as error:
            raise OSError(f"vllm answered {error.code}: {error.read().decode()[:300]}") from error

    def prompt(self, window: list[int]) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens and of the true one, for each scored token."""
        answer = self._complete(prompt=window, max_tokens=1, prompt_logprobs=self.named)
        return [{int(t): x["logprob"] for t, x in found.items()} for found in answer["prompt_logprobs"][self.scored_from :]]

    def continuation(self, window: list[int]):
        """Logits [scored tokens, vocabulary] of the tokens that the server is made to write."""
        return self.write(window[: self.scored_from], window[self.scored_from :])

    def write(self, prompt: list[int], forced: list[int]):
        """Logits [forced tokens, vocabulary] of the tokens that the server is made to write."""
        from safetensors.torch import load_file

        name = next(self.names)
        self._complete(
            prompt=prompt, max_tokens=len(forced), ignore_eos=True,
            vllm_xargs={FORCED_TOKENS: ",".join(map(str, forced)), KEPT_LOGITS: name},
        )  # fmt: skip
        path = Path(self.folder.name) / f"{name}.safetensors"
        if not path.exists():
            raise OSError("vllm did not write the tokens it was given; does this version load --logits-processors?")
        logits = load_file(path)["logits"]
        path.unlink()
        return logits

    def counts(self) -> dict:
        """What the server says of its cache: tokens that fit, vectors quantized, share of recent pages read from copies."""
        text = self._get("/metrics").decode()
        number = lambda name: sum(float(x) for x in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))
        counts = {"vectors_quantized": int(number("tqai_vectors_quantized_total")), "tokens_read": int(number("tqai_tokens_read_total"))}
        size = re.search(r'kv_cache_size_tokens="(\d+)"', text)
        if size:
            counts["kv_tokens"] = int(size[1])
        wanted = number("tqai_recent_pages_read_total")
        if wanted:
            counts["recent_from_copies"] = 1 - number("tqai_fallbacks_total") / wanted
        return counts

"""mlx-lm's real server over HTTP with compressed caches, and the plain mlx_lm commands after `tqai mlx enable`."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_models
import tqai
from mlx_lm.generate import generate_step

ENV = os.environ | {"HF_HUB_OFFLINE": "1"}


class Server:
    """A server process; ask() is one chat request."""

    def __init__(self, command: list[str], log, env=ENV):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        with open(log, "w") as out:
            command = [*command, "--port", str(self.port), "--log-level", "DEBUG"]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        raise AssertionError(log.read_text())

    def post(self, body: dict, timeout: float = 600):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=timeout)

    def ask(self, *said: str, count: int = 24, **options) -> tuple[str, dict]:
        """(answer, usage) to a conversation of user, assistant, user ... messages."""
        messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
        with self.post({"messages": messages, "max_tokens": count, **options}) as response:
            answer = json.load(response)
        return answer["choices"][0]["message"]["content"], answer["usage"]

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self.log.read_text()


@contextlib.contextmanager
def serving(tmp_path, *flags: str, kind: str = "llama", command=("-m", "tqai", "serve", "--mlx")):
    server = Server([sys.executable, *command, str(mlx_models.folder_of(kind)), *flags], tmp_path / f"server-{kind}.log")
    try:
        yield server
    finally:
        log = server.stop()
    log = re.sub(r"Traceback(?s:.*?)(BrokenPipeError|ConnectionResetError)", "", log)  # clients that went
    assert "Traceback" not in log, log


def together(*calls) -> list:
    """The results of all calls, run at once."""
    results = [None] * len(calls)

    def run(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def cached(usage: dict) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def alone(kind: str, *said: str, count: int = 24, **options) -> str:
    """The same chat by mlx_lm in this process, with a cache of its own."""
    model, tokenizer = mlx_models.load(kind)
    tqai.patch(model, **options)
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
    prompt = mx.array(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    tokens = []
    for token, _ in generate_step(prompt, model, max_tokens=count):
        if int(token) in tokenizer.eos_token_ids:
            break
        tokens.append(int(token))
    tqai.unpatch(model)
    return tokenizer.decode(tokens)


CHATS = ("alpha " * 60, "beta gamma " * 35, "short")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_three_concurrent_chats_are_answered_as_alone(tmp_path, kind):
    with serving(tmp_path, "--prompt-cache-size", "0", kind=kind) as server:
        answers = together(*(lambda text=text: server.ask(text)[0] for text in CHATS))
        assert answers == [server.ask(text)[0] for text in CHATS], "one after the other"
        late = threading.Thread(target=lambda: server.ask("delta " * 400, count=200))
        late.start()
        time.sleep(0.5)  # the first is generating by now
        assert server.ask(CHATS[0])[0] == answers[0], "a late joiner"
        late.join()
    assert answers == [alone(kind, text) for text in CHATS]


def test_mixed_lengths_of_up_to_three_thousand_tokens(tmp_path):
    texts = ["x", "hello " * 20, "y" * 130, "some words " * 60, "z " * 1500]
    with serving(tmp_path, "--prompt-cache-size", "0") as server:
        together_ = together(*(lambda text=text: server.ask(text, count=8) for text in texts))
        assert max(usage["prompt_tokens"] for _, usage in together_) > 3000
        assert [answer for answer, _ in together_] == [server.ask(text, count=8)[0] for text in texts]


def test_prompts_are_reused_and_trimmed(tmp_path):
    """In the strategy `full` a trimmed cache is the same as one that never was longer, so answers are equal."""
    first, second = "tell me " * 80, "and then " * 10
    with serving(tmp_path, "--cache-strategy", "full", "--kv-cache-dtype", "tqai_k4v4") as server:
        answer, usage = server.ask(first)
        assert cached(usage) == 0
        again, usage = server.ask(first)
        assert again == answer and cached(usage) == usage["prompt_tokens"] - 1, "trimmed to its prompt"
        turn, usage = server.ask(first, "ok", second)
        assert 600 < cached(usage) < usage["prompt_tokens"]
        fork, usage = server.ask(first + "something else")
        assert cached(usage) > 500
    options = {"bits_k": 4, "bits_v": 4, "cache_strategy": "full"}
    assert answer == alone("llama", first, **options) and turn == alone("llama", first, "ok", second, **options)
    assert fork == alone("llama", first + "something else", **options)


def test_seeded_disconnected_and_bounded_requests(tmp_path):
    """Seeded requests are served one by one, from trimmed caches: equal in the strategy `full`."""
    flags = ("--prompt-cache-bytes", "1MB", "--prompt-cache-size", "40", "--cache-strategy", "full")
    with serving(tmp_path, *flags) as server:
        sampled = [server.ask(CHATS[1], seed=seed, temperature=1.0, count=30)[0] for seed in (3, 3, 4)]
        assert sampled[0] == sampled[1] != sampled[2]
        expected = server.ask(CHATS[2])[0]
        body = {"messages": [{"role": "user", "content": "go on " * 50}], "max_tokens": 3000, "stream": True}
        for _ in range(2):
            stream = server.post(body)
            stream.readline()
            stream.close()  # gone in the middle of an answer
        assert server.ask(CHATS[2])[0] == expected
        for i in range(16):
            server.ask(f"{i} " * 200, count=2)
        log = server.log.read_text()
    held = [int(line.split("Prompt Cache: ")[1].split()[0]) for line in log.splitlines() if "Prompt Cache: " in line]
    # 613 tokens in 2 layers of 2 heads are 127 KB in K4V2, 628 KB in float16.
    assert 5 <= held[-1] <= 9


def test_a_draft_model(tmp_path):
    draft = str(mlx_models.folder_of("draft"))
    with serving(tmp_path, "--draft-model", draft, "--cache-strategy", "full") as server:
        answer, _ = server.ask(CHATS[0])
    assert answer == alone("llama", CHATS[0], cache_strategy="full")


def test_vector_values(tmp_path):
    with serving(tmp_path, "--vector-values", "--cache-strategy", "full") as server:
        answer, _ = server.ask(CHATS[0])
    vector, plain = (alone("llama", CHATS[0], cache_strategy="full", vector_values=given) for given in (True, False))
    assert answer == vector != plain


def test_the_module_takes_the_same_flags(tmp_path):
    with serving(tmp_path, command=("-m", "tqai_plugins.mlx_lm_plugin.server", "--model")) as server:
        assert server.ask("short")[0] == alone("llama", "short")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--kv-cache-dtype", "tqai_k5v4"], "bits_k is 5; on MLX allowed are 2, 3, 4, 8"),
        (["--kv-cache-dtype", "turboquant"], "unknown KV cache format 'turboquant'"),
        (["--kv-cache-dtype", "tqai_k4v4", "--vector-values"], "vector_values is True but bits_v is 4"),
        (["--kv-bits", "4"], "--kv-bits asks for mlx-lm's quantized cache; leave it out"),
        (["--residual-window", "-1"], "residual_window is -1"),
    ],
)
def test_bad_flags_end_in_one_sentence(flags, said):
    command = [sys.executable, "-m", "tqai", "serve", "--mlx", str(mlx_models.folder_of("llama")), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_cannot_be_served_ends_the_server(tmp_path):
    folder = mlx_models.write(tmp_path / "narrow", "llama", head_dim=40)
    command = [sys.executable, "-m", "tqai", "serve", "--mlx", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300, check=False)
    assert done.returncode == 2 and "head dimensions that are multiples of 16" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python environment of its own over this one, to write a .pth file to."""
    import site

    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    with open(f"{packages}/over.pth", "w") as file:
        file.write(lines)
    return str(python)


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env=ENV | env, timeout=300, check=True)


def test_enable_and_disable(environment, tmp_path):
    model = str(mlx_models.folder_of("llama"))
    say = [environment, "-m", "mlx_lm", "generate", "--model", model, "--prompt", CHATS[0], "--max-tokens", "12"]
    tqai_ = [environment, "-m", "tqai", "mlx"]
    stock = run(*say)
    assert "disabled" in run(*tqai_, "status").stdout and "tqai" not in stock.stderr
    assert "tqai_k2v2" in run(*tqai_, "enable", "--kv-cache-dtype", "tqai_k2v2").stdout
    coarse = run(*say)
    assert "tqai: KV cache tqai_k2v2" in coarse.stderr and answer(coarse) != answer(stock)
    assert answer(run(*say, TQAI_MLX="off")) == answer(stock), "the variable goes before"
    assert "KV cache tqai_k8v8" in run(*say, TQAI_MLX="tqai_k8v8").stderr
    assert "enabled" in run(*tqai_, "status").stdout
    file = str(tmp_path / "cache.safetensors")
    run(environment, "-m", "mlx_lm", "cache_prompt", "--model", model, "--prompt", CHATS[1], "--prompt-cache-file", file)
    more = run(environment, "-m", "mlx_lm", "generate", "--model", model, "--prompt-cache-file", file, "--prompt", "go", "--max-tokens", "4")
    assert answer(more)
    with serving_plain(environment, tmp_path) as server:
        assert server.ask("short")[1]["completion_tokens"]
    assert "KV cache tqai_k2v2" in server.log.read_text()
    assert "disabled" in run(*tqai_, "disable").stdout
    after = run(*say)
    assert answer(after) == answer(stock) and "tqai" not in after.stderr
    assert not list((tmp_path.parent).glob("**/tqai_mlx.pth"))


@contextlib.contextmanager
def serving_plain(python: str, tmp_path):
    server = Server([python, "-m", "mlx_lm", "server", "--model", str(mlx_models.folder_of("llama"))], tmp_path / "plain.log")
    try:
        yield server
    finally:
        server.stop()


def answer(done: subprocess.CompletedProcess) -> str:
    return done.stdout.split("==========")[1]


def test_python_starts_without_mlx_when_enabled():
    code = "import sys; from tqai_plugins.mlx_lm_plugin import autoload; autoload.arm('tqai'); print(*sys.modules)"
    loaded = set(run(sys.executable, "-c", code).stdout.split())
    assert not {"mlx", "mlx.core", "mlx_lm", "numpy", "torch"} & loaded

"""Prompt-cache files of MLX are whole or as they were, whatever ends the process that saves them; servers that are killed start again."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.mlx, pytest.mark.slow]
pytest.importorskip("mlx_lm")

import mlx_models
from mlx_lm.models.cache import load_prompt_cache
from test_mlx_server import CHATS, ENV, Server, serving, together

from tqai_plugins.mlx_lm_plugin.patching import register

register()  # as a process that loads such files does by patching a model

# Saves the caches of prompts of these lengths one after the other, for ever with "loop"; argv: model, file, limit of bytes, how.
SAVE = """
import resource, sys
import mlx.core as mx, mlx_lm, tqai
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
model, _ = mlx_lm.load(sys.argv[1])
tqai.patch(model)
caches = []
for length in (300, 1000):
    cache = make_prompt_cache(model)
    model(mx.zeros((1, length), mx.int32), cache=cache)
    mx.eval([c.state[0] for c in cache])
    caches.append(cache)
if int(sys.argv[3]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
while True:
    for cache in caches:
        save_prompt_cache(sys.argv[2], cache)
        print("saved", flush=True)
    if sys.argv[4] == "once":
        break
"""


def save(file, limit: int = 0, how: str = "once") -> subprocess.Popen:
    command = [sys.executable, "-c", SAVE, str(mlx_models.folder_of("llama")), str(file), str(limit), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)


def length(file) -> int:
    return load_prompt_cache(str(file))[0].length


@pytest.mark.parametrize("name", ["cache.safetensors", "cache"])
def test_a_disk_that_is_full_keeps_the_file_that_was_there(tmp_path, name):
    """As a limit of file size, which the shorter cache meets and the longer one does not."""
    saving = save(tmp_path / name, limit=300_000)
    said, error = saving.communicate(timeout=120)
    assert said == "saved\n" and saving.returncode and "Unable to write" in error.splitlines()[-1]
    assert os.listdir(tmp_path) == ["cache.safetensors"] and length(tmp_path / "cache.safetensors") == 300


def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    file = tmp_path / "cache.safetensors"
    found = set()
    for attempt in range(5):
        saving = save(file, how="loop")
        saving.stdout.readline()
        time.sleep(0.004 * attempt)
        saving.send_signal(signal.SIGKILL)
        saving.communicate(timeout=60)
        found.add(length(file))
    assert found <= {300, 1000}


def test_a_server_that_is_killed_in_the_middle_of_answers_starts_again(tmp_path):
    """Clients do not wait for ever, and the next server answers as the first did."""
    command = [sys.executable, "-m", "tqai", "serve", "--mlx", str(mlx_models.folder_of("llama"))]
    server = Server(command, tmp_path / "first.log")
    expected = server.ask(CHATS[2])
    streams = [server.post({"messages": [{"role": "user", "content": text}], "max_tokens": 3000, "stream": True}) for text in CHATS]
    for stream in streams:
        stream.readline()
    server.process.kill()
    for stream in streams:
        rest = b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            rest = stream.read()
        assert b"[DONE]" not in rest
    again = Server(command, tmp_path / "second.log")
    try:
        assert again.ask(CHATS[2]) == expected
    finally:
        again.stop()


def test_a_hundred_clients_that_leave(tmp_path):
    """Before their answer, in the middle of it, or without reading any; the server goes on as if they had not been."""
    command = [sys.executable, "-m", "tqai", "serve", "--mlx", str(mlx_models.folder_of("llama"))]
    server = Server(command, tmp_path / "log")
    try:
        expected, _ = server.ask(CHATS[2])

        def leave(i: int):
            body = {"messages": [{"role": "user", "content": f"{i} " * (1 + i % 40)}], "max_tokens": 200, "stream": True}
            with server.post(body) as stream:
                for _ in range(i % 4):
                    stream.readline()

        for start in range(0, 100, 10):
            together(*(lambda i=i: leave(i) for i in range(start, start + 10)))
        assert server.ask(CHATS[2])[0] == expected
    finally:
        server.stop()


def test_clients_wait_while_the_server_is_busy(tmp_path):
    """It is stopped, so that it accepts no connection; the system holds them until it goes on."""
    with serving(tmp_path) as server, contextlib.ExitStack() as open_ones:
        server.process.send_signal(signal.SIGSTOP)
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(64)]
        for client in clients:
            open_ones.enter_context(client)
            client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        server.process.send_signal(signal.SIGCONT)
        assert [client.recv(12) for client in clients] == [b"HTTP/1.0 200"] * 64

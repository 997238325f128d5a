"""What tqai depends on, connects to and says of itself: bounds, no network, and a docstring for every public name."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import small_model

ROOT = Path(__file__).parents[1]
SOURCES = [file for name in ("tqai_plugins", "triton_kernels", "metal_kernels") for file in sorted((ROOT / name).rglob("*.py"))]
# What every command has, as the docstring of tqai.cli says.
COMMAND = {"add_parser", "run", "show", "plot"}


def test_every_dependency_has_a_lower_and_an_upper_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [r for r in (*project["dependencies"], *(r for extra in extras.values() for r in extra)) if not r.startswith("tqai[")]
    assert len(required) > 15
    unbounded = [r for r in required if not re.match(r"[\w-]+>=[\d.]+,<[\d.]+($|;)", r)]
    assert unbounded == []


def test_what_is_installed_lies_within_the_bounds():
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    for text in requires("tqai"):
        needed = Requirement(text)
        if needed.name == "tqai" or not needed.marker and not needed.specifier:
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            continue
        assert needed.specifier.contains(found, prereleases=True), f"{needed} but {found} is here: test it, then widen the range"


OFFLINE = """
import importlib, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"network: {event} {args[1:]}")
sys.addaudithook(refuse)
import socket
try:
    socket.create_connection(("127.0.0.1", 9))
    raise SystemExit("the hook is no good")
except RuntimeError:
    pass
import tqai
count = 0
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
        count += 1
    except ImportError as error:
        assert error.name and error.name.split(".")[0] in ("vllm", "mlx", "mlx_lm", "prometheus_client"), (name, error)
assert count > 60, count
import torch
from tqai import models
model, tokenizer = models.load(sys.argv[1])
ids = tokenizer("A lighthouse " * 20, return_tensors="pt").input_ids
cache = tqai.patch(model)
model.generate(ids, past_key_values=cache, max_new_tokens=3)
assert cache.vectors_dequantized
from tqai.cli import main
assert main(["info", "--json"]) == main(["plan", "--model", sys.argv[1], "--json"]) == 0
"""


@pytest.mark.slow
def test_nothing_connects_on_import_or_while_a_model_generates(tmp_path):
    pytest.importorskip("transformers")
    folder = small_model.write(tmp_path / "model")
    modules = []
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[:2] == ("tqai_plugins", "tqai") else ("tqai_plugins", *parts) if parts[0] != "tqai_plugins" else parts
        modules += [".".join(parts)] if parts[-1] not in ("__init__", "__main__") else []
    done = subprocess.run([sys.executable, "-c", OFFLINE, str(folder), *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def undocumented(file: Path) -> list[str]:
    """Public functions, classes and methods without a docstring. Methods of a class with a base are the base's."""
    command = "cli" in file.parts

    def look(node, inside: str, inherits: bool):
        for item in node.body:
            if not isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or item.name.startswith("_"):
                continue
            is_class = isinstance(item, ast.ClassDef)
            if not ast.get_docstring(item) and not inherits and not (command and not inside and item.name in COMMAND):
                yield f"{file.name}: {inside}{item.name}"
            if is_class:
                yield from look(item, f"{item.name}.", bool(item.bases))

    tree = ast.parse(file.read_text())
    return ([] if ast.get_docstring(tree) or not tree.body or file.name == "__main__.py" else [file.name]) + list(look(tree, "", False))


def test_every_public_name_has_a_docstring(tmp_path):
    assert len(SOURCES) > 100
    assert [name for file in SOURCES for name in undocumented(file)] == []
    (tmp_path / "planted.py").write_text('"""A."""\n\n\ndef f():\n    return 1\n\n\nclass C:\n    """C."""\n\n    def g(self):\n        return 1\n')
    assert undocumented(tmp_path / "planted.py") == ["planted.py: f", "planted.py: C.g"]


ARRAYS = ("np.ndarray", "torch.Tensor", "mx.array")


def raised(body: list[ast.stmt]) -> set[str]:
    """Names of the errors that these statements raise themselves, but for what is raised to be caught here."""
    found = set()
    for item in body:
        if isinstance(item, ast.Raise) and item.exc is not None:
            found.add(ast.unparse(item.exc.func if isinstance(item.exc, ast.Call) else item.exc))
        for field in ("body", "orelse", "finalbody"):
            caught = isinstance(item, ast.Try) and field == "body" and item.handlers
            if not caught and not isinstance(item, (ast.FunctionDef, ast.ClassDef)):
                found |= raised(getattr(item, field, []))
    return {name for name in found if name.endswith("Error")}


def unsaid(file: Path) -> list[str]:
    """Public functions that take arrays and show no shape such as [tokens, heads], or raise an error that they do not name."""

    def look(node, inside: str, known: str):
        for item in node.body:
            if isinstance(item, ast.ClassDef) and not item.bases and not item.name.startswith("_"):
                yield from look(item, f"{item.name}.", ast.get_docstring(item) or "")
            if not isinstance(item, ast.FunctionDef) or item.name.startswith("_"):
                continue
            says = known + (ast.get_docstring(item) or "")
            taken = [a.arg for a in (*item.args.args, *item.args.kwonlyargs) if a.annotation and ast.unparse(a.annotation).split(" | ")[0] in ARRAYS]
            if taken and "[" not in says:
                yield f"{file.name}: {inside}{item.name} takes {', '.join(taken)}"
            yield from (f"{file.name}: {inside}{item.name} raises {name}" for name in sorted(raised(item.body)) if name not in says)

    return list(look(ast.parse(file.read_text()), "", ""))


def test_public_functions_say_the_shapes_they_take_and_the_errors_they_raise(tmp_path):
    """Of the whole product but its commands, which have users instead of callers."""
    assert [name for file in SOURCES if "cli" not in file.parts for name in unsaid(file)] == []
    planted = '"""A."""\n\n\ndef f(x: np.ndarray):\n    """F."""\n    if x.ndim:\n        raise ValueError("no")\n'
    (tmp_path / "planted.py").write_text(planted)
    assert unsaid(tmp_path / "planted.py") == ["planted.py: f takes x", "planted.py: f raises ValueError"]

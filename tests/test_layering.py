"""Imports go core <- kernels <- runtime plugins <- tqai, and the wheel holds what it should."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVEL = {
    "core": 0,
    "torch_kernels": 1, "triton_kernels": 1, "metal_kernels": 1,
    "vllm_plugin": 2, "mlx_lm_plugin": 2, "transformers_plugin": 2,
    "tqai": 3,
}
HEAVY = {"torch", "triton", "vllm", "mlx", "mlx_lm", "transformers"}


def package_folders(root: Path) -> dict[str, Path]:
    found = {name: root / name for name in ("triton_kernels", "metal_kernels")}
    return found | {p.parent.name: p.parent for p in (root / "tqai_plugins").glob("*/__init__.py")}


def import_name(folder: str) -> str:
    return "tqai" if folder == "tqai" else f"tqai_plugins.{folder}"


def imports(file: Path, package: list[str], anywhere: bool = True):
    """Every module that a file of `package` imports, anywhere or at once, by its full name; relative ones are resolved."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def cycle(root: Path) -> list[str]:
    """Modules each of which imports the next one at once, and the last the first."""
    graph = {}
    for name, folder in package_folders(root).items():
        for file in folder.rglob("*.py"):
            package = [*import_name(name).split("."), *file.parent.relative_to(folder).parts]
            graph[".".join([*package, file.stem])] = list(imports(file, package, anywhere=False))
    known = {module: {x if x in graph else x.rpartition(".")[0] for x in found} & graph.keys() for module, found in graph.items()}
    try:
        graphlib.TopologicalSorter(known).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def violations(root: Path) -> list[str]:
    """Imports that point up or sideways, as 'file: module'."""
    found = []
    for name, folder in package_folders(root).items():
        for file in folder.rglob("*.py"):
            package = [*import_name(name).split("."), *file.parent.relative_to(folder).parts]
            for module in imports(file, package):
                first, second = [*module.split("."), ""][:2]
                target = second if first == "tqai_plugins" else first
                points_up = target in LEVEL and target != name and LEVEL[target] >= LEVEL[name]
                if points_up or (name == "core" and first in HEAVY):
                    found.append(f"{file.relative_to(root)}: {module}")
    return found


def copy_sources(to: Path) -> Path:
    for name in ("tqai_plugins", "triton_kernels", "metal_kernels", "examples", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    return to


def test_imports_point_down():
    assert violations(ROOT) == []


def test_modules_do_not_import_each_other(tmp_path):
    """Else it depends on which comes first whether they can be imported."""
    assert cycle(ROOT) == []
    root = copy_sources(tmp_path)
    with open(root / "tqai_plugins/core/bit_packing.py", "a") as file:
        file.write("from .reference import encode\n")
    assert {"tqai_plugins.core.bit_packing", "tqai_plugins.core.reference"} <= set(cycle(root))


@pytest.mark.parametrize(
    "file, line",
    [
        ("tqai_plugins/core/rotation.py", "import torch"),
        ("tqai_plugins/core/codebook.py", "from tqai_plugins.torch_kernels import codec"),
        ("tqai_plugins/core/codebook.py", "from ..torch_kernels import codec"),
        ("tqai_plugins/core/codebook.py", "def f():\n    from .. import transformers_plugin"),
        ("tqai_plugins/transformers_plugin/kv_cache.py", "from ..vllm_plugin.compat import OLDEST"),
        ("triton_kernels/merge.py", "from tqai_plugins.torch_kernels import codec"),
        ("tqai_plugins/vllm_plugin/__init__.py", "import tqai"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line):
    copy = copy_sources(tmp_path)
    (copy / file).write_text(line + "\n" + (copy / file).read_text())
    assert len(violations(copy)) == 1


def test_every_package_folder_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {"tqai_plugins", "tqai.results"}
    for name, folder in package_folders(ROOT).items():
        for init in folder.rglob("__init__.py"):
            present.add(".".join([import_name(name), *init.parent.relative_to(folder).parts]))
    assert present == listed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, unpacked."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_sources(folder / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    zipfile.ZipFile(next(folder.glob("tqai-*.whl"))).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_no_top_level_kernels(wheel):
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == {"tqai", "tqai_plugins"}
    assert not (wheel / "tqai_plugins" / "tqai").exists()
    assert (wheel / "tqai_plugins/core/codebook_tables.json").is_file()
    assert (wheel / "tqai/results/quality_smollm2.json").is_file(), "tqai plan reads what was measured"


def test_wheel_and_checkout_have_the_same_modules(wheel):
    in_wheel = {".".join(path.relative_to(wheel).with_suffix("").parts) for path in wheel.rglob("*.py")}
    in_checkout = {"tqai_plugins.__init__"} | {
        ".".join([import_name(name), *path.relative_to(folder).with_suffix("").parts])
        for name, folder in package_folders(ROOT).items()
        for path in folder.rglob("*.py")
    }
    assert in_wheel == in_checkout
    modules = sorted(name.removesuffix(".__init__") for name in in_wheel)
    code = f"from importlib.util import find_spec; print([m for m in {modules} if find_spec(m) is None])"
    for folder, path in (("/", wheel), (ROOT, f"{ROOT}:{ROOT / 'tqai_plugins'}"), (ROOT, wheel)):
        environment = os.environ | {"PYTHONPATH": str(path)}
        run = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        assert subprocess.run([sys.executable, "-c", code], check=True, **run).stdout == "[]\n"


@pytest.mark.parametrize("name", ["triton_kernels", "metal_kernels"])
def test_kernels_are_not_importable_from_the_checkout_by_their_folder_name(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode and f"tqai_plugins.{name}" in done.stderr


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import tqai; t = time.perf_counter() - t; "
        f"print(sorted({HEAVY!r} & set(sys.modules)), t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, seconds = done.stdout.rsplit(" ", 1)
    assert modules == "[]" and float(seconds) < 0.3

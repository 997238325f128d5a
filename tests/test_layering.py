"""Imports go core <- kernels <- runtime plugins <- tqai, and the wheel holds what it should."""

import ast
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


def violations(root: Path) -> list[str]:
    """Imports that point up or sideways, as 'file: module'."""
    found = []
    for name, folder in package_folders(root).items():
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    modules = [f"{node.module}.{alias.name}" for alias in node.names]
                for module in modules:
                    parts = module.split(".")
                    target = parts[1] if parts[0] == "tqai_plugins" and len(parts) > 1 else parts[0]
                    if name == "core" and parts[0] in HEAVY:
                        found.append(f"{file.relative_to(root)}: {module}")
                    if target in LEVEL and target != name:
                        sideways = LEVEL[target] == LEVEL[name] and not (name == "tqai")
                        if LEVEL[target] > LEVEL[name] or sideways:
                            found.append(f"{file.relative_to(root)}: {module}")
    return found


def copy_sources(to: Path) -> Path:
    for name in ("tqai_plugins", "triton_kernels", "metal_kernels", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    return to


def test_imports_point_down():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "file, line",
    [
        ("tqai_plugins/core/rotation.py", "import torch"),
        ("tqai_plugins/core/codebook.py", "from tqai_plugins.torch_kernels import codec"),
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
    present = {"tqai_plugins"}
    for name, folder in package_folders(ROOT).items():
        root = "tqai" if name == "tqai" else f"tqai_plugins.{name}"
        for init in folder.rglob("__init__.py"):
            present.add(".".join([root, *init.parent.relative_to(folder).parts]))
    assert present == listed


def test_the_wheel_has_no_top_level_kernels(tmp_path):
    source = copy_sources(tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(list(map(str, command)), check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("tqai-*.whl"))).namelist()
    assert {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")} == {"tqai", "tqai_plugins"}
    assert "tqai_plugins/core/codebook_tables.json" in names
    assert "tqai_plugins/triton_kernels/decode_attention.py" in names


@pytest.mark.parametrize("name", ["triton_kernels", "metal_kernels"])
def test_kernels_are_not_importable_from_the_checkout_by_their_folder_name(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f"tqai_plugins.{name}" in done.stderr


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import tqai; t = time.perf_counter() - t; "
        f"print(sorted({HEAVY!r} & set(sys.modules)), t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, seconds = done.stdout.rsplit(" ", 1)
    assert modules == "[]" and float(seconds) < 0.3

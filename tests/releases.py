"""Does the plugin fit each release of vLLM and mlx-lm that it is for? `python tests/releases.py` prints a table of those that pip finds,
in an environment of .ci/run for vLLM, in one for mlx-lm.

The Python of each release's wheel is unpacked and goes before the one that is installed. vLLM's checks are those of
vllm_releases.py, without a GPU; for mlx-lm tests of this folder run.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
# What a row of mlx-lm's table runs.
MLX_TESTS = {
    "caches": ["test_mlx_upstream.py"],
    "generators": ["test_mlx_upstream_generation.py", "test_mlx_cache.py", "-k", "generation or batches_give or saved or speculative"],
    "server": ["test_mlx_server.py", "-k", "concurrent_chats and llama or reused"],
}


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqai" / "releases"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unpack(package: str, release: str) -> Path:
    """The folder with the Python of a release, kept for the next time; OSError if pip cannot fetch it."""
    folder = cache_folder() / f"{package}-{release}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, f"{package}=={release}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"{package} {release} could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
        making = cache_folder() / f"making-{os.getpid()}-{package}-{release}"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(making, [n for n in wheel.namelist() if n.endswith((".py", ".json")) or ".dist-info/" in n])
    making.rename(folder)
    return folder


def run(package: str, release: str, command: list) -> subprocess.CompletedProcess:
    """This Python with the release in front."""
    path = os.pathsep.join([str(unpack(package, release)), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=HERE, check=False)


def available(package: str, oldest: tuple, below: tuple) -> list[str]:
    """Releases in this range that pip finds, the oldest first; no release candidates."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", listed)[1].split(", ")
    number = lambda release: tuple(map(int, release.split(".")))
    return sorted((r for r in found if re.fullmatch(r"[\d.]+", r) and oldest <= number(r)[:2] < below), key=number)


def check_vllm(release: str) -> dict[str, bool]:
    import vllm_releases

    done = vllm_releases.run(release)
    sys.stderr.write("" if done.returncode == 0 else done.stderr[-2000:])
    return {part: f"{part} ok" in done.stdout for part in vllm_releases.PARTS}


def check_mlx(release: str) -> dict[str, bool]:
    found = {}
    for part, tests in MLX_TESTS.items():
        done = run("mlx-lm", release, ["-m", "pytest", "-q", "-m", "mlx", *tests])
        found[part] = done.returncode == 0 and f"mlx_lm {release}" == _imported("mlx_lm", release)
        sys.stderr.write(f"mlx-lm {release}: {part} {'ok' if found[part] else done.stdout[-2000:]}\n")
    return found


def _imported(module: str, release: str) -> str:
    code = f"import {module}; print('{module}', {module}.__version__)"
    return run(module.replace("_", "-"), release, ["-c", code]).stdout.strip()


def table(package: str, found: dict[str, dict[str, bool] | None]) -> str:
    """Markdown with a column for each release; None for one that pip could not fetch."""
    parts = next(filter(None, found.values()), {})
    rows = [[package, *found], ["---"] * (1 + len(found))]
    for part in parts:
        rows.append([part, *("?" if each is None else "yes" if each[part] else "**no**" for each in found.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def matrix(package: str, oldest: tuple, below: tuple, check: Callable) -> bool:
    """Print the table; whether nothing in it failed."""
    found: dict[str, dict[str, bool] | None] = {}
    for release in available(package, oldest, below):
        try:
            found[release] = check(release)
        except OSError as error:
            sys.stderr.write(f"{error}\n")
            found[release] = None
    print(table(package, found))
    return all(all(each.values()) for each in found.values() if each)


def main() -> int:
    good = []
    if importlib.util.find_spec("vllm"):
        from tqai_plugins.vllm_plugin.compat import NEWEST, OLDEST

        good.append(matrix("vllm", OLDEST, (NEWEST[0], NEWEST[1] + 1), check_vllm))
    if importlib.util.find_spec("mlx_lm"):
        from tqai_plugins.mlx_lm_plugin.compat import TESTED

        good.append(matrix("mlx-lm", *TESTED, check_mlx))
    return 0 if good and all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The plugin beside the oldest release of vLLM that it serves, the newest and one between, from their wheels."""

import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM's requirements; .ci/run vllm installs them")

import vllm_releases


@pytest.mark.parametrize("release", [vllm_releases.OLDEST, vllm_releases.BETWEEN, vllm_releases.NEWEST])
def test_the_plugin_fits(release):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqai" / "vllm-releases"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        vllm_releases.unpack(release, cache)
    except OSError as error:
        pytest.skip(str(error))
    done = vllm_releases.run(release, cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" ok") == 3

"""The plugin beside the oldest release of vLLM that it serves, the newest and one between, from their wheels."""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM's requirements; .ci/run vllm installs them")

import releases
import vllm_releases


@pytest.mark.parametrize("release", [vllm_releases.OLDEST, vllm_releases.BETWEEN, vllm_releases.NEWEST])
def test_the_plugin_fits(release):
    try:
        releases.unpack("vllm", release)
    except OSError as error:
        pytest.skip(str(error))
    done = vllm_releases.run(release)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" ok") == 3

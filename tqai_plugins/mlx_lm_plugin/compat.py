"""Every line that depends on mlx-lm's version. The caches' interface (state, from_state) is 0.32's."""

from __future__ import annotations

import re
from importlib.metadata import version

TESTED = ((0, 32), (0, 33))  # from, below


def check_version() -> None:
    """ImportError outside the tested range of mlx-lm."""
    found = version("mlx-lm")
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if not TESTED[0] <= numbers < TESTED[1]:
        (low, high) = (".".join(map(str, end)) for end in TESTED)
        raise ImportError(f"mlx-lm {found} was not tested with tqai; install one of >={low},<{high}: pip install 'tqai[mlx]'")

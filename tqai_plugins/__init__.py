"""tqai: TurboQuant KV caches for the runtimes people already use."""

from pathlib import Path

# A wheel holds the kernel packages inside this one; a checkout keeps them beside it.
_checkout = Path(__file__).parents[1]
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

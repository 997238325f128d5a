"""What this project measured, from the files of examples/results (installed inside the package)."""

from __future__ import annotations

import json
import re
from pathlib import Path

REFERENCE = "uncompressed"
FP8 = "fp8"


def folder() -> Path:
    """Where the result files lie: inside an installed package, beside it in a checkout."""
    here = Path(__file__).parent
    installed, checkout = here / "results", here.parents[1] / "examples" / "results"
    return installed if installed.is_dir() else checkout


def read(pattern: str) -> dict[str, dict]:
    """Result files by name, those whose name matches a pattern such as quality_*.json."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder().glob(pattern))}


def divergences(served: bool) -> tuple[str, dict[str, float]]:
    """(where it was measured, mean KL divergence in nats by cache format), fp8 and those tqai formats that were measured.

    served: by vLLM's server as it is; otherwise by the transformers cache with its exact tokens.
    """
    (data,) = read("served_smollm2.json" if served else "quality_smollm2.json").values()
    rows = data["rows"]
    if served:
        rows = [row | row["continuation"] for row in rows if ":" not in row["name"]]
    found = {format_of(row): row["kld"] for row in rows if format_of(row) and not is_full(row)}
    return f"{data['model']}, {data['windows']} windows of {data['context']} tokens", found


def format_of(row: dict) -> str | None:
    """The cache format of a row of `tqai benchmark quality`."""
    found = re.match(r"(?:tqai_)?k([1-8])v([1-8])", row["name"])
    if found:
        return f"tqai_k{found[1]}v{found[2]}"
    return {FP8: FP8, "bf16": "bf16"}.get(row["name"])


def is_full(row: dict) -> bool:
    """Whether a row's cache kept no tokens exact."""
    return row.get("options", {}).get("cache_strategy") == "full"


def fidelity_class(divergence: float, fp8: float) -> str:
    """A word for a mean KL divergence, by its relation to that of an fp8 cache in the same run."""
    for limit, word in ((0.1, "as bf16"), (0.75, "better than fp8"), (1.5, "as fp8"), (6.0, "some loss")):
        if divergence <= limit * fp8:
            return word
    return "much loss"

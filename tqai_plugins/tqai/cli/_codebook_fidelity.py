"""KL divergence of a model with each codebook, through tqai.patch(codebook=FILE) and the cache that generate() uses."""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqai_plugins.core.codebook import Codebook, shipped


@dataclass(frozen=True)
class Reading:
    """What a model reads: windows of `context` tokens of a text (None: the built-in one), the second halves scored."""

    model: str
    text: Path | None
    context: int
    windows: int

    def check(self, head_dims: list[int]) -> None:
        """ValueError for bad numbers, and for a model with another head_dim, before anything is solved."""
        from tqai import model_shape

        for name, value, lowest in (("--context", self.context, 4), ("--windows", self.windows, 1)):
            if value < lowest:
                raise ValueError(f"{name} is {value}; allowed are {lowest} and more")
        found = sorted({layer.head_dim for layer in model_shape.read(self.model).layers if layer.heads})
        if head_dims != found:
            said = ",".join(map(str, found))
            raise ValueError(f"{self.model} has head_dim {said}; give --head-dims {said}, or leave --model out")

    def as_json(self) -> dict:
        """For a report."""
        text = self.text.name if self.text else "built-in"
        return {"model": self.model, "text": text, "context": self.context, "windows": self.windows}


def add_divergences(rows: list[dict], books: list[Codebook], reading: Reading) -> None:
    """Give each row of a report the mean divergence with its codebook, and how it differs from the shipped one's.

    Keys and values both have the codebook's width, and no token is exact. A process has one codebook for each
    head_dim and width, so each is read in a process of its own; those with the same numbers are read once.
    """
    from rich.console import Console
    from tqai import fidelity

    found: dict[str, list[float]] = {}
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes,
    ):
        for row, book in zip(rows, books):
            plain = shipped(book.head_dim, book.bits)
            for needed in (plain, book):
                if needed.digest not in found:
                    Console(stderr=True).print(f"Reading with {needed.name}, {needed.bits} bits", soft_wrap=True)
                    file = Path(folder) / f"{needed.digest}.json"
                    needed.write(file, {})
                    found[needed.digest] = processes.submit(divergences, reading, needed.bits, file).result()
            row["kld"], row["kld_error"] = fidelity.mean_and_error(found[book.digest])
            pairs = zip(found[book.digest], found[plain.digest])
            row["kld_more"], row["kld_more_error"] = fidelity.mean_and_error([a - b for a, b in pairs])


def divergences(reading: Reading, bits: int, codebook: Path) -> list[float]:
    """Of each scored token, in nats, with this codebook, which this process keeps from now on."""
    import torch
    from tqai import fidelity, models, patch

    from . import benchmark_quality as quality

    model, tokenizer = models.load(reading.model, torch.float32)
    tokens = tokenizer(quality.read_text(reading.text), return_tensors="pt").input_ids[0]
    scores = {name: fidelity.Score() for name in (quality.REFERENCE, "coded")}
    for window in quality.split_windows(tokens, reading.context, reading.windows).to(model.device):
        caches = {
            quality.REFERENCE: fidelity.DynamicCache(config=model.config),
            "coded": patch(model, bits_k=bits, bits_v=bits, cache_strategy="full", codebook=codebook),
        }
        fidelity.teacher_forced(model, window[None], reading.context // 2, caches, scores, 32)
    return scores["coded"].kld

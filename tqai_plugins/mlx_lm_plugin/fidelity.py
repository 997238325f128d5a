"""How far a cache moves a model's predictions: teacher-forced, through the caches that mlx-lm's generators use.

What a query reads does not depend on how tokens are cut into chunks (attention.attend), so that chunks of any size
see what generation sees, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from .kv_cache import CompressedKVCache
from .patching import install, uninstall

REFERENCE = "uncompressed"
BLOCK = 64  # neighbouring tokens are alike, so standard errors come from the means of blocks of so many
CHUNK = 512


def measure(model, windows: np.ndarray, entries: dict[str, dict]) -> Iterator[list[dict]]:
    """After each window of tokens [windows, context]: the rows of the table over all windows so far.

    entries: name -> options of install. The second half of each window is scored. Rows have the keys of
    `tqai benchmark quality`: name, tokens, perplexity, kld, top1_agreement, their standard errors, bits and key_mean_layers.
    """
    scores = {name: ([], [], []) for name in (REFERENCE, *entries)}
    about: dict[str, dict] = {REFERENCE: {"bits": 16.0}}
    for window in windows:
        start = len(window) // 2
        reference = log_probabilities(model, window, start, make_prompt_cache(model))
        _add(scores[REFERENCE], reference, reference, window[start:])
        for name, options in entries.items():
            install(model, **options)
            try:
                cache = make_prompt_cache(model)
                _add(scores[name], log_probabilities(model, window, start, cache), reference, window[start:])
                means = sum(layer.options.key_mean is not None for layer in cache if isinstance(layer, CompressedKVCache))
                about[name] = {"bits": stored_bits(cache), "key_mean_layers": means}
            finally:
                uninstall(model)
        yield [{"name": name, **about[name], **_summary(score)} for name, score in scores.items()]


def log_probabilities(model, tokens: np.ndarray, start: int, cache: list) -> np.ndarray:
    """float32 [len(tokens) - start, vocabulary]: predictions of tokens[start:], read through this cache."""
    found = []
    for begin in range(0, len(tokens) - 1, CHUNK):
        part = tokens[begin : min(begin + CHUNK, len(tokens) - 1)]
        logits = model(mx.array(part[None].astype(np.int32)), cache=cache)[0, max(start - 1 - begin, 0) :].astype(mx.float32)
        if logits.size:
            logits = logits - mx.logsumexp(logits, -1, keepdims=True)
        mx.eval(logits, [layer.state for layer in cache])
        found.append(np.array(logits))
    return np.concatenate(found)


def stored_bits(cache: list) -> float:
    """Bits an element of what the compressed layers store for the tokens they hold, exact ones included."""
    bits = elements = 0
    for layer in cache:
        if isinstance(layer, CompressedKVCache):
            exact = sum(x.size for x in (layer.recent, layer.sinks) if x is not None)
            bits += 8 * layer.columns[0][:, :, : layer.length].nbytes + 16 * exact  # as in a 16-bit model
            elements += 2 * layer.length * layer.columns[0].shape[1] * layer.head_dim
    return bits / elements


def _add(score: tuple[list, list, list], found: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> None:
    nll, kld, same = score
    nll += (-found[np.arange(len(targets)), targets]).tolist()
    kld += (np.exp(reference, dtype=np.float64) * (reference.astype(np.float64) - found)).sum(-1).tolist()
    same += (found.argmax(-1) == reference.argmax(-1)).astype(float).tolist()


def _summary(score: tuple[list, list, list]) -> dict:
    (nll, nll_error), (kld, kld_error), (same, same_error) = (_mean_and_error(values) for values in score)
    return {
        "tokens": len(score[0]), "perplexity": math.exp(nll), "perplexity_error": math.exp(nll) * nll_error,
        "kld": kld, "kld_error": kld_error, "top1_agreement": same, "top1_error": same_error,
    }  # fmt: skip


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    blocks = np.array(values[: len(values) // BLOCK * BLOCK]).reshape(-1, BLOCK).mean(1)
    error = blocks.std(ddof=1) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.nan
    return sum(values) / len(values), float(error)

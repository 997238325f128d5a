"""Which layers deserve more bits: what the codes of one layer alone do to a model's predictions, and the best mix.

Divergences of single layers add up well while they are small, so that the mix with the least sum for its bytes is
found exactly, by dynamic programming. Whether it holds is then measured on other text (`tqai recommend`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tqai_plugins.core.kv_format import KVFormat, format_name
from tqai_plugins.transformers_plugin import Cache, CacheOptions
from tqai_plugins.transformers_plugin.kv_cache import CompressedLayer
from tqai_plugins.transformers_plugin.vector_store import Counts

from . import fidelity

MOST = 8  # the width that counts as no loss, given to the side that is not measured
PIECE = 64  # tokens scored at a time: a vocabulary of 262,144 takes 67 MB


@dataclass(frozen=True, order=True)
class Trial:
    """One layer with these widths, all others uncompressed."""

    layer: int
    bits_k: int
    bits_v: int

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.layer} {format_name(self.bits_k, self.bits_v)}"


def compressed_layers(config) -> list[int]:
    """The layers that the transformers cache of this model compresses."""
    return [i for i, layer in enumerate(Cache(config).layers) if isinstance(layer, CompressedLayer)]


def trials(layers: Iterable[int], widths: Iterable[int]) -> list[Trial]:
    """What has to be measured: keys at each width, values at each width, and both at MOST."""
    less = [bits for bits in widths if bits != MOST]
    pairs = [(MOST, MOST), *((bits, MOST) for bits in less), *((MOST, bits) for bits in less)]
    return [Trial(layer, *pair) for layer in layers for pair in pairs]


@torch.inference_mode()
def sweep(model, windows: torch.Tensor, wanted: list[Trial], options: dict) -> Iterator[tuple[Trial, float]]:
    """Each trial with its mean KL divergence in nats, through the layer of the transformers cache.

    windows: [count, context]; the last three quarters of each are scored. options: of CacheOptions, besides widths;
    with the strategy `full` a token read at once sees what it would see in generation.
    """
    start = windows.shape[1] // 4

    def logits(cache, window):
        return model(window[None], past_key_values=cache, logits_to_keep=windows.shape[1] - start).logits[0]

    references = [logits(fidelity.DynamicCache(config=model.config), window) for window in windows]
    for trial in wanted:
        layer_options = CacheOptions.of(bits_k=trial.bits_k, bits_v=trial.bits_v, **options)
        total = 0.0
        for window, reference in zip(windows, references):
            cache = fidelity.DynamicCache(config=model.config)
            cache.layers[trial.layer] = CompressedLayer(layer_options, Counts())
            total += divergence(reference, logits(cache, window))
        yield trial, total / len(windows)


def divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(reference || found) of logits [tokens, vocabulary], in nats."""
    total = 0.0
    for wanted, given in zip(reference.split(PIECE), found.split(PIECE)):
        # float32's error in log_softmax, some 1e-6, differs in sign from token to token.
        wanted, given = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
        total += (wanted.exp() * (wanted - given)).sum(dtype=torch.float64).item()
    return total / len(reference)


def costs(measured: dict[Trial, float]) -> dict[int, dict[tuple[int, int], float]]:
    """layer -> (bits_k, bits_v) -> expected divergence, from the trials: what keys add and what values add."""
    found = {}
    for layer in sorted({trial.layer for trial in measured}):
        least = measured[Trial(layer, MOST, MOST)]
        own = {(t.bits_k, t.bits_v): max(value, least) for t, value in measured.items() if t.layer == layer}
        keys = _falling({k: cost - least / 2 for (k, v), cost in own.items() if v == MOST})
        values = _falling({v: cost - least / 2 for (k, v), cost in own.items() if k == MOST})
        found[layer] = {(k, v): keys[k] + values[v] for k in keys for v in values}
    return found


def _falling(cost: dict[int, float]) -> dict[int, float]:
    """Measured costs by width, none above that of a smaller width: more bits never harm but by chance."""
    lowest, out = math.inf, {}
    for bits in sorted(cost):
        lowest = out[bits] = min(lowest, cost[bits])
    return out


@dataclass(frozen=True)
class Mix:
    """Widths of each layer, the bytes of a token in one KV head over all these layers, and the expected divergence."""

    widths: dict[int, tuple[int, int]]
    token_bytes: int
    expected: float


def best_mixes(cost: dict[int, dict[tuple[int, int], float]], head_dim: int) -> list[Mix]:
    """For each number of bytes the mix expected to diverge least, bytes rising; only those worth their bytes."""
    size = {pair: KVFormat(*pair, head_dim).slot_bytes for pairs in cost.values() for pair in pairs}
    best: dict[int, tuple[float, tuple]] = {0: (0.0, ())}
    for pairs in cost.values():
        grown: dict[int, tuple[float, tuple]] = {}
        for used, (so_far, chosen) in best.items():
            for pair, more in pairs.items():
                total = used + size[pair]
                if so_far + more < grown.get(total, (math.inf,))[0]:
                    grown[total] = so_far + more, (*chosen, pair)
        best = grown
    mixes, lowest = [], math.inf
    for total in sorted(best):
        expected, chosen = best[total]
        if expected < lowest:
            lowest = expected
            mixes.append(Mix(dict(zip(cost, chosen)), total, expected))
    return mixes


def within_bytes(mixes: list[Mix], token_bytes: int) -> Mix:
    """The best mix of at most so many bytes; ValueError if every mix takes more."""
    fitting = [mix for mix in mixes if mix.token_bytes <= token_bytes]
    if not fitting:
        raise ValueError(
            f"no mix of these widths takes {token_bytes} bytes or less; the least is {mixes[0].token_bytes}"
        )
    return fitting[-1]


def within_divergence(mixes: list[Mix], budget: float) -> Mix:
    """The smallest mix that is expected to stay within a divergence; ValueError if none does."""
    fitting = [mix for mix in mixes if mix.expected <= budget]
    if not fitting:
        raise ValueError(
            f"no mix of these widths is expected to stay within {budget} nats; the least is {mixes[-1].expected:.5f}"
        )
    return fitting[0]

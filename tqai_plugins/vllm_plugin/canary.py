"""A canary: --additional-config '{"tqai": {"canary": 10000}}' has about one step in 10,000 of each layer checked as it is served
(of steps that CUDA graphs replay: decode_canary.py).

Of one new token it compares what lies on the page with the key and value that were to be stored, and what attention
returned with a plain form in float64 over what can be read. Errors go to /metrics; one beyond its bound to the log, once.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from tqai_plugins.core.codebook import TOP, Codebook
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.core.solve_codebook import distortion
from tqai_plugins.torch_kernels import codec, paged

from . import metrics
from .options import Options

logger = init_logger("vllm.tqai")

LONGEST = 4096  # tokens of a request whose attention is checked: they become dense
WORSE = 4  # a single vector may be so many times worse than a format is on average
ATTENTION = 0.01  # relative squared error: a kernel's 16-bit roundings make some 1e-5, one wrong page about 1

_chance = random.Random()  # not the one that a server's seed is for
_worst: dict[str, float] = {}
_reported: set[str] = set()


class Canary:
    """Says when a layer's step is to be checked."""

    def __init__(self, config):
        self.every = Options.of(config).canary
        self._wait()
        if self.every:
            for what in ("keys", "values", "attention"):
                metrics.count_canary(config, what, 0, 0, _worst.get(what, 0.0))  # shown from the start

    def _wait(self) -> None:
        self.left = _chance.randint(1, max(1, 2 * self.every - 1))

    def due(self) -> bool:
        """Asked once a step."""
        self.left -= 1
        if not self.every or self.left > 0:
            return False
        self._wait()
        return True


@dataclass(frozen=True)
class NewTokens:
    """Of a step's requests: their first rows (and the end), their lengths with the new tokens, their pages, the copies of what
    each reads from codes (empty without), and how many new tokens are read from codes too; more are a chunk of a prompt."""

    starts: Sequence[int]
    lengths: Sequence[int]
    tables: torch.Tensor
    copies: Sequence[list[int]]
    query_limit: int

    @classmethod
    def of_prefill(cls, plan) -> NewTokens:
        """Of the chunks of a prefill.Prefill, which are read as they are."""
        lengths = [context + b - a for context, a, b in zip(plan.contexts, plan.starts, plan.starts[1:])]
        copies = [] if plan.recent_table is None else plan.recent_table.tolist()
        return cls(plan.starts, lengths, plan.block_table, copies, 0)


def check(impl, name: str, new: NewTokens, query, key, value, out, pages, page_tokens: int, slots, positions) -> None:
    """Check one of the new tokens in this layer, by chance. query and out [tokens, q_heads, head_dim], key and value [tokens,
    kv_heads, head_dim], slots and positions int [tokens]; pages uint8 [num_pages, kv_heads, page_bytes]."""
    request = _chance.choice([i for i, start in enumerate(new.starts[:-1]) if new.starts[i + 1] > start])
    first, end = new.starts[request], new.starts[request + 1]
    token = _chance.randrange(first, end)
    row = slice(token, token + 1)
    slot = int(slots[token])
    if slot < 0 or not all(torch.isfinite(x[first:end]).all() for x in (query, key, value)):
        return
    page, offset = divmod(slot, page_tokens)
    held = paged.dequantize(pages, torch.tensor([page]), offset, offset + 1, impl.fmt, page_tokens)
    stored = key[row] if impl.key_mean is None else (key[row] - impl.key_mean.term(positions[row])).to(key.dtype), value[row]
    where = f"layer {name}, format {impl.fmt.name}, head_dim {impl.head_size}"
    for what, found, expected, bound in zip(("keys", "values"), held, stored, bounds(impl.fmt)):
        _note(impl.config, what, _error(found, codec.rotate(expected.float())), bound, where)

    length, chunk = new.lengths[request], end - first > new.query_limit
    last = length - (end - token) + 1  # tokens that it attends to
    if length > LONGEST:
        return
    begin = max(0, last - impl.window) if impl.window is not None else 0
    stop = length - (end - first) if chunk else length
    recent = (impl.recent_pages, new.copies[request]) if len(new.copies) and impl.recent_pages is not None else None
    k, v = paged.read(
        pages, new.tables[request], min(begin, stop), stop, impl.fmt, page_tokens, recent=recent, mean=impl.key_mean
    )
    k, v = (codec.rotate_back(x).double() for x in (k, v))
    if chunk:
        k, v = (torch.cat([x, own[first:end].double()]) for x, own in ((k, key), (v, value)))
    seen = slice(begin - min(begin, stop), last - min(begin, stop))
    expected = paged.dense_attention(query[row].double(), k[seen], v[seen], impl.scale, soft_cap=impl.soft_cap, sinks=impl.sinks)
    _note(impl.config, "attention", _error(out[row], expected), ATTENTION, f"{where}, {last} tokens")


@functools.lru_cache(None)
def bounds(fmt: KVFormat) -> tuple[float, float]:
    """The relative squared error that a stored key and value may have."""

    def bound(bits: int) -> float:
        if bits == 8:  # half a step for each coordinate; the largest coordinate, at worst the whole vector, is TOP steps
            return fmt.head_dim / TOP**2 / 4
        return WORSE * distortion(fmt.head_dim, Codebook.lloyd_max(fmt.head_dim, bits).magnitudes)

    return bound(fmt.bits_k), bound(fmt.bits_v)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative and squared; scales of float16 do not hold smaller vectors than these."""
    difference, norm = ((x.double() ** 2).sum().item() for x in (found - expected, expected))
    return difference / norm if norm > 1e-9 else 0.0


def _note(config, what: str, error: float, bound: float, where: str) -> None:
    failed = not error <= bound
    if failed and what not in _reported:
        _reported.add(what)
        logger.error(
            "tqai: the canary found %s with a relative squared error of %.3g, more than %.3g, in %s: answers of this server may be "
            "wrong. Please report this line, the lines of tqai above and what `tqai doctor` prints; further ones are counted in "
            "tqai_canary_failures_total", what, error, bound, where,
        )  # fmt: skip
    _worst[what] = max(_worst.get(what, 0.0), error if math.isfinite(error) else math.inf)
    metrics.count_canary(config, what, 1, failed, _worst[what])

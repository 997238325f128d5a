"""How far a cache moves a model's predictions: teacher-forced, through the cache object that generate() uses."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from tqai_plugins.core.activations import Activations
from tqai_plugins.transformers_plugin.activations import applied
from tqai_plugins.transformers_plugin.kv_cache import Cache, CompressedLayer

BLOCK = 64  # neighbouring tokens are alike, so standard errors come from the means of blocks of so many


@dataclass
class Score:
    """Numbers of each scored token under one cache; kld and same compare with the reference cache."""

    nll: list[float] = field(default_factory=list)  # nats
    kld: list[float] = field(default_factory=list)  # KL(reference || this), nats
    same: list[float] = field(default_factory=list)  # 1 where the most probable token is the reference's

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """logits and reference [tokens, vocabulary], targets [tokens]."""
        found, wanted = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
        self.nll += (-found.gather(-1, targets[:, None])[:, 0]).tolist()
        self.kld += (wanted.exp() * (wanted - found)).sum(-1).tolist()
        self.same += (logits.argmax(-1) == reference.argmax(-1)).double().tolist()

    def summary(self) -> dict:
        """Means over the scored tokens, with their standard errors, for JSON."""
        nll, nll_error = mean_and_error(self.nll)
        kld, kld_error = mean_and_error(self.kld)
        same, same_error = mean_and_error(self.same)
        return {
            "tokens": len(self.nll), "perplexity": math.exp(nll), "perplexity_error": math.exp(nll) * nll_error,
            "kld": kld, "kld_error": kld_error, "top1_agreement": same, "top1_error": same_error,
        }  # fmt: skip


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (nan from less than two blocks)."""
    means = torch.tensor(values, dtype=torch.float64).split(BLOCK)
    full = torch.stack([block.mean() for block in means if len(block) == BLOCK or len(means) == 1])
    error = full.std().item() / math.sqrt(len(full)) if len(full) > 1 else math.nan
    return sum(values) / len(values), error


@torch.inference_mode()
def teacher_forced(
    model, tokens: torch.Tensor, scored_from: int, caches: dict, scores: dict, chunk: int, step=None,
    activations: dict[str, Activations] | None = None,
):  # fmt: skip
    """Feed `tokens` [1, count] to the model once with each cache, and score the predictions from `scored_from` on.

    caches: name -> new cache, the reference first; scores: name -> Score, added to. The tokens before
    `scored_from` are one prompt, as in generate(); the others come `chunk` at a time.
    step, if given, is called with the number of tokens of each piece that is done.
    activations: those that are compressed besides, by the name of the cache.
    """
    count = tokens.shape[1]
    starts = [0, *range(scored_from - 1, count - 1, chunk)]
    for start, end in zip(starts, [*starts[1:], count - 1]):
        reference = None
        for name, cache in caches.items():
            chosen = (activations or {}).get(name)
            with applied(model, chosen) if chosen else contextlib.nullcontext():
                logits = model(tokens[:, start:end], past_key_values=cache, logits_to_keep=0 if start else 1).logits[0]
            if start:
                reference = logits if reference is None else reference
                scores[name].add(logits, reference, tokens[0, start + 1 : end + 1])
        if step:
            step(end - start)


def after_prompt(cache: Cache, model, prompt: torch.Tensor, exact: DynamicCache) -> Cache:
    """A new compressed cache once the model has read a prompt [1, tokens] with it; exact: an uncompressed one that has read the same.

    With an exact window a prompt is seen exactly and coded afterwards, so what `exact` holds is coded and the model need not read again.
    """
    if cache.options.window:
        for i, (mine, theirs) in enumerate(zip(cache.layers, exact.layers, strict=True)):
            if isinstance(mine, CompressedLayer):
                mine.update(theirs.keys, theirs.values)
            else:
                cache.layers[i] = copy.deepcopy(theirs)
    else:
        model(prompt, past_key_values=cache, logits_to_keep=1)
    return cache


def cache_bytes(cache) -> int:
    """Bytes of all storage behind a cache."""
    if isinstance(cache, Cache):
        return cache.nbytes
    states = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in states}.values())


def coded_tokens(cache: Cache) -> int:
    """Tokens that lie as codes, in the compressed layer that has most of them."""
    layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer) and layer.stores]
    return max((layer.stores[0].codes.length for layer in layers), default=0)


def stored_bits(cache: Cache) -> dict:
    """Bits an element of a filled cache, counted in its buffers: of what lies as codes, and of all tokens.

    Exact tokens count 16 bits, as in a bfloat16 model, also where the model was measured in float32.
    """
    code_bits = code_elements = exact_elements = 0
    for layer in cache.layers:
        for store in layer.stores if isinstance(layer, CompressedLayer) else ():
            code_bits += 8 * (store.codes.tokens.nbytes + store.scales.tokens.nbytes)
            code_elements += store.scales.tokens.numel() * store.exact.data.shape[-1]
            exact_elements += store.exact.tokens.numel()
    return {
        "code_bits": code_bits / max(code_elements, 1),
        "bits": (code_bits + 16 * exact_elements) / max(code_elements + exact_elements, 1),
    }


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    """[...] rounded to bfloat16 and back."""
    return x.bfloat16().to(x.dtype)


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """[...] cast to e4m3 and back without a scale; it ends at 448."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def to_int4(x: torch.Tensor) -> torch.Tensor:
    """[..., head_dim] in groups of 64 coordinates with a float16 step and lowest value."""
    groups = x.float().unflatten(-1, (-1, math.gcd(64, x.shape[-1])))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-6).half().float()
    low = low.half().float()
    return (((groups - low) / step).round().clamp(0, 15) * step + low).flatten(-2).to(x.dtype)


# Formats of others, for comparison: how they change keys and values, and the bits an element that they would take.
YARDSTICKS = {"bf16": (to_bf16, 16.0), "fp8": (to_fp8, 8.0), "int4_g64": (to_int4, 4.5)}


class _RoundedLayer(DynamicLayer):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(self.change(key_states), self.change(value_states), *args, **kwargs)


def yardstick(config, name: str) -> DynamicCache:
    """An uncompressed cache of numbers that went through another format; every token, the newest included."""
    cache = DynamicCache(config=config)
    change = YARDSTICKS[name][0]
    cache.layers = [_RoundedLayer(change) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

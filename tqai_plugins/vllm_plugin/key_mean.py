"""Key means of a served model (core/key_mean.py) and the balance of its keys (key_balance.py), learned when its weights are
there and then fixed: --additional-config '{"tqai": {"key_mean": false}}' leaves both out.

The model reads a built-in text once, with exact attention, and each layer's keys before RoPE and its queries are measured, unless
a folder of `tqai convert --key-means` brings what is needed. They do not depend on requests, and ranks learn what one rank would, so all pages of
a server agree.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.tokenizers import cached_tokenizer_from_config

from tqai_plugins.core import key_mean, key_mean_file
from tqai_plugins.core.kv_format import RECENT_PAGE_TOKENS, is_tqai
from tqai_plugins.core.texts import PROSE
from tqai_plugins.torch_kernels.key_mean import KeyMean
from tqai_plugins.torch_kernels.paged import dense_attention

from . import compat, key_balance, metrics, wide_keys
from .options import Options

logger = init_logger("vllm.tqai")

# While the model reads: keys, values and queries of each layer, by its name.
_read: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None


@dataclass(frozen=True)
class Measured:
    """Of a layer: this rank's heads and, so that all ranks decide alike, of all ranks' the pairs of its mean and what
    core.key_mean calls kept, lost and scatter energy with these."""

    mine: key_mean.LayerMeans
    pairs: np.ndarray
    kept: float
    lost: float
    scatter: float

    @classmethod
    def of(cls, mine: key_mean.LayerMeans, pairs: np.ndarray, mean_of_ranks: Callable = lambda x: x) -> Measured:
        """By these pairs, int [pairs]; mean_of_ranks takes what ranks must agree on, a float array [3]."""
        energies = key_mean.kept_energy(mine, pairs), key_mean.lost_energy(mine, pairs), key_mean.scatter_energy(mine)
        return cls(mine, pairs, *mean_of_ranks(np.array(energies)).tolist())


def read(impl, layer, query, key, value, output):
    """A layer's attention without a cache: exact while the model reads, else, in vLLM's profiling run, zeros."""
    if _read is None:
        return output.fill_(0)
    query = query.view(-1, impl.num_heads, impl.head_size).float()
    if impl.kv_sharing_target_layer_name is None:
        k, v = (x.view(-1, impl.num_kv_heads, impl.head_size).float() for x in (key, value))
        _read[layer.layer_name] = k, v, query
    k, v, _ = _read[impl.kv_sharing_target_layer_name or layer.layer_name]
    out = dense_attention(
        query, k, v, impl.scale, sliding_window=impl.window, soft_cap=impl.soft_cap, sinks=impl.sinks
    )
    output.view(out.shape).copy_(out)
    return output


def why_none(config) -> str | None:
    """Why a server of this VllmConfig has no key means, None if it may have some."""
    parallel, model = config.parallel_config, config.model_config
    layers = config.compilation_config.static_forward_context.values()
    foreign = [x for x in layers if isinstance(x, AttentionLayerBase) and not is_tqai(getattr(x, "kv_cache_dtype", None))]
    for so, reason in (
        (not Options.of(config).key_mean, "key_mean is false"),
        (bool(foreign), "layers without a compressed cache"),
        (model.max_model_len < RECENT_PAGE_TOKENS, f"sequences of fewer than {RECENT_PAGE_TOKENS} tokens"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallel"),
        (parallel.data_parallel_size > 1, "data parallel"),
        (config.kv_transfer_config is not None, "a KV connector may bring pages of another process"),
        (getattr(model, "enable_sleep_mode", False), "sleep mode gives away their memory"),
        (getattr(model, "is_multimodal_model", False), "a multimodal model"),
    ):
        if so:
            return reason
    return None


def learn(model: torch.nn.Module, config) -> None:
    """Balance the compressed layers of `model` that can be, give the others a key mean where it pays or 8-bit keys where it cannot
    help, and say so in the log.

    A mean took nothing more from what balance leaves of the distance to the uncompressed model, and costs time to read.
    """
    reason = why_none(config)
    start = time.perf_counter()
    balanced = key_balance.layers(model, config)
    with_rope = {} if reason else _layers(model, config)
    if not with_rope and reason is None:
        reason = "no layer with keys below 8 bits and RoPE of the common form"
    stored = _stored_means(with_rope, config)
    found = stored or _means_of_text(with_rope, model, config)
    others = {layer: measured for layer, measured in found.items() if layer not in balanced}
    wide_keys.give({layer for layer, x in others.items() if key_mean.cannot_hold(layer.impl.fmt, x.lost, x.scatter)}, config)
    paying = [layer for layer, x in others.items() if key_mean.may_pay(layer.impl.fmt) and key_mean.pays(layer.impl.fmt, x.kept)]
    for layer in paying:
        layer.impl.key_mean = _key_mean(others[layer], with_rope[layer], config)
    for layer, module in balanced.items():
        key_balance.balance(module, found[layer].mine.squares if layer in found else None)
    metrics.set_key_means(config, len(paying))
    if balanced:
        source = "what they are in a text" if found else "the weights of their norms"
        logger.info("tqai: the keys of %d layers are stored in balance with their queries, by %s", len(balanced), source)
    if reason:
        logger.info("tqai: keys are stored without a key mean: %s", reason)
        wide_keys.warn_of_biases(model, reason)
    elif others:
        logger.info(
            "tqai: the keys of %d of %d layers are stored less their mean, by %d pairs of RoPE, where it pays; %s in %.1f s",
            len(paying), len(others), key_mean.MEAN_PAIRS, "read from the folder" if stored else "learned",
            time.perf_counter() - start,
        )  # fmt: skip


def _layers(model: torch.nn.Module, config) -> dict:
    """Attention layer -> its RoPE, of those that may profit and whose RoPE is of the form that core.key_mean knows."""
    found = {}
    for module in model.modules():
        rope = getattr(module, "rotary_emb", None)
        for layer in module.children():
            impl = getattr(layer, "impl", None)
            if impl is None or impl.kv_sharing_target_layer_name is not None:
                continue
            fits = layer.head_size >= key_mean.COLUMNS and key_balance.is_plain(rope, layer.head_size, config.model_config.max_model_len)
            if fits and key_mean.may_pay(impl.fmt):
                found[layer] = rope
    return found


def _tokens(config) -> torch.Tensor:
    model = config.model_config
    text = [] if model.skip_tokenizer_init else cached_tokenizer_from_config(model).encode(PROSE)
    return torch.tensor(key_mean.choose_tokens(text, model.get_vocab_size(), model.max_model_len))


def _means_of_text(layers: dict, model: torch.nn.Module, config) -> dict[torch.nn.Module, Measured]:
    """By layer."""
    global _read
    if not layers:
        return {}
    tokens, device = _tokens(config), next(model.parameters()).device
    _read = {}
    try:
        with torch.inference_mode(), set_forward_context(None, config, num_tokens=len(tokens), skip_compiled=True):
            model(input_ids=tokens.to(device), positions=torch.arange(len(tokens), device=device))
        read = _read
    finally:
        _read = None
    found = {}
    for layer, rope in layers.items():
        keys, queries = (x.cpu().numpy() for x in read[layer.layer_name][::2])
        cos, sin = _turns(rope, len(keys))
        mine = key_mean.measure(keys, queries, cos, sin, layer.impl.scale)
        mean_of_ranks = functools.partial(_mean_of_ranks, device=device)
        pairs = key_mean.choose_pairs(mean_of_ranks(key_mean.energy(mine.means)))
        measured = Measured.of(mine, pairs, mean_of_ranks)
        found[layer] = replace(measured, mine=replace(mine, squares=mean_of_ranks(mine.squares)))
    return found


def _mean_of_ranks(x: np.ndarray, device) -> np.ndarray:
    total = tensor_model_parallel_all_reduce(torch.tensor(x, dtype=torch.float32, device=device)).cpu().numpy()
    return total / get_tensor_model_parallel_world_size()


def _stored_means(layers: dict, config) -> dict[torch.nn.Module, Measured] | None:
    """The same from a converted folder, None if it has no means; ValueError if they are another model's."""
    held = key_mean_file.read(config.model_config.model)
    if held is None:
        return None
    found = {}
    for layer in layers:
        number = compat.layer_index(layer.layer_name)
        heads = config.model_config.get_total_num_kv_heads()
        if number not in held or held[number].means.shape != (heads, layer.head_size):
            raise ValueError(
                f"{key_mean_file.NAME} of {config.model_config.model} has no means of {heads} heads of {layer.head_size} "
                f"coordinates for layer {number}; convert the model again"
            )
        first = get_tensor_model_parallel_rank() * heads // get_tensor_model_parallel_world_size()
        measured = Measured.of(held[number], key_mean.choose_pairs(key_mean.energy(held[number].means)))
        mine = replace(held[number], means=held[number].means[first : first + layer.num_kv_heads])
        found[layer] = replace(measured, mine=mine)
    return found


def _turns(rope, positions: int) -> list[np.ndarray]:
    """cos and sin [<= positions, head_dim / 2]."""
    return np.split(rope.cos_sin_cache[:positions].float().cpu().numpy(), 2, 1)


def _key_mean(measured: Measured, rope, config) -> KeyMean:
    """With a table for whole tiles of positions."""
    rows = -(-config.model_config.max_model_len // RECENT_PAGE_TOKENS) * RECENT_PAGE_TOKENS
    cos, sin = _turns(rope, rows)
    table = np.zeros((rows, key_mean.COLUMNS), np.int8)
    table[: len(cos)] = key_mean.make_table(cos, sin, measured.pairs)
    return KeyMean.make(measured.mine.means, measured.pairs, torch.from_numpy(table).to(rope.cos_sin_cache.device), key_mean.unit(cos))

"""8-bit keys for the layers whose keys no fewer bits can hold: biases spread over more pairs of RoPE than a key mean keeps."""

from __future__ import annotations

import torch
from vllm.logger import init_logger

from tqai_plugins.core.kv_format import format_name

from . import compat, metrics, presets

logger = init_logger("vllm.tqai")


def give(layers: set[torch.nn.Module], config) -> None:
    """Store their keys at 8 bits and their values as before, or warn of why that is not possible."""
    if not layers:
        return
    names = ", ".join(str(number) for number in sorted(compat.layer_index(layer.layer_name) for layer in layers))
    wide = {layer: format_name(8, layer.impl.fmt.bits_v) for layer in layers}
    reason = _why_none(config)
    if reason:
        logger.warning(
            "tqai: what the keys of layers %s have in common is more than a key mean holds, and they cannot have 8 bits alone: %s. "
            "Answers may be far from the uncompressed model's: measure them, or give --kv-cache-dtype %s",
            names, reason, next(iter(wide.values())),
        )  # fmt: skip
        return
    for layer, name in wide.items():
        presets.give(layer, name)
    logger.info("tqai: the keys of layers %s have 8 bits, since what they have in common is more than a key mean holds", names)
    metrics.announce_again(config)


def warn_of_biases(model: torch.nn.Module, reason: str) -> None:
    """Of biases of keys in a model without key means: 4 bits and fewer bear them only less their mean."""
    narrow = [
        layer.impl.fmt
        for module in model.modules()
        for layer in module.children()
        if getattr(getattr(layer, "impl", None), "fmt", None) is not None and layer.impl.fmt.bits_k < 8 and _has_bias(module)
    ]
    if narrow:
        logger.warning(
            "tqai: the keys of %d layers have biases and are stored without a key mean (%s). Answers may be far from the "
            "uncompressed model's: measure them, or give --kv-cache-dtype %s", len(narrow), reason, format_name(8, narrow[0].bits_v),
        )  # fmt: skip


def _has_bias(attention: torch.nn.Module) -> bool:
    """Whether the projection to keys, alone or together with queries and values, adds one."""
    biases = (getattr(getattr(attention, name, None), "bias", None) for name in ("qkv_proj", "k_proj"))
    return any(isinstance(bias, torch.Tensor) and bool(bias.any()) for bias in biases)


def _why_none(config) -> str | None:
    """Why single layers cannot have a format of their own, None if they can."""
    if not compat.has_formats_of_layers():
        return "vLLM before 0.29"
    layers = config.compilation_config.static_forward_context.values()
    special = ("sliding_window", "kv_sharing_target_layer_name")
    return presets.why_none(config, any(getattr(layer, name, None) for layer in layers for name in special))

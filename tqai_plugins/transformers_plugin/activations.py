"""Activation compression for transformers models by forward hooks: it simulates the error and saves no memory."""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import nn

from ..core.activations import Activations, group_size
from ..torch_kernels import codec

# Names that a feed-forward block's last projection has in transformers.
LAST_PROJECTIONS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "w2")

_handles: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


def install(model: nn.Module, activations: Activations) -> None:
    """Quantize and dequantize these activations in every call of the model, until uninstall or the next install.

    ValueError for a model in which they are not found; nothing is hooked then.
    """
    uninstall(model)
    if not activations.any:
        return
    hooks = []
    layers = _layers(model)
    if activations.compress_hidden:
        hooks += [(layer, "hidden_states", activations.bits_hidden) for layer in layers[1:]]
    if activations.compress_ffn:
        hooks += [
            (found, "input", activations.bits_ffn) for layer in layers for found in _last_projections(model, layer)
        ]
    _handles[model] = [
        module.register_forward_pre_hook(_Compress(name, bits), with_kwargs=True) for module, name, bits in hooks
    ]


def uninstall(model: nn.Module) -> None:
    """Remove what install hooked; nothing of it stays in the model."""
    for handle in _handles.pop(model, ()):
        handle.remove()


@contextlib.contextmanager
def applied(model: nn.Module, activations: Activations):
    """install for the length of a with statement."""
    install(model, activations)
    try:
        yield
    finally:
        uninstall(model)


def round_trip(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Activations [..., size] as their codes stand for them: groups of coordinates, each with its scale; same dtype."""
    groups = x.unflatten(-1, (-1, group_size(x.shape[-1])))
    codes, scales = codec.quantize(groups, bits, on_invalid="flag")
    return codec.dequantize(codes, scales, bits, groups.shape[-1], x.dtype).flatten(-2)


class _Compress:
    """A forward pre-hook that changes the first argument, which may come by its name."""

    def __init__(self, name: str, bits: int):
        self.name, self.bits = name, bits

    def __call__(self, module, args, kwargs):
        if args:
            return (round_trip(args[0], self.bits), *args[1:]), kwargs
        return args, kwargs | {self.name: round_trip(kwargs[self.name], self.bits)}


def _layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: the list in the model that has as many entries as its config has layers."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in root.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{model.config.model_type} has no list of its {count} decoder layers; its activations cannot be compressed"
    )


def _last_projections(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    stacked = any(parameter.ndim == 3 for parameter in layer.parameters())  # experts in one tensor
    found = [
        module for name, module in layer.named_modules()
        if name.split(".")[-1] in LAST_PROJECTIONS and "attn" not in name
    ]  # fmt: skip
    if stacked or not found:
        raise ValueError(
            f"compress_ffn does not work with {model.config.model_type}: its feed-forward blocks have no modules "
            f"called {', '.join(LAST_PROJECTIONS)}; leave it out"
        )
    return found

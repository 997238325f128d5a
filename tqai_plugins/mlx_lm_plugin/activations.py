"""Activation compression for mlx-lm models: it simulates the error and saves no memory."""

from __future__ import annotations

import functools
import weakref

import mlx.core as mx
from mlx import nn

from ..core.activations import Activations, group_size
from ..core.codebook import SEARCH, TOP, Codebook
from ..core.kv_format import SCALE_DENOMINATOR
from ..core.reference import SMALLEST_RMS
from ..metal_kernels.codec import rotate, rotate_back

# Names that a feed-forward block's last projection has in mlx-lm.
LAST_PROJECTIONS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "w2")

_installed: list[tuple[weakref.ref, list[tuple[nn.Module, type]]]] = []


def install(model: nn.Module, activations: Activations) -> None:
    """Quantize and dequantize these activations in every call of the model, until uninstall or the next install.

    ValueError for a model in which they are not found; nothing is changed then.
    """
    uninstall(model)
    found = []
    if activations.compress_hidden:
        found += [(layer, activations.bits_hidden) for layer in model.layers[1:]]
    if activations.compress_ffn:
        found += [(module, activations.bits_ffn) for layer in model.layers for module in _last_projections(layer)]
    if found:
        _installed.append((weakref.ref(model), [(module, type(module)) for module, _ in found]))
    for module, bits in found:  # Python looks __call__ up in the class, so that is what changes
        module.__class__ = _compressing(type(module), bits)


def uninstall(model: nn.Module) -> None:
    """Undo install; nothing of it stays in the model."""
    for entry in _installed[:]:
        owner, changed = entry[0](), entry[1]
        if owner is model:
            for module, kind in changed:
                module.__class__ = kind
        if owner is model or owner is None:
            _installed.remove(entry)


@functools.lru_cache(None)
def _compressing(kind: type, bits: int) -> type:
    """A class like `kind` whose instances compress the first argument they are called with."""

    def __call__(self, x, *args, **kwargs):
        return kind.__call__(self, round_trip(x, bits), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})


def _last_projections(layer: nn.Module) -> list[nn.Module]:
    found = [
        module for name, module in layer.named_modules()
        if name.split(".")[-1] in LAST_PROJECTIONS and "attn" not in name
    ]  # fmt: skip
    if not found:
        raise ValueError(
            f"compress_ffn does not work with {type(layer).__module__}: its feed-forward blocks have no modules called "
            f"{', '.join(LAST_PROJECTIONS)}; leave it out"
        )
    return found


def round_trip(x: mx.array, bits: int) -> mx.array:
    """Activations [..., size] as codes of groups of coordinates stand for them; same dtype."""
    group = group_size(x.shape[-1])
    book = Codebook.lloyd_max(group, bits)
    y = rotate(x.reshape(*x.shape[:-1], -1, group))
    size = mx.abs(y)
    rms = mx.sqrt(mx.mean(y * y, -1, keepdims=True))
    live = rms > SMALLEST_RMS  # NaN and infinity stay what they are
    boundaries, magnitudes = mx.array(book.boundaries), mx.array(book.magnitudes)
    best, out = mx.full(rms.shape, -1.0), mx.zeros(y.shape)
    for multiple in (1.0,) if bits == 8 else SEARCH:
        grid = mx.where(live, size.max(-1, keepdims=True) / TOP if bits == 8 else rms * multiple * book.unit, 1)
        level = mx.take(magnitudes, _count_below(boundaries, size / grid))
        along, energy = (size * level).sum(-1, keepdims=True), (level * level).sum(-1, keepdims=True)
        scale = (along / energy * SCALE_DENOMINATOR).astype(mx.float16).astype(mx.float32) / SCALE_DENOMINATOR
        merit = along * along / energy
        out = mx.where(merit > best, level * scale, out)
        best = mx.maximum(merit, best)
    out = mx.where(live, mx.where(y < 0, -out, out), y)
    return rotate_back(out).reshape(x.shape).astype(x.dtype)


def _count_below(boundaries: mx.array, numbers: mx.array) -> mx.array:
    """How many boundaries each number exceeds, by bisection."""
    low = mx.zeros(numbers.shape, mx.uint32)
    step = boundaries.size + 1 >> 1  # boundaries are a power of two less one
    while step:
        low = mx.where(numbers > mx.take(boundaries, low + (step - 1)), low + step, low)
        step >>= 1
    return low

"""Keys or values as attention sees them: a tensor that is made only when somebody looks at its numbers."""

from __future__ import annotations

import functools

import torch
from torch.utils import _pytree as pytree

from ..core.rotation import Rotation
from ..torch_kernels import codec
from .vector_store import Snapshot

# Above so many query rows a KV head, dense states and the library's own attention are faster.
MAX_ROWS = 128


class StoredStates(torch.Tensor):
    """Stands for [batch, heads, tokens, head_dim] of a compressed layer.

    scaled_dot_product_attention of a few queries reads the codes themselves. To any other operation it
    is an ordinary tensor of the model's dtype, dequantized once, so every attention implementation works.
    """

    snapshot: Snapshot

    @staticmethod
    def __new__(cls, snapshot: Snapshot):
        recent = snapshot.recent
        self = torch.Tensor._make_wrapper_subclass(cls, snapshot.shape, dtype=recent.dtype, device=recent.device)
        self.snapshot = snapshot
        return self

    def __repr__(self) -> str:
        return f"StoredStates(shape={tuple(self.shape)}, dtype={self.dtype}, coded={self.snapshot.codes.shape[2]})"

    @functools.cached_property
    def dense(self) -> torch.Tensor:
        return self.snapshot.dense()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            found = _attention(*args, **(kwargs or {}))
            if found is not None:
                return found
            args, kwargs = _dense((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = _dense((args, kwargs or {}))
        return function(*args, **kwargs)


def _dense(tree):
    return pytree.tree_map_only(StoredStates, lambda states: states.dense, tree)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor | None:
    """scaled_dot_product_attention over codes, or None where it must be done on dense states."""
    coded = isinstance(key, StoredStates) and isinstance(value, StoredStates) and not isinstance(query, StoredStates)
    if not coded or query.ndim != 4 or dropout_p or is_causal:
        return None
    batch, heads, rows, _ = query.shape
    kv_heads = key.shape[1]
    if key.shape[0] != batch or heads % kv_heads or heads // kv_heads * rows > MAX_ROWS:
        return None
    mask = attn_mask
    if mask is not None:
        mask = mask.expand(batch, heads, rows, key.shape[2]).reshape(batch, kv_heads, -1, key.shape[2])
    grouped = query.reshape(batch, kv_heads, -1, query.shape[3])
    scale = query.shape[3] ** -0.5 if scale is None else scale
    weights = _weights(grouped.float() * scale, key.snapshot, mask)
    return _weighted_sum(weights, value.snapshot).to(query.dtype).view(batch, heads, rows, value.shape[3])


def _weights(query: torch.Tensor, keys: Snapshot, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(query keys) [batch, kv_heads, rows, tokens] in float32; the query is rotated, not the keys."""
    scores = query.new_empty(*query.shape[:3], keys.shape[2])
    first, last = keys.sinks.shape[2], keys.shape[2] - keys.recent.shape[2]
    scores[..., :first] = query @ keys.sinks.mT.float()
    scores[..., last:] = query @ keys.recent.mT.float()
    turned = query @ codec.matrix(Rotation(query.shape[3]), query.device).T
    for part, levels, worth in keys.tiles():
        scores[..., first:last][..., part] = turned @ levels.mT * worth[:, :, None]
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype != torch.bool:
        return (scores + mask).softmax(-1)
    # A row that sees nothing (left padding) becomes zeros, as in PyTorch's own attention.
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)


def _weighted_sum(weights: torch.Tensor, values: Snapshot) -> torch.Tensor:
    """weights [batch, kv_heads, rows, tokens] times values; the sum over codes is rotated back once."""
    first, last = values.sinks.shape[2], values.shape[2] - values.recent.shape[2]
    turned = weights.new_zeros(*weights.shape[:3], values.shape[3])
    for part, levels, worth in values.tiles():
        turned += weights[..., first:last][..., part] * worth[:, :, None] @ levels
    out = turned @ codec.matrix(Rotation(values.shape[3]), weights.device)
    return out + weights[..., :first] @ values.sinks.float() + weights[..., last:] @ values.recent.float()

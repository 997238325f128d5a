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
        exact = snapshot.exact
        self = torch.Tensor._make_wrapper_subclass(cls, snapshot.shape, dtype=exact.dtype, device=exact.device)
        self.snapshot = snapshot
        return self

    def __repr__(self) -> str:
        return f"StoredStates(shape={tuple(self.shape)}, dtype={self.dtype}, coded={self.snapshot.codes.shape[2]})"

    @functools.cached_property
    def dense(self) -> torch.Tensor:
        """The numbers, dequantized at the first look."""
        return self.snapshot.dense()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            found = _attention(*args, **kwargs)
            if found is not None:
                return found
        if function.__name__ != "__get__":  # shape, dtype and the like need no numbers
            args, kwargs = _dense((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

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
    if not coded or query.ndim != 4 or dropout_p or is_causal or key.snapshot.sketch is not None:
        return None
    batch, heads, rows, _ = query.shape
    kv_heads = key.shape[1]
    if key.shape[0] != batch or heads % kv_heads or heads // kv_heads * rows > MAX_ROWS:
        return None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    grouped = query.reshape(batch, kv_heads, -1, query.shape[3]).float() * scale
    scores = _scores(grouped, key.snapshot)
    if attn_mask is not None:
        mask = attn_mask.expand(batch, heads, rows, key.shape[2]).reshape(scores.shape)
        scores = _mask(scores, _exact_first(mask, key.snapshot))
    out = _weighted_sum(scores.softmax(-1), value.snapshot)
    return out.to(query.dtype).view(batch, heads, rows, value.shape[3])


def _scores(query: torch.Tensor, keys: Snapshot) -> torch.Tensor:
    """query keys^T [batch, kv_heads, rows, tokens], the exact tokens first; the query is rotated, not the keys."""
    turned, coded = query @ keys.matrix.T, []
    for part, levels, scales in keys.tiles():
        coded.append(turned @ levels.mT * scales[:, :, None])
        if keys.means is not None:
            coded[-1] += keys.means.scores(query, *keys.positions(part))
    return torch.cat([query @ keys.exact.mT.float(), *coded], -1)


def _exact_first(mask: torch.Tensor, keys: Snapshot) -> torch.Tensor:
    sizes = [keys.sinks, keys.codes.shape[2], keys.exact.shape[2] - keys.sinks]
    sinks, coded, recent = mask.split(sizes, -1)
    return torch.cat([sinks, recent, coded], -1)


def _mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return scores + mask
    # A row that sees nothing (left padding) has nobody to read it; any finite number will do.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def _weighted_sum(weights: torch.Tensor, values: Snapshot) -> torch.Tensor:
    """weights [batch, kv_heads, rows, tokens] times values; what comes from codes is rotated back once."""
    exact, coded = weights.split([values.exact.shape[2], values.codes.shape[2]], -1)
    out = exact @ values.exact.float()
    turned = [coded[..., part] * scales[:, :, None] @ levels for part, levels, scales in values.tiles()]
    if turned:
        out += sum(turned) @ codec.level_matrix(Rotation(values.shape[3]), out.device)
    return out

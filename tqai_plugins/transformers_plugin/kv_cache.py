"""TurboQuant KV cache for transformers 5: pass it to generate() as past_key_values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import DynamicCache, DynamicLayer

from .key_means import TurnedMeans
from .options import CacheOptions
from .stored_states import StoredStates
from .vector_store import Counts, Snapshot, VectorStore


class CompressedLayer(DynamicLayer):
    """One attention layer. Stored states are detached: no gradient flows through the cache."""

    def __init__(
        self, options: CacheOptions, counts: Counts, factors: Sequence[float] | None = None, means: TurnedMeans | None = None
    ):
        super().__init__()
        self.options, self.counts, self.factors, self.means = options, counts, factors, means
        self.stores: tuple[VectorStore, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.options.device is not None and torch.device(self.options.device).type != self.device.type:
            raise ValueError(
                f"device is {str(self.options.device)!r} but the model is on {str(self.device)!r}; "
                "the cache lies where the model is: move the model, or leave device out"
            )
        keep_dense = self.options.keep_dense
        sketch_size = self.options.qjl_sketch_size if self.options.use_qjl else 0
        factors = None
        if self.factors is not None:
            if len(self.factors) != key_states.shape[-1]:
                raise ValueError(f"key_factors has {len(self.factors)} for a layer of head_dim {key_states.shape[-1]}")
            factors = torch.tensor(self.factors, device=self.device)
        means = None
        if self.means is not None:
            heads, head_dim = self.means.measured.means.shape
            if (heads, head_dim) != (key_states.shape[1], key_states.shape[3]):
                raise ValueError(
                    f"key_means has {heads} heads of {head_dim} coordinates for a layer of {key_states.shape[1]} of "
                    f"{key_states.shape[3]}; they are another model's"
                )
            means = self.means.on(self.device)
        self.stores = tuple(
            VectorStore(states, bits, self.options.sinks, self.options.window, keep_dense, self.counts, size, by, off, vector)
            for states, bits, size, by, off, vector in (
                (key_states, self.options.bits_k, sketch_size, factors, means, False),
                (value_states, self.options.bits_v, 0, None, None, self.options.vector_values),
            )  # fmt: skip
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store the new tokens; returns all keys and values, as StoredStates where some are codes.

        Both are [batch, kv_heads, new tokens, head_dim], of the same batch and heads each time; else ValueError, and
        nothing is stored.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = (store.append(states) for store, states in zip(self.stores, (key_states, value_states)))
        return tuple(StoredStates(states) if isinstance(states, Snapshot) else states for states in seen)

    def _check(self, *states: torch.Tensor) -> None:
        for i, (name, new) in enumerate(zip(("keys", "values"), states)):
            if new.ndim != 4 or not new.is_floating_point():
                raise ValueError(
                    f"{name} are {new.dtype} of shape {list(new.shape)}; expected a floating dtype and "
                    "[batch, kv_heads, new tokens, head_dim]"
                )
            if self.stores and (held := self.stores[i].shape) != (new.shape[0], new.shape[1], new.shape[3]):
                batch, heads, head_dim = held
                raise ValueError(
                    f"{name} of shape {list(new.shape)} do not go with what this cache holds, [{batch}, {heads}, *, {head_dim}]; "
                    "take another cache for another batch or model"
                )
        if states[0].shape[:3] != states[1].shape[:3]:
            raise ValueError(f"keys are of shape {list(states[0].shape)}, values of {list(states[1].shape)}; expected as many of both")

    def get_seq_length(self) -> int:
        return self.stores[0].length if self.stores else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget -tokens_to_remove tokens, as DynamicLayer does. Tokens that are codes by then stay codes."""
        if type(tokens_to_remove) is not int or tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove!r}) is not supported; give minus the number of tokens to remove")
        for store in self.stores:
            store.crop(-tokens_to_remove)

    def _change(self, function) -> None:
        for store in self.stores:
            for buffer in store.buffers:
                buffer.change(function)

    def offload(self) -> None:
        self._change(lambda data: data.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda data: data.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.stores, self.is_initialized = (), False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda data: data.index_select(0, beam_idx.to(data.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda data: data.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda data: data[indices.to(data.device)])


class Cache(TransformersCache):
    """A compressed cache for one request (or batch, or conversation) with a model of this config.

    Full-attention layers are compressed; sliding-window and linear layers, already bounded, are the
    library's own. Use a new Cache, or reset(), for the next request. Options: see CacheOptions.
    Raises ValueError for encoder-decoder models, and for models without a full-attention layer.
    """

    def __init__(self, config, **options):
        self.options = CacheOptions.of(**options)
        self.counts = Counts()
        if not hasattr(config, "get_text_config") or not hasattr(config, "model_type"):
            raise ValueError(f"config is a {type(config).__name__}; expected a transformers model's configuration, model.config")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{config.model_type} is an encoder-decoder model; tqai compresses decoder-only models")
        layers = DynamicCache(config=config).layers
        # Subclasses of DynamicLayer hold more than keys and values, or drop old ones by themselves.
        layers = [
            CompressedLayer(self.options.of_layer(i), self.counts, self.options.factors_of(i), self.options.means_of(i))
            if type(layer) is DynamicLayer
            else layer
            for i, layer in enumerate(layers)
        ]
        for i in self.options.layer_formats or ():
            if i >= len(layers) or not isinstance(layers[i], CompressedLayer):
                raise ValueError(
                    f"layer_formats has layer {i}, which is no full-attention layer of this {config.model_type}"
                )
        if not any(isinstance(layer, CompressedLayer) for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise ValueError(f"{config.model_type} has no full-attention layer to compress, only {kinds}")
        if self.options.cache_strategy == "incremental":
            warnings.warn(
                "cache_strategy='incremental' keeps a dequantized copy of the cache besides the codes, so it saves no "
                "memory; use 'residual'",
                stacklevel=2,
            )
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds: codes, scales, exact tokens, spare room, other layers' states."""
        return sum({s.data_ptr(): s.nbytes() for layer in self.layers for s in _storages(vars(layer))}.values())

    @property
    def vectors_quantized(self) -> int:
        """Vectors turned into codes so far."""
        return self.counts.quantized

    @property
    def vectors_dequantized(self) -> int:
        """Vectors read back from codes so far, each time counted."""
        return self.counts.dequantized

    @property
    def key_mean_layers(self) -> int:
        """Layers whose keys are coded less their mean."""
        return sum(isinstance(layer, CompressedLayer) and layer.means is not None for layer in self.layers)

    def __repr__(self) -> str:
        compressed = sum(isinstance(layer, CompressedLayer) for layer in self.layers)
        less = f", {self.key_mean_layers} with key means" if self.key_mean_layers else ""
        return f"tqai.Cache({compressed} of {len(self.layers)} layers compressed{less}, {self.options})"


def _storages(held):
    if isinstance(held, torch.Tensor):
        yield held.untyped_storage()
    elif isinstance(held, (list, tuple, dict)):
        for item in held.values() if isinstance(held, dict) else held:
            yield from _storages(item)
    elif isinstance(held, VectorStore):
        for buffer in held.buffers:
            yield buffer.data.untyped_storage()
        for tensor in held.means.tensors if held.means is not None else ():
            yield tensor.untyped_storage()

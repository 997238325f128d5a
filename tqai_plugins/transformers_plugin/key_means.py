"""The mean key of each layer of a transformers model (core/key_mean.py), for its caches and for a converted folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tqai_plugins.core import converted_folder, key_mean, key_mean_file
from tqai_plugins.core.key_mean import LayerMeans
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.core.texts import PROSE
from tqai_plugins.torch_kernels.key_mean import Coefficients

from .rope import Rope

NAME = "tqai_key_means"


@dataclass(frozen=True, eq=False)
class TurnedMeans:
    """The means of a layer and the RoPE that turns them: what CacheOptions.key_means holds, shared by all caches."""

    measured: LayerMeans
    rope: Rope

    @cached_property
    def pairs(self) -> np.ndarray:
        """Those that are kept, int [MEAN_PAIRS]."""
        return key_mean.choose_pairs(key_mean.energy(self.measured.means))

    def pays(self, bits_k: int, bits_v: int) -> bool:
        """Whether keys and values of these widths are closer with it by more than it costs."""
        head_dim = self.measured.means.shape[1]
        if head_dim < key_mean.COLUMNS:
            return False
        fmt = KVFormat(bits_k, bits_v, head_dim)
        return key_mean.may_pay(fmt) and key_mean.pays(fmt, key_mean.kept_energy(self.measured, self.pairs))

    def on(self, device: torch.device) -> PlacedMeans:
        """For the keys of a cache there."""
        rope_columns = np.concatenate([self.pairs, self.pairs + self.rope.head_dim // 2])
        of = Coefficients.of(self.measured.means, self.pairs, self.rope.unit, device)
        return PlacedMeans(self.rope, torch.from_numpy(rope_columns).to(device), of)


@dataclass(frozen=True, eq=False)
class PlacedMeans:
    """Key means on a device. The same positions give the same numbers whenever they are asked for."""

    rope: Rope
    rope_columns: torch.Tensor  # of RoPE's table, which make the rows of the means'
    of: Coefficients

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it keeps; the table is shared."""
        return [self.rope.table, self.rope_columns, self.of.coefficients, self.of.columns, self.of.coordinates]

    def _rows(self, start: int, end: int) -> torch.Tensor:
        return self.rope.rows(start, end, self.rope_columns.device)[:, self.rope_columns]

    def term(self, start: int, end: int) -> torch.Tensor:
        """float32 [kv_heads, end - start, head_dim]: the means at these positions."""
        return self.of.term_of(self._rows(start, end)).transpose(0, 1)

    def scores(self, query: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """What they add to the scores of queries [batch, kv_heads, queries, head_dim]: [batch, kv_heads, queries, end - start]."""
        return self.of.scores_of(query, self._rows(start, end))


def of(model, layers: Mapping[int, LayerMeans | TurnedMeans] | None) -> dict[int, TurnedMeans] | None:
    """For CacheOptions.key_means, of what learn or stored returned. ValueError for a model with another kind of RoPE.

    What is no mean of a layer is passed on, for the options to refuse.
    """
    if not isinstance(layers, Mapping):
        return layers
    ropes: dict[tuple, Rope] = {}
    made = dict(layers)
    for layer, measured in layers.items():
        if type(layer) is int and layer >= 0 and isinstance(measured, LayerMeans):
            kind, head_dim = Rope.kind_of(model, layer), measured.means.shape[1]
            if (kind, head_dim) not in ropes:
                ropes[kind, head_dim] = Rope(model, kind, head_dim)
            made[layer] = TurnedMeans(measured, ropes[kind, head_dim])
    return made  # type: ignore[return-value]


def stored(model) -> dict[int, LayerMeans] | None:
    """Those that the folder of `tqai convert` brought from which the model was loaded; None if there are none."""
    if getattr(model.config, converted_folder.ENTRY, None) is None:
        return None
    return key_mean_file.read(model.config.name_or_path)


@torch.no_grad()
def learn(model, tokenizer) -> dict[int, LayerMeans]:
    """Layer -> its means, while the model reads a built-in text. ValueError for a model whose RoPE does not turn all
    pairs (i, i + head_dim / 2) by one position."""
    vocabulary = model.config.get_text_config().vocab_size
    text = key_mean.choose_tokens(tokenizer(PROSE).input_ids, vocabulary, key_mean.TOKENS)
    tokens = torch.tensor([text], device=model.device)
    found: dict[int, LayerMeans] = {}

    def attention(module, query, key, value, *args, scaling=None, **kwargs):
        keys, queries = (x[0].transpose(0, 1).float().cpu().numpy() for x in (key, query))
        cos, sin = Rope(model, Rope.kind_of(model, module.layer_idx), key.shape[-1]).turns(np.arange(len(keys)))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        found[module.layer_idx] = key_mean.measure(keys, queries, cos, sin, scale)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, scaling=scaling, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        model(tokens, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return found

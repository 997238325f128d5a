"""The key means of one attention layer as tensors: what the launches of a step share. core/key_mean.py says what it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tqai_plugins.core import key_mean
from tqai_plugins.core.key_mean import COLUMNS, MEAN_PAIRS


@dataclass(frozen=True)
class KeyMean:
    """table int8 [positions, COLUMNS] and coordinates int32 [2, MEAN_PAIRS] (both coordinates of each pair), shared by
    the heads of a layer; coefficients float32 [kv_heads, 2, COLUMNS]. place int32 [head_dim]: where among a head's
    coefficients a coordinate's cosine is, -1 for coordinates without a mean."""

    table: torch.Tensor
    coordinates: torch.Tensor
    place: torch.Tensor
    coefficients: torch.Tensor

    @classmethod
    def make(cls, means: np.ndarray, pairs: np.ndarray, table: torch.Tensor, unit: float) -> KeyMean:
        """means [kv_heads, head_dim] before RoPE; table as core.key_mean.make_table's, on the layer's device."""
        head_dim = means.shape[1]
        coordinates = np.stack([pairs, pairs + head_dim // 2])
        place = np.full(head_dim, -1)
        place[coordinates] = np.arange(2)[:, None] * COLUMNS + np.arange(MEAN_PAIRS)
        as_int = lambda x: torch.tensor(x, dtype=torch.int32, device=table.device)
        rows = torch.tensor(key_mean.coefficients(means, pairs, unit), device=table.device)
        return cls(table, as_int(coordinates), as_int(place), rows)

    def term(self, positions: torch.Tensor) -> torch.Tensor:
        """core.key_mean.term: float32 [tokens, kv_heads, head_dim] for positions int [tokens]."""
        rows = self.table[positions.long()].float()
        products = rows[:, None, None, :] * self.coefficients
        sums = products[..., :MEAN_PAIRS] + products[..., MEAN_PAIRS:]
        out = torch.zeros(len(rows), len(self.coefficients), len(self.place), device=rows.device)
        first, second = self.coordinates.long()
        out[..., first], out[..., second] = sums[:, :, 0], sums[:, :, 1]
        return out

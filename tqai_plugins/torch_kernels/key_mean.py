"""The key means of one attention layer as tensors: what the launches of a step share. core/key_mean.py says what it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tqai_plugins.core import key_mean
from tqai_plugins.core.key_mean import COLUMNS, MEAN_PAIRS


@dataclass(frozen=True)
class Coefficients:
    """coordinates int32 [2, MEAN_PAIRS] (both coordinates of each pair), shared by the heads of a layer; coefficients
    float32 [kv_heads, 2, COLUMNS]. place int32 [head_dim]: where among a head's coefficients a coordinate's cosine is, -1
    for coordinates without a mean."""

    coordinates: torch.Tensor
    place: torch.Tensor
    coefficients: torch.Tensor

    @classmethod
    def of(cls, means: np.ndarray, pairs: np.ndarray, unit: float, device: torch.device) -> Coefficients:
        """means [kv_heads, head_dim] before RoPE; unit: of the table."""
        head_dim = means.shape[1]
        coordinates = np.stack([pairs, pairs + head_dim // 2])
        place = np.full(head_dim, -1)
        place[coordinates] = np.arange(2)[:, None] * COLUMNS + np.arange(MEAN_PAIRS)
        as_int = lambda x: torch.tensor(x, dtype=torch.int32, device=device)
        rows = torch.tensor(key_mean.coefficients(means, pairs, unit), device=device)
        return cls(as_int(coordinates), as_int(place), rows)

    def term_of(self, rows: torch.Tensor) -> torch.Tensor:
        """core.key_mean.term: float32 [tokens, kv_heads, head_dim] of the table's rows [tokens, COLUMNS]."""
        products = rows.float()[:, None, None, :] * self.coefficients
        sums = products[..., :MEAN_PAIRS] + products[..., MEAN_PAIRS:]
        out = torch.zeros(len(rows), len(self.coefficients), len(self.place), device=rows.device)
        first, second = self.coordinates.long()
        out[..., first], out[..., second] = sums[:, :, 0], sums[:, :, 1]
        return out

    def scores_of(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """query . term: float32 [batch, kv_heads, queries, tokens] of queries [batch, kv_heads, queries, head_dim]."""
        first, second = (query[..., pairs.long()].repeat(1, 1, 1, 2) for pairs in self.coordinates)
        by = self.coefficients[:, :, None]  # [kv_heads, 2, 1, COLUMNS]
        return (first * by[:, 0] + second * by[:, 1]) @ rows.float().T


@dataclass(frozen=True)
class KeyMean(Coefficients):
    """With its table int8 [positions, COLUMNS], also shared by the heads of a layer."""

    table: torch.Tensor

    @classmethod
    def make(cls, means: np.ndarray, pairs: np.ndarray, table: torch.Tensor, unit: float) -> KeyMean:
        """means [kv_heads, head_dim] before RoPE; table as core.key_mean.make_table's, on the layer's device."""
        of = Coefficients.of(means, pairs, unit, table.device)
        return cls(of.coordinates, of.place, of.coefficients, table)

    def term(self, positions: torch.Tensor) -> torch.Tensor:
        """core.key_mean.term: float32 [tokens, kv_heads, head_dim] for positions int [tokens]."""
        return self.term_of(self.table[positions.long()])

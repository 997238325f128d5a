"""The key means of one attention layer as tensors: what the launches of a step share. core/key_mean.py says what it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tqai_plugins.core import key_mean
from tqai_plugins.core.key_mean import MEAN_PAIRS


@dataclass(frozen=True)
class Coefficients:
    """core.key_mean.coefficients, float32 [kv_heads, 2, head_dim], and what the heads of a layer share: core.key_mean.columns
    as int32 [head_dim], and coordinates int32 [2, MEAN_PAIRS], both of each pair."""

    coefficients: torch.Tensor
    columns: torch.Tensor
    coordinates: torch.Tensor

    @classmethod
    def of(cls, means: np.ndarray, pairs: np.ndarray, unit: float, device: torch.device) -> Coefficients:
        """means [kv_heads, head_dim] before RoPE; unit: of the table."""
        head_dim = means.shape[1]
        as_int = lambda x: torch.tensor(x, dtype=torch.int32, device=device)
        rows = torch.tensor(key_mean.coefficients(means, pairs, unit), device=device)
        return cls(rows, as_int(key_mean.columns(pairs, head_dim)), as_int(np.stack([pairs, pairs + head_dim // 2])))

    def term_of(self, rows: torch.Tensor) -> torch.Tensor:
        """core.key_mean.term: float32 [tokens, kv_heads, head_dim] of the table's rows [tokens, COLUMNS]."""
        cosines, sines = (rows[:, None, self.columns + side].float() for side in (0, MEAN_PAIRS))
        return cosines * self.coefficients[:, 0] + sines * self.coefficients[:, 1]

    def scores_of(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """query . term: float32 [batch, kv_heads, queries, tokens] of queries [batch, kv_heads, queries, head_dim]."""
        first, second = (
            query[..., None, pairs] * self.coefficients[:, None, :, pairs] for pairs in self.coordinates.long()
        )  # [batch, kv_heads, queries, 2, MEAN_PAIRS]
        return (first + second).flatten(-2) @ rows.float().T


@dataclass(frozen=True)
class KeyMean(Coefficients):
    """With its table int8 [positions, COLUMNS], also shared by the heads of a layer."""

    table: torch.Tensor

    @classmethod
    def make(cls, means: np.ndarray, pairs: np.ndarray, table: torch.Tensor, unit: float) -> KeyMean:
        """means [kv_heads, head_dim] before RoPE; table as core.key_mean.make_table's, on the layer's device."""
        of = Coefficients.of(means, pairs, unit, table.device)
        return cls(of.coefficients, of.columns, of.coordinates, table)

    def term(self, positions: torch.Tensor) -> torch.Tensor:
        """core.key_mean.term: float32 [tokens, kv_heads, head_dim] for positions int [tokens]."""
        return self.term_of(self.table[positions.long()])

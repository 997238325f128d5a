"""Scratch memory that the launches of a step share, allocated once so that CUDA graphs capture it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tqai_plugins.core.key_mean import COLUMNS


@dataclass(frozen=True)
class Workspace:
    """planes int8 [tokens, q_heads, 2, head_dim], q_scale and q_bias float32 [tokens, q_heads] from prepare;
    mean_planes int8 [tokens, q_heads, 2, COLUMNS] and mean_scale float32 [tokens, q_heads] too, what a query gives
    each column of the key mean's table; partial float32 and lse float32, flat, from decode_attention's splits; arrivals
    int32, how many splits of some rows are done, zeros between launches."""

    planes: torch.Tensor
    q_scale: torch.Tensor
    q_bias: torch.Tensor
    mean_planes: torch.Tensor
    mean_scale: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, num_tokens: int, num_q_heads: int, head_dim: int, max_rows: int, device) -> Workspace:
        """num_tokens: most query tokens of a decode step. max_rows: most (query head, split) pairs,
        see decode_attention.max_partial_rows."""
        return cls(
            torch.zeros(num_tokens, num_q_heads, 2, head_dim, dtype=torch.int8, device=device),
            torch.zeros(num_tokens, num_q_heads, device=device),
            torch.zeros(num_tokens, num_q_heads, device=device),
            torch.zeros(num_tokens, num_q_heads, 2, COLUMNS, dtype=torch.int8, device=device),
            torch.zeros(num_tokens, num_q_heads, device=device),
            torch.zeros(max_rows * head_dim, device=device),
            torch.zeros(max_rows, device=device),
            torch.zeros(num_tokens * num_q_heads, dtype=torch.int32, device=device),
        )

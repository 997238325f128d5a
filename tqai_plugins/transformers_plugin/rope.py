"""RoPE of a transformers model by position, as core/key_mean.py needs it."""

from __future__ import annotations

import copy

import numpy as np
import torch

from ..core import key_mean

BLOCK = 1024  # positions that a table grows by


class Rope:
    """RoPE of the layers of one kind, and its table: core.key_mean.make_table of all pairs, for as many positions as were
    asked for. What is in it never changes, so that codes are read with what they were written with. ValueError for a model
    whose RoPE does not turn all pairs (i, i + head_dim / 2) by one position."""

    def __init__(self, model, kind: str | None, head_dim: int):
        # A copy, since some kinds change with the longest position that they have seen.
        self.module, self.kind = copy.deepcopy(getattr(getattr(model, "model", None), "rotary_emb", None)), kind
        if self.module is not None:
            self.module.to("cpu")
        self.head_dim, self.model_type = head_dim, model.config.model_type
        cos, _ = self.turns(np.arange(key_mean.FIRST_TOKEN))
        self.unit = key_mean.unit(cos)
        self.table = torch.zeros(key_mean.FIRST_TOKEN, head_dim, dtype=torch.int8)

    @classmethod
    def kind_of(cls, model, layer: int) -> str | None:
        """Which of the model's RoPEs a layer has, None where there is one."""
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
        rope = getattr(getattr(model, "model", None), "rotary_emb", None)
        return kinds[layer] if layer < len(kinds) and hasattr(rope, f"{kinds[layer]}_inv_freq") else None

    @torch.no_grad()
    def turns(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, float32 [positions, head_dim / 2]."""
        kind, half = [self.kind] if self.kind else [], self.head_dim // 2
        turns = None if self.module is None else self.module(torch.zeros(1), torch.from_numpy(positions)[None], *kind)
        if turns is None or any(x.shape != (1, len(positions), 2 * half) or not torch.equal(x[..., :half], x[..., half:]) for x in turns):
            raise ValueError(f"{self.model_type} models have no RoPE of the common form, so no key means; leave them out")
        cos, sin = (x[0, :, :half].float().numpy() for x in turns)
        return cos, sin

    @torch.inference_mode(False)  # or a cache that was begun in inference mode could not go on outside
    def rows(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """int8 [end - start, head_dim] of the table: cosines of all pairs, then sines."""
        while (held := len(self.table)) < end:
            # With the first positions, by which each block finds the same unit.
            cos, sin = self.turns(np.r_[: key_mean.FIRST_TOKEN, held : held + BLOCK])
            new = key_mean.make_table(cos, sin, np.arange(self.head_dim // 2))[key_mean.FIRST_TOKEN :]
            self.table = torch.cat([self.table.to(device), torch.from_numpy(new).to(device)])
        return self.table[start:end].to(device)

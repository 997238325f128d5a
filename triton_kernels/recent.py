"""Where the newest tokens of each sequence are kept at 8 bits too, for the launches of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqai_plugins.core.kv_format import RECENT_PAGE_TOKENS, KVFormat, PageLayout


@dataclass(frozen=True)
class RecentPages:
    """pages uint8 [copies, kv_heads, page_bytes] of RECENT_PAGE_TOKENS tokens at 8 bits; slots int32
    [new tokens], where the copy of each goes, -1 for none; table int32 [sequences, 2], the copies of the
    last page but one and of the last (in pages of RECENT_PAGE_TOKENS), -1 for none."""

    pages: torch.Tensor
    slots: torch.Tensor
    table: torch.Tensor

    @staticmethod
    def format(head_dim: int) -> KVFormat:
        return KVFormat(8, 8, head_dim)

    @classmethod
    def layout(cls, head_dim: int) -> PageLayout:
        return cls.format(head_dim).page_layout(RECENT_PAGE_TOKENS)

    @classmethod
    def none(cls, pages: torch.Tensor, any_tensor: torch.Tensor) -> RecentPages:
        """Arguments for a kernel that is compiled without copies."""
        return cls(pages, any_tensor, any_tensor)

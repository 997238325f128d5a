"""CPU attention backend: the same codes through plain PyTorch. Slow; for CI and laptops."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from tqai_plugins.core.kv_format import RECENT_PAGE_TOKENS, SERVED_NAMES, KVFormat, is_tqai, recent_format
from tqai_plugins.torch_kernels import paged
from tqai_plugins.torch_kernels.recent import RecentCopies, claim

from . import canary, compat, key_mean, metrics, presets, recent_memory

logger = init_logger("vllm.tqai")


class Backend(CPUAttentionBackend):
    """vLLM's CPU_ATTN for every dtype but tqai's: on CPU vLLM asks for no other backend."""

    supported_kv_cache_dtypes = [*CPUAttentionBackend.supported_kv_cache_dtypes, *SERVED_NAMES]

    @classmethod
    def customize_spec(cls, spec):
        if compat.is_tqai_spec(spec) and spec.state_content_bytes is None:
            return compat.customize_spec(spec)
        return super().customize_spec(spec)

    @staticmethod
    def get_impl_cls():
        return Impl

    @staticmethod
    def get_builder_cls():
        return Builder


@dataclass
class Metadata(CPUAttentionMetadata):
    """One step. starts and lengths (new tokens included) of its requests; those with more than query_limit new
    tokens prefill. positions: of the new tokens. recent_slots: where the copy of each new token goes, None without
    copies; recent: the copies of the first page and the last RECENT_PAGES of what each request reads from codes."""

    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    query_limit: int = 1
    positions: torch.Tensor | None = None
    recent_slots: torch.Tensor | None = None
    recent: list[list[int]] = field(default_factory=list)


class Builder(CPUAttentionMetadataBuilder):
    """Plans each step of the layers that share a page table."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.ours = compat.is_tqai_spec(kv_cache_spec)
        if self.ours:  # the stock builder plans for kernels that do not know these pages
            AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
            self.page_tokens = kv_cache_spec.block_size
            self.query_limit = compat.query_token_limit(vllm_config)
            self.recent = None
            copies = recent_memory.copies(vllm_config)
            if copies and recent_memory.fits(self.page_tokens):
                scheduler = vllm_config.scheduler_config
                tokens = scheduler.max_num_batched_tokens + scheduler.max_num_seqs
                self.recent = RecentCopies.allocate(copies, scheduler.max_num_seqs, tokens, device)
            self.meter = metrics.Meter(vllm_config, layer_names, self.recent)
            return
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if is_tqai(self.kv_cache_dtype):  # a layer that the user skipped
            self.kv_cache_dtype = "auto"

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        if not self.ours:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        if self.recent is not None:
            claim(
                self.recent, common.slot_mapping, common.query_start_loc, common.seq_lens, common.block_table_tensor,
                self.page_tokens, self.query_limit,
            )
        self.meter.step(common.query_start_loc, common.seq_lens)
        return self._metadata(common, self.recent)

    def build_for_drafting(self, common_attn_metadata, draft_index):
        """A draft model's layers share this builder but not the step: they read codes only."""
        if not self.ours:
            return super().build_for_drafting(common_attn_metadata, draft_index)
        return self._metadata(common_attn_metadata, None)

    def _metadata(self, common, recent: RecentCopies | None) -> Metadata:
        starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
        copies, slots = [], None
        if recent is not None:
            slots = recent.slots[: common.num_actual_tokens].clone()
            prefills = common.query_start_loc.diff()[:, None] > self.query_limit
            count = prefills.shape[0]
            copies = torch.where(prefills, recent.context[:count], recent.table[:count]).tolist()
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            starts=starts,
            lengths=lengths,
            query_limit=self.query_limit,
            positions=common.positions,
            recent_slots=slots,
            recent=copies,
        )


class Impl(CPUAttentionBackendImpl):
    """One layer; vLLM's own for other dtypes than tqai's."""

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
        logits_soft_cap=None, attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, *args, **kwargs,
    ):
        self.fmt = None
        if is_tqai(kv_cache_dtype):
            compat.check_layer(kv_cache_dtype, attn_type, alibi_slopes)
            compat.set_active(kv_cache_dtype)
            self.fmt = KVFormat.from_name(kv_cache_dtype, head_size)
            self.config = get_current_vllm_config()
            self.recent_pages = self.key_mean = None
            self.canary = canary.Canary(self.config)
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            "auto" if self.fmt else kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, *args, **kwargs,
        )
        self.window, self.soft_cap = sliding_window, logits_soft_cap or None
        self.sinks = getattr(self, "sinks", None)
        self.kv_cache_dtype = kv_cache_dtype

    def use_format(self, name: str) -> None:
        """Before any page is made: another format than the run's."""
        self.kv_cache_dtype, self.fmt = name, KVFormat.from_name(name, self.head_size)

    def recent_bytes(self) -> int:
        """Of one 8-bit copy of a recent page in this layer."""
        if self.kv_sharing_target_layer_name is not None:
            return 0
        return self.num_kv_heads * recent_format(self.head_size).page_layout(RECENT_PAGE_TOKENS).page_bytes

    def process_weights_after_loading(self, act_dtype):
        """After the weights and before vLLM measures free memory: reserve what is not a page."""
        if self.fmt is None:
            return
        presets.apply(self.config)
        metrics.announce(self.config, "plain PyTorch on the CPU")
        copies = recent_memory.copies(self.config)
        if copies and self.recent_bytes():
            bytes_each = self.recent_bytes() // self.num_kv_heads
            self.recent_pages = torch.zeros(copies, self.num_kv_heads, bytes_each, dtype=torch.uint8)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        if self.fmt is None:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        key, value = (self._vectors(x, slot_mapping.shape[0]) for x in (key, value))
        positions = None
        if self.key_mean is not None:
            positions = get_forward_context().attn_metadata[layer.layer_name].positions[: slot_mapping.shape[0]]
        paged.store(
            key, value, kv_cache.flatten(2), slot_mapping, self.fmt, kv_cache.shape[2],
            positions=positions, mean=self.key_mean,
        )

    def _vectors(self, x, tokens: int):
        return x[:tokens].view(tokens, self.num_kv_heads, self.head_size)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        if self.fmt is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if attn_metadata is None:
            return key_mean.read(self, layer, query, key, value, output)
        meta, owner = attn_metadata, self
        shares = self.kv_sharing_target_layer_name is not None
        if shares:  # another layer's cache; this one's keys are not in it
            owner = self.config.compilation_config.static_forward_context[self.kv_sharing_target_layer_name].impl
        else:
            key, value = (self._vectors(x, meta.num_actual_tokens) for x in (key, value))
            if meta.recent_slots is not None and self.recent_pages is not None:
                fmt = recent_format(self.head_size)
                paged.store(key, value, self.recent_pages, meta.recent_slots, fmt, RECENT_PAGE_TOKENS)
        shape = (-1, self.num_heads, self.head_size)
        for i, (start, end) in enumerate(zip(meta.starts, meta.starts[1:])):
            if end == start:
                continue
            prefills = end - start > meta.query_limit
            output.view(shape)[start:end] = paged.attention(
                query.view(shape)[start:end], kv_cache.flatten(2), meta.block_table[i], meta.lengths[i], self.fmt,
                kv_cache.shape[2], self.scale, sliding_window=self.window, soft_cap=self.soft_cap, sinks=self.sinks,
                own=(key[start:end], value[start:end]) if prefills and not shares else None,
                recent=(owner.recent_pages, meta.recent[i]) if meta.recent and owner.recent_pages is not None else None,
                mean=owner.key_mean,
            ).to(output.dtype)
        if not shares and self.canary.due():
            new = canary.NewTokens(meta.starts, meta.lengths, meta.block_table, meta.recent, meta.query_limit)
            canary.check(
                self, layer.layer_name, new, query.view(shape), key, value, output.view(shape), kv_cache.flatten(2),
                kv_cache.shape[2], meta.slot_mapping, meta.positions,
            )  # fmt: skip
        return output

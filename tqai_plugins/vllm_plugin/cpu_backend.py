"""CPU attention backend: the same codes through plain PyTorch. Slow; for CI and laptops."""

from __future__ import annotations

from tqai_plugins.core.kv_format import SERVED_NAMES, KVFormat, is_tqai
from tqai_plugins.torch_kernels import paged
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from . import compat

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


class Builder(CPUAttentionMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.ours = compat.is_tqai_spec(kv_cache_spec)
        if self.ours:  # the stock builder plans for kernels that do not know these pages
            AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
            return
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if is_tqai(self.kv_cache_dtype):  # a layer that the user skipped
            self.kv_cache_dtype = "auto"

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        if not self.ours:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
        )


class Impl(CPUAttentionBackendImpl):
    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, *args, **kwargs
    ):
        self.fmt = None
        if is_tqai(kv_cache_dtype):
            if alibi_slopes is not None:
                raise ValueError(f"--kv-cache-dtype {kv_cache_dtype} does not serve models with ALiBi; use another dtype")
            compat.set_active(kv_cache_dtype)
            self.fmt = KVFormat.from_name(kv_cache_dtype, head_size)
            logger.info_once(
                f"tqai: KV cache {self.fmt.name}: {self.fmt.slot_bytes} bytes a token and KV head (head_dim {head_size}, "
                f"{self.fmt.compression:.2f} times smaller than 16 bits), plain PyTorch on the CPU"
            )
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            "auto" if self.fmt else kv_cache_dtype, *args, **kwargs,
        )
        self.window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        if self.fmt is None:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        tokens = slot_mapping.shape[0]
        shape = (tokens, self.num_kv_heads, self.head_size)
        paged.store(
            key[:tokens].view(shape), value[:tokens].view(shape), kv_cache.flatten(2), slot_mapping, self.fmt,
            kv_cache.shape[2],
        )

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        if self.fmt is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if attn_metadata is None:
            return output
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        shape = (-1, self.num_heads, self.head_size)
        for i, (start, end) in enumerate(zip(starts, starts[1:])):
            if end > start:
                output.view(shape)[start:end] = paged.attention(
                    query.view(shape)[start:end], kv_cache.flatten(2), attn_metadata.block_table[i], lengths[i], self.fmt,
                    kv_cache.shape[2], self.scale, sliding_window=self.window, soft_cap=self.logits_soft_cap or None,
                    sinks=getattr(self, "sinks", None),
                ).to(output.dtype)
        return output

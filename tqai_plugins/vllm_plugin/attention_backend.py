"""CUDA attention backend: calls the Triton kernels and FlashAttention, computes nothing itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from tqai_plugins.core.kv_format import SERVED_NAMES, KVFormat, is_tqai
from tqai_plugins.torch_kernels import prefill
from tqai_plugins.triton_kernels import device_tables
from tqai_plugins.triton_kernels.decode_attention import decode_attention, max_partial_rows, uses_ptx
from tqai_plugins.triton_kernels.dequantize import dequantize
from tqai_plugins.triton_kernels.prepare import prepare
from tqai_plugins.triton_kernels.workspace import Workspace
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.turboquant_attn import (
    TurboQuantAttentionBackend,
    TurboQuantAttentionImpl,
    TurboQuantMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.vllm_flash_attn import flash_attn_varlen_func

from . import compat

# The logger's name must lie under vLLM's for its handlers to print it.
logger = init_logger("vllm.tqai")

PAGE_TOKENS = 64  # the kernels' tile; other multiples of 16 work, slower
MAX_QUERY_LEN = 8  # query tokens of a decode step: longer ones are prefill
PREFILL_WORKSPACE_BYTES = 64 << 20


class Backend(TurboQuantAttentionBackend):
    """Serves tqai dtypes; turboquant_* go to vLLM's own classes."""

    # One launch stores a decode step's keys and turns its queries, so forward stores.
    forward_includes_kv_cache_update = True
    supported_kv_cache_dtypes = [*TurboQuantAttentionBackend.supported_kv_cache_dtypes, *SERVED_NAMES]

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype):
        return is_tqai(kv_cache_dtype) or super().supports_kv_cache_dtype(kv_cache_dtype)

    @classmethod
    def get_preferred_block_size(cls, default_block_size):
        if is_tqai(get_current_vllm_config().cache_config.cache_dtype):
            return PAGE_TOKENS
        return super().get_preferred_block_size(default_block_size)

    @classmethod
    def customize_spec(cls, spec):
        if compat.is_tqai_spec(spec) and spec.state_content_bytes is None:
            return compat.customize_spec(spec)
        return super().customize_spec(spec)

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="tqai"):
        # 0.26 and 0.27 say "auto" for a dtype they do not know.
        if cache_dtype_str != "auto" and not is_tqai(cache_dtype_str):
            return TurboQuantAttentionBackend.get_kv_cache_shape(
                num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str
            )
        return num_blocks, num_kv_heads, block_size, compat.active_format(head_size).slot_bytes

    @staticmethod
    def get_impl_cls():
        return _Dispatch

    @staticmethod
    def get_builder_cls():
        return Builder


@dataclass
class Metadata(AttentionMetadata):
    """One step. Requests come decodes first; the first num_decodes have query_len tokens each."""

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    query_len: int
    prefill: Prefill | None


@dataclass(frozen=True)
class Prefill:
    """The requests behind the decodes. Starts count from the first prefill token."""

    query_start_loc: torch.Tensor
    query_starts: list[int]
    max_query_len: int
    context_lengths: list[int]
    block_table: torch.Tensor


class Builder(TurboQuantMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.ours = is_tqai(vllm_config.cache_config.cache_dtype)
        if not self.ours:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            return
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        limit = compat.query_token_limit(vllm_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=limit <= MAX_QUERY_LEN)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        if not self.ours:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        num_decodes, num_prefills, decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold, require_uniform=True
        )
        chunk = None
        if num_prefills:
            starts = (common.query_start_loc_cpu[num_decodes:] - decode_tokens).tolist()
            lengths = common.seq_lens_cpu_upper_bound[num_decodes:].tolist()
            contexts = [length - (b - a) for length, a, b in zip(lengths, starts, starts[1:])]
            chunk = Prefill(
                (common.query_start_loc[num_decodes:] - decode_tokens).to(torch.int32),
                starts,
                max(b - a for a, b in zip(starts, starts[1:])),
                contexts,
                common.block_table_tensor[num_decodes:],
            )
        return Metadata(
            common.num_actual_tokens,
            common.slot_mapping,
            common.block_table_tensor,
            common.seq_lens,
            num_decodes,
            -(-decode_tokens // num_decodes) if num_decodes else 0,
            chunk,
        )


@functools.lru_cache(None)
def _workspace(num_tokens: int, num_q_heads: int, head_dim: int, rows: int, device: torch.device) -> Workspace:
    """Layers run one after another, so those of one shape share theirs."""
    return Workspace.allocate(num_tokens, num_q_heads, head_dim, rows, device)


@functools.lru_cache(None)
def _dense_tile(tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
    return torch.empty(2, tokens, num_kv_heads, head_dim, dtype=dtype, device=device)


@functools.lru_cache(None)
def _announce(name: str, page_tokens: int, ptx: bool, num_kv_heads: int, head_dim: int) -> None:
    fmt = KVFormat.from_name(name, head_dim)
    logger.info(
        "tqai: KV cache %s: %d-bit keys, %d-bit values, %d bytes a token and KV head (head_dim %d, %.2f times smaller "
        "than 16 bits), pages of %d tokens, %d KV heads a layer here, decode kernel: %s",
        fmt.name, fmt.bits_k, fmt.bits_v, fmt.slot_bytes, head_dim, fmt.compression, page_tokens, num_kv_heads,
        "PTX byte permutes" if ptx else "plain Triton",
    )


class Impl(TurboQuantAttentionImpl):
    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
        kv_cache_dtype="tqai", logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None, **_,
    ):
        compat.set_active(kv_cache_dtype)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.fmt = KVFormat.from_name(kv_cache_dtype, head_size)
        self.soft_cap = logits_soft_cap or None
        self.stores = kv_sharing_target_layer_name is None
        if alibi_slopes is not None:
            raise ValueError(f"--kv-cache-dtype {kv_cache_dtype} does not serve models with ALiBi; use another dtype")
        if sliding_window is not None:
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype} does not serve sliding-window layers on CUDA yet; "
                "keep them as they are with --kv-cache-dtype-skip-layers sliding_window"
            )
        if not self.fmt.served or head_size > 256:
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype} serves head dimensions that are multiples of 16 up to 256, "
                f"this model has {head_size}; use another dtype"
            )
        self.fa_version = get_flash_attn_version(head_size=head_size)
        config = get_current_vllm_config()
        device = torch.device("cuda", torch.cuda.current_device())
        requests = config.scheduler_config.max_num_seqs
        query_len = min(MAX_QUERY_LEN, compat.query_token_limit(config))
        rows = max_partial_rows(requests, num_heads, self.num_kv_heads, query_len, self.fmt, device)
        self.workspace = _workspace(requests * query_len, num_heads, head_size, rows, device)
        token_bytes = 2 * self.num_kv_heads * head_size * 2
        self.tile_tokens = max(PAGE_TOKENS, PREFILL_WORKSPACE_BYTES // token_bytes // PAGE_TOKENS * PAGE_TOKENS)
        self.ptx = uses_ptx(device)

    def process_weights_after_loading(self, act_dtype):
        pass

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        raise RuntimeError("tqai stores in forward; this vLLM stores separately: please report its version")

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output=None, output_scale=None, output_block_scale=None
    ):
        if attn_metadata is None:  # vLLM's profiling run
            return output.fill_(0)
        meta = attn_metadata
        page_tokens = kv_cache.shape[2]
        _announce(self.kv_cache_dtype, page_tokens, self.ptx, self.num_kv_heads, self.head_size)
        pages = kv_cache.flatten(2)
        tokens = meta.num_actual_tokens
        out = output.view(-1, self.num_heads, self.head_size)
        query = query.view(-1, self.num_heads, self.head_size)
        key = key[:tokens].view(-1, self.num_kv_heads, self.head_size)
        value = value[:tokens].view(-1, self.num_kv_heads, self.head_size)
        decode_tokens = meta.num_decodes * meta.query_len if meta.num_decodes else 0
        slots = meta.slot_mapping if self.stores else torch.full_like(meta.slot_mapping, -1)
        prepare(
            query[:decode_tokens] if decode_tokens else None, key, value, pages, slots, self.workspace, self.fmt,
            page_tokens, self.scale,
        )
        if decode_tokens:
            decode_attention(
                self.workspace, pages, meta.block_table, meta.seq_lens[: meta.num_decodes], out[:decode_tokens],
                self.fmt, page_tokens, query_len=meta.query_len, soft_cap=self.soft_cap,
            )
        if meta.prefill is not None:
            rows = slice(decode_tokens, tokens)
            self._prefill(query[rows], key[rows], value[rows], pages, page_tokens, meta.prefill, out[rows])
        return output

    def _flash(self, query, key, value, starts, key_starts, max_query, max_key, causal):
        """FlashAttention over ragged requests: output [tokens, heads, head_dim] and lse [tokens, heads]."""
        out, lse = flash_attn_varlen_func(
            query, key, value, max_seqlen_q=max_query, cu_seqlens_q=starts, max_seqlen_k=max_key,
            cu_seqlens_k=key_starts, softmax_scale=self.scale, causal=causal, softcap=self.soft_cap or 0.0,
            return_softmax_lse=True, fa_version=self.fa_version,
        )
        return out, lse.transpose(0, 1)

    def _prefill(self, query, key, value, pages, page_tokens, chunk, out):
        """The chunk to itself exactly; to cached codes in the rotated basis, in bounded tiles."""
        starts = chunk.query_start_loc
        own, lse = self._flash(
            query, key, value, starts, starts, chunk.max_query_len, chunk.max_query_len, causal=True
        )
        if not any(chunk.context_lengths):
            out.copy_(own)
            return
        device, dim = query.device, self.head_size
        norms = device_tables.norms(dim, dim, device)
        turned = (query @ device_tables.signed_hadamard(dim, dim, query.dtype, device)) * norms.to(query.dtype)
        k, v = _dense_tile(self.tile_tokens, self.num_kv_heads, dim, query.dtype, device)

        def attend_tile(queries, segments, first):
            requests = segments[-1].request - first + 1
            lengths = [s.end - s.start for s in segments]
            ends = torch.tensor([[s.start for s in segments], [s.end for s in segments]], dtype=torch.int32)
            begin, end = ends.to(device, non_blocking=True)
            by_request = [0] * requests
            for s in segments:
                by_request[s.request - first] = s.end - s.start
            key_starts = torch.tensor([0, *by_request], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            held = [s.request - first for s in segments]
            at = key_starts[held].to(device, non_blocking=True)
            table = chunk.block_table[[s.request for s in segments]]
            dequantize(pages, table, begin, end, at, k, v, self.fmt, page_tokens, max(lengths))
            total = sum(lengths)
            query_starts = starts[first : first + requests + 1] - starts[first]
            return self._flash(
                queries, k[:total], v[:total], query_starts, key_starts.to(device, non_blocking=True),
                chunk.max_query_len, max(lengths), causal=False,
            )

        cached, cached_lse = prefill.attend_cached(
            turned, chunk.query_starts, chunk.context_lengths, self.tile_tokens, attend_tile
        )
        back = (cached * norms).to(query.dtype) @ device_tables.signed_hadamard(dim, dim, query.dtype, device, back=True)
        merged, _ = prefill.merge(own.float(), lse, back.float(), cached_lse)
        out.copy_(merged)


class _UpstreamImpl(TurboQuantAttentionImpl):
    """vLLM's own turboquant_*, storing in forward as this backend says."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None, *args, **kwargs):
        if attn_metadata is not None:
            tokens = attn_metadata.num_actual_tokens
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping[:tokens])
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)


class _Dispatch(TurboQuantAttentionImpl):
    def __new__(cls, *args, **kwargs):
        dtype = kwargs.get("kv_cache_dtype", args[6] if len(args) > 6 else "auto")
        return (Impl if is_tqai(dtype) else _UpstreamImpl)(*args, **kwargs)

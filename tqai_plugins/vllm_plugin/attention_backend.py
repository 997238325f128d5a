"""CUDA attention backend: calls the Triton kernels and FlashAttention, computes nothing itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
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

from tqai_plugins.core.kv_format import COPIED_PAGES, RECENT_PAGE_TOKENS, SERVED_NAMES, KVFormat, is_tqai, recent_format
from tqai_plugins.torch_kernels.recent import RecentCopies
from tqai_plugins.triton_kernels import device_tables
from tqai_plugins.triton_kernels.decode_attention import decode_attention, max_partial_rows, uses_ptx
from tqai_plugins.triton_kernels.dequantize import dequantize
from tqai_plugins.triton_kernels.first_calls import make_together
from tqai_plugins.triton_kernels.merge import merge
from tqai_plugins.triton_kernels.prepare import TILINGS, prepare
from tqai_plugins.triton_kernels.recent import SIDES, RecentPages, claim
from tqai_plugins.triton_kernels.workspace import Workspace

from . import canary, compat, key_mean, metrics, prefill, presets, recent_memory
from .decode_canary import DecodeCanary, Left

# The logger's name must lie under vLLM's for its handlers to print it.
logger = init_logger("vllm.tqai")

PAGE_TOKENS = 64  # the kernels' tile; other multiples of 16 work, slower
MAX_QUERY_LEN = 8  # query tokens of a decode step: longer ones are prefill


class Backend(TurboQuantAttentionBackend):
    """Serves tqai dtypes; turboquant_* go to vLLM's own classes."""

    # One launch stores a decode step's keys and turns its queries, so forward stores.
    forward_includes_kv_cache_update = True
    supported_kv_cache_dtypes = [*TurboQuantAttentionBackend.supported_kv_cache_dtypes, *SERVED_NAMES]

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype):
        return is_tqai(kv_cache_dtype) or super().supports_kv_cache_dtype(kv_cache_dtype)

    @classmethod
    def validate_configuration(cls, *args, kv_cache_dtype, **config):
        which = super() if is_tqai(kv_cache_dtype) else TurboQuantAttentionBackend
        return which.validate_configuration(*args, kv_cache_dtype=kv_cache_dtype, **config)

    @classmethod
    def supports_sink(cls):
        return True

    @classmethod
    def supports_sliding_window(cls):
        return True

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
        if not is_tqai(cache_dtype_str) and not (cache_dtype_str == "auto" and compat.is_active()):
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
    positions: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    query_len: int
    prefill: prefill.Prefill | None
    recent: RecentCopies | None


class Builder(TurboQuantMetadataBuilder):
    """Plans each step of the layers that share a page table: which requests decode, and where copies go."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.ours = is_tqai(vllm_config.cache_config.cache_dtype)
        if not self.ours:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            return
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        self.query_limit = compat.query_token_limit(vllm_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=self.query_limit <= MAX_QUERY_LEN)
        self.exact_lengths = not compat.lengths_are_bounds(vllm_config)
        heads, head_dim = kv_cache_spec.num_kv_heads, kv_cache_spec.head_size
        self.tile_tokens = prefill.tile_tokens(heads, head_dim, vllm_config.model_config.dtype)
        self.page_tokens = kv_cache_spec.block_size
        self.recent = None
        copies = recent_memory.copies(vllm_config)
        if copies:
            recent_memory.warn_unless_fits(self.page_tokens)
        if copies and recent_memory.fits(self.page_tokens):
            scheduler = vllm_config.scheduler_config
            self.recent = RecentCopies.allocate(
                copies, scheduler.max_num_seqs, scheduler.max_num_batched_tokens + scheduler.max_num_seqs, device
            )
            self._compile_claim(scheduler.max_num_seqs, device)
        self.meter = metrics.Meter(vllm_config, layer_names, self.recent)
        self.slower = None if uses_ptx(device) else metrics.PLAIN_TRITON
        layers = vllm_config.compilation_config.static_forward_context
        impls = {layers[name].impl.shape: layers[name].impl for name in layer_names}
        if vllm_config.model_config.enable_sleep_mode:
            compat.refuse_deep_sleep()
        dtype = vllm_config.model_config.dtype
        calls: dict[tuple, Callable[[], None]] = {}
        for impl in impls.values():
            calls |= impl.first_calls(self.page_tokens, dtype, self.recent)
        make_together(list(calls.values()), device)
        self.canary = DecodeCanary(vllm_config, {name: layers[name].impl for name in layer_names}, self.page_tokens, device)

    def _compile_claim(self, max_sequences: int, device) -> None:
        slots = torch.full((1,), -1, device=device)
        for sequences in (n for n in (*SIDES, max_sequences) if n <= max_sequences):
            empty = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
            claim(self.recent, slots, empty, empty[:-1], empty[:-1, None], self.page_tokens, self.query_limit)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        if not self.ours:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        self.canary.look()
        if self.recent is not None:
            claim(
                self.recent, common.slot_mapping, common.query_start_loc, common.seq_lens, common.block_table_tensor,
                self.page_tokens, self.query_limit,
            )
        if common.seq_lens_cpu_upper_bound is not None:
            self.meter.step(common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, self.slower)
        meta = self._metadata(common, self.recent)
        self.canary.plan(meta)
        return meta

    def build_for_cudagraph_capture(self, common_attn_metadata):
        """What is captured reads the same tensors; its dummy requests claim nothing."""
        if not self.ours:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        return self._metadata(common_attn_metadata, self.recent)

    def build_for_drafting(self, common_attn_metadata, draft_index):
        """A draft model's layers share this builder but not the step: they read codes only."""
        if not self.ours:
            return super().build_for_drafting(common_attn_metadata, draft_index)
        return self._metadata(common_attn_metadata, None)

    def _metadata(self, common, recent):
        num_decodes, num_prefills, decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold, require_uniform=True
        )
        chunk = None
        if num_prefills:
            starts = (common.query_start_loc_cpu[num_decodes:] - decode_tokens).tolist()
            lengths = common.seq_lens_cpu_upper_bound if self.exact_lengths else common.seq_lens
            contexts = [n - (b - a) for n, a, b in zip(lengths[num_decodes:].tolist(), starts, starts[1:])]
            chunk = prefill.Prefill(
                starts,
                contexts,
                (common.query_start_loc[num_decodes:] - decode_tokens).to(torch.int32),
                common.block_table_tensor[num_decodes:],
                None if recent is None else recent.context[num_decodes:],
                self.tile_tokens,
            )
        return Metadata(
            common.num_actual_tokens,
            common.slot_mapping,
            common.positions,
            common.block_table_tensor,
            common.seq_lens,
            num_decodes,
            -(-decode_tokens // num_decodes) if num_decodes else 0,
            chunk,
            recent,
        )


@functools.lru_cache(None)
def _workspace(num_tokens: int, num_q_heads: int, head_dim: int, rows: int, device: torch.device) -> Workspace:
    """Layers run one after another, so those of one shape share theirs."""
    return Workspace.allocate(num_tokens, num_q_heads, head_dim, rows, device)


class Impl(TurboQuantAttentionImpl):
    """One layer: its format, and the kernels' calls."""

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
        kv_cache_dtype="tqai", logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None,
        sinks=None, **_,
    ):
        compat.check_layer(kv_cache_dtype, attn_type, alibi_slopes)
        compat.set_active(kv_cache_dtype)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.soft_cap = logits_soft_cap or None
        self.window = sliding_window
        self.sinks = sinks  # a parameter of the model, loaded later
        if not KVFormat.from_name(kv_cache_dtype, head_size).served or head_size > 256:
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype} serves head dimensions that are multiples of 16 up to 256, "
                f"this model has {head_size}; use another dtype"
            )
        self.fa_version = get_flash_attn_version(head_size=head_size)
        self.config = get_current_vllm_config()
        self.canary = canary.Canary(self.config)
        self.left: Left | None = None  # of a row of decoding, for a check
        self.ptx = uses_ptx(torch.device("cuda", torch.cuda.current_device()))
        self.recent_pages = self.key_mean = None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.lends = False  # whether other layers read this one's cache
        self._set_format(kv_cache_dtype)

    @property
    def owner(self) -> Impl:
        """The layer whose cache this one reads: itself, but for layers without keys."""
        if self.kv_sharing_target_layer_name is None:
            return self
        return self.config.compilation_config.static_forward_context[self.kv_sharing_target_layer_name].impl

    def use_format(self, name: str) -> None:
        """Before any page is made: another format than the run's."""
        self._set_format(name)
        device_tables.make_all(self.fmt, self.workspace.planes.device)

    def _set_format(self, name: str) -> None:
        self.kv_cache_dtype, self.fmt = name, KVFormat.from_name(name, self.head_size)
        device = torch.device("cuda", torch.cuda.current_device())
        requests = self.config.scheduler_config.max_num_seqs
        query_len = min(MAX_QUERY_LEN, compat.query_token_limit(self.config))
        rows = max_partial_rows(requests, self.num_heads, self.num_kv_heads, query_len, self.fmt, device)
        self.workspace = _workspace(requests * query_len, self.num_heads, self.head_size, rows, device)

    def recent_bytes(self) -> int:
        """Of one 8-bit copy of a recent page in this layer."""
        if self.owner is not self:
            return 0
        return self.num_kv_heads * RecentPages.layout(self.head_size).page_bytes

    def process_weights_after_loading(self, act_dtype):
        """After the weights and before vLLM measures free memory: reserve what is not a page."""
        presets.apply(self.config)
        metrics.announce(self.config, "Triton with byte permutes (PTX)" if self.ptx else "plain Triton")
        device = self.workspace.planes.device
        device_tables.make_all(self.fmt, device)
        if self.sinks is not None:
            self.sinks = self.sinks.to(torch.float32)
        tokens = prefill.tile_tokens(self.num_kv_heads, self.head_size, act_dtype)
        if self.window is not None:
            tokens = max(tokens, self.config.scheduler_config.max_num_batched_tokens + self.window)
        prefill.reserve(tokens, self.num_kv_heads, self.head_size, act_dtype, device)
        self.owner.lends |= self.owner is not self
        copies = recent_memory.copies(self.config)
        if copies and self.recent_bytes():
            bytes_each = RecentPages.layout(self.head_size).page_bytes
            self.recent_pages = torch.zeros(copies, self.num_kv_heads, bytes_each, dtype=torch.uint8, device=device)

    @property
    def shape(self) -> tuple:
        """What its kernels are compiled for."""
        sinks, mean = self.sinks is not None, self.owner.key_mean is not None
        return self.num_heads, self.num_kv_heads, self.fmt, self.window is not None, self.soft_cap is not None, sinks, mean

    def first_calls(self, page_tokens, dtype, bookkeeping) -> dict[tuple, Callable[[], None]]:
        """Calls that compile the kernels of decoding and of prefill, so that no request waits for one, by what each is compiled
        for: layers of several shapes share some."""
        device = self.workspace.planes.device
        pages = torch.zeros(1, self.num_kv_heads, page_tokens * self.fmt.slot_bytes, dtype=torch.uint8, device=device)
        vectors = torch.zeros(1, self.num_kv_heads, self.head_size, dtype=dtype, device=device)
        out = torch.zeros(1, self.num_heads, self.head_size, dtype=dtype, device=device)
        table = torch.full((1, COPIED_PAGES), -1, dtype=torch.int32, device=device)
        slots, zero = table[0].long(), torch.zeros(1, dtype=torch.int32, device=device)
        copies, mean = self.owner.recent_pages, self.owner.key_mean
        recent = None if bookkeeping is None else RecentPages(copies, table[0], table)
        store = lambda tiling: prepare(
            None, vectors, vectors, pages, slots, self.workspace, self.fmt, page_tokens, self.scale, recent=recent,
            positions=slots, mean=mean, tiling=tiling,
        )
        attend = lambda: decode_attention(
            self.workspace, pages, table, zero, out, self.fmt, page_tokens, soft_cap=self.soft_cap, recent=recent, mean=mean,
            sliding_window=self.window, sinks=self.sinks,
        )
        read = lambda held, fmt, tokens, mean: dequantize(
            held, table, zero, zero, zero, vectors, vectors, fmt, tokens, 1, rotated=False, mean=mean
        )
        calls: dict[tuple, Callable[[], None]] = {
            ("attend", self.shape): attend,  # first, as it takes the longest
            **{("store", n, self.shape): functools.partial(store, tiling) for n, tiling in TILINGS.items()},
            ("merge", self.num_heads, self.head_size, self.window is not None, self.sinks is not None): lambda: merge(
                self.workspace.partial, self.workspace.lse, zero, out, 1, sliding_window=self.window, sinks=self.sinks
            ),
            ("read", self.shape): lambda: read(pages, self.fmt, page_tokens, mean),
        }
        if recent is not None:
            key = "read copies", self.num_kv_heads, self.head_size
            calls[key] = lambda: read(copies, recent_format(self.head_size), RECENT_PAGE_TOKENS, None)
        return calls

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        raise RuntimeError("tqai stores in forward; this vLLM stores separately: please report its version")

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output=None, output_scale=None, output_block_scale=None
    ):
        if attn_metadata is None:  # vLLM's profiling run
            return key_mean.read(self, layer, query, key, value, output)
        meta, owner = attn_metadata, self.owner
        page_tokens = kv_cache.shape[2]
        pages = kv_cache.flatten(2)
        tokens = meta.num_actual_tokens
        out = output.view(-1, self.num_heads, self.head_size)
        query = query.view(-1, self.num_heads, self.head_size)
        decode_tokens = meta.num_decodes * meta.query_len if meta.num_decodes else 0
        rows = slice(decode_tokens, tokens)
        if owner is self:
            key, value = (x[:tokens].view(-1, self.num_kv_heads, self.head_size) for x in (key, value))
            chunk = key[rows], value[rows]
            # What a piece of a CUDA graph wrote does not outlive the layer.
            self.chunk = tuple(x.clone() for x in chunk) if self.lends and meta.prefill is not None else None
        else:  # its keys are the owner's, stored already
            key = value = query.new_empty(0, self.num_kv_heads, self.head_size)
            chunk = owner.chunk
        recent = None
        if meta.recent is not None and owner.recent_pages is not None:
            recent = RecentPages(owner.recent_pages, meta.recent.slots, meta.recent.table)
        prepare(
            query[:decode_tokens] if decode_tokens else None, key, value, pages, meta.slot_mapping, self.workspace,
            self.fmt, page_tokens, self.scale, recent=recent, positions=meta.positions, mean=owner.key_mean,
        )
        if decode_tokens:
            decode_attention(
                self.workspace, pages, meta.block_table, meta.seq_lens[: meta.num_decodes], out[:decode_tokens],
                self.fmt, page_tokens, query_len=meta.query_len, soft_cap=self.soft_cap, recent=recent,
                mean=owner.key_mean, sliding_window=self.window, sinks=self.sinks,
            )
            if self.left is not None:
                self.left.take(query[:decode_tokens], key[:decode_tokens], value[:decode_tokens], out[:decode_tokens], pages)
        if meta.prefill is not None:
            prefill.attend(
                query[rows], *chunk, pages, page_tokens, owner.recent_pages, meta.prefill, self.fmt,
                out[rows], softmax_scale=self.scale, fa_version=self.fa_version, sliding_window=self.window,
                soft_cap=self.soft_cap, sinks=self.sinks, mean=owner.key_mean,
            )
            # Never in a CUDA graph, which has no prefill; of decoding see decode_canary.py.
            if self.kv_sharing_target_layer_name is None and self.canary.due():
                canary.check(
                    self, layer.layer_name, canary.NewTokens.of_prefill(meta.prefill), query[rows], key[rows], value[rows], out[rows], pages,
                    page_tokens, meta.slot_mapping[rows], meta.positions[rows],
                )
        return output


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

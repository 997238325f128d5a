"""Compressed pages in plain PyTorch: what the Triton kernels do, on any device, slowly."""

from __future__ import annotations

import torch

from tqai_plugins.core.kv_format import RECENT_PAGE_TOKENS, RECENT_PAGES, KVFormat, recent_format

from . import codec
from .key_mean import KeyMean


def _columns(pages: torch.Tensor, fmt: KVFormat, page_tokens: int):
    """Views of pages uint8 [..., page_bytes] by token: key codes, value codes, key and value scales."""
    layout = fmt.page_layout(page_tokens)
    k = pages[..., : layout.v_codes].unflatten(-1, (page_tokens, fmt.k_bytes))
    v = pages[..., layout.v_codes : layout.k_scales].unflatten(-1, (fmt.v_bytes, page_tokens)).transpose(-1, -2)
    scales = pages[..., layout.k_scales : layout.page_bytes]
    k_scales, v_scales = scales.unflatten(-1, (2, page_tokens, 2)).unbind(-3)
    return k, v, k_scales, v_scales


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    fmt: KVFormat,
    page_tokens: int,
    *,
    positions: torch.Tensor | None = None,
    mean: KeyMean | None = None,
) -> None:
    """Quantize key and value [tokens, kv_heads, head_dim] into pages uint8 [num_pages, kv_heads, page_bytes].

    slots int [tokens] are page * page_tokens + offset, -1 to skip. A vector with NaN or infinity gets
    the scale NaN, so that what attends to it reads as NaN. mean is taken off the keys, at positions int [tokens].
    """
    if mean is not None:
        key = (key - mean.term(positions)).to(key.dtype)
    kept = slots >= 0
    page, offset = slots[kept] // page_tokens, slots[kept] % page_tokens
    heads = torch.arange(pages.shape[1], device=pages.device)
    at = (page[:, None], heads[None, :], offset[:, None])
    states = torch.stack([key[kept], value[kept]]).float()
    if fmt.bits_k == fmt.bits_v:  # at once: for a few tokens on a CPU it is the number of operations that takes the time
        quantized = list(zip(*codec.quantize(states, fmt.bits_k, on_invalid="flag"), strict=True))
    else:
        widths = zip(states, (fmt.bits_k, fmt.bits_v), strict=True)
        quantized = [codec.quantize(x, bits, on_invalid="flag") for x, bits in widths]
    k, v, k_scales, v_scales = _columns(pages, fmt, page_tokens)
    for (packed, worth), codes, scales in zip(quantized, (k, v), (k_scales, v_scales), strict=True):
        codes[at] = packed
        scales[at] = worth[..., None].view(torch.uint8)


def dequantize(
    pages: torch.Tensor, block_table: torch.Tensor, start: int, end: int, fmt: KVFormat, page_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [start, end) of one sequence as float32 K and V [tokens, kv_heads, head_dim], rotated basis.

    block_table int [pages of the sequence].
    """
    first = start // page_tokens
    blocks = block_table[first : -(-end // page_tokens)].long()
    k, v, k_scales, v_scales = _columns(pages[blocks], fmt, page_tokens)

    def dense(codes, scales, bits):
        codes = codes.transpose(1, 2).flatten(0, 1)[start - first * page_tokens : end - first * page_tokens]
        scales = scales.transpose(1, 2).flatten(0, 1)[start - first * page_tokens : end - first * page_tokens]
        scales = scales.contiguous().view(torch.float16)[..., 0]
        return codec.dequantize_rotated(codes.contiguous(), scales, bits, fmt.head_dim)

    return dense(k, k_scales, fmt.bits_k), dense(v, v_scales, fmt.bits_v)


def _overlay_copies(k, v, start, end, recent: torch.Tensor, copies: list[int], head_dim: int) -> None:
    """Lay the copies of the first page and of the last before token `end` over k and v, which hold tokens [start, end)."""
    fmt = recent_format(head_dim)
    pages = -(-end // RECENT_PAGE_TOKENS)
    for page, copy in zip((0, *range(pages - RECENT_PAGES, pages)), copies, strict=True):
        begin, stop = max(start, page * RECENT_PAGE_TOKENS), min(end, (page + 1) * RECENT_PAGE_TOKENS)
        if copy < 0 or begin >= stop:
            continue
        offset = begin - page * RECENT_PAGE_TOKENS
        rows = slice(begin - start, stop - start)
        table = torch.tensor([copy])
        k[rows], v[rows] = dequantize(recent, table, offset, offset + stop - begin, fmt, RECENT_PAGE_TOKENS)


def read(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    end: int,
    fmt: KVFormat,
    page_tokens: int,
    *,
    recent: tuple[torch.Tensor, list[int]] | None = None,
    mean: KeyMean | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dequantize, as attention reads it: with the mean on the keys again, and the copies laid over.

    Parameters as in attention; returns float32 K and V [end - start, kv_heads, head_dim] in the rotated basis.
    """
    k, v = dequantize(pages, block_table, start, end, fmt, page_tokens)
    if mean is not None:
        k += codec.rotate(mean.term(torch.arange(start, end, device=k.device)))
    if recent is not None:
        _overlay_copies(k, v, start, end, *recent, fmt.head_dim)
    return k, v


def attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    length: int,
    fmt: KVFormat,
    page_tokens: int,
    softmax_scale: float,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    own: tuple[torch.Tensor, torch.Tensor] | None = None,
    recent: tuple[torch.Tensor, list[int]] | None = None,
    mean: KeyMean | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence's newest tokens over its codes.

    query [queries, q_heads, head_dim] are the last of `length` stored tokens; sinks [q_heads] are
    logits without a value. own: exact keys and values [queries, kv_heads, head_dim] of the queries'
    tokens, read in place of their codes. recent: pages of 8-bit copies uint8 [copies, kv_heads, page_bytes]
    and which of them are the first page and the last RECENT_PAGES (of RECENT_PAGE_TOKENS) of what is read from codes, -1 for
    none.
    mean: what was taken off the keys of the codes; the copies have it. Returns float32 of query's shape.
    """
    queries = query.shape[0]
    start = 0 if sliding_window is None else max(0, length - queries - sliding_window + 1)
    end = length if own is None else length - queries
    k, v = read(pages, block_table, start, end, fmt, page_tokens, recent=recent, mean=mean)
    if own is not None:
        k, v = (torch.cat([cached, codec.rotate(x.float())]) for cached, x in zip((k, v), own, strict=True))
    query = codec.rotate(query.float())
    return codec.rotate_back(
        dense_attention(query, k, v, softmax_scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks)
    )


def dense_attention(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence: float32 query [queries, q_heads, head_dim], k and v
    [tokens, kv_heads, head_dim]."""
    queries, q_heads, head_dim = query.shape
    tokens, kv_heads, _ = k.shape
    q = query.view(queries, kv_heads, q_heads // kv_heads, head_dim)
    score = torch.einsum("qhgd,thd->hgqt", q, k) * softmax_scale
    if soft_cap:
        score = soft_cap * torch.tanh(score / soft_cap)
    token = torch.arange(tokens, device=query.device)
    last = torch.arange(tokens - queries, tokens, device=query.device)[:, None]
    hidden = token > last
    if sliding_window is not None:
        hidden |= token <= last - sliding_window
    score = score.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(kv_heads, -1, 1, 1).expand(-1, -1, queries, 1)
        weights = torch.cat([score, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = score.softmax(-1)
    return torch.einsum("hgqt,thd->qhgd", weights, v).reshape(queries, q_heads, head_dim)

"""Where the keys, or the values, of one layer lie: exact first tokens, codes, exact last tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.rotation import Rotation
from ..torch_kernels import codec

BLOCK = 32  # tokens leave the exact window so many at a time: quantizing them one by one is 20 times slower
TILE = 1 << 20  # coordinates dequantized at a time


@dataclass
class Counts:
    """Vectors that a cache has quantized, and read back from their codes, so far."""

    quantized: int = 0
    dequantized: int = 0


class TokenBuffer:
    """A tensor [batch, heads, tokens, ...] that grows along its tokens, in amortised O(1) a token."""

    def __init__(self, first: torch.Tensor, capacity: int = 0):
        self.length = 0
        self.data = self._empty(first, capacity)
        self.append(first)

    @staticmethod
    @torch.inference_mode(False)  # or generate() could not go on with a cache that was begun in inference mode
    def _empty(like: torch.Tensor, capacity: int) -> torch.Tensor:
        return torch.empty(*like.shape[:2], capacity, *like.shape[3:], dtype=like.dtype, device=like.device)

    @property
    def tokens(self) -> torch.Tensor:
        return self.data[:, :, : self.length]

    def append(self, new: torch.Tensor) -> None:
        end = self.length + new.shape[2]
        capacity = self.data.shape[2]
        if end > capacity:
            grown = self._empty(new, max(end, capacity + capacity // 8 + BLOCK))
            grown[:, :, : self.length] = self.tokens
            self.data = grown
        self.data[:, :, self.length : end] = new
        self.length = end

    @torch.inference_mode(False)
    def change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.data = function(self.data)


@dataclass(frozen=True)
class Snapshot:
    """All tokens of a store at one moment: sinks and recent [batch, heads, tokens, head_dim], codes between them."""

    sinks: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    recent: torch.Tensor
    bits: int
    counts: Counts

    @property
    def shape(self) -> torch.Size:
        batch, heads, count, head_dim = self.recent.shape
        return torch.Size([batch, heads, count + self.codes.shape[2] + self.sinks.shape[2], head_dim])

    def tiles(self):
        """Slices of the coded tokens with their float32 levels and worths, a bounded number at a time."""
        batch, heads, _, head_dim = self.recent.shape
        step = max(TILE // (batch * heads * head_dim), BLOCK)
        for start in range(0, self.codes.shape[2], step):
            part = slice(start, start + step)
            scales = self.scales[:, :, part]
            self.counts.dequantized += scales.numel()
            levels = codec.levels(self.codes[:, :, part], self.bits, head_dim)
            yield part, levels, codec.worth(scales)

    def dense(self) -> torch.Tensor:
        """[batch, heads, tokens, head_dim] in the model's dtype and basis."""
        if not self.codes.shape[2]:
            return torch.cat([self.sinks, self.recent], 2) if self.sinks.shape[2] else self.recent
        out = self.recent.new_empty(self.shape)
        first, last = self.sinks.shape[2], self.shape[2] - self.recent.shape[2]
        out[:, :, :first], out[:, :, last:] = self.sinks, self.recent
        matrix = codec.matrix(Rotation(self.shape[3]), self.codes.device)
        for part, levels, worth in self.tiles():
            out[:, :, first:last][:, :, part] = levels @ matrix * worth[..., None]
        return out


class VectorStore:
    """Keys or values of one layer. Tokens enter the exact window, and leave it, in order, as codes."""

    def __init__(self, first: torch.Tensor, bits: int, sink_tokens: int, window: int, keep_dense: bool, counts: Counts):
        none = first.detach()[:, :, :0]
        codes, scales = codec.quantize(none, bits)
        self.bits, self.sink_tokens, self.window, self.counts = bits, sink_tokens, window, counts
        self.sinks = TokenBuffer(none, sink_tokens)
        self.codes, self.scales = TokenBuffer(codes), TokenBuffer(scales)
        self.recent = self._window(none)
        self.dense = TokenBuffer(none) if keep_dense else None

    def _window(self, tokens: torch.Tensor) -> TokenBuffer:
        return TokenBuffer(tokens, self.window + BLOCK if self.window else 0)

    @property
    def buffers(self) -> list[TokenBuffer]:
        every = [self.sinks, self.codes, self.scales, self.recent, self.dense]
        return [buffer for buffer in every if buffer is not None]

    @property
    def length(self) -> int:
        return self.sinks.length + self.codes.length + self.recent.length

    def append(self, new: torch.Tensor) -> Snapshot | torch.Tensor:
        """Store new tokens [batch, heads, new, head_dim] and return all that attention shall see.

        With a window the new tokens are seen exactly and coded afterwards; without one they are seen
        as codes at once.
        """
        before = self.length
        tokens = new.detach()
        if self.sinks.length == before:
            count = self.sink_tokens - before
            self.sinks.append(tokens[:, :, :count])
            tokens = tokens[:, :, count:]
        self.recent.append(tokens)
        if self.window:
            seen = self.snapshot() if before else new
            if self.recent.length >= self.window + BLOCK:
                self._encode_oldest()
            return seen
        self._encode_oldest()
        if self.dense is None:
            return self.snapshot()
        self.dense.append(self.snapshot(before).dense())
        return self.dense.tokens

    def _encode_oldest(self) -> None:
        count = self.recent.length - self.window
        codes, scales = codec.quantize(self.recent.tokens[:, :, :count], self.bits)
        self.counts.quantized += scales.numel()
        self.codes.append(codes)
        self.scales.append(scales)
        # A new buffer, since a snapshot may still look at the old one.
        self.recent = self._window(self.recent.tokens[:, :, count:])

    def snapshot(self, start: int = 0) -> Snapshot:
        """The tokens from position `start` on, which lies before the exact window."""
        coded = max(start - self.sinks.length, 0)
        parts = self.sinks.tokens[:, :, start:], self.codes.tokens[:, :, coded:], self.scales.tokens[:, :, coded:]
        return Snapshot(*parts, self.recent.tokens, self.bits, self.counts)

    def crop(self, count: int) -> None:
        """Forget the newest `count` tokens. The window refills with the tokens that follow."""
        keep = max(self.length - count, 0)
        if self.dense is not None:
            self.dense.length = keep
        self.sinks.length, keep = min(self.sinks.length, keep), keep - min(self.sinks.length, keep)
        self.codes.length, keep = min(self.codes.length, keep), keep - min(self.codes.length, keep)
        self.scales.length = self.codes.length
        self.recent.length = keep

"""Where the keys, or the values, of one layer lie: exact first tokens, codes, exact last tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.rotation import Rotation
from ..torch_kernels import codec
from .key_means import PlacedMeans

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
        """What it holds, a view."""
        return self.data[:, :, : self.length]

    def append(self, new: torch.Tensor) -> None:
        """Add tokens [batch, heads, new, ...]."""
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
        """Replace the whole tensor, room included, by a function of it."""
        self.data = function(self.data)


@dataclass(frozen=True)
class Sketch:
    """What the codes of the coded tokens leave over, as core.qjl sketches it: packed signs and norms."""

    signs: torch.Tensor
    norms: torch.Tensor
    size: int


@dataclass(frozen=True)
class Snapshot:
    """All tokens of a store at one moment: the first `sinks` exact ones, the coded ones, from position `first_coded` on,
    the other exact ones."""

    exact: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    sinks: int
    bits: int
    counts: Counts
    sketch: Sketch | None = None
    factors: torch.Tensor | None = None
    means: PlacedMeans | None = None
    first_coded: int = 0
    vector: bool = False

    @property
    def shape(self) -> torch.Size:
        """[batch, heads, tokens, head_dim], as of an ordinary tensor of keys."""
        batch, heads, count, head_dim = self.exact.shape
        return torch.Size([batch, heads, count + self.codes.shape[2], head_dim])

    @property
    def matrix(self) -> torch.Tensor:
        """float32 [head_dim, head_dim] that takes levels times scales back to the model's basis."""
        matrix = codec.level_matrix(Rotation(self.shape[3]), self.codes.device)
        return matrix if self.factors is None else matrix * self.factors.to(matrix)

    def tiles(self):
        """Slices of the coded tokens with their float32 levels and float16 scales, a bounded number at a time."""
        batch, heads, _, head_dim = self.exact.shape
        step = max(TILE // (batch * heads * head_dim), BLOCK)
        for start in range(0, self.codes.shape[2], step):
            part = slice(start, start + step)
            scales = self.scales[:, :, part]
            self.counts.dequantized += scales.numel()
            yield part, codec.levels(self.codes[:, :, part], self.bits, head_dim, vector=self.vector), scales

    def positions(self, part: slice) -> tuple[int, int]:
        """First, and last plus one, of a tile."""
        return self.first_coded + part.start, self.first_coded + min(part.stop, self.codes.shape[2])

    def dense(self) -> torch.Tensor:
        """[batch, heads, tokens, head_dim] in the model's dtype and basis."""
        out = self.exact.new_empty(self.shape)
        coded = out[:, :, self.sinks : self.sinks + self.codes.shape[2]]
        out[:, :, : self.sinks] = self.exact[:, :, : self.sinks]
        out[:, :, self.sinks + self.codes.shape[2] :] = self.exact[:, :, self.sinks :]
        matrix = self.matrix
        for part, levels, scales in self.tiles():
            found = levels @ matrix * scales[..., None]
            coded[:, :, part] = found if self.means is None else found + self.means.term(*self.positions(part))
            if self.sketch is not None:
                signs, norms = self.sketch.signs[:, :, part], self.sketch.norms[:, :, part]
                left_over = codec.estimate(signs, norms, self.sketch.size, self.shape[3])
                coded[:, :, part] += (left_over if self.factors is None else left_over * self.factors).to(coded.dtype)
        return out


class VectorStore:
    """Keys or values of one layer: exact first tokens, codes, exact last tokens, which turn to codes in order. factors
    [head_dim]: what keys are divided by before they are coded (core/key_balance.py). means: what is taken off them before,
    by their place in the cache, which is their position but for left padding, where codes are only less exact. vector: whether
    four coordinates are coded at once (core/vector_codebook.py)."""

    def __init__(
        self, first: torch.Tensor, bits: int, sink_tokens: int, window: int, keep_dense: bool, counts: Counts,
        sketch_size: int = 0, factors: torch.Tensor | None = None, means: PlacedMeans | None = None, vector: bool = False,
    ):  # fmt: skip
        none = first.detach()[:, :, :0]
        codes, scales = codec.quantize(none, bits, vector=vector)
        self.bits, self.window, self.sink_tokens, self.counts = bits, window, sink_tokens, counts
        self.factors, self.means, self.vector = factors, means, vector
        # Room for all exact tokens there can be between two calls.
        self.exact_capacity = sink_tokens + (window + BLOCK if window else 0)
        self.exact = TokenBuffer(none, self.exact_capacity)
        self.codes, self.scales = TokenBuffer(codes), TokenBuffer(scales)
        self.dense = TokenBuffer(none) if keep_dense else None
        self.sketch_size = sketch_size
        # Signs and norms of what the codes leave over, token by token with the codes.
        self.sketch = [TokenBuffer(part) for part in codec.sketch(none.float(), sketch_size)] if sketch_size else []

    @property
    def buffers(self) -> list[TokenBuffer]:
        """All that it keeps."""
        return [self.exact, self.codes, self.scales, *self.sketch] + ([self.dense] if self.dense is not None else [])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, heads, head_dim) of what it holds."""
        batch, heads, _, head_dim = self.exact.data.shape
        return batch, heads, head_dim

    @property
    def length(self) -> int:
        """Tokens, exact and coded."""
        return self.exact.length + self.codes.length

    def append(self, new: torch.Tensor) -> Snapshot | torch.Tensor:
        """Store new tokens [batch, heads, new, head_dim] and return all that attention shall see.

        With a window the new tokens are seen exactly and coded afterwards; without one they are seen
        as codes at once.
        """
        before = self.length
        self.exact.append(new.detach())
        if self.window:
            seen = self.snapshot() if before else new
            if self.exact.length >= self.exact_capacity:
                self._encode_oldest()
            return seen
        self._encode_oldest()
        if self.dense is None:
            return self.snapshot()
        self.dense.append(self.snapshot(before).dense())
        return self.dense.tokens

    def _encode_oldest(self) -> None:
        exact, first = self.exact.tokens, self.sink_tokens
        last = max(exact.shape[2] - self.window, first)
        leaving = exact[:, :, first:last]
        if self.means is not None and last > first:
            start = first + self.codes.length
            leaving = leaving.float() - self.means.term(start, start + last - first)
        if self.factors is not None:
            leaving = leaving.float() / self.factors.to(leaving.device)
        codes, scales = codec.quantize(leaving, self.bits, vector=self.vector)
        self.counts.quantized += scales.numel()
        self.codes.append(codes)
        self.scales.append(scales)
        if self.sketch:
            left_over = leaving.float() - codec.dequantize(codes, scales, self.bits, exact.shape[3], vector=self.vector)
            for buffer, part in zip(self.sketch, codec.sketch(left_over, self.sketch_size)):
                buffer.append(part)
        # A new buffer, since a snapshot may still look at the old one.
        self.exact = TokenBuffer(exact[:, :, :first], self.exact_capacity)
        self.exact.append(exact[:, :, last:])

    def snapshot(self, start: int = 0) -> Snapshot:
        """The tokens from position `start` on, which lies before the exact window."""
        sinks = min(self.sink_tokens, self.exact.length)
        coded = max(start - sinks, 0)
        exact, codes, scales = self.exact.tokens, self.codes.tokens, self.scales.tokens
        if start:
            exact, codes, scales = exact[:, :, min(start, sinks) :], codes[:, :, coded:], scales[:, :, coded:]
        sketch = None
        if self.sketch:
            signs, norms = (buffer.tokens[:, :, coded:] for buffer in self.sketch)
            sketch = Sketch(signs, norms, self.sketch_size)
        return Snapshot(
            exact, codes, scales, max(sinks - start, 0), self.bits, self.counts, sketch, self.factors, self.means,
            self.sink_tokens + coded, self.vector,
        )  # fmt: skip

    def crop(self, count: int) -> None:
        """Forget the newest `count` tokens. The window refills with the tokens that follow."""
        keep = max(self.length - count, 0)
        coded = max(min(self.codes.length, keep - self.sink_tokens), 0)
        for buffer in (self.codes, self.scales, *self.sketch):
            buffer.length = coded
        self.exact.length = keep - coded
        if self.dense is not None:
            self.dense.length = keep

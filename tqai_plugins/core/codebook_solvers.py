"""Other codebooks than Lloyd-Max's, behind one function: solve().

A solver finds levels; an objective says what is good. The mean squared error and the attention objective are both taken
of the encoder as it is, which searches over scales and fits one a vector: for that encoder Lloyd-Max, optimal for
one coordinate, need not be.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np

from . import reference
from .codebook import TOP, Codebook, shipped
from .kv_format import SERVED_WIDTHS, check_head_dim, check_width
from .solve_codebook import _fit, _on_grid, lloyd_max_levels

SOLVERS = ("lloyd_max", "cmaes", "fuzzy")
OBJECTIVES = ("mse", "attention")
SAMPLES = 1024  # vectors that an objective is measured on
QUERIES, LOGIT_STD = 64, 2.0
Step = Callable[[int, float], None]


def solve(
    head_dim: int, bits: int, solver: str = "lloyd_max", objective: str = "mse", seed: int = 0, step: Step = lambda *_: None
) -> Codebook:
    """A codebook by this solver for this objective; step(evaluations so far, best value so far) is called as it goes.

    Raises ValueError for 8 bits, whose levels are uniform: the largest coordinate sets their grid.
    """
    check_head_dim(head_dim)
    check_width("bits", bits)
    if bits in (1, 8):
        raise ValueError(f"there is nothing to solve for {bits} bits: its levels are given; allowed are 2 to 7")
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; allowed are {', '.join(SOLVERS)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; allowed are {', '.join(OBJECTIVES)}")
    measure = Measure(objective, head_dim, seed, step)
    if solver == "cmaes":
        book = _cmaes(head_dim, bits, measure, seed)
    else:
        levels = lloyd_max_levels(head_dim, bits) if solver == "lloyd_max" else fuzzy_levels(head_dim, bits)
        book = _from_levels(head_dim, bits, levels)
        if objective == "attention":  # these solvers minimize a squared error by themselves: the rest is a descent
            book = _descend(book, measure)
    return Codebook(head_dim, bits, book.magnitudes, book.unit, f"{solver}-{objective}-{head_dim}-{bits}-{book.digest}")


class Measure:
    """An objective over vectors of one seed, the same for every codebook: lower is better."""

    def __init__(self, objective: str, head_dim: int, seed: int, step: Step = lambda *_: None, samples: int = SAMPLES):
        random = np.random.default_rng(seed)
        self.of = mean_squared_error if objective == "mse" else attention_divergence
        self.vectors = random.standard_normal((samples, head_dim)).astype(np.float32)
        self.queries = random.standard_normal((QUERIES, head_dim)).astype(np.float32)
        self.step, self.count, self.best = step, 0, np.inf

    def __call__(self, book: Codebook) -> float:
        found = self.of(book, self.vectors, self.queries)
        self.count += 1
        self.best = min(self.best, found)
        self.step(self.count, self.best)
        return found


def decoded(book: Codebook, vectors: np.ndarray) -> np.ndarray:
    """What rotated vectors [count, head_dim] read back as."""
    codes, worth = reference.encode(vectors, book)
    half = 1 << (book.bits - 1)
    level = np.array(book.magnitudes, np.float32)[codes & (half - 1)]
    return np.where(codes & half, -level, level) * worth[:, None]


def mean_squared_error(book: Codebook, vectors: np.ndarray, queries: np.ndarray | None = None) -> float:
    """E |x - x'|^2 / E |x|^2 of vectors [vectors, head_dim]; queries are not used."""
    return float(((decoded(book, vectors) - vectors) ** 2).sum() / (vectors**2).sum())


def attention_divergence(book: Codebook, keys: np.ndarray, queries: np.ndarray) -> float:
    """Mean KL divergence of softmax(q k') from softmax(q k), in nats (arXiv 2402.14866 preserves attention's output).

    Queries [queries, head_dim]; keys [keys, head_dim] come in runs of 128; logits have the standard deviation LOGIT_STD, as in heads that attend to a few tokens.
    """
    scale = LOGIT_STD / np.sqrt(keys.shape[1])
    runs = lambda x: np.einsum("qd,rtd->rqt", queries, x.reshape(-1, 128, x.shape[1])) * scale

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    exact, got = log_softmax(runs(keys).astype(float)), log_softmax(runs(decoded(book, keys)).astype(float))
    return float((np.exp(exact) * (exact - got)).sum(-1).mean())


def fuzzy_levels(head_dim: int, bits: int, rounds: int = 60, iterations: int = 40) -> np.ndarray:
    """Positive levels by fuzzy c-means, whose memberships sharpen as a temperature falls (arXiv 1908.05033).

    Over a dense grid of the coordinate's density, so there are no samples; the last rounds are Lloyd's algorithm.
    """
    top = min(np.sqrt(head_dim), 8.0)
    x = (np.arange(8192) + 0.5) * (top / 8192)
    weight = np.exp((head_dim - 3) / 2 * np.log1p(-np.minimum(x * x / head_dim, 1 - 1e-15)))
    weight /= weight.sum()
    count = 1 << (bits - 1)
    levels = np.interp((np.arange(count) + 0.5) / count, np.cumsum(weight), x)
    for temperature in np.geomspace(0.5, 1e-6, rounds):
        for _ in range(iterations):
            distance = (x[:, None] - levels) ** 2
            member = np.exp(-(distance - distance.min(1, keepdims=True)) / temperature) * weight[:, None]
            member /= member.sum(1, keepdims=True) / weight[:, None]
            moved = (member * x[:, None]).sum(0) / np.maximum(member.sum(0), 1e-300)
            done = np.abs(moved - levels).max() < 1e-7
            levels = moved
            if done:
                break
    return np.sort(levels)


def _from_levels(head_dim: int, bits: int, levels: np.ndarray) -> Codebook:
    """The nearest codebook whose magnitudes the kernels can hold, by the squared error of one coordinate."""
    magnitudes = _on_grid(head_dim, levels) if bits in SERVED_WIDTHS else levels / levels[-1] * TOP
    return _book(head_dim, bits, magnitudes, _fit(head_dim, magnitudes)[0])


def _book(head_dim: int, bits: int, magnitudes, unit: float) -> Codebook:
    return Codebook(head_dim, bits, tuple(round(float(m), 6) for m in magnitudes), round(float(unit), 9), "being solved")


def _descend(book: Codebook, measure: Measure) -> Codebook:
    """Moves of one magnitude by a step, while one helps."""
    step = 1.0 if book.bits in SERVED_WIDTHS else 0.5
    best = measure(book)
    while True:
        start = best
        for j, move in itertools.product(range(len(book.magnitudes) - 1), (-step, step)):
            tried = list(book.magnitudes)
            tried[j] += move
            if not all(a < b for a, b in itertools.pairwise([0, *tried])):
                continue
            candidate = _book(book.head_dim, book.bits, tried, _fit(book.head_dim, np.array(tried))[0])
            found = measure(candidate)
            if found < best:
                book, best = candidate, found
        if best == start:
            return book


def _cmaes(head_dim: int, bits: int, measure: Measure, seed: int) -> Codebook:
    """CMA-ES over the logarithms of the gaps between levels and of the unit, from Lloyd-Max's.

    The strategy, with options seeded by the caller, is that of the `cma` package.
    """
    try:
        import cma
    except ImportError as error:
        raise ImportError("solver 'cmaes' needs the package cma; pip install cma") from error
    start = shipped(head_dim, bits)

    def of(point: np.ndarray) -> Codebook:
        levels = np.cumsum(np.exp(point[:-1]))
        magnitudes = levels / levels[-1] * TOP
        if bits in SERVED_WIDTHS:
            magnitudes = np.maximum.accumulate(np.floor(magnitudes)) + 0.5
            for j in range(1, len(magnitudes)):  # steps apart
                magnitudes[j] = max(magnitudes[j], magnitudes[j - 1] + 1)
            magnitudes = np.minimum(magnitudes, TOP - np.arange(len(magnitudes))[::-1])
        return _book(head_dim, bits, magnitudes, np.exp(point[-1]))

    first = np.log(np.append(np.diff([0, *start.magnitudes]), start.unit))
    options = {"seed": seed + 1, "verbose": -9, "maxfevals": 150 * len(first), "tolfun": 1e-9}
    found, _ = cma.fmin2(lambda point: measure(of(point)), first, 0.03, options)
    candidates = [start, of(found)]
    return min(candidates, key=functools.partial(_quietly, measure))


def _quietly(measure: Measure, book: Codebook) -> float:
    return measure.of(book, measure.vectors, measure.queries)

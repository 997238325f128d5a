"""Random sequences of operations on the MLX caches, single and batched, against plain lists of tokens.

The same few thousand operations each time; TQAI_OPERATIONS=100000 runs about so many new ones.
"""

import copy
import dataclasses

import numpy as np
import pytest

pytestmark = [pytest.mark.mlx, pytest.mark.slow]
pytest.importorskip("mlx_lm")
import mlx.core as mx
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlx_lm.models import base as mlx_base
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from operations import done, sized
from tqai_plugins.metal_kernels import codec

from tqai_plugins.core import key_mean
from tqai_plugins.mlx_lm_plugin import BatchCompressedKVCache, CacheOptions, CompressedKVCache, dispatch
from tqai_plugins.mlx_lm_plugin.key_mean import KeyMean
from tqai_plugins.mlx_lm_plugin.patching import register

STEPS, HEADS, GROUP, HEAD_DIM, SCALE = 40, 2, 2, 32, 0.2
MOST_CACHES, MOST_ROWS, MOST_TOKENS = 4, 5, 150


@dataclasses.dataclass
class Row:
    """A sequence: keys and values of each token [2, heads, head_dim] as given and as their codes read back, and how many of
    the newest are held as given."""

    given: list[np.ndarray] = dataclasses.field(default_factory=list)
    coded: list[np.ndarray] = dataclasses.field(default_factory=list)
    held: int = 0

    def read(self, options: CacheOptions) -> np.ndarray:
        """What the newest token reads [2, heads, tokens, head_dim]."""
        count = len(self.given)
        exact = lambda t: t >= count - min(options.window, self.held) or (t < options.sinks and not options.keep_dense)
        return np.stack([self.given[t] if exact(t) else self.coded[t] for t in range(count)], 2)

    def append(self, states: np.ndarray, options: CacheOptions) -> None:
        """states [2, heads, tokens, head_dim]."""
        fmt, off = options.format(HEAD_DIM), np.zeros_like(states)
        if options.key_mean is not None:
            off[0] = TERM[:, len(self.given) :][:, : states.shape[2]]
        back = codec.load(codec.store(*(mx.array(x)[None] for x in states - off), fmt), fmt)
        coded = np.stack([np.array(codec.rotate_back(x))[0] for x in back]) + off
        self.given += list(states.transpose(2, 0, 1, 3))
        self.coded += list(coded.transpose(2, 0, 1, 3))
        self.held += states.shape[2]

    def settle(self, options: CacheOptions) -> None:
        self.held = min(self.held, options.window)

    def trim(self, count: int) -> None:
        kept = max(len(self.given) - count, 0)
        self.given, self.coded, self.held = self.given[:kept], self.coded[:kept], max(self.held - count, 0)


def some_mean() -> tuple[KeyMean, np.ndarray]:
    """A key mean, and by core.key_mean what it is at each position [heads, positions, head_dim]."""
    means = 3 * np.random.default_rng(0).standard_normal((HEADS, HEAD_DIM))
    angles = 1e4 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    mean = KeyMean.make(key_mean.LayerMeans(means, np.ones(HEADS), np.ones((2, HEAD_DIM // 2))), angles, 1.0)
    turns, pairs = np.arange(MOST_TOKENS + 50)[:, None] * np.float32(angles).astype(float), np.array(mean.pairs)
    table = key_mean.make_table(np.cos(turns), np.sin(turns), pairs)
    return mean, key_mean.term(table, key_mean.coefficients(np.float32(means), pairs), pairs).transpose(1, 0, 2)


MEAN, TERM = some_mean()


class Caches(RuleBasedStateMachine):
    strategy, folder, means = "", None, None

    @initialize(
        window=st.integers(0, 20), sinks=st.integers(0, 5), bits=st.tuples(*[st.sampled_from([2, 3, 4, 8])] * 2), seed=st.integers(0, 2**31)
    )
    def start(self, window, sinks, bits, seed):
        self.options = CacheOptions(*bits, sinks, window, self.strategy, key_means=self.means)
        self.random = np.random.default_rng(seed)
        self.all, self.last = [(CompressedKVCache(self.options), [Row()])], 0

    def draw(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape).astype(np.float32)

    def pick(self, data, kind=object) -> int | None:
        """The place of a cache of this kind, if there is one."""
        found = [i for i, (cache, _) in enumerate(self.all) if isinstance(cache, kind)]
        if not found:
            return None
        done["MLX caches"] += 1
        self.last = data.draw(st.sampled_from(found), "which cache")
        return self.last

    def add(self, cache, rows: list[Row]) -> None:
        """Beside the others, or in the place of one if there are many."""
        if len(self.all) == MOST_CACHES:
            self.all.pop(self.random.integers(MOST_CACHES))
        self.all.append((cache, rows))
        self.last = len(self.all) - 1

    @rule(data=st.data(), new=st.one_of(st.just(1), st.integers(1, 40)))
    def update(self, data, new):
        cache, rows = self.all[self.pick(data)]
        if cache.length + new <= MOST_TOKENS:
            self.feed(cache, rows, [new] * len(rows))

    @rule(data=st.data())
    def update_with_right_padding(self, data):
        """Chunks of different lengths, as mlx-lm reads the prompts of a batch."""
        which = self.pick(data, BatchCompressedKVCache)
        if which is None or self.all[which][0].length > MOST_TOKENS - 20:
            return
        cache, rows = self.all[which]
        counts = [data.draw(st.integers(1, 20), "tokens of a row") for _ in rows]
        cache.prepare(lengths=counts, right_padding=[max(counts) - n for n in counts])
        self.feed(cache, rows, counts)
        cache.finalize()

    def feed(self, cache, rows: list[Row], counts: list[int]) -> None:
        """New tokens for each row, padded to the longest; the last query of each row must see what it has to."""
        longest = max(counts)
        states = self.draw(2, len(rows), HEADS, longest, HEAD_DIM)
        queries = self.draw(len(rows), HEADS * GROUP, longest, HEAD_DIM)
        mask = cache.make_mask(longest, return_array=False)
        fetched = cache.update_and_fetch(*map(mx.array, states))
        out = mlx_base.scaled_dot_product_attention(mx.array(queries), *fetched, cache=cache, scale=SCALE, mask=mask)
        for i, (row, count) in enumerate(zip(rows, counts)):
            row.append(states[:, i, :, :count], self.options)
            k, v = row.read(self.options).repeat(GROUP, 1).astype(float)
            score = np.einsum("hd,htd->ht", queries[i, :, count - 1], k) * SCALE
            weights = np.exp(score - score.max(-1, keepdims=True))
            expected = np.einsum("ht,htd->hd", weights / weights.sum(-1, keepdims=True), v)
            # A number that lies on a boundary of codes may come to its other side where a mean is taken off in another order.
            tolerance = 1e-4 if self.means is None else 2e-3
            np.testing.assert_allclose(np.array(out)[i, :, count - 1], expected, rtol=tolerance, atol=tolerance)
            row.settle(self.options)

    @rule(data=st.data(), count=st.one_of(st.integers(0, 5), st.integers(0, MOST_TOKENS)))
    def trim(self, data, count):
        cache, rows = self.all[self.pick(data)]
        if isinstance(cache, BatchCompressedKVCache):  # mlx-lm trims a batch by speculated tokens, which all rows have
            count = min(count, min(len(row.given) for row in rows))
        cache.trim(count)
        for row in rows:
            row.trim(count)

    @rule(data=st.data(), by_file=st.booleans())
    def copy_or_save_and_load(self, data, by_file):
        cache, rows = self.all[self.pick(data)]
        if by_file:
            file = str(self.folder / "cache.safetensors")
            save_prompt_cache(file, [cache])
            (twin,) = load_prompt_cache(file)
        else:
            twin = copy.deepcopy(cache)
        self.add(twin, copy.deepcopy(rows))

    @rule(data=st.data())
    def merge(self, data):
        """Up to three single caches become a batch; they go on themselves."""
        singles = [pair for pair in self.all if isinstance(pair[0], CompressedKVCache)]
        if singles:
            chosen = data.draw(st.lists(st.sampled_from(range(len(singles))), min_size=1, max_size=3), "which")
            done["MLX caches"] += 1
            self.add(
                CompressedKVCache.merge([singles[i][0] for i in chosen]), [copy.deepcopy(singles[i][1][0]) for i in chosen]
            )

    @rule(data=st.data())
    def filter(self, data):
        which = self.pick(data, BatchCompressedKVCache)
        if which is not None:
            cache, rows = self.all[which]
            kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=len(rows), unique=True), "rows")
            cache.filter(kept)
            self.all[which] = cache, [rows[i] for i in kept]

    @rule(data=st.data())
    def extend(self, data):
        which, other = (self.pick(data, BatchCompressedKVCache) for _ in range(2))
        if which is not None and which != other and sum(len(self.all[i][1]) for i in (which, other)) <= MOST_ROWS:
            self.all[which][0].extend(self.all[other][0])
            self.all[which][1].extend(copy.deepcopy(self.all[other][1]))
            self.last = which

    @rule(data=st.data())
    def extract(self, data):
        which = self.pick(data, BatchCompressedKVCache)
        if which is not None:
            cache, rows = self.all[which]
            row = data.draw(st.integers(0, len(rows) - 1), "row")
            self.add(cache.extract(row), [copy.deepcopy(rows[row])])

    @precondition(lambda self: len(self.all) > 1)
    @rule(data=st.data())
    def drop(self, data):
        del self.all[self.pick(data)]
        self.last = 0

    @invariant()
    def the_cache_of_the_last_operation_is_right(self):
        if hasattr(self, "all"):
            self.check(*self.all[self.last])

    def check(self, cache, rows: list[Row]) -> None:
        lengths = [len(row.given) for row in rows]
        offsets = [cache.offset] if isinstance(cache, CompressedKVCache) else cache.offset.tolist()
        assert offsets == lengths and cache.size() == cache.length >= max(lengths)
        # A copy goes on by one token, which reads all that is there.
        self.feed(copy.deepcopy(cache), copy.deepcopy(rows), [1] * len(rows))

    def teardown(self):
        for pair in getattr(self, "all", ()):
            self.check(*pair)


@pytest.mark.parametrize("means", [None, {0: MEAN}], ids=["", "key means"])
@pytest.mark.parametrize("strategy", ["residual", "full", "incremental"])
def test_mlx_caches_are_lists_of_tokens(strategy, means, tmp_path):
    machine = type(f"Caches_{strategy}_{bool(means)}", (Caches,), {"strategy": strategy, "folder": tmp_path, "means": means})
    before = done["MLX caches"]
    dispatch.install()
    register()
    try:
        run_state_machine_as_test(machine, settings=sized(1 / STEPS / 6, 40, stateful_step_count=STEPS))
    finally:
        dispatch.uninstall()
    assert done["MLX caches"] - before > 150

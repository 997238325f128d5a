"""Random sequences of operations on the transformers cache against plain lists of tokens, and on pages against a dictionary.

`pytest tests/test_cache_operations.py` runs the same few thousand operations each time; with TQAI_OPERATIONS=100000 it runs
about so many new ones. Hypothesis shrinks a failure and prints how to run it again.
"""

import copy
import dataclasses
import io

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import made_means
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from operations import done, sized

from tqai_plugins.core import key_mean
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.torch_kernels import codec, paged
from tqai_plugins.transformers_plugin import Cache
from tqai_plugins.transformers_plugin.vector_store import BLOCK

STEPS = 40  # operations of one sequence, at most
HEADS, HEAD_DIM = 2, 32
MOST_ROWS, MOST_CACHES = 4, 3


@dataclasses.dataclass
class Token:
    """Keys and values of one position, each [rows, heads, head_dim]: as given, or as their codes read back."""

    exact: list[torch.Tensor]
    coded: list[torch.Tensor] | None = None

    @property
    def seen(self) -> list[torch.Tensor]:
        return self.exact if self.coded is None else self.coded

    def change(self, function) -> "Token":
        return Token([function(x) for x in self.exact], None if self.coded is None else [function(x) for x in self.coded])


@dataclasses.dataclass
class Listed:
    """What a cache has to be: tokens in order, of which the oldest but the first few become codes."""

    sinks: int
    window: int
    bits: tuple[int, int]
    tokens: list[Token]
    means: torch.Tensor | None = None  # [positions, heads, head_dim]: off the keys while they are codes

    def code(self) -> None:
        exact = [token for token in self.tokens if token.coded is None]
        if self.window and len(exact) < self.sinks + self.window + BLOCK:
            return
        leaving = exact[self.sinks : max(len(exact) - self.window, self.sinks)]
        start = self.sinks + sum(token.coded is not None for token in self.tokens)
        for position, token in enumerate(leaving, start):
            off = [0.0, 0.0] if self.means is None else [self.means[position], 0.0]
            token.coded = [
                codec.dequantize(*codec.quantize(x - less, bits), bits, HEAD_DIM) + less
                for x, bits, less in zip(token.exact, self.bits, off)
            ]

    def append(self, new: list[Token]) -> list[list[torch.Tensor]]:
        """Returns what attention has to see."""
        self.tokens += new
        if not self.window:
            self.code()
        seen = [token.seen for token in self.tokens]
        self.code()
        return seen


def turned(means) -> torch.Tensor:
    """What core.key_mean says of all positions that a test comes to."""
    positions = np.arange(STEPS * 60)
    cos, sin = means.rope.turns(positions)
    table = key_mean.make_table(cos, sin, means.pairs)
    coefficients = key_mean.coefficients(means.measured.means, means.pairs, key_mean.unit(cos))
    return torch.from_numpy(key_mean.term(table, coefficients, means.pairs))


class CacheOperations(RuleBasedStateMachine):
    strategy, means, turned = "", None, None

    @initialize(
        sinks=st.integers(0, 5), window=st.integers(0, 20),
        bits=st.tuples(st.integers(1, 8), st.integers(1, 8)), rows=st.integers(1, 3), seed=st.integers(0, 2**31),
    )  # fmt: skip
    def start(self, sinks, window, bits, rows, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.config = transformers.LlamaConfig(num_hidden_layers=1, head_dim=HEAD_DIM)
        options = {"bits_k": bits[0], "bits_v": bits[1], "sink_tokens": sinks, "residual_window": window}
        cache = Cache(self.config, cache_strategy=self.strategy, key_means=self.means, **options)
        self.rows, self.last = [rows], 0
        self.pairs = [(cache, Listed(sinks, window if self.strategy == "residual" else 0, bits, [], self.turned))]

    def pick(self, data) -> int:
        done["the transformers cache"] += 1
        self.last = data.draw(st.integers(0, len(self.pairs) - 1), "which cache")
        return self.last

    def every(self, which: int, function) -> None:
        listed = self.pairs[which][1]
        listed.tokens = [token.change(function) for token in listed.tokens]
        self.rows[which] = listed.tokens[0].exact[0].shape[0] if listed.tokens else self.rows[which]

    @rule(data=st.data(), new=st.one_of(st.just(1), st.integers(0, 60)))
    def update(self, data, new):
        which = self.pick(data)
        cache, listed = self.pairs[which]
        states = [torch.randn(self.rows[which], HEADS, new, HEAD_DIM, generator=self.random) for _ in range(2)]
        seen = cache.update(*states, 0)
        expected = listed.append([Token([x[:, :, i].clone() for x in states]) for i in range(new)])
        same(seen, expected)

    @rule(data=st.data(), count=st.one_of(st.integers(0, 5), st.integers(0, 200)))
    def crop(self, data, count):
        cache, listed = self.pairs[self.pick(data)]
        cache.crop(-count)
        listed.tokens = listed.tokens[: max(len(listed.tokens) - count, 0)]

    @rule(data=st.data())
    def reorder(self, data):
        which = self.pick(data)
        if not self.pairs[which][1].tokens:
            return
        rows = self.rows[which]
        order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows), "beams"))
        self.pairs[which][0].reorder_cache(order)
        self.every(which, lambda x: x[order])

    @rule(data=st.data())
    def select(self, data):
        which = self.pick(data)
        if not self.pairs[which][1].tokens:
            return
        rows = st.integers(0, self.rows[which] - 1)
        kept = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=MOST_ROWS), "rows"))
        self.pairs[which][0].batch_select_indices(kept)
        self.every(which, lambda x: x[kept])

    @rule(data=st.data(), times=st.integers(1, 3))
    def repeat(self, data, times):
        which = self.pick(data)
        if self.pairs[which][1].tokens and self.rows[which] * times <= MOST_ROWS:
            self.pairs[which][0].batch_repeat_interleave(times)
            self.every(which, lambda x: x.repeat_interleave(times, 0))

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(data=st.data(), by_file=st.booleans())
    def copy_or_save_and_load(self, data, by_file):
        """Afterwards both go their own ways."""
        which = self.pick(data)
        cache, listed = self.pairs[which]
        if by_file:
            file = io.BytesIO()
            torch.save(cache, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(cache)
        self.pairs.append((twin, copy.deepcopy(listed)))
        self.rows.append(self.rows[which])

    @rule(data=st.data())
    def offload_and_prefetch(self, data):
        for layer in self.pairs[self.pick(data)][0].layers:
            if layer.is_initialized:
                layer.offload()
                layer.prefetch()

    @rule(data=st.data(), rows=st.integers(1, 3))
    def reset(self, data, rows):
        which = self.pick(data)
        self.pairs[which][0].reset()
        self.pairs[which][1].tokens, self.rows[which] = [], rows

    @invariant()
    def the_cache_of_the_last_operation_is_right(self):
        if hasattr(self, "pairs"):
            check(*self.pairs[self.last])

    def teardown(self):
        for pair in getattr(self, "pairs", ()):
            check(*pair)


def check(cache: Cache, listed: Listed) -> None:
    assert cache.get_seq_length() == len(listed.tokens)
    assert cache.get_mask_sizes(1, 0) == (len(listed.tokens) + 1, 0)
    stores = cache.layers[0].stores
    if stores:
        same([store.snapshot().dense() for store in stores], [token.seen for token in listed.tokens])
        assert {store.codes.length for store in stores} == {sum(token.coded is not None for token in listed.tokens)}


def same(found, expected: list[list[torch.Tensor]]) -> None:
    for i, states in enumerate(found):
        assert states.shape[2] == len(expected)
        if expected:
            torch.testing.assert_close(states + 0, torch.stack([seen[i] for seen in expected], 2), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:cache_strategy='incremental'")
@pytest.mark.parametrize("means", [False, True], ids=["", "key means"])
@pytest.mark.parametrize("strategy", ["residual", "full", "incremental"])
def test_the_transformers_cache_is_a_list_of_tokens(strategy, means):
    made = made_means.make(1, HEADS, HEAD_DIM, 3.0) if means else None
    given = {"strategy": strategy, "means": made, "turned": turned(made[0]) if made else None}
    machine = type(f"CacheOperations_{strategy}_{means}", (CacheOperations,), given)
    before = done["the transformers cache"]
    run_state_machine_as_test(machine, settings=sized(1 / STEPS / 6, 50, stateful_step_count=STEPS))
    assert done["the transformers cache"] - before > 300


SERVED = st.sampled_from([2, 3, 4, 8])


@sized(1 / 60, 60)
@given(data=st.data(), bits=st.tuples(SERVED, SERVED), head_dim=st.sampled_from([16, 48, 64, 80]), page_tokens=st.sampled_from([16, 48, 64]))
def test_pages_hold_each_token_where_its_slot_says(data, bits, head_dim, page_tokens):
    """Sequences whose pages lie anywhere grow by turns and are freed, so that others get their pages; slots of -1 are skipped."""
    fmt, heads, count = KVFormat(*bits, head_dim), data.draw(st.integers(1, 3)), data.draw(st.integers(2, 8))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    pages = torch.randint(0, 256, (count, heads, fmt.page_layout(page_tokens).page_bytes), dtype=torch.uint8, generator=random)
    free, sequences = list(torch.randperm(count, generator=random)), []
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        if sequences and data.draw(st.integers(0, 4)) == 0:
            free += sequences.pop(data.draw(st.integers(0, len(sequences) - 1), "freed"))[0]
        if not sequences or len(sequences) < 3 and data.draw(st.booleans(), "another"):
            sequences.append(([], []))
        slots, new = [], []
        for table, tokens in sequences:  # one batch: some tokens of each sequence
            for _ in range(data.draw(st.integers(0, 40), "new tokens")):
                if len(tokens) == len(table) * page_tokens:
                    if not free:
                        break
                    table.append(free.pop(0))
                pair = torch.randn(2, heads, head_dim, generator=random)
                slots.append(int(table[-1]) * page_tokens + len(tokens) % page_tokens)
                new.append(pair)
                tokens.append(pair)
        for _ in range(data.draw(st.integers(0, 2), "padding")):
            slots.append(-1)
            new.append(torch.full((2, heads, head_dim), torch.nan))
        before = pages.clone()
        if slots:
            key, value = torch.stack(new, 1)
            paged.store(key, value, pages, torch.tensor(slots), fmt, page_tokens)
            done["pages"] += 1
        touched = {slot // page_tokens for slot in slots if slot >= 0}
        untouched = [i for i in range(count) if i not in touched]
        assert torch.equal(pages[untouched], before[untouched])
        for table, tokens in sequences:
            if not tokens:
                continue
            start = data.draw(st.integers(0, len(tokens) - 1), "from")
            end = data.draw(st.integers(start + 1, len(tokens)), "to")
            found = paged.dequantize(pages, torch.tensor([int(page) for page in table]), start, end, fmt, page_tokens)
            done["pages"] += 1
            for states, stored, width in zip(found, torch.stack(tokens[start:end], 1), bits):
                expected = codec.dequantize_rotated(*codec.quantize(stored, width), width, head_dim)
                assert torch.equal(states, expected)

"""Bookkeeping of the 8-bit copies against a plain model of what a copy must hold."""

import dataclasses
import random

import pytest

torch = pytest.importorskip("torch")

from tqai_plugins.core.kv_format import COPIED_PAGES, RECENT_PAGES
from tqai_plugins.core.kv_format import RECENT_PAGE_TOKENS as PAGE
from tqai_plugins.torch_kernels import recent
from tqai_plugins.torch_kernels.recent import RecentCopies, claim

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Server:
    """A scheduler with a page pool, prefix sharing, preemption and rejected tokens; every slot and every copy
    holds the identity of the token last written to it."""

    def __init__(self, claim, copies: int, page_tokens: int, seed: int, device="cpu"):
        self.claim, self.random, self.page_tokens, self.device = claim, random.Random(seed), page_tokens, device
        self.pages, self.max_pages = 64, 12
        self.cache = {}  # slot -> token
        self.copy = {}  # slot of a copy -> token
        self.free = list(range(1, self.pages))
        self.random.shuffle(self.free)
        self.running = []  # [blocks, length, owned]
        self.copies = RecentCopies.allocate(copies, 8, 2048, device)
        self.token = 0

    def step(self):
        r = self.random
        if len(self.running) < 6 and r.random() < 0.4:
            self.running.append({"blocks": [], "length": 0, "prompt": r.choice([1, 30, 64, 65, 130, 300])})
        if self.running and r.random() < 0.06:  # finished or preempted: its own pages are free again
            gone = self.running.pop(r.randrange(len(self.running)))
            users = [b for s in self.running for b in s["blocks"]]
            self.free += [b for b in set(gone["blocks"]) if b not in users]
        rows, slots, starts = [], [], [0]
        for s in self.running:
            sure = lambda o: (o["length"] - 4) // self.page_tokens  # pages that no rejected token can change
            whole = [o for o in self.running if o is not s and sure(o) > 0]
            if not s["blocks"] and whole and r.random() < 0.5:  # whole pages of another, perhaps of this very step
                other = r.choice(whole)
                s["blocks"] = other["blocks"][: r.randint(1, sure(other))]
                s["length"] = len(s["blocks"]) * self.page_tokens
            new = r.choice([s["prompt"], 7, 1]) if s["prompt"] else 1
            if r.random() < 0.1:
                new = 4  # a speculated block, later cut
            new = min(new, self.max_pages * self.page_tokens - s["length"])
            need = -(-(s["length"] + new) // self.page_tokens) - len(s["blocks"])
            if new <= 0 or need > len(self.free):
                continue
            s["prompt"] = max(0, s["prompt"] - new)
            s["blocks"] = s["blocks"] + [self.free.pop() for _ in range(need)]
            written = []
            for position in range(s["length"], s["length"] + new):
                written.append(s["blocks"][position // self.page_tokens] * self.page_tokens + position % self.page_tokens)
            rows.append((s, new))
            slots += written
            starts.append(len(slots))
            s["length"] += new
        if not rows:
            return
        tensor = lambda x: torch.tensor(x, dtype=torch.int32, device=self.device)
        table = [s["blocks"] + [0] * (self.max_pages - len(s["blocks"])) for s, _ in rows]
        lengths = [s["length"] for s, _ in rows]
        padding = r.randint(0, 2)  # as CUDA graphs pad
        self.claim(
            self.copies, torch.tensor(slots + [-1] * padding, device=self.device), tensor(starts), tensor(lengths),
            tensor(table), self.page_tokens,
        )
        for slot, copied in zip(slots, self.copies.slots.tolist(), strict=False):
            self.token += 1
            self.cache[slot] = self.token
            if copied >= 0:
                self.copy[copied] = self.token
        for i, (s, new) in enumerate(rows):
            self.check(s, s["length"], self.copies.table[i].tolist())
            self.check(s, s["length"] - new, self.copies.context[i].tolist())
            if new == 4 and s["length"] > 4:
                s["length"] -= r.randint(0, 3)  # rejected tokens are written again
        return rows

    def check(self, sequence, length, table):
        """Whatever copy a reader is sent to holds the very tokens of the page it stands for."""
        last = -(-length // PAGE)
        for page, copy in zip((0 if last > RECENT_PAGES else -1, *range(last - RECENT_PAGES, last)), table, strict=True):
            if copy < 0:
                continue
            assert page >= 0
            for position in range(page * PAGE, min(length, (page + 1) * PAGE)):
                block = sequence["blocks"][position // self.page_tokens]
                token = self.cache[block * self.page_tokens + position % self.page_tokens]
                assert self.copy[copy * PAGE + position % PAGE] == token


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("copies, page_tokens", [(32, 64), (5, 64), (32, 128)])
def test_a_copy_always_holds_its_pages_tokens(copies, page_tokens, seed):
    server = Server(claim, copies, page_tokens, seed)
    for _ in range(150):
        server.step()
    wanted, served = server.copies.wanted_served.tolist()
    assert 0 < served <= wanted


@pytest.mark.parametrize("seed, copies, page_tokens, side", [(0, 32, 64, 16), (1, 5, 64, 64), (2, 50, 128, 256), (3, 20, 64, 4096)])
def test_the_kernel_keeps_the_same_books(seed, copies, page_tokens, side, monkeypatch):
    """The Triton kernel beside the reference, step by step (by the interpreter where there is no GPU)."""
    pytest.importorskip("triton")
    from tqai_plugins.triton_kernels import recent as kernels

    monkeypatch.setattr(kernels, "SIDES", {side: kernels.SIDES[side]})

    def both(copies, slot_mapping, query_start_loc, seq_lens, *rest):
        expected = dataclasses.replace(copies, **{f.name: getattr(copies, f.name).clone() for f in dataclasses.fields(copies)})
        recent.claim(expected, slot_mapping, query_start_loc, seq_lens, *rest)
        copies.slots.fill_(7), copies.table.fill_(7), copies.context.fill_(7)
        kernels.claim(copies, slot_mapping, query_start_loc, seq_lens, *rest)
        for field in dataclasses.fields(copies):
            got, wanted = getattr(copies, field.name), getattr(expected, field.name)
            used = {"slots": slot_mapping.shape[0], "table": len(seq_lens), "context": len(seq_lens)}.get(field.name, len(got))
            assert torch.equal(got[:used], wanted[:used]), field.name
        copies.table[len(seq_lens) :], copies.context[len(seq_lens) :] = -1, -1

    server = Server(both, copies, page_tokens, seed, DEVICE)
    for _ in range(300 if DEVICE == "cuda" else 40 if side == 16 else 15):
        server.step()


def decode(server_copies, lengths, steps):
    """`lengths` sequences on pages of their own that grow by a token a step; the last step's table."""
    n = len(lengths)
    table = torch.arange(n * 40, dtype=torch.int32).view(n, 40)
    starts = torch.arange(n + 1, dtype=torch.int32)
    for step in range(steps):
        now = torch.tensor(lengths) + step
        slots = table[torch.arange(n), (now - 1) // PAGE].long() * PAGE + (now - 1) % PAGE
        claim(server_copies, slots, starts, now.int(), table, PAGE)
    return server_copies.table[:n]


def test_sequences_within_capacity_keep_the_first_and_all_recent_pages():
    copies = RecentCopies.allocate(4 * COPIED_PAGES, 8, 64, "cpu")
    table = decode(copies, [1, 1, 1, 1], RECENT_PAGES * PAGE + 70)
    assert (table >= 0).all() and table.unique().numel() == 4 * COPIED_PAGES


def test_a_short_sequence_has_no_first_page_beside_its_recent_ones():
    copies = RecentCopies.allocate(4 * COPIED_PAGES, 8, 64, "cpu")
    table = decode(copies, [1, 1, 1, 1], RECENT_PAGES * PAGE)
    assert (table[:, 0] == -1).all() and (table[:, 1:] >= 0).all()


@pytest.mark.parametrize("chunks", [[260], [30, 230], [100, 160], [64, 196], [1, 1, 258]])
def test_all_of_a_first_page_is_copied_whatever_the_chunks(chunks):
    copies = RecentCopies.allocate(12, 8, 512, "cpu")
    table = torch.arange(8, dtype=torch.int32)[None]
    length, written = 0, []
    for chunk in chunks:
        slots = torch.arange(length, length + chunk)
        length += chunk
        as_int = lambda x: torch.tensor(x, dtype=torch.int32)
        claim(copies, slots, as_int([0, chunk]), as_int([length]), table, PAGE)
        written += copies.slots[:chunk].tolist()
    first = int(copies.table[0, 0])
    assert first >= 0 and written[:PAGE] == list(range(first * PAGE, first * PAGE + PAGE))


def test_beyond_capacity_pages_are_read_from_codes_and_counted():
    copies = RecentCopies.allocate(4, 8, 64, "cpu")
    table = decode(copies, [1, 1, 1, 1], 200)
    assert (table >= 0).sum() <= 4 < table.numel()
    wanted, served = copies.wanted_served.tolist()
    assert served < wanted


def test_a_skipped_step_claims_nothing():
    copies = RecentCopies.allocate(4, 8, 64, "cpu")
    starts = torch.tensor([0, 1], dtype=torch.int32)
    table = torch.zeros(1, 4, dtype=torch.int32)
    claim(copies, torch.tensor([-1]), starts, torch.tensor([1], dtype=torch.int32), table, PAGE)
    assert (copies.owner == -1).all()
    assert (copies.slots == -1).all()

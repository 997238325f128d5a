"""Each Triton kernel against the NumPy reference: by the interpreter here, compiled on a CUDA machine."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tqai_plugins.triton_kernels import decode_attention as decode
from tqai_plugins.triton_kernels import device_tables
from tqai_plugins.triton_kernels import merge as merging
from tqai_plugins.triton_kernels.decode_attention import decode_attention, max_partial_rows
from tqai_plugins.triton_kernels.dequantize import dequantize
from tqai_plugins.triton_kernels.first_calls import make_together
from tqai_plugins.triton_kernels.prepare import TILINGS, Tiling, prepare
from tqai_plugins.triton_kernels.recent import RecentPages
from tqai_plugins.triton_kernels.workspace import Workspace

from tqai_plugins.core import key_mean, reference
from tqai_plugins.core.codebook import Codebook
from tqai_plugins.core.kv_format import RECENT_PAGES, KVFormat
from tqai_plugins.core.rotation import Rotation
from tqai_plugins.torch_kernels.key_mean import KeyMean

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter does not multiply bfloat16; float16 rounds the output to 5e-4.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = 2.5e-3 if DEVICE.type == "cuda" else 5e-4
# The interpreter takes a second for some twenty programs: many rows in each.
TILING = None if DEVICE.type == "cuda" else Tiling(64, 1, 4)


def copied_pages(length):
    """The pages of 64 tokens that can have a copy, as RecentPages.table lists them; -1 for a first page among the last."""
    pages = -(-length // 64)
    return 0 if pages > RECENT_PAGES else -1, *range(pages - RECENT_PAGES, pages)


class Step:
    """Sequences of given lengths, stored by `prepare` on pages in shuffled order; the rest is noise."""

    def __init__(self, fmt, kv_heads, group, lengths, page, query_len=1, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.fmt, self.kv_heads, self.group, self.page, self.query_len = fmt, kv_heads, group, page, query_len
        self.lengths = lengths
        batch, d = len(lengths), fmt.head_dim
        pages_each = -(-max(lengths) // page) + 1
        self.pages = torch.randint(
            0, 256, (batch * pages_each + 1, kv_heads, fmt.page_layout(page).page_bytes), dtype=torch.uint8, generator=g
        ).to(DEVICE)
        self.table = torch.randperm(batch * pages_each, generator=g).int().view(batch, pages_each).to(DEVICE)
        draw = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE, DTYPE)
        self.q = draw(batch * query_len, kv_heads * group, d)
        self.k, self.v = draw(sum(lengths), kv_heads, d), draw(sum(lengths), kv_heads, d)
        slots = [
            self.table[i].cpu().long()[torch.arange(n) // page] * page + torch.arange(n) % page
            for i, n in enumerate(lengths)
        ]
        self.slots = torch.cat(slots).to(DEVICE)
        heads = kv_heads * group
        rows = max(20 * len(self.q) * heads, max_partial_rows(batch, heads, kv_heads, query_len, fmt, DEVICE))
        self.workspace = Workspace.allocate(batch * query_len, kv_heads * group, d, rows, DEVICE)
        self.workspace.partial.fill_(torch.nan)
        self.workspace.lse.fill_(torch.nan)
        self.softmax_scale = d**-0.5
        self.recent = self.mean = None
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)

    def add_key_mean(self):
        """Give the keys of each head the mean of a model that turns pairs of coordinates as RoPE does."""
        d = self.fmt.head_dim
        angles = np.arange(4096)[:, None] * 1e4 ** (-np.arange(d // 2) / (d // 2))
        cos, sin = np.cos(angles), np.sin(angles)
        means = 2 * np.random.default_rng(0).standard_normal((self.kv_heads, d))
        pairs = key_mean.choose_pairs(key_mean.energy(means))
        table = torch.from_numpy(key_mean.make_table(cos, sin, pairs)).to(DEVICE)
        self.mean = KeyMean.make(means, pairs, table, 1.0)
        self.k += self.mean.term(self.positions).to(self.k.dtype)

    def store(self, tiling=TILING):
        prepare(
            self.q, self.k, self.v, self.pages, self.slots, self.workspace, self.fmt, self.page, self.softmax_scale,
            recent=self.recent, positions=self.positions, mean=self.mean, tiling=tiling,
        )

    def keep_recent(self, table):
        """8-bit copies of the first page and the last ones of each sequence as table [sequences, COPIED_PAGES] says."""
        copies = torch.tensor(table, dtype=torch.int32)
        slots = []
        for length, row in zip(self.lengths, table):
            copy_of = dict(zip(copied_pages(length), row))
            for token in range(length):
                copy = copy_of.get(token // 64, -1)
                slots.append(copy * 64 + token % 64 if copy >= 0 else -1)
        page_bytes = RecentPages.layout(self.fmt.head_dim).page_bytes
        noise = torch.randint(0, 256, (copies.max() + 2, self.kv_heads, page_bytes))
        self.recent = RecentPages(
            noise.to(torch.uint8).to(DEVICE), torch.tensor(slots, dtype=torch.int32, device=DEVICE), copies.to(DEVICE)
        )

    def attend(self, **options):
        out = torch.full_like(self.q, torch.nan)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        decode_attention(
            self.workspace, self.pages, self.table, lengths, out, self.fmt, self.page, query_len=self.query_len,
            recent=self.recent, mean=self.mean, **options,
        )
        return out.float().cpu().numpy()

    def stored(self, sequence):
        """(k codes, k scales, v codes, v scales) of one sequence as bytes on the pages, token by token."""
        layout, fmt = self.fmt.page_layout(self.page), self.fmt
        length, pages = self.lengths[sequence], self.pages[self.table[sequence].long()].cpu().numpy()
        found = ([], [], [], [])
        for token in range(length):
            page = pages[token // self.page]
            i = token % self.page
            found[0].append(page[:, i * fmt.k_bytes : (i + 1) * fmt.k_bytes])
            found[1].append(page[:, layout.k_scales + 2 * i : layout.k_scales + 2 * i + 2])
            found[2].append(page[:, layout.v_codes + i : layout.k_scales : self.page])
            found[3].append(page[:, layout.v_scales + 2 * i : layout.v_scales + 2 * i + 2])
        k, ks, v, vs = (np.ascontiguousarray(np.stack(f)) for f in found)
        return k, ks.view(np.float16)[..., 0], v, vs.view(np.float16)[..., 0]

    def expected(self, window=None, soft_cap=None, sinks=None):
        fmt, rotation, rows = self.fmt, Rotation(self.fmt.head_dim), []
        for i, length in enumerate(self.lengths):
            if length == 0:
                rows += [np.zeros((self.kv_heads * self.group, fmt.head_dim))] * self.query_len
                continue
            k, ks, v, vs = self.stored(i)
            book_k, book_v = (Codebook.lloyd_max(fmt.head_dim, bits) for bits in (fmt.bits_k, fmt.bits_v))
            k = reference.dequantize_rotated(k, ks, fmt.bits_k, book_k).astype(float)
            v = reference.dequantize_rotated(v, vs, fmt.bits_v, book_v).astype(float)
            if self.mean is not None:
                mean = self.mean.term(torch.arange(length, device=DEVICE)).cpu().numpy()
                k += reference.rotate(mean, rotation)
            row = [] if self.recent is None else self.recent.table[i].tolist()
            for column, (page, copy) in enumerate(zip(copied_pages(length), row)):
                start = 64 * page
                if copy >= 0 and (column == 0 or min(row[column:]) >= 0):  # a last page's copy is read with all later ones
                    at, rows_of = sum(self.lengths[:i]), slice(start, min(start + 64, length))
                    eight = Codebook.lloyd_max(fmt.head_dim, 8)
                    for x, out in ((self.k, k), (self.v, v)):
                        codes = reference.quantize(x[at : at + length][rows_of].float().cpu().numpy(), 8)
                        out[rows_of] = reference.dequantize_rotated(*codes, 8, eight)
            for t in range(self.query_len):
                q = reference.rotate(self.q[i * self.query_len + t].float().cpu().numpy(), rotation).astype(float)
                score = np.einsum("hgd,thd->hgt", q.reshape(self.kv_heads, self.group, -1), k) * self.softmax_scale
                if soft_cap:
                    score = soft_cap * np.tanh(score / soft_cap)
                token, last = np.arange(length), length - self.query_len + t
                seen = token <= last
                if window:
                    seen &= token > last - window
                score = np.where(seen, score, -np.inf)[:, :, None]
                extra = None if sinks is None else sinks.cpu().numpy().reshape(self.kv_heads, self.group, 1)
                out, _ = reference.softmax_attention(score, v.transpose(1, 0, 2)[:, None], extra)
                rows.append(reference.rotate_back(out.reshape(-1, fmt.head_dim).astype(np.float32), rotation))
        return np.stack(rows)


def assert_close(got, expected):
    assert np.isfinite(got).all(), "an output was not written, or is not a number"
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-9)
    assert error < TOLERANCE, error


FORMATS = [(k, v) for k in (8, 4, 3, 2) for v in (8, 4, 3, 2)]


@pytest.mark.parametrize("bits", FORMATS, ids=lambda b: f"k{b[0]}v{b[1]}")
def test_codes_on_pages_are_the_references(bits):
    step = Step(KVFormat(*bits, 64), 2, 1, [19], 16)
    step.store()
    k, ks, v, vs = step.stored(0)
    for x, width, codes, scales in ((step.k, bits[0], k, ks), (step.v, bits[1], v, vs)):
        expected, expected_scales = reference.quantize(x.float().cpu().numpy(), width)
        # Tie rule (reference.encode): a grid almost as good may be chosen for a vector now and then.
        same = (codes == expected).all(-1)
        assert same.mean() > 0.97
        np.testing.assert_allclose(scales[same].astype(float), expected_scales[same].astype(float), rtol=2**-9)


@pytest.mark.parametrize("bits", FORMATS, ids=lambda b: f"k{b[0]}v{b[1]}")
def test_decode_attention_over_every_format(bits):
    step = Step(KVFormat(*bits, 64), 1, 2, [70, 3], 64)
    step.store()
    assert_close(step.attend(num_splits=2), step.expected())


@pytest.mark.parametrize(
    "bits, head_dim", [*(((4, 3), d) for d in (80, 96, 112, 128, 192, 256)), ((8, 8), 80), ((4, 2), 96), ((8, 8), 256)]
)
def test_head_dims(bits, head_dim):
    step = Step(KVFormat(*bits, head_dim), 1, 3, [67], 64)
    step.store()
    assert_close(step.attend(num_splits=2), step.expected())


@pytest.mark.parametrize("bits", FORMATS, ids=lambda b: f"k{b[0]}v{b[1]}")
def test_recent_pages_are_read_at_eight_bits(bits):
    """Copies of all last pages, of the last alone, of none, of older ones alone (not read), and of short sequences."""
    step = Step(KVFormat(*bits, 64), 1, 2, [260, 250, 200, 193, 150, 129, 20], 64)
    step.keep_recent([
        [5, 8, 0, 4], [6, 9, -1, 2], [7, -1, -1, -1], [-1, 1, 10, -1], [-1, 11, 12, 13], [-1, -1, 14, 15], [-1, -1, -1, 3],
    ])  # fmt: skip
    step.store()
    assert_close(step.attend(num_splits=2), step.expected())


@pytest.mark.parametrize("head_dim, page, group, query_len", [(80, 128, 3, 1), (128, 64, 4, 3), (256, 64, 1, 1)])
def test_recent_pages_of_other_shapes(head_dim, page, group, query_len):
    step = Step(KVFormat(4, 2, head_dim), 1, group, [260, 66], page, query_len)
    step.keep_recent([[4, 5, 0, 1], [-1, -1, 3, 2]])
    step.store()
    assert_close(step.attend(num_splits=3, sliding_window=150), step.expected(window=150))


@pytest.mark.parametrize(
    "bits, head_dim, group, query_len", [((4, 2), 64, 2, 1), ((3, 3), 64, 4, 3), ((4, 4), 80, 1, 1), ((2, 4), 128, 3, 1)]
)
def test_a_key_mean_is_taken_off_and_added_to_the_scores(bits, head_dim, group, query_len):
    step = Step(KVFormat(*bits, head_dim), 2, group, [200, 70], 64, query_len)
    step.add_key_mean()
    step.keep_recent([[1, -1, 0, 4], [-1, -1, -1, -1]])
    step.store()
    k, ks, _, _ = step.stored(0)
    centred = (step.k[:200].float() - step.mean.term(step.positions[:200])).to(step.k.dtype)
    expected, _ = reference.quantize(centred.float().cpu().numpy(), bits[0])
    assert (k == expected).all(-1).mean() > 0.97
    assert_close(step.attend(num_splits=2), step.expected())
    assert_close(step.attend(num_splits=2, sliding_window=90, soft_cap=3.0), step.expected(window=90, soft_cap=3.0))


def test_dequantize_adds_the_key_mean_again():
    step = Step(KVFormat(4, 2, 64), 2, 1, [70], 64)
    step.add_key_mean()
    step.store()
    starts, ends, out_starts = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (3, 70, 0))
    k_out, v_out = torch.full((2, 67, 2, 64), torch.nan, device=DEVICE)
    arguments = (step.pages, step.table, starts, ends, out_starts, k_out, v_out, step.fmt, 64, 67)
    dequantize(*arguments, rotated=False, mean=step.mean)
    k, ks, _, _ = step.stored(0)
    dense = reference.dequantize(k, ks, 4, 64) + step.mean.term(torch.arange(70, device=DEVICE)).cpu().numpy()
    np.testing.assert_allclose(k_out.cpu().numpy(), dense[3:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="ask for rotated=False"):
        dequantize(*arguments, mean=step.mean)


@pytest.mark.parametrize("bits", [(4, 2), (3, 8)])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_all_tilings_of_prepare_write_the_same_bytes(bits, head_dim):
    step = Step(KVFormat(*bits, head_dim), 1, 2, [66, 5], 64)
    step.keep_recent([[-1, -1, 0, 1], [-1, -1, -1, 2]])
    pages, copies = step.pages.clone(), step.recent.pages.clone()
    written = []
    for tiling in TILINGS.values():
        step.pages.copy_(pages), step.recent.pages.copy_(copies), step.workspace.planes.zero_()
        step.store(tiling)
        written.append([step.pages.clone(), step.recent.pages.clone(), step.workspace.planes.clone()])
    for other in written[1:]:
        differ = [(a != b).any(-1).float().mean() for a, b in zip(written[0][:2], other)]
        assert max(differ) < (0.5 if DEVICE.type == "cuda" else 1e-9)  # sums in another order may take another grid
        assert torch.equal(written[0][2], other[2]) or DEVICE.type == "cuda"


@pytest.mark.parametrize("page", [16, 32, 48, 64, 128])
def test_page_sizes(page):
    step = Step(KVFormat(4, 2, 64), 2, 4, [150, 1], page)
    step.store()
    assert_close(step.attend(num_splits=3), step.expected())


@pytest.mark.parametrize("group, query_len", [(1, 1), (7, 1), (16, 2), (4, 8), (3, 5)])
def test_groups_and_query_lengths(group, query_len):
    step = Step(KVFormat(4, 2, 64), 1, group, [75], 64, query_len)
    step.store()
    assert_close(step.attend(num_splits=2), step.expected())


@pytest.mark.parametrize("query_len", [1, 3])
def test_window_soft_cap_and_sinks(query_len):
    step = Step(KVFormat(4, 4, 64), 2, 2, [200, 30], 64, query_len)
    step.store()
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = step.attend(num_splits=2, sliding_window=70, soft_cap=3.0, sinks=sinks)
    assert_close(got, step.expected(window=70, soft_cap=3.0, sinks=sinks))


def test_empty_and_one_token_sequences():
    step = Step(KVFormat(4, 2, 64), 1, 4, [0, 1, 130], 64)
    step.store()
    assert_close(step.attend(num_splits=4), step.expected())


@pytest.mark.parametrize(
    "q_heads, kv_heads, fmt, query_len, sequences",
    [(32, 8, KVFormat(4, 2, 128), 4, 32), (64, 8, KVFormat(4, 2, 128), 2, 8), (32, 8, KVFormat(8, 8, 128), 3, 8), (9, 3, KVFormat(4, 2, 64), 3, 64)],
)
def test_a_workspace_has_room_for_smaller_batches_and_fewer_query_tokens(monkeypatch, q_heads, kv_heads, fmt, query_len, sequences):
    """They are split more often: an H100's multiprocessors are filled with few of them too."""
    monkeypatch.setattr(decode, "_multiprocessors", lambda device: 132)
    room = max_partial_rows(sequences, q_heads, kv_heads, query_len, fmt, DEVICE)
    for n in range(1, sequences + 1):
        for length in range(1, query_len + 1):
            splits = decode.choose_splits(n, kv_heads, q_heads // kv_heads * length, fmt, DEVICE)
            assert n * length * q_heads * splits <= room, (n, length)


def test_a_workspace_without_room_for_the_splits_is_refused():
    step = Step(KVFormat(4, 2, 64), 1, 4, [130], 64)
    step.store()
    with pytest.raises(ValueError, match="512 splits of 4 rows need 2048 partial rows, the workspace has"):
        step.attend(num_splits=512)


def test_log_sum_exp_merges_with_other_attention():
    step = Step(KVFormat(8, 8, 64), 1, 2, [90], 64)
    step.store()
    lse = torch.full((1, 2), torch.nan, device=DEVICE)
    step.attend(num_splits=2, lse=lse)
    k, ks, _, _ = step.stored(0)
    keys = reference.dequantize_rotated(k, ks, 8, Codebook.lloyd_max(64, 8))[:, 0]
    scores = reference.rotate(step.q[0].float().cpu().numpy(), Rotation(64)) @ keys.T * step.softmax_scale
    np.testing.assert_allclose(lse[0].cpu().numpy(), np.log(np.exp(scores).sum(-1)), rtol=1e-3)


@pytest.mark.parametrize(
    "bits, head_dim, group, query_len", [((4, 2), 64, 4, 1), ((3, 8), 80, 3, 2), ((4, 4), 128, 9, 1)]
)
def test_splits_merge_to_the_same_here_and_in_a_launch_of_their_own(monkeypatch, bits, head_dim, group, query_len):
    """One split, some, and more than there are tiles, with sinks and log-sum-exp; twice each in one workspace."""
    step = Step(KVFormat(*bits, head_dim), 1, group, [150, 2], 64, query_len)
    step.store()
    sinks = torch.randn(group, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = step.expected(sinks=sinks)
    for splits in (1, 3, decode.MERGED_SPLITS + 1):
        found = []
        for merged in (0, decode.MERGED_SPLITS, decode.MERGED_SPLITS):
            step.workspace.partial.fill_(torch.nan), step.workspace.lse.fill_(torch.nan)
            lse = torch.full((len(step.q), group), torch.nan, device=DEVICE)
            with monkeypatch.context() as patch:
                for module in (decode, merging):
                    patch.setattr(module, "MERGED_SPLITS", merged)
                found.append((step.attend(num_splits=splits, sinks=sinks, lse=lse), lse.cpu().numpy()))
            assert_close(found[-1][0], expected)
        for out, lse in found[1:]:
            np.testing.assert_allclose(out, found[0][0], rtol=2e-3, atol=2e-5)
            np.testing.assert_allclose(lse, found[0][1], rtol=1e-6)
    assert not step.workspace.arrivals.any()


@pytest.mark.parametrize("splits, launches", [(1, 0), (2, 0), (16, 0), (17, 1)])
def test_few_splits_need_no_second_launch(monkeypatch, splits, launches):
    step = Step(KVFormat(4, 2, 64), 1, 1, [64 * 17 - 5], 64)
    step.store()
    called = []
    monkeypatch.setattr(decode, "merge", lambda *a, **k: called.append(a))
    assert np.isfinite(step.attend(num_splits=splits)).all() == (not launches) and len(called) == launches


@pytest.mark.parametrize(
    "bits, head_dim, group, query_len", [((4, 2), 64, 4, 1), ((3, 8), 80, 3, 2), ((4, 4), 128, 9, 1)]
)
def test_sequences_of_a_batch_merge_here_or_in_a_launch_of_their_own(bits, head_dim, group, query_len):
    """One split, some, and one more than is merged where it is, of which sequences have all, all but one and one; twice each."""
    step = Step(KVFormat(*bits, head_dim), 1, group, [64 * 17 - 5, 64 * 16, 2], 64, query_len)
    step.store()
    expected, rows = step.expected(), len(step.q) * group
    step.workspace = dataclasses.replace(
        step.workspace, partial=step.workspace.partial.new_empty(rows * 17 * head_dim), lse=step.workspace.lse.new_empty(rows * 17)
    )
    for splits in (1, 9, 17):
        found = []
        for _ in range(2):
            step.workspace.partial.fill_(torch.nan), step.workspace.lse.fill_(torch.nan)
            found.append(step.attend(num_splits=splits))
        assert_close(found[0], expected)
        np.testing.assert_array_equal(*found)
    assert not step.workspace.arrivals.any()


def test_a_split_without_a_tile_stores_nothing():
    """Where a block table has room for more than a sequence has, so that few parts are merged."""
    step = Step(KVFormat(4, 2, 64), 1, 1, [3 * 64, 1, 20 * 64], 64)
    step.store()
    assert np.isnan(step.attend(num_splits=18, merged=False)).all()
    parts = step.workspace.lse[: 3 * 18].view(3, 18).cpu()
    stored = torch.isfinite(parts).sum(1).tolist()
    assert stored == [3, 1, 10]  # two tiles each
    assert_close(step.attend(num_splits=18), step.expected())


@pytest.mark.parametrize(
    "pages, window, splits, launches", [(4, None, 4, 0), (40, 100, 3, 0), (40, 1500, 25, 1), (40, None, 40, 1)]
)
def test_there_are_no_more_splits_than_tiles_to_read(monkeypatch, pages, window, splits, launches):
    """Of a short table, and of a window, so that few are merged where they are; an H100 has room for 128 splits."""
    step = Step(KVFormat(4, 2, 64), 1, 1, [64 * pages - 70], 64)
    step.store()
    monkeypatch.setattr(decode, "_multiprocessors", lambda device: 132)
    called, merge = [], decode.merge
    monkeypatch.setattr(decode, "merge", lambda *a, **k: (called.append(a), merge(*a, **k)))
    rows = splits * len(step.q)
    room = lambda rows: dataclasses.replace(
        step.workspace, partial=step.workspace.partial.new_empty(rows * 64), lse=step.workspace.lse.new_empty(rows)
    )
    step.workspace = room(rows - 1)
    with pytest.raises(ValueError, match=f"^{splits} splits of "):
        step.attend(sliding_window=window)
    step.workspace = room(rows)
    assert_close(step.attend(sliding_window=window), step.expected(window=window))
    assert len(called) == launches


def test_slot_minus_one_is_skipped():
    step = Step(KVFormat(4, 2, 64), 1, 1, [5], 16)
    before = step.pages.clone()
    step.slots.fill_(-1)
    step.store()
    assert torch.equal(step.pages, before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 6.0e4])
def test_a_vector_that_cannot_be_stored_reads_as_nan(poison):
    step = Step(KVFormat(4, 2, 64), 1, 1, [5, 5], 16)
    step.k[2] = poison if poison != 6.0e4 else poison * (torch.arange(64, device=DEVICE) % 2)
    if poison == 6.0e4:
        step.v[2] = 0  # a large vector is stored, and a zero one
    step.store()
    out = step.attend()
    assert np.isfinite(out[1]).all()
    assert np.isnan(out[0]).all() == (poison != 6.0e4)


@pytest.mark.parametrize("bits", [(8, 4), (3, 2), (2, 3)], ids=lambda b: f"k{b[0]}v{b[1]}")
@pytest.mark.parametrize("rotated", [True, False])
def test_dequantize_ranges_of_several_sequences(bits, rotated):
    step = Step(KVFormat(*bits, 96), 2, 1, [70, 9, 33], 16)
    step.store()
    starts, ends = torch.tensor([3, 0, 33], dtype=torch.int32), torch.tensor([70, 9, 33], dtype=torch.int32)
    out_starts = torch.tensor([0, 67, 76], dtype=torch.int32)
    k_out = torch.full((80, 2, 96), torch.nan, device=DEVICE)
    v_out = torch.full((80, 2, 96), torch.nan, device=DEVICE)
    arguments = (step.pages, step.table, starts.to(DEVICE), ends.to(DEVICE), out_starts.to(DEVICE))
    dequantize(*arguments, k_out, v_out, step.fmt, 16, 67, rotated=rotated)
    for i in range(2):
        k, ks, v, vs = step.stored(i)
        for codes, scales, width, out in ((k, ks, bits[0], k_out), (v, vs, bits[1], v_out)):
            dense = reference.dequantize_rotated(codes, scales, width, Codebook.lloyd_max(96, width))
            rows = slice(out_starts[i], out_starts[i] + ends[i] - starts[i])
            expected = dense[starts[i] : ends[i]]
            if not rotated:
                expected = reference.rotate_back(expected, Rotation(96))
            np.testing.assert_allclose(out[rows].cpu().numpy(), expected, rtol=1e-6, atol=0 if rotated else 1e-5)
    assert torch.isnan(k_out[76:]).all(), "rows that were not asked for stay untouched"


def test_dequantize_leaves_rows_of_pages_that_do_not_exist():
    step = Step(KVFormat(4, 2, 64), 1, 1, [40], 16)
    step.store()
    step.table[0, 1] = -1
    one = lambda n: torch.tensor([n], dtype=torch.int32, device=DEVICE)
    k_out, v_out = torch.full((2, 40, 1, 64), torch.nan, device=DEVICE)
    dequantize(step.pages, step.table, one(0), one(40), one(0), k_out, v_out, step.fmt, 16, 40)
    assert torch.isnan(k_out[16:32]).all() and torch.isnan(v_out[16:32]).all()
    assert torch.isfinite(k_out[:16]).all() and torch.isfinite(k_out[32:]).all()


@pytest.mark.cuda
@pytest.mark.parametrize("bits", FORMATS, ids=lambda b: f"k{b[0]}v{b[1]}")
def test_byte_permutes_and_plain_loads_agree(bits):
    step = Step(KVFormat(*bits, 128), 2, 4, [700, 64, 5], 64)
    step.store()
    np.testing.assert_allclose(step.attend(ptx=True), step.attend(ptx=False), rtol=0, atol=1e-5)


@pytest.mark.cuda
def test_pages_beyond_four_gibibytes():
    step = Step(KVFormat(4, 2, 128), 8, 4, [300, 70], 64)
    each = step.pages[0].numel()
    first = 2**32 // each + 1
    step.pages = torch.cat([torch.empty(first, *step.pages.shape[1:], dtype=torch.uint8, device=DEVICE), step.pages])
    step.table += first
    step.slots += first * step.page
    step.store()
    assert_close(step.attend(), step.expected())


@pytest.mark.cuda
def test_a_million_tokens():
    length, fmt = 1_000_003, KVFormat(4, 2, 64)
    step = Step(fmt, 1, 4, [1], 64)
    blocks = -(-length // 64)
    step.pages = torch.empty(blocks, 1, fmt.page_layout(64).page_bytes, dtype=torch.uint8, device=DEVICE)
    step.table = torch.randperm(blocks, device=DEVICE).int()[None]
    token = torch.arange(length, device=DEVICE)
    step.slots = step.table[0].long()[token // 64] * 64 + token % 64
    step.k, step.v = torch.randn(2, length, 1, 64, device=DEVICE, dtype=DTYPE)
    step.store()
    step.lengths = [length]
    k, v = torch.empty(2, length, 1, 64, device=DEVICE)
    one = lambda n: torch.tensor([n], dtype=torch.int32, device=DEVICE)
    dequantize(step.pages, step.table, one(0), one(length), one(0), k, v, fmt, 64, length)
    turn = torch.from_numpy(reference.rotation_matrix(Rotation(64))).to(DEVICE).double()
    scores = (step.q[0].double() @ turn.T) @ k[:, 0].double().T * step.softmax_scale
    expected = (scores.softmax(-1) @ v[:, 0].double()) @ turn
    assert_close(step.attend()[0], expected.cpu().numpy())


def test_first_calls_are_all_made_and_none_fails_unheard():
    step, made = Step(KVFormat(4, 2, 64), 1, 1, [5], 16), []
    make_together([step.store, lambda: made.append(DEVICE)], DEVICE)
    assert made == [DEVICE]
    assert_close(step.attend(), step.expected())
    with pytest.raises(ValueError, match="partial rows"):
        make_together([step.store, lambda: step.attend(num_splits=10**6)], DEVICE)


@pytest.mark.cuda
@pytest.mark.parametrize("splits", [1, 5, None])
def test_graph_replay_with_changed_lengths(splits):
    step = Step(KVFormat(4, 2, 128), 2, 4, [300, 200], 64)
    step.store()
    lengths = torch.tensor(step.lengths, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(step.q)
    run = lambda: decode_attention(step.workspace, step.pages, step.table, lengths, out, step.fmt, 64, num_splits=splits)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    step.lengths = [299, 17]
    lengths.copy_(torch.tensor(step.lengths))
    out.fill_(torch.nan)
    graph.replay()
    assert_close(out.float().cpu().numpy(), step.expected())


@pytest.mark.cuda
def test_all_tables_of_a_format_can_be_made_ahead():
    step = Step(KVFormat(4, 3, 128), 1, 2, [70], 64)
    step.keep_recent([[-1, -1, 0, 1]])
    d = device_tables
    tables = (d.signs, d.back_matrix, d.levels)
    for table in tables:
        table.cache_clear()
    device_tables.make_all(step.fmt, step.pages.device)
    made = [table.cache_info().misses for table in tables]
    step.store()
    step.attend()
    assert [table.cache_info().misses for table in tables] == made

"""Golden vectors: the bytes that every backend must write for known inputs.

    from golden_vectors import assert_matches, load

tests/golden/d<head_dim>.json holds, for each width (and d<head_dim>_vector.json for vector values), rows of
[seed, exponent, codes, scale]: the input as `bell_shaped` makes it, its packed codes and its float16 scale (little-endian), both
in hex. No row is near a tie (see `is_tied`), so there is nothing to round differently. After a change of FORMAT_VERSION, and only then:

    python tests/golden_vectors.py
"""

import functools
import json
from itertools import count, islice
from pathlib import Path

import numpy as np

from tqai_plugins.core import reference
from tqai_plugins.core.bit_packing import unpack, unpack_patterns
from tqai_plugins.core.codebook import SEARCH, TOP, Codebook
from tqai_plugins.core.kv_format import FORMAT_VERSION, SCALE_DENOMINATOR, SERVED_WIDTHS, packed_bytes
from tqai_plugins.core.rotation import Rotation, splitmix64
from tqai_plugins.core.vector_codebook import VECTOR, codebook_of

FOLDER = Path(__file__).with_name("golden")
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
CASES = [(d, b) for d in HEAD_DIMS for b in SERVED_WIDTHS] + [(100, b) for b in (1, 5, 6, 7)]
VECTOR_HEAD_DIMS = (*HEAD_DIMS, 100)
# Powers of two: ordinary, small, a subnormal scale, a scale of zero, a vector too small to square, zeros, huge.
EXPONENTS = (0, 0, 0, 0, 0, 0, 3, -6, -17, -40, -70, None, 12)
TIE = 2.0**-16  # the tie rule of reference.encode


def bell_shaped(seed: int, exponent: int | None, head_dim: int) -> np.ndarray:
    """float32 [head_dim], bell-shaped, in whole numbers from splitmix64: the same in every language.

    Each number is the sum of the four 16-bit fields of a random word, less its mean, times
    2^(exponent - 16); with an odd seed coordinate `seed % head_dim` is an outlier, 32 times as large.
    An exponent of None makes zeros.
    """
    if exponent is None:
        return np.zeros(head_dim, np.float32)
    words = islice(splitmix64(seed), head_dim)
    x = np.array([sum(word >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 131070 for word in words], np.float32)
    if seed % 2:
        x[seed % head_dim] *= 32
    return np.ldexp(x, exponent - 16).astype(np.float32)


def file_name(head_dim: int, vector: bool) -> str:
    return f"d{head_dim}{'_vector' if vector else ''}.json"


def load(head_dim: int, bits: int, vector: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x float32 [n, head_dim], its packed codes uint8 [n, packed_bytes], its scales float16 [n]."""
    stored = json.loads((FOLDER / file_name(head_dim, vector)).read_text())
    assert stored["format_version"] == FORMAT_VERSION, "golden vectors of another format: make them anew"
    seeds, exponents, codes, scales = zip(*stored["rows"][str(bits)], strict=True)
    x = np.stack([bell_shaped(seed, exponent, head_dim) for seed, exponent in zip(seeds, exponents, strict=True)])
    packed = np.frombuffer(bytes.fromhex("".join(codes)), np.uint8)
    return x, packed.reshape(len(x), -1), np.frombuffer(bytes.fromhex("".join(scales)), "<f2")


def assert_matches(x, bits: int, packed, scales, vector: bool = False) -> None:
    """A backend's codes and scales of x [..., head_dim] are the reference's, or differ by the tie rule.

    The codes are equal, or those of a grid as good as the best up to TIE, in which a coordinate within
    TIE of a boundary, or TIE of the root mean square around zero, may lie on either side; the scale is within
    one float16 of the one these codes ask for.
    """
    x = np.asarray(x, np.float32)
    x = x.reshape(-1, x.shape[-1])
    packed, scales = np.asarray(packed).reshape(len(x), -1), np.asarray(scales).reshape(-1)
    assert (packed.dtype, scales.dtype) == (np.uint8, np.float16)
    assert packed.shape == (len(x), packed_bytes(x.shape[-1], bits)) and len(scales) == len(x)
    codes, worth = reference.quantize(x, bits, codebook=codebook_of(x.shape[-1], bits, vector), on_invalid="flag")
    for i in range(len(x)):
        if np.array_equal(codes[i], packed[i]):
            expected = worth[i]
        else:
            levels = _excused_patterns(x[i], packed[i]) if vector else _excused_by_a_tie(x[i], bits, packed[i])
            assert levels is not None, f"vector {i}: codes differ from the reference's and no tie explains it"
            expected = np.float16(levels[0] / levels[1] * SCALE_DENOMINATOR)
        if np.isnan(expected):
            assert np.isnan(scales[i]), f"vector {i}: scale is {scales[i]}, expected NaN"
        else:
            off = abs(int(expected.view(np.int16)) - int(scales[i].view(np.int16)))
            assert off <= 1, f"vector {i}: scale is {scales[i]!r}, expected {expected!r} or its neighbour"


def _grids(x: np.ndarray, bits: int):
    """In float64: |R x| on each grid of the search [grids, head_dim], their codes' magnitudes, their cosines^2."""
    book = Codebook.lloyd_max(x.size, bits)
    size = np.abs(reference.rotate(x, Rotation(x.size)).astype(np.float64))
    if bits == 8:
        steps = size.max(keepdims=True) / TOP
    else:
        steps = np.sqrt(np.mean(size**2)) * np.array(SEARCH) * book.unit
    scaled = size / steps[:, None]
    levels = np.array(book.magnitudes)[np.searchsorted(book.boundaries, scaled)]
    return scaled, levels, (levels @ size) ** 2 / (levels**2).sum(-1) / (size**2).sum()


def _at_boundary(scaled: np.ndarray, bits: int) -> np.ndarray:
    """Whether each number lies within TIE of a boundary between two magnitudes."""
    boundaries = np.array(Codebook.lloyd_max(scaled.shape[-1], bits).boundaries)
    return (np.abs(scaled[..., None] / boundaries - 1) < TIE).any(-1)


def _at_zero(turned: np.ndarray) -> np.ndarray:
    return np.abs(turned) < TIE * np.sqrt(np.mean(turned**2))


def is_tied(x: np.ndarray, bits: int) -> bool:
    """Whether another grid with other codes is as good as the best, or a coordinate lies on a boundary or on zero."""
    scaled, levels, merits = _grids(x, bits)
    best = merits.argmax()
    rivals = merits >= merits[best] * (1 - TIE)
    on_edge = _at_boundary(scaled[best], bits) | _at_zero(scaled[best])
    return bool((levels[rivals] != levels[best]).any() or on_edge.any())


def _excused_by_a_tie(x: np.ndarray, bits: int, packed: np.ndarray) -> tuple[float, float] | None:
    """(codes . R x, codes . codes) if these codes are allowed for x, else None."""
    book, turned = Codebook.lloyd_max(x.size, bits), reference.rotate(x, Rotation(x.size)).astype(np.float64)
    codes, half = unpack(packed, bits, x.size), 1 << (bits - 1)
    found = np.array(book.magnitudes)[codes & (half - 1)]
    if (((codes & half > 0) != (turned < 0)) & ~_at_zero(turned)).any():
        return None
    scaled, levels, merits = _grids(x, bits)
    for grid, level, merit in zip(scaled, levels, merits, strict=True):
        differ = found != level
        if merit >= merits.max() * (1 - TIE) and _at_boundary(grid, bits)[differ].all():
            return float(found @ np.abs(turned)), float(found @ found)  # signs may differ only where it is no matter
    return None


def _pattern_grids(turned: np.ndarray):
    """In float64, of R x: sizes times patterns [fours, 16]; on each grid of the search merits [grids, fours, 16] of the
    patterns, and cosines^2 [grids] of the best of them."""
    patterns, halves = np.array(VECTOR.patterns), np.array(VECTOR.half_energies)
    steps = np.sqrt(np.mean(turned**2)) * np.array(SEARCH) * VECTOR.unit
    along = np.abs(turned).reshape(-1, 4) @ patterns.T
    merits = along - steps[:, None, None] * halves
    best = merits.argmax(-1)
    cosines = np.take_along_axis(along, best.T, 1).sum(0) ** 2 / (2 * halves[best].sum(-1)) / (turned**2).sum()
    return along, merits, cosines


def is_pattern_tied(x: np.ndarray) -> bool:
    """is_tied for vector values."""
    turned = reference.rotate(x, Rotation(x.size)).astype(np.float64)
    along, merits, cosines = _pattern_grids(turned)
    best = merits.argmax(-1)
    rivals, chosen = cosines >= cosines.max() * (1 - TIE), best[cosines.argmax()]
    good = merits[cosines.argmax()] >= merits[cosines.argmax()].max(-1, keepdims=True) - TIE * along
    return bool((best[rivals] != chosen).any() or (good.sum(-1) > 1).any() or _at_zero(turned).any())


def _excused_patterns(x: np.ndarray, packed: np.ndarray) -> tuple[float, float] | None:
    """_excused_by_a_tie for vector values."""
    turned = reference.rotate(x, Rotation(x.size)).astype(np.float64)
    index, negative = unpack_patterns(packed)
    if ((negative != (turned < 0)) & ~_at_zero(turned)).any():
        return None
    along, merits, cosines = _pattern_grids(turned)
    found, fours = np.array(VECTOR.patterns)[index].ravel(), np.arange(len(index))
    for merit, cosine in zip(merits, cosines, strict=True):
        good = merit[fours, index] >= merit.max(-1) - TIE * along[fours, index]
        if cosine >= cosines.max() * (1 - TIE) and good.all():
            return float(found @ np.abs(turned)), float(found @ found)
    return None


def make(head_dim: int, bits: int, vector: bool = False) -> list[list]:
    """The rows of one case: seeds counted up, passing over inputs near a tie."""
    rows, seeds = [], count(1000 * head_dim + 100_000_000 * (bits + 10 * vector))
    tied = is_pattern_tied if vector else lambda x: is_tied(x, bits)
    for exponent in EXPONENTS:
        live = exponent is not None and exponent > -60
        seed = next(s for s in seeds if not live or not tied(bell_shaped(s, exponent, head_dim)))
        x = bell_shaped(seed, exponent, head_dim)
        packed, scale = reference.quantize(x, bits, codebook=codebook_of(head_dim, bits, vector))
        rows.append([seed, exponent, packed.tobytes().hex(), scale.astype("<f2").tobytes().hex()])
    return rows


@functools.cache
def make_all() -> dict[str, str]:
    """File name -> contents."""
    files = {}
    for head_dim, vector in [(d, v) for d in sorted({d for d, _ in CASES}) for v in (False, True)]:
        widths = [2] if vector else [b for d, b in CASES if d == head_dim]
        rows = {
            str(b): "[\n" + ",\n".join("  " + json.dumps(row) for row in make(head_dim, b, vector)) + "\n]" for b in widths
        }
        body = ",\n".join(f'"{b}": {text}' for b, text in rows.items())
        files[file_name(head_dim, vector)] = f'{{"format_version": {FORMAT_VERSION}, "rows": {{\n{body}\n}}}}\n'
    return files


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in make_all().items():
        (FOLDER / name).write_text(text)

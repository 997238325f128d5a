"""Optimal scalar quantizers for one coordinate of a random unit vector.

After a random rotation a coordinate of a unit vector in d dimensions has the density
(1 - t^2)^((d-3)/2) on [-1, 1], a scaled Beta distribution (TurboQuant, arXiv 2504.19874, Lemma 1).
Lloyd-Max levels for it are the paper's codebooks (section 3.1, equation 4).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import itertools
import json
import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import json_file
from .kv_format import FORMAT_VERSION, SERVED_WIDTHS, check_head_dim, check_width

TOP = 127.5  # the largest magnitude an int8 can stand for: see Codebook
SHIPPED = "lloyd_max"
# Codebook files for this process and its children, separated as in PATH: see use().
ENVIRONMENT = "TQAI_CODEBOOK"
FILE_KEYS = ("tqai_codebook", "name", "head_dim", "bits", "magnitudes", "unit", "digest", "made")


@dataclass(frozen=True)
class Codebook:
    """A symmetric codebook: a code is a sign and an index into `magnitudes`.

    `magnitudes` rise to TOP at most. For the served widths each is a whole number m plus 1/2, so an int8
    kernel that holds m (or ~m for a negative sign) reconstructs exactly these numbers.
    `unit` is what one step of the magnitude scale is worth on a vector of root mean square 1.
    """

    head_dim: int
    bits: int
    magnitudes: tuple[float, ...]
    unit: float
    name: str = SHIPPED

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Between neighbouring magnitudes; a value on a boundary takes the smaller magnitude."""
        return tuple((a + b) / 2 for a, b in zip(self.magnitudes, self.magnitudes[1:]))

    @property
    def integers(self) -> tuple[int, ...]:
        """m for each magnitude m + 1/2; ValueError for widths that are not served."""
        if self.bits not in SERVED_WIDTHS:
            raise ValueError(f"{self.bits}-bit magnitudes are not on the integer grid; served widths are {SERVED_WIDTHS}")
        return tuple(int(m) for m in self.magnitudes)

    @classmethod
    def lloyd_max(cls, head_dim: int, bits: int) -> Codebook:
        """The shipped codebook, or one solved in milliseconds for an uncommon head_dim; see also use()."""
        return _in_use.get((head_dim, bits)) or _lloyd_max(head_dim, bits)

    @classmethod
    def read(cls, path: str | Path) -> Codebook:
        """A codebook file as write() makes it; ValueError for anything else."""
        try:
            return cls.from_json(json_file.read(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no codebook file of tqai: {error}") from error

    @classmethod
    def from_json(cls, given: object) -> Codebook:
        """The inverse of as_json; ValueError or TypeError for anything else."""
        if not isinstance(given, dict) or sorted(given) != sorted(FILE_KEYS):
            raise ValueError("it has other keys")
        if given["tqai_codebook"] != FORMAT_VERSION:
            raise ValueError(f"it is of version {given['tqai_codebook']!r}, this is {FORMAT_VERSION}")
        book = cls(given["head_dim"], given["bits"], tuple(given["magnitudes"]), given["unit"], given["name"])
        check_width("bits", book.bits)
        check_head_dim(book.head_dim)
        levels = [0, *book.magnitudes]
        if not all(type(x) in (int, float) and math.isfinite(x) for x in (*levels, book.unit)) or book.unit < 0:
            raise ValueError("it holds no numbers")
        if len(levels) != 1 + (1 << book.bits - 1) or not all(a < b <= TOP for a, b in itertools.pairwise(levels)):
            raise ValueError(f"its magnitudes do not rise from 0 to {TOP}")
        if book.bits in SERVED_WIDTHS and any(m % 1 != 0.5 for m in book.magnitudes):
            raise ValueError("its magnitudes are not whole numbers plus one half")
        if not isinstance(book.name, str) or given["digest"] != book.digest:
            raise ValueError("its numbers are not those that were written")
        return book

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that stand for the numbers: codes are read by the codebook that wrote them alone."""
        numbers = json.dumps([self.head_dim, self.bits, [float(m) for m in self.magnitudes], float(self.unit)])
        return hashlib.sha256(numbers.encode()).hexdigest()[:8]

    def as_json(self, made: dict) -> dict:
        """For a JSON file; `made` says how it was made."""
        held = (FORMAT_VERSION, self.name, self.head_dim, self.bits, list(self.magnitudes), self.unit, self.digest, made)
        return dict(zip(FILE_KEYS, held))

    def write(self, path: str | Path, made: dict) -> None:
        """Write a file that read() takes; `made` says how it was made."""
        Path(path).write_text(json.dumps(self.as_json(made), indent=1) + "\n")


# Searching around the Lloyd-Max scale lowers the error at no cost for the reader: 15 % at 4 bits,
# 6 % at 3, 1 % at 2. Multiples of the unit; eight, which the copies of a vector in a GPU tile share evenly.
SEARCH = (0.8, 0.86, 0.92, 0.99, 1.05, 1.12, 1.18, 1.25)


@functools.lru_cache(None)
def _tables() -> dict:
    return json.loads((importlib.resources.files(__package__) / "codebook_tables.json").read_text())


_in_use: dict[tuple[int, int], Codebook] = {}


def use(book: Codebook) -> None:
    """Let this process use a codebook wherever it would use the shipped one of its head_dim and bits.

    ValueError if codes may already have been written with another: a process has one codebook for each
    head_dim and bits, so that no code is read with other levels than it was written with.
    """
    now = Codebook.lloyd_max(book.head_dim, book.bits) if (book.head_dim, book.bits) in _in_use else book
    if now != book:
        raise ValueError(
            f"codebook {book.name!r} comes too late: this process already uses {now.name!r} for head_dim {book.head_dim} "
            f"at {book.bits} bits; start a new process, with {ENVIRONMENT}=FILE if it is a server"
        )
    _in_use[book.head_dim, book.bits] = book


def read_all(files: object) -> list[Codebook]:
    """The codebooks of a file's name or a list of them; ValueError for anything else."""
    given = [files] if isinstance(files, (str, os.PathLike)) else files
    if not isinstance(given, (list, tuple)) or not all(isinstance(file, (str, os.PathLike)) for file in given):
        raise ValueError(f"codebook is {files!r}; expected a file of `tqai codebook build`, or a list of them")
    return [Codebook.read(file) for file in given]


def use_for(books: Iterable[Codebook], head_dim: int, widths: Collection[int]) -> None:
    """use() each; ValueError for one that a cache with this head_dim and these widths would not read."""
    for book in books:
        if book.head_dim != head_dim or book.bits not in widths:
            raise ValueError(
                f"codebook {book.name!r} is for head_dim {book.head_dim} at {book.bits} bits, but this cache has "
                f"head_dim {head_dim} with {', '.join(map(str, sorted(widths)))} bits: it would not be used"
            )
        use(book)


@functools.lru_cache(None)
def _from_environment() -> None:
    for path in filter(None, os.environ.get(ENVIRONMENT, "").split(os.pathsep)):
        use(Codebook.read(path))


def _lloyd_max(head_dim: int, bits: int) -> Codebook:
    check_width("bits", bits)
    check_head_dim(head_dim)
    _from_environment()
    if (head_dim, bits) not in _in_use:
        _in_use[head_dim, bits] = shipped(head_dim, bits)
    return _in_use[head_dim, bits]


@functools.lru_cache(None)
def shipped(head_dim: int, bits: int) -> Codebook:
    """The Lloyd-Max codebook, whatever use() chose."""
    check_width("bits", bits)
    check_head_dim(head_dim)
    entry = _tables().get(f"{head_dim}/{bits}")
    if entry is None:
        from .solve_codebook import solve  # numpy is needed only here

        entry = solve(head_dim, bits)
    return Codebook(head_dim, bits, tuple(entry["magnitudes"]), entry["unit"])

"""Coverage-guided fuzzing of every parser of files and words, with atheris (pip install atheris).

    python tests/fuzz/parsers.py TARGET tests/fuzz/corpus/TARGET -max_total_time=120    # see TARGETS

Whatever comes in, a parser returns something that it would write itself, or raises ValueError with one sentence.
tests/test_fuzz_corpus.py runs the kept corpus, without atheris.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

WORK = Path(tempfile.mkdtemp(prefix="tqai-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
BOOK = {
    "tqai_codebook": 1, "name": "made", "head_dim": 48, "bits": 2, "magnitudes": [38.5, 127.5], "unit": 0.0188, "digest": "", "made": {},
}  # fmt: skip
PRESET = {"tqai_preset": 1, "model": "m", "num_layers": 2, "head_dim": 32, "layers": {"0": "tqai_k8v4", "1": "tqai"}, "made": {}}
ENTRY = {
    "version": 1, "format": "tqai_k2v2", "format_version": 1, "rotation": {"kind": "hadamard", "seed": 1952932201}, "codebooks": [BOOK],
}  # fmt: skip
LIST = {"version": 1, "made_from": "m", "files": {"config.json": {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}}}
VALUES = [None, True, 0, 1, -1, 2, 9, 1.5, float("nan"), float("inf"), 10**30, "", "tqai", "tqai_k4v4", "../x", "a\0b", [], {}, [0.5, 1.5]]


def changed(data: bytes, whole: dict) -> bytes:
    """The bytes themselves or, if they begin with \\x01, this object after the changes that they stand for."""
    if data[:1] != b"\x01":
        return data
    given, numbers = json.loads(json.dumps(whole)), iter(data[1:])
    for at in numbers:
        held = given
        for _ in range(next(numbers, 0) % 3):  # go deeper
            inner = [x for x in (held.values() if isinstance(held, dict) else held) if isinstance(x, (dict, list)) and x]
            held = inner[at % len(inner)] if inner else held
        value = VALUES[next(numbers, 0) % len(VALUES)]
        if isinstance(held, dict):
            held[list(held)[at % len(held)] if at < 200 and held else chr(at)] = value
        else:
            held[at % len(held)] = value
    return json.dumps(given).encode()


def file_of(data: bytes, name: str = "given.json") -> Path:
    path = WORK / name
    path.write_bytes(data)
    return path


def with_its_sum(book):
    """A codebook's object with the check sum that would be right, or none would get further than that."""
    from tqai_plugins.core.codebook import Codebook

    try:
        return book | {"digest": Codebook(book["head_dim"], book["bits"], tuple(book["magnitudes"]), book["unit"]).digest}
    except Exception:
        return book


def codebook(data: bytes) -> None:
    from tqai_plugins.core.codebook import Codebook

    given = changed(data, BOOK)
    path = file_of(json.dumps(with_its_sum(json.loads(given))).encode() if data[:1] == b"\x01" else given)
    book = Codebook.read(path)
    book.write(path, {})
    assert Codebook.read(path) == book and len(book.boundaries) == len(book.magnitudes) - 1


def preset(data: bytes) -> None:
    from tqai_plugins.core.preset import Preset

    path = file_of(changed(data, PRESET))
    found = Preset.read(path)
    assert 0 < found.bits_per_element < 17
    found.write(path, {})
    assert Preset.read(path) == found


def manifest(data: bytes) -> None:
    from tqai_plugins.core import converted_folder

    file_of(b"{}", "config.json")
    path = file_of(changed(data, LIST), converted_folder.MANIFEST)
    try:
        assert converted_folder.verify(WORK) is True
    finally:
        path.unlink()


def entry(data: bytes) -> None:
    from tqai_plugins.core import codebook as books
    from tqai_plugins.core import converted_folder
    from tqai_plugins.core.kv_format import parse_name

    books._in_use.clear()
    if data[:1] == b"\x01":
        given = json.loads(changed(data, ENTRY))
        if isinstance(given.get("codebooks"), list):
            given["codebooks"] = [with_its_sum(book) for book in given["codebooks"]]
        data = json.dumps({"tqai": given}).encode()
    file_of(data, "config.json")
    assert parse_name(converted_folder.folder_format(WORK))


def words(data: bytes) -> None:
    from tqai.cli import _parse

    from tqai_plugins.core.kv_format import KVFormat, parse_name

    text = data.decode("utf-8", "replace")
    for parse in (parse_name, lambda x: _parse.numbers(x, "--x"), _parse.shapes, lambda x: KVFormat.from_name(x, 64)):
        try:
            parse(text)
        except ValueError as error:
            assert str(error)


TARGETS = {function.__name__: function for function in (codebook, preset, manifest, entry, words)}


def once(target: str, data: bytes) -> bool:
    """Whether it was taken; anything but ValueError is a finding."""
    try:
        TARGETS[target](data)
        return True
    except ValueError as error:
        assert str(error)
        return False


if __name__ == "__main__":
    import atheris

    target = sys.argv.pop(1)
    with atheris.instrument_imports(include=["tqai_plugins.core", "tqai.cli._parse", "json"]):
        import tqai_plugins.core.converted_folder
        import tqai_plugins.core.preset  # noqa: F401
    atheris.Setup(sys.argv, lambda data: once(target, data))
    atheris.Fuzz()

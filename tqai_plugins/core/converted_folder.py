"""A model folder that says which cache it is meant for, and whose files can be checked.

`config.json` has one entry, "tqai": the format, its version, the rotation and the codebooks. Every runtime hands it on with
the model's configuration. `tqai.json` lists all files with their sizes and SHA-256 sums. `key_means.json`, if there is one,
holds the mean key of each layer (key_mean_file.py), which vLLM then need not learn and other caches use.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from . import json_file
from .codebook import Codebook, shipped, use
from .kv_format import FORMAT_VERSION, KVFormat
from .rotation import Rotation

ENTRY = "tqai"
MANIFEST = "tqai.json"
FOLDER_VERSION = 1
LONGEST_NAME = 200


def entry(fmt: KVFormat) -> dict:
    """What config.json says, for JSON: the format with the codebooks that this process uses for it."""
    books = [Codebook.lloyd_max(fmt.head_dim, bits) for bits in dict.fromkeys((fmt.bits_k, fmt.bits_v))]
    rotation = Rotation(fmt.head_dim)
    return {
        "version": FOLDER_VERSION, "format": fmt.name, "format_version": FORMAT_VERSION,
        "rotation": {"kind": rotation.kind, "seed": rotation.seed},
        "codebooks": [book.as_json({}) for book in books],
    }  # fmt: skip


def format_of(given: object, of: str = "config.json") -> str:
    """The format name of such an entry, whose codebooks this process uses from now on. ValueError says what is wrong."""
    try:
        if not isinstance(given, dict):
            raise TypeError(f"its entry {ENTRY!r} is a {type(given).__name__}")
        for key, ours in (("version", FOLDER_VERSION), ("format_version", FORMAT_VERSION)):
            if given[key] != ours:
                newer = isinstance(given[key], int) and given[key] > ours
                raise ValueError(f"its {key} is {given[key]!r}, this tqai reads {ours}" + ("; update tqai" if newer else ""))
        books = [Codebook.from_json(book) for book in given["codebooks"]]
        head_dim = books[0].head_dim
        fmt = KVFormat.from_name(given["format"], head_dim)
        rotation = Rotation(head_dim)
        if given["rotation"] != {"kind": rotation.kind, "seed": rotation.seed}:
            raise ValueError("it was made with another rotation")
        if {book.bits for book in books} != {fmt.bits_k, fmt.bits_v} or {book.head_dim for book in books} != {head_dim}:
            raise ValueError(f"its codebooks are not those of {fmt.name}")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{of} was not made by this version of `tqai convert`: {reason}") from error
    for book in books:
        if book.digest != shipped(book.head_dim, book.bits).digest:
            use(book)
    return fmt.name


def folder_format(folder: str | Path) -> str:
    """The format name that a folder's config.json says, as format_of; ValueError if it says none."""
    config = Path(folder) / "config.json"
    try:
        given = json_file.read(config)[ENTRY]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is no folder of `tqai convert`: its config.json has no entry {ENTRY!r}") from error
    return format_of(given, str(config))


def write_manifest(folder: Path, made_from: str) -> None:
    """List the folder's files; the last step of a conversion."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    data = {"version": FOLDER_VERSION, "made_from": made_from, "files": files}
    (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n")


def verify(folder: str | Path) -> bool:
    """Whether this is a converted folder, all of whose files are as they were written; ValueError if some are not."""
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        data = json_file.read(manifest)
        version, files = data["version"], data["files"]
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{manifest} is damaged: {reason}; convert the model again") from error
    if version != FOLDER_VERSION:
        raise ValueError(f"{folder} is a converted folder of version {version!r}, this tqai reads {FOLDER_VERSION}; update tqai")
    if "config.json" not in listed:
        raise ValueError(f"{manifest} is damaged: it does not list config.json; convert the model again")
    for name, (size, _) in listed.items():  # sizes first: they cost nothing
        path = folder / name
        if not name or Path(name).name != name or "\0" in name or len(name) > LONGEST_NAME or path.is_symlink():
            raise ValueError(f"{manifest} names {name[:LONGEST_NAME]!r}, which is not a plain file of this folder; convert the model again")
        if not path.is_file():
            raise ValueError(f"{folder} lacks {name}; copy the folder again, or convert the model again")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}; copy the folder again")
    for name, (_, digest) in listed.items():
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is not what `tqai convert` wrote: its SHA-256 sum differs; convert again")
    return True


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

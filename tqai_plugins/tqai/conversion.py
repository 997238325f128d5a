"""Write a model folder that needs nothing at start: safetensors, tokenizer, the cache's format, and sums of all files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tqai_plugins.core import converted_folder
from tqai_plugins.core.kv_format import KVFormat, parse_name

from . import models
from .configurations import head_dim_of

SHARD = "4GB"


def convert(model: str, folder: Path, name: str, dtype=None, key_means: bool = False) -> KVFormat:
    """Convert a model (see models.load) to a folder for this cache format; the folder appears at once whole.

    dtype: torch.dtype of the weights, bfloat16 if None. key_means: store the mean key of each layer too. Raises
    ValueError for a model that cannot be compressed, or if the folder is there already.
    """
    from tqai_plugins.core import key_mean_file
    from tqai_plugins.transformers_plugin import Cache
    from tqai_plugins.transformers_plugin.key_means import learn as learn_key_means

    bits_k, bits_v = parse_name(name)
    folder = folder.expanduser()
    if folder.exists():
        raise ValueError(f"{folder} is there already; remove it or give another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
        loaded, tokenizer = _load(model, dtype, Path(work))
        Cache(loaded.config, bits_k=bits_k, bits_v=bits_v)  # refuses what it cannot compress
        fmt = KVFormat(bits_k, bits_v, head_dim_of(loaded.config))
        made = Path(work) / "model"
        with models._quiet_library(), models._status(f"Writing {folder}"):
            loaded.save_pretrained(made, max_shard_size=SHARD)
            tokenizer.save_pretrained(made)
            if key_means:
                key_mean_file.write(made, learn_key_means(loaded, tokenizer))
            models.write_config(made, {converted_folder.ENTRY: converted_folder.entry(fmt)})
            for file in made.iterdir():
                file.chmod(0o644)
            converted_folder.write_manifest(made, made_from=Path(model).name)
        os.rename(made, folder)
    return fmt


def _load(model: str, dtype, work: Path):
    """models.load, but a GGUF file by way of a plain folder, since such a model cannot be saved again."""
    if Path(model).suffix.lower() != ".gguf":
        return models.load(model, dtype)
    models._locate(model)
    with models._status(f"Reading {model}"):
        models.convert_gguf(Path(model).expanduser(), work / "gguf")
    return models.load(str(work / "gguf"), dtype)

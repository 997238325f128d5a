"""The file of a converted folder that holds each layer's mean key and what else a text says of it (key_mean.LayerMeans)."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from . import json_file
from .converted_folder import FOLDER_VERSION
from .key_mean import LayerMeans

NAME = "key_means.json"
FIELDS = tuple(field.name for field in fields(LayerMeans))
LARGEST = 1 << 26  # bytes; of Llama-3.1-405B they would have some 3 million


def write(folder: Path, layers: dict[int, LayerMeans]) -> None:
    """For servers and caches; layers by number."""
    rounded = np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])
    held = {str(n): {name: rounded(getattr(layer, name)).tolist() for name in FIELDS} for n, layer in layers.items()}
    (folder / NAME).write_text(json.dumps({"version": FOLDER_VERSION, "layers": held}) + "\n")


def read(folder: str | Path) -> dict[int, LayerMeans] | None:
    """What write() wrote, None if the folder has none; ValueError if it is damaged."""
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    try:
        data = json_file.read(path, LARGEST)
        if data["version"] != FOLDER_VERSION:
            raise ValueError(f"its version is {data['version']!r}, this tqai reads {FOLDER_VERSION}")
        return {int(n): _layer_means(held) for n, held in data["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; convert the model again") from error


def _layer_means(held: dict) -> LayerMeans:
    layer = LayerMeans(*(np.array(held[name], np.float64) for name in FIELDS))
    if layer.means.ndim != 2 or layer.query_energy.shape != layer.means.shape[:1]:
        raise ValueError("a layer has other than a mean and an energy for each head")
    if layer.squares.shape != (2, layer.means.shape[1] // 2):
        raise ValueError("a layer has other than squares of queries and keys for each pair of coordinates")
    if not all(np.isfinite(getattr(layer, name)).all() for name in FIELDS):
        raise ValueError("it holds what is no number")
    return layer

"""The file of a converted folder that holds the mean key of each layer (key_mean.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from . import json_file
from .converted_folder import FOLDER_VERSION
from .key_mean import LayerMeans

NAME = "key_means.json"
LARGEST = 1 << 26  # bytes; of Llama-3.1-405B they would have some 3 million


def write(folder: Path, layers: dict[int, LayerMeans]) -> None:
    """For servers; layers by number."""
    numbers = lambda x: [float(f"{value:.6g}") for value in x]
    held = {
        str(n): {"means": [numbers(mean) for mean in layer.means], "query_energy": numbers(layer.query_energy)}
        for n, layer in layers.items()
    }
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
    layer = LayerMeans(np.array(held["means"], np.float64), np.array(held["query_energy"], np.float64))
    if layer.means.ndim != 2 or layer.query_energy.shape != layer.means.shape[:1]:
        raise ValueError("a layer has other than a mean and an energy for each head")
    if not all(np.isfinite(x).all() for x in (layer.means, layer.query_energy)):
        raise ValueError("it holds what is no number")
    return layer

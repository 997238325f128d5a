"""A preset: which format each layer of a model gets, in a JSON file of `tqai recommend`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from . import json_file
from .kv_format import KVFormat, check_head_dim

VERSION = 1


@dataclass(frozen=True)
class Preset:
    """Formats of the full-attention layers, for models with this many layers (all kinds) and this head_dim.

    formats: ((layer, format name), ...) with the layers rising. name: of the model that it was made for.
    """

    name: str
    num_layers: int
    head_dim: int
    formats: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"its model is {self.name!r}, no name")
        if type(self.num_layers) is not int or self.num_layers < 1:
            raise ValueError(f"its num_layers is {self.num_layers!r}; allowed are whole numbers from 1")
        check_head_dim(self.head_dim)
        layers = [layer for layer, _ in self.formats]
        if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < self.num_layers:
            raise ValueError(f"its layers are not rising numbers from 0 to {self.num_layers - 1}")
        for _, name in self.formats:
            KVFormat.from_name(name, self.head_dim)

    @classmethod
    def read(cls, path: str | Path) -> Preset:
        """ValueError says why a file is no preset."""
        try:
            given = json_file.read(path)
            if "tqai_preset" not in given:
                raise ValueError("it has no entry 'tqai_preset'")
            if given["tqai_preset"] != VERSION:
                raise ValueError(f"its version is {given['tqai_preset']!r}, this tqai reads {VERSION}")
            if not isinstance(given["layers"], dict):
                raise ValueError(f"its layers is a {type(given['layers']).__name__}; expected names of formats by layer")
            formats = tuple((int(layer), name) for layer, name in given["layers"].items())
            return cls(given["model"], given["num_layers"], given["head_dim"], formats)
        except (ValueError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is no preset of `tqai recommend`: {reason}") from error

    def write(self, path: str | Path, made: dict) -> None:
        """`made` says how it was made; for people, not read back."""
        data = {
            "tqai_preset": VERSION, "model": self.name, "num_layers": self.num_layers, "head_dim": self.head_dim,
            "layers": {str(layer): name for layer, name in self.formats}, "made": made,
        }  # fmt: skip
        Path(path).write_text(json.dumps(data, indent=1) + "\n")

    def check_model(self, num_layers: int, head_dim: int) -> None:
        """ValueError for a model of another shape."""
        if (num_layers, head_dim) != (self.num_layers, self.head_dim):
            raise ValueError(
                f"the preset is for {self.name} with {self.num_layers} layers and head_dim {self.head_dim}, "
                f"but this model has {num_layers} layers and head_dim {head_dim}"
            )

    @property
    def bits_per_element(self) -> float:
        """Stored bits for each number of the layers in `formats`, scales included."""
        formats = [KVFormat.from_name(name, self.head_dim) for _, name in self.formats]
        return sum(fmt.bits_per_element for fmt in formats) / len(formats)

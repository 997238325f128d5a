"""Bad input over the API, the command line and every file: each is refused in one clear sentence within a second.

A case is an action and what its sentence must say: what was given, and what is allowed or what to do.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import small_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
import tqai
from tqai import conversion, model_shape, models, plan
from tqai.cli import main

from tqai_plugins.core import codebook, codebook_solvers, converted_folder, json_file
from tqai_plugins.core.codebook import Codebook, shipped
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.core.preset import Preset
from tqai_plugins.core.texts import PROSE
from tqai_plugins.torch_kernels import codec

SECONDS, MEBIBYTES = 1.0, 32
NAN, INFINITE = float("nan"), float("inf")


@dataclasses.dataclass(frozen=True)
class Here:
    """What an action finds: a model's folder, the same converted (both may be changed), and an empty folder."""

    plain: Path
    converted: Path
    empty: Path

    def model(self):
        config = transformers.AutoConfig.from_pretrained(self.plain)
        return transformers.AutoModelForCausalLM.from_config(config)

    def file(self, content: bytes | str | dict, name: str = "given.json") -> Path:
        path = self.empty / name
        content = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    plain = small_model.write(tmp_path_factory.mktemp("plain"))
    converted = tmp_path_factory.mktemp("converted") / "folder"
    conversion.convert(str(plain), converted, "tqai_k4v3")
    pytest.importorskip("matplotlib.pyplot")
    tqai.patch(models.load(str(plain))[0])  # whatever is slow only once
    plan.plan(model_shape.read(str(plain)), plan.MACHINES["h100"], plan.Use(plan.RUNTIMES["vllm"], 100), "tqai")
    return plain, converted


@pytest.fixture
def here(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(codebook, "_in_use", dict(codebook._in_use))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return Here(*(shutil.copytree(f, tmp_path / n) for f, n in zip(originals, ("plain", "converted"))), tmp_path / "empty")


# ---- the API


def patch(**options):
    return lambda here: tqai.patch(here.model(), **options)


def option(name: str, says: str, *values):
    return {f"patch({name}={value!r})": (patch(**{name: value}), f"{name} is .*{says}") for value in values}


def quantize(x: torch.Tensor, bits: int = 4, **options):
    return lambda here: codec.quantize(x, bits, **options)


def vectors(value: float | None = None, size: int = 64, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    if value is not None:
        x[1, 5] = value
    return x


def update(*pairs, **options):
    """A cache that is given these keys and values one after the other."""

    def act(here):
        cache = tqai.Cache(transformers.AutoConfig.from_pretrained(here.plain), **options)
        for k, v in pairs:
            cache.update(k, v, 0)
        return cache

    return act


def states(*shape, value: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


WHOLE = "allowed are the whole numbers 1 to 8"
BAD_VECTOR = "vectors hold NaN, infinity or numbers too large for a float16 scale; mend the input"
GOOD = states(1, 1, 3, 32), states(1, 1, 3, 32)
API = (
    option("bits_k", WHOLE, 0, 9, -1, 2.0, "4", None, True, NAN, 10**30)
    | option("bits_v", WHOLE, 0, 9, INFINITE, [2], "two")
    | option("sink_tokens", "allowed are whole numbers from 0", -1, 1.5, "4", True, NAN)
    | option("residual_window", "allowed are whole numbers from 0", -1, None, 128.0, "128")
    | option("qjl_sketch_size", "allowed are whole numbers from 1", 0, None, "64")
    | option("use_qjl", "allowed are True and False", 1, "yes", None)
    | option("vector_values", "allowed are True and False", 1, 0, "yes", None, NAN)
    | option("cache_strategy", "allowed are auto, residual, full, incremental", "", None, "RESIDUAL", 3)
    | option("device", "expected the model's", "warp", 3.5, "cuda:-1", [])
    | option("backend", "allowed are 'auto', 'torch' and 'mlx'", "", "cuda", "MLX", 1)
    | option("layer_formats", "expected a mapping such as", [], "tqai", 3)
    | option("key_factors", "expected a mapping such as", [], "tqai", 3)
    | option("key_factors", "expected powers of two", {0: ()}, {0: (3.0,)}, {0: (0.0,)}, {0: (-2.0,)}, {0: (INFINITE,)}, {0: "4"}, {0: 4})
    | option("key_means", "expected a mapping such as", [], "tqai", 3)
    | option("key_means", "expected what key_means.of", {0: 4}, {1: None}, {0: [1.0]})
    | option("config", "expected one of kv-only.*a format such as", "", "kv-onli", 5, b"tqai", "/no/such/file.json", [])
    | option("compress_hidden", "allowed are True and False", 1, "yes")
    | option("bits_hidden", "allowed are the whole numbers 2 to 8", 1, 9, 8.0, "8")
    | option("bits_ffn", "allowed are the whole numbers 2 to 8", 0, None, True)
    | {
        "patch(bit_k=4)": (patch(bit_k=4), "unknown option 'bit_k'; allowed are bits_k, bits_v"),
        "backend='mlx' without an MLX model": (patch(backend="mlx"), "backend is 'mlx' but .*pip install"),
        "vector values of 4 bits": (patch(vector_values=True, bits_v=4), "vector_values is True but bits_v is 4; it is allowed with 2 bits"),
        "vector values of 3 bits in a layer": (
            patch(vector_values=True, layer_formats={1: "tqai_k4v3"}), "bits_v is 3 in layer 1; .*set bits_v to 2, or leave vector_values out",
        ),
        "vector values of another config": (patch(config="tqai_k4v4", vector_values=True), "vector_values is True but bits_v is 4"),
        "vector values of head_dim 66": (quantize(vectors(size=66), 2, vector=True), "head_dim is 66; allowed are multiples of 4"),
        "vector values of 3 bits": (quantize(vectors(), 3, vector=True), "bits is 3; it is allowed with 2 bits alone"),
        "layer 9 of 2": (patch(layer_formats={9: "tqai"}), "layer_formats has layer 9, which is no full-attention layer"),
        "layer '0'": (patch(layer_formats={"0": "tqai"}), "a layer of layer_formats is '0'; allowed are whole numbers"),
        "layer -1": (patch(layer_formats={-1: "tqai"}), "a layer of layer_formats is -1"),
        "key means of layer '0'": (patch(key_means={"0": None}), "a layer of key_means is '0'; allowed are whole numbers"),
        "key means of layer -1": (patch(key_means={-1: None}), "a layer of key_means is -1"),
        "format of a layer": (patch(layer_formats={0: "k4v2"}), "unknown KV cache format 'k4v2'; expected 'tqai'"),
        "format 4 of a layer": (patch(layer_formats={0: 4}), "unknown KV cache format 4; expected 'tqai'"),
        "config and width": (patch(config="kv-only", bits_k=4), "config 'kv-only' already says bits_k; leave out one"),
        "config is an empty folder": (lambda h: tqai.patch(h.model(), config=h.empty), "is no folder of `tqai convert`"),
        "no codebook file": (patch(codebook="none.json"), "No such file or directory: 'none.json'"),
        "codebook=5": (patch(codebook=5), "codebook is 5; expected a file of `tqai codebook build`, or a list"),
        "codebook=[5]": (patch(codebook=[5]), "codebook is .5.; expected a file"),
        "no model": (lambda here: tqai.patch(None), "model is a NoneType; expected a transformers or an MLX"),
        "a name as model": (lambda here: tqai.patch("smol"), "model is a str; expected a transformers or an MLX"),
        "a config as model": (lambda here: tqai.patch(here.model().config), "model is a LlamaConfig; expected a transformers"),
        "Cache of no config": (lambda here: tqai.Cache({}), "config is a dict; expected a transformers model's config"),
        "Cache of a model": (lambda here: tqai.Cache(here.model()), "config is a LlamaForCausalLM; expected a transformers model.*model.config"),
        "an encoder": (lambda here: tqai.Cache(transformers.T5Config()), "t5 is an encoder-decoder model; tqai compresses"),
        "NaN": (quantize(vectors(NAN)), BAD_VECTOR),
        "infinity": (quantize(vectors(INFINITE)), BAD_VECTOR),
        "minus infinity": (quantize(vectors(-INFINITE)), BAD_VECTOR),
        "too large for a float16 scale": (quantize(vectors(1e9)), BAD_VECTOR),
        "an overflown float16": (quantize(vectors(1e6, dtype=torch.float16)), BAD_VECTOR),
        "9 bits": (quantize(vectors(), 9), "bits is 9; allowed are the whole numbers 1 to 8"),
        "head_dim 7": (quantize(vectors(size=7)), "head_dim is 7; allowed are the whole numbers 8 to 512"),
        "head_dim 513": (quantize(vectors(size=513)), "head_dim is 513; allowed are"),
        "head_dim 0": (quantize(torch.ones(3, 0)), "head_dim is 0; allowed are"),
        "an unknown scale": (quantize(vectors(), scale="l1"), "scale is 'l1'; allowed are least_squares, exact_norm, norm"),
        "an unknown on_invalid": (quantize(vectors(), on_invalid="ask"), "on_invalid is 'ask'; allowed are raise, flag"),
        "whole numbers as vectors": (quantize(torch.ones(3, 64, dtype=torch.long)), "vectors are torch.int64; expected a floating"),
        "NaN in a cache": (update((states(1, 1, 200, 32, value=NAN), states(1, 1, 200, 32))), BAD_VECTOR),
        "NaN in a cache without a window": (
            update((states(1, 1, 1, 32, value=NAN), states(1, 1, 1, 32)), cache_strategy="full"), BAD_VECTOR,
        ),
        "another head_dim than before": (update(GOOD, (states(1, 1, 1, 64),) * 2), r"keys.*\[1, 1, 1, 64\].*\[1, 1, \*, 32\]"),
        "another batch than before": (update(GOOD, (states(2, 1, 1, 32),) * 2), r"keys.*\[2, 1, 1, 32\].*\[1, 1, \*, 32\]"),
        "more values than keys": (update((states(1, 1, 3, 32), states(1, 1, 4, 32))), r"keys are of shape \[1, 1, 3, 32\], values of \[1, 1, 4, 32\]; expected as many"),
        "keys without heads": (update((states(3, 32), states(3, 32))), r"keys .*\[3, 32\]; expected .*\[batch, kv_heads, new tokens"),
        "keys of whole numbers": (update((states(1, 1, 3, 32, dtype=torch.long),) * 2), "keys are torch.int64 .*; expected a floating"),
        "crop(3)": (lambda here: update(GOOD)(here).crop(3), r"crop\(3\) is not supported; give minus the number"),
        "crop('3')": (lambda here: update(GOOD)(here).crop("3"), r"crop\('3'\) is not supported; give minus the number"),
    }
)  # fmt: skip


def named(name: object, says: str = "unknown KV cache format"):
    return lambda here: KVFormat.from_name(name, 64), f"{says} .*{re.escape(repr(name))}.*expected 'tqai' or 'tqai_k<bits>v<bits>'"


FORMATS = {f"format {name!r}": named(name) for name in (
    "", "tqai_", "tqai_k4", "tqai_k0v4", "tqai_k4v9", "tqai-k4v2", "TQAI", "tqai_k4v2\n", "tqai_k４v２", "tqai_k4v2 ", "k4v2", None, 4, b"tqai",
)} | {
    "a format of a million letters": (lambda here: KVFormat.from_name("k" * 1_000_000, 64), "unknown KV cache format 'kkkk"),
    "a config of a million letters": (patch(config="k" * 1_000_000), "config is 'kkkk.*expected one of kv-only"),
} | {
    f"head_dim {value!r}": (lambda here, value=value: KVFormat(4, 2, value), "head_dim is .*allowed are the whole numbers 8 to 512")
    for value in (0, 7, 513, 64.0, "64", True, None, NAN, 10**20)
} | {
    f"solve{arguments}": (lambda here, a=arguments: codebook_solvers.solve(*a), says)
    for arguments, says in {
        (64, 8): "nothing to solve for 8 bits.*allowed are 2 to 7", (64, 1): "nothing to solve for 1 bits",
        (3, 4): "head_dim is 3; allowed", (64, 4, "magic"): "solver is 'magic'; allowed are lloyd_max",
        (64, 4, "fuzzy", "joy"): "objective is 'joy'; allowed are mse",
    }.items()
}  # fmt: skip


# ---- files

BOOK = Codebook(48, 2, (38.5, 127.5), shipped(48, 2).unit, "made").as_json({"by": "hand"})
PRESET = {"tqai_preset": 1, "model": "small", "num_layers": 2, "head_dim": 32, "layers": {"0": "tqai_k8v4", "1": "tqai"}, "made": {}}


def sparse(here: Here) -> Path:
    path = here.file(b"")
    os.truncate(path, 1 << 40)
    return path


def pipe(here: Here) -> Path:
    os.mkfifo(here.empty / "pipe")
    return here.empty / "pipe"


def link(here: Here, to: str) -> Path:
    (here.empty / "link").symlink_to(to)
    return here.empty / "link"


# What no file of ours may be, and what is said of it.
ANY_FILE = {
    "empty": (lambda here: here.file(b""), "Expecting value"),
    "a list": (lambda here: here.file(b"[]"), "holds a list"),
    "a word": (lambda here: here.file(b"tqai"), "Expecting value"),
    "a pickle": (lambda here: here.file(b"\x80\x04cposix\nsystem\n."), "not UTF-8"),
    "UTF-16": (lambda here: here.file("{}".encode("utf-16")), "not UTF-8"),
    "a deep list": (lambda here: here.file("[" * 100_000), "nested too deep"),
    "deep objects": (lambda here: here.file('{"a":' * 100_000), "nested too deep"),
    "a name twice": (lambda here: here.file('{"model": 1, "model": 2}'), "twice"),
    "a number of a million digits": (lambda here: here.file('{"a": ' + "9" * 1_000_000 + "}"), "digits"),
    "a terabyte that is not there": (sparse, "1,099,511,627,776 bytes, more than"),
    "a pipe": (pipe, "no regular file"),
    "a device": (lambda here: link(here, "/dev/zero"), "no regular file"),
    "a folder": (lambda here: here.empty, "no regular file|no folder of"),
}
READERS = {
    "codebook": (Codebook.read, "is no codebook file of tqai"),
    "preset": (Preset.read, "is no preset of `tqai recommend`"),
}
FILES = {
    f"{what}: {kind}": (lambda here, read=read, make=make: read(make(here)), f"{sentence}.*({says})")
    for (what, (read, sentence)), (kind, (make, says)) in itertools.product(READERS.items(), ANY_FILE.items())
} | {
    "a preset that links to itself": (lambda here: tqai.patch(here.model(), config=link(here, "link")), "expected one of kv-only"),
}  # fmt: skip


def changed(data: dict, read: Callable, says: str, **change):
    held = {name: value for name, value in (data | change).items() if value is not ...}
    return lambda here: read(here.file(held)), says


ENTRIES = {f"codebook with {name} {value!r:.40}": changed(BOOK, Codebook.read, says, **{name: value}) for name, value, says in (
    ("tqai_codebook", 2, "is of version 2, this is 1"), ("tqai_codebook", None, "is of version None"), ("bits", 9, "bits is 9; allowed"),
    ("bits", "2", "bits is '2'"), ("bits", 10**400, "bits is 1"), ("head_dim", 4, "head_dim is 4"), ("head_dim", None, "head_dim is None"),
    ("magnitudes", [], "do not rise"), ("magnitudes", [127.5, 38.5], "do not rise"), ("magnitudes", [38.5, NAN], "no numbers"),
    ("magnitudes", [38.5, INFINITE], "no numbers"), ("magnitudes", ["1", 2], "no numbers"), ("magnitudes", 7, "no codebook file"),
    ("magnitudes", [38.5, 128.5], "do not rise"), ("magnitudes", [38.25, 127.5], "whole numbers plus one half"),
    ("magnitudes", "5" * 1_100_000, "more than the 1,048,576"), ("magnitudes", [[1], [2]], "no numbers"),
    ("magnitudes", [38.5, 126.5], "not those that were written"), ("unit", -1.0, "no numbers"), ("unit", NAN, "no numbers"),
    ("unit", None, "no numbers"), ("name", 5, "not those that were written"), ("digest", "00000000", "not those that were written"),
    ("digest", ..., "other keys"), ("more", 1, "other keys"),
)} | {f"preset with {name} {value!r}": changed(PRESET, Preset.read, f"is no preset.*{says}", **{name: value}) for name, value, says in (
    ("tqai_preset", 2, "version is 2, this tqai reads 1"), ("tqai_preset", ..., "no entry 'tqai_preset'"),
    ("model", ..., "has no 'model'"), ("model", 7, "model is 7"), ("num_layers", ..., "has no 'num_layers'"),
    ("num_layers", "2", "num_layers is '2'"), ("num_layers", 2.0, "num_layers is 2.0"), ("num_layers", NAN, "num_layers is nan"),
    ("num_layers", 0, "num_layers is 0"), ("num_layers", True, "num_layers is True"), ("head_dim", 5, "head_dim is 5"),
    ("head_dim", "32", "head_dim is '32'"), ("layers", {}, "rising numbers from 0 to 1"), ("layers", ..., "has no 'layers'"),
    ("layers", [], "layers is a list"), ("layers", {"2": "tqai"}, "rising numbers from 0 to 1"), ("layers", {"-1": "tqai"}, "rising"),
    ("layers", {"1": "tqai", "0": "tqai"}, "rising"), ("layers", {"0": "tqai", "00": "tqai"}, "rising"), ("layers", {"x": "tqai"}, "'x'"),
    ("layers", {"0": "k4v2"}, "unknown KV cache format 'k4v2'"), ("layers", {"0": 4}, "unknown KV cache format 4"),
    ("layers", {"0": None}, "unknown KV cache format None"), ("layers", {"9" * 5000: "tqai"}, "digits"),
)} | {
    "a preset for another model": (
        lambda here: tqai.patch(here.model(), config=here.file(PRESET | {"num_layers": 3})),
        "the preset is for small with 3 layers and head_dim 32, but this model has 2 layers",
    ),
    "a codebook for another head_dim": (
        lambda here: tqai.patch(here.model(), codebook=here.file(BOOK)), "is for head_dim 48 at 2 bits, but this cache has head_dim 32",
    ),
}  # fmt: skip


def folder(change: Callable[[Path], object], says: str):
    """A converted folder after this change."""

    def act(here):
        change(here.converted)
        models.load(str(here.converted))

    return act, says


def edited(name: str, says: str, **change):
    def act(path: Path):
        data = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(data | change))

    return folder(act, says)


def listing(says: str, name: str, **entry):
    """A folder whose list of files has another entry."""

    def act(path: Path):
        data = json.loads((path / "tqai.json").read_text())
        data["files"][name] = data["files"].get(name, {"bytes": 1, "sha256": ""}) | entry
        (path / "tqai.json").write_text(json.dumps(data))

    return folder(act, says)


def linked(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent / "weights")
    (path / "model.safetensors").symlink_to(path.parent / "weights")


def entry(says: str, **change):
    """Another entry "tqai" in config.json, with a list of files that fits."""

    def act(here):
        config = here.converted / "config.json"
        data = json.loads(config.read_text())
        data[converted_folder.ENTRY] |= change
        config.write_text(json.dumps(data))
        (here.converted / "tqai.json").unlink()
        converted_folder.write_manifest(here.converted, "")
        tqai.patch(models.load(str(here.converted))[0])

    return act, says


PLAIN = "not a plain file of this folder"
FOLDERS = {
    "a folder with a truncated file": folder(lambda f: os.truncate(f / "model.safetensors", 9), "has 9 bytes instead of .*; copy the folder again"),
    "a folder with a longer file": folder(lambda f: os.truncate(f / "model.safetensors", 1 << 40), "has 1099511627776 bytes instead of"),
    "a folder without a file": folder(lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json; copy the folder again"),
    "a folder with a link": folder(linked, PLAIN),
    "a folder with a huge list": folder(lambda f: os.truncate(f / "tqai.json", 1 << 40), "damaged: .*more than the"),
    "a folder with a deep list": folder(lambda f: (f / "tqai.json").write_text("[" * 100_000), "damaged: .*nested too deep"),
    "a folder whose list is cut": folder(lambda f: os.truncate(f / "tqai.json", 50), "tqai.json is damaged"),
    "a newer folder": edited("tqai.json", "version 2, this tqai reads 1; update tqai", version=2),
    "a folder of no version": edited("tqai.json", "version 'x', this tqai reads 1", version="x"),
    "a folder that lists nothing": edited("tqai.json", "does not list config.json; convert the model again", files={}),
    "a folder that lists a list": edited("tqai.json", "tqai.json is damaged", files=[]),
    "a folder with an edited config": edited("config.json", "bytes instead of|SHA-256 sum differs", hidden_size=128),
    "a path that leads up": listing(PLAIN, "../../etc/passwd"), "a path from the root": listing(PLAIN, "/etc/passwd"),
    "a path into a folder": listing(PLAIN, "sub/model"), "the folder itself": listing(PLAIN, "."), "no name": listing(PLAIN, ""),
    "a name with a zero byte": listing(PLAIN, "a\0b"), "a name too long": listing(PLAIN, "x" * 5000),
    "a huge declared size": listing("bytes instead of 1000000000000000000", "config.json", bytes=10**18),
    "a size below zero": listing("bytes instead of -1", "config.json", bytes=-1),
    "a size in words": listing("bytes instead of many", "config.json", bytes="many"),
    "another sum": listing("SHA-256 sum differs; convert again", "config.json", sha256="0" * 64),
    "a sum that is a number": listing("SHA-256 sum differs", "config.json", sha256=7),
    "an entry of a newer version": entry("its version is 2, this tqai reads 1; update tqai", version=2),
    "an entry of another format version": entry("its format_version is 0", format_version=0),
    "an entry with an unknown format": entry("unknown KV cache format 'tqai_k4v9'", format="tqai_k4v9"),
    "an entry with another rotation": entry("made with another rotation", rotation={"kind": "haar", "seed": 0}),
    "an entry without codebooks": entry("not made by this version of `tqai convert`", codebooks=[]),
    "an entry with the codebooks of another format": entry("its codebooks are not those of tqai_k8v8", format="tqai_k8v8"),
    "an entry with codebooks of no kind": entry("not made by this version of `tqai convert`", codebooks=[5]),
}  # fmt: skip


def with_code(here: Here):
    config = json.loads((here.plain / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (here.plain / "config.json").write_text(json.dumps(config))
    (here.plain / "mine.py").write_text(f"open({str(here.empty / 'ran')!r}, 'w')")
    try:
        models.load(str(here.plain))
    finally:
        assert not (here.empty / "ran").exists(), "code of a model's folder ran"


def with_pickle(here: Here):
    (here.plain / "model.safetensors").unlink()
    (here.plain / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(S\"open('ran','w')\"\ntR.")
    try:
        models.load(str(here.plain))
    finally:
        assert not (here.empty / "ran").exists(), "code of a pickle ran"


MODELS = {
    "a model with code of its own": (with_code, "cannot be read, it is damaged or of an unknown kind"),
    "a model that is a pickle": (with_pickle, "cannot be read.*no file named model.safetensors"),
    "no such model": (lambda here: models.load("nothing"), "there is no model 'nothing'; give a folder"),
    "no such GGUF file": (lambda here: models.load("nothing.gguf"), "there is no file nothing.gguf"),
    "a web page for a GGUF file": (lambda here: models.load(str(here.file(b"<html>", "a.gguf"))), "does not begin with 'GGUF'"),
    "a cut GGUF file": (lambda here: models.load(str(here.file(b"GGUF\3\0\0\0" + b"\xff" * 16, "a.gguf"))), "cannot be read, it is damaged"),
    "a text file for a model": (lambda here: models.load(str(here.file(b"x", "notes.txt"))), "is a file, but no GGUF file; give a model folder"),
    "an empty folder for a model": (lambda here: models.load(str(here.empty)), "is no model folder: it has no config.json"),
    "cut weights": (lambda h: (os.truncate(h.plain / "model.safetensors", 100), models.load(str(h.plain))), "cannot be read, it is damaged"),
}  # fmt: skip


# ---- the command line: its one line on stderr is the sentence


def command(line: str, says: str, files: Callable[[Here], object] = lambda here: None):
    def act(here):
        files(here)
        words = [word.format(plain=here.plain, converted=here.converted) for word in line.split()]
        try:
            code = main(words)
        except SystemExit as stop:  # argparse's
            code = stop.code
        raise Refused(code)

    return act, says


class Refused(Exception):
    """A command ended with this exit code."""


FOLDER = "--model {plain}"
COMMANDS = {line: command(line, says) for line, says in {
    "nonsense": "invalid choice: 'nonsense'", "benchmark": "arguments are required: WHAT", "info --head-dim 5": "head_dim is 5; allowed are",
    "info --head-dim x": "invalid int value: 'x'", "info --json /no/such/folder/x": "No such file or directory: /no/such/folder/x",
    "benchmark codec --head-dim 600": "head_dim is 600; allowed are", "benchmark codec --vectors 0": "--vectors is 0; allowed are 1 and more",
    "benchmark plots /no/folder": "there is no folder /no/folder", "benchmark plots .": "has no results: no file called",
    "codebook build --head-dim 64 --bits 9 --out x": "bits is 9; allowed are", "codebook build --head-dim 64 --bits 8 --out x": "nothing to solve for 8",
    "codebook build --head-dim 4 --bits 3 --out x": "head_dim is 4; allowed", "codebook build --bits 3 --out x": "required: --head-dim",
    "codebook build --head-dim 64 --bits 3 --solver magic --out x": "invalid choice: 'magic'",
    "codebook build --head-dim 64 --bits 3 --out /no/such/folder/x": "No such file or directory: /no/such/folder/x",
    "codebook report --bits two": "--bits is 'two'; expected whole numbers", "codebook report --head-dims 64;128": "--head-dims is '64;128'; expected",
    f"codebook report {FOLDER}": "has head_dim 32; give --head-dims 32", f"codebook report {FOLDER} --windows 0": "--windows is 0; allowed are 1",
    f"run Hi {FOLDER} --bits-k 9": "bits_k is 9; allowed", f"run Hi {FOLDER} --max-tokens 0": "--max-tokens is 0; allowed are 1 and more",
    f"run Hi {FOLDER} --config kv-onli": "config is 'kv-onli'; expected one of kv-only", f"run Hi {FOLDER} --config all8 --bits-k 4": "already says bits_k",
    f"run Hi {FOLDER} --sink-tokens -1": "sink_tokens is -1; allowed", f"run Hi {FOLDER} --cache-strategy fast": "cache_strategy is 'fast'; allowed",
    "run Hi --model nothing": "there is no model 'nothing'", "run Hi": "required: --model", "run --model {plain} Hi --bits-ffn 1": "bits_ffn is 1; allowed",
    f"compare Hi {FOLDER} --residual-window -5": "residual_window is -5; allowed", f"compare Hi {FOLDER} --max-tokens -1": "--max-tokens is -1",
    f"convert {FOLDER} --output x --format tqai_k9v1": "unknown KV cache format 'tqai_k9v1'", f"convert {FOLDER} --output {{plain}}": "is the model itself",
    f"convert {FOLDER} --output {{converted}}": "is there already; remove it or give another --output", "convert --model x --output y": "there is no model 'x'",
    f"plan {FOLDER} --machine h1000": "--machine is 'h1000'; known are", f"plan {FOLDER} --memory lots": "memory is 'lots'; expected a size such as 24GB",
    f"plan {FOLDER} --memory -5GB": "memory is '-5GB'; expected|expected one argument", f"plan {FOLDER} --memory nanGB": "memory is 'nanGB'; expected",
    f"plan {FOLDER} --memory 1KB": "memory is '1KB'; expected", f"plan {FOLDER} --memory 0.1MB": "does not fit 0.1MB", f"plan {FOLDER} --context 0": "--context is 0", f"plan {FOLDER} --context 99999999": "--context is 99999999",
    f"plan {FOLDER} --concurrency 0": "--concurrency is 0", f"plan {FOLDER} --formats k9": "unknown KV cache format 'k9'",
    f"plan {FOLDER} --tensor-parallel 0": "--tensor-parallel is 0", f"plan {FOLDER} --twins nan": "--twins is nan; allowed are 0 to 50 percent",
    f"plan {FOLDER} --utilization 1.5": "--utilization is 1.5; allowed", f"plan {FOLDER} --utilization nan": "--utilization is nan; allowed",
    f"plan {FOLDER} --batched-tokens -1": "--batched-tokens is -1", f"plan {FOLDER} --memory 24GB --bandwidth -3": "--bandwidth is -3",
    f"recommend {FOLDER} --widths 2,4": "--widths is '2,4'; expected some of 2, 3, 4, 8", f"recommend {FOLDER} --like k9": "unknown KV cache format 'k9'",
    f"recommend {FOLDER} --context 10": "--context is 10; allowed are 64", f"recommend {FOLDER} --windows 0": "--windows is 0; allowed are 1",
    f"recommend {FOLDER} --budget nan": "--budget is nan; expected a number of nats above 0", f"recommend {FOLDER} --budget -1": "--budget is -1.0; expected",
    f"recommend {FOLDER} --sink-tokens -1": "sink_tokens is -1; allowed", f"recommend {FOLDER} --text none.txt": "No such file or directory: none.txt",
    f"benchmark quality {FOLDER} --formats k9v2": "--formats has 'k9v2'; expected k<bits>v<bits>", f"benchmark quality {FOLDER} --formats ,": "--formats has ''",
    f"benchmark quality {FOLDER} --formats k4v4+means": "--formats has 'k4v4.means'",
    f"benchmark quality {FOLDER} --context 1": "--context is 1; allowed are 4", f"benchmark quality {FOLDER} --windows -1": "--windows is -1; allowed are 1",
    f"benchmark quality {FOLDER} --chunk 0": "--chunk is 0; allowed are 1", f"benchmark quality {FOLDER} --text none.txt": "No such file or directory",
    f"benchmark quality {FOLDER} --context 100000": "needs? .*; give a longer --text", f"benchmark quality {FOLDER} --dtype float8": "invalid choice: 'float8'",
    f"benchmark needle {FOLDER} --depths 0.5,2": "--depths is '0.5,2'; expected numbers from 0 to 1", f"benchmark needle {FOLDER} --depths nan": "--depths is 'nan'",
    f"benchmark needle {FOLDER} --contexts 1k": "--contexts is '1k'; expected whole", f"benchmark needle {FOLDER} --contexts 30": "--contexts has 30, which has no room",
    f"benchmark needle {FOLDER} --contexts 100000": "--contexts has 100000, but the model reads at most [0-9]+ tokens", f"benchmark needle {FOLDER} --needles 0": "--needles is 0; allowed are 1",
    f"benchmark needle {FOLDER} --formats k9v2": "--formats has 'k9v2'; expected k<bits>",
    f"benchmark needle {FOLDER} --text none.txt": "No such file or directory", f"benchmark needle {FOLDER} --dtype float8": "invalid choice: 'float8'",
    f"benchmark forward {FOLDER} --configs kv": "--configs has 'kv'; known are kv-only", f"benchmark forward {FOLDER} --tokens 1": "--tokens is 1; allowed are 2",
    "benchmark kernels --shapes 8by8": "--shapes .*'8by8'", "benchmark serving --shapes x": "--shapes .*'x'", "benchmark serving --dtypes tqai_k9v9": "tqai_k9v9",
    "benchmark serving --dtypes tqai:canary": "'tqai:canary'.*tqai:canary=10000", "benchmark serving --dtypes tqai:bird=1": "bird.*allowed are .*canary",
    "benchmark serving --dtypes fp8:canary=1": "'fp8:canary=1'; only tqai's dtypes have options",
    "benchmark kernels --formats k9": "unknown KV cache format 'k9'", "mlx enabel": "invalid choice: 'enabel'",
    "mlx enable --kv-cache-dtype tqai_k5v5": "is 'tqai_k5v5'; mlx-lm serves widths of 2, 3, 4 and 8", "mlx enable --kv-cache-dtype x');import": "unknown KV cache format",
    "serve m": "required: --mlx|unrecognized arguments", "serve --mlx": "--mlx needs a model|expected", "doctor --head-dims x": "--head-dims is for the Metal kernels; give --mlx with it",
}.items()} | {
    "a text that is no text": command(
        f"benchmark quality {FOLDER} --text given.json", "--text given.json is not UTF-8 text", lambda here: here.file(b"\xff\xfe\0")
    ),
    "a text of nothing": command(f"benchmark needle {FOLDER} --text given.json", "--text has no text", lambda here: here.file("")),
    "a preset is there already": command(f"recommend {FOLDER} --out given.json", "is there already; give another name", lambda h: h.file("{}")),
    "a damaged part of a sweep": command(
        f"recommend {FOLDER} --context 64 --out p.json", "p.json.part is no part of a sweep .*; remove it", lambda h: h.file("[", "p.json.part")
    ),
    "a result that is none": command("benchmark plots .", "quality_x.json is no result of the command .tqai benchmark", lambda h: h.file("{}", "quality_x.json")),
    "a result that is cut": command("benchmark plots .", "quality_x.json is no result of", lambda h: h.file('{"rows": [', "quality_x.json")),
}  # fmt: skip

CASES = API | FORMATS | FILES | ENTRIES | FOLDERS | MODELS | COMMANDS


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_sentence_at_once(case, here, capfd):
    act, says = CASES[case]
    tracemalloc.start()
    start = time.process_time(), time.perf_counter()
    try:
        with pytest.raises((ValueError, OSError, Refused)) as refused:
            act(here)
        seconds = time.process_time() - start[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = str(refused.value)
    if isinstance(refused.value, Refused):
        assert refused.value.args == (2,)
        said = capfd.readouterr().err.splitlines()[-1]
        assert said.startswith("tqai") and "Traceback" not in said
    assert re.search(says, said), said
    assert "\n" not in said and len(said) < 1000, "one sentence"
    assert seconds < SECONDS and peak < MEBIBYTES << 20, f"{seconds:.2f} s, {peak >> 20} MiB"


def test_there_are_many_cases():
    assert len(CASES) >= 300


@pytest.mark.parametrize("what, data", [("codebook", BOOK), ("preset", PRESET)])
def test_cut_and_flipped_files_are_refused_or_mean_the_same(what, data, tmp_path):
    """Every length, and every bit: a codebook has a check sum; a preset that can be read is one that could be written."""
    read, sentence = READERS[what]
    whole = json.dumps(data).encode()
    path = tmp_path / "file.json"
    path.write_bytes(whole)
    first, refused = read(path), 0
    damaged = [whole[:n] for n in range(len(whole))]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in range(8)]
    for content in damaged:
        path.write_bytes(content)
        try:
            found = read(path)
        except ValueError as error:
            assert sentence in str(error)
            refused += 1
        else:
            assert what == "preset" or dataclasses.replace(found, name=first.name) == first
            assert isinstance(found, type(first))
    assert refused > 0.7 * len(damaged) and len(damaged) > 1000


def test_what_is_odd_but_no_error():
    """Zero vectors, no vectors, one token, no token: all are kept, and read back as they should."""
    for bits in range(1, 9):
        codes, scales = codec.quantize(torch.zeros(2, 64), bits)
        assert not codec.dequantize(codes, scales, bits, 64).any()
        assert codec.quantize(torch.zeros(0, 64), bits)[0].shape[0] == 0
    tiny = torch.full((1, 64), 1e-30)
    assert not codec.dequantize(*codec.quantize(tiny, 4), 4, 64).any()
    cache = tqai.Cache(transformers.LlamaConfig(num_hidden_layers=1, head_dim=32), cache_strategy="full")
    for tokens in (0, 1, 0, 2):
        seen = cache.update(torch.ones(1, 2, tokens, 32), torch.ones(1, 2, tokens, 32), 0)
    assert cache.get_seq_length() == 3 and seen[0].shape == (1, 2, 3, 32)


def test_what_no_code_runs_from_holds_for_all_readers():
    """Nothing in the packages unpickles, evaluates or unpacks an archive that it did not fetch itself."""
    root = Path(tqai.__file__).parents[1]
    sources = {path: path.read_text() for name in ("tqai_plugins", "triton_kernels", "metal_kernels") for path in (root.parent / name).rglob("*.py")}
    assert len(sources) > 60
    for path, text in sources.items():
        assert not re.search(r"import (marshal|pickle|shelve)|\btorch\.load\(|(?<![.\w])(eval|exec)\(|allow_pickle|yaml\.load", text), path
    assert PROSE and json_file.LARGEST <= 1 << 20

"""A folder of `tqai convert` in mlx-lm: its files are checked, and it says which widths the cache gets."""

import json
import shutil

import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

import mlx_lm
import mlx_models
import numpy as np
import tqai
from mlx_lm.models.cache import make_prompt_cache
from tqai import models

from tqai_plugins.core import converted_folder, key_mean_file
from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.mlx_lm_plugin import key_means
from tqai_plugins.mlx_lm_plugin.server import with_caches


@pytest.fixture
def folder(tmp_path):
    """What convert adds to a model folder, for K8V3."""
    made = shutil.copytree(mlx_models.folder_of("llama"), tmp_path / "model")
    config = json.loads((made / "config.json").read_text())
    config[converted_folder.ENTRY] = converted_folder.entry(KVFormat(8, 3, 64))
    (made / "config.json").write_text(json.dumps(config))
    converted_folder.write_manifest(made, "llama")
    return made


def list_again(folder) -> None:
    (folder / converted_folder.MANIFEST).unlink()
    converted_folder.write_manifest(folder, "llama")


def test_mlx_lm_reads_the_rope_of_what_transformers_5_saved(tmp_path):
    """Its llama knows no rope_parameters, and would silently take 10,000."""
    made = shutil.copytree(mlx_models.folder_of("llama"), tmp_path / "model")
    config = json.loads((made / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100_000.0}
    (made / "config.json").write_text(json.dumps(config))
    assert mlx_lm.load(str(made))[0].args.rope_theta == 10_000
    models.write_config(made, {})
    assert mlx_lm.load(str(made))[0].args.rope_theta == 100_000


def widths(model) -> tuple[int, int]:
    options = make_prompt_cache(model)[0].options
    tqai.unpatch(model)
    return options.bits_k, options.bits_v


def test_the_server_takes_its_format_unless_told_otherwise(folder):
    assert widths(with_caches(mlx_lm.load, {})(str(folder))[0]) == (8, 3)
    assert widths(with_caches(mlx_lm.load, {})(path_or_hf_repo=str(folder))[0]) == (8, 3)
    assert widths(with_caches(mlx_lm.load, {"bits_k": 4, "bits_v": 4})(str(folder))[0]) == (4, 4)


def test_the_server_takes_its_key_means(folder):
    model, tokenizer = mlx_lm.load(str(folder))
    learned = key_means.learn(model, tokenizer)
    key_mean_file.write(folder, learned)
    list_again(folder)
    model, _ = with_caches(mlx_lm.load, {"bits_k": 2, "bits_v": 8})(str(folder))
    held = [cache.options.key_mean for cache in make_prompt_cache(model)]
    np.testing.assert_allclose(held[1].means, key_means.of(model, learned, make_prompt_cache(model)[1].options)[1].means, rtol=1e-5)
    tqai.unpatch(model)
    (folder / key_mean_file.NAME).write_text("{}")
    list_again(folder)
    with pytest.raises(ValueError, match="key_means.json is damaged"):
        with_caches(mlx_lm.load, {})(str(folder))


def test_patch_takes_it_from_the_folder(folder):
    model, _ = mlx_lm.load(str(folder))
    tqai.patch(model, config=folder)
    assert widths(model) == (8, 3)


def test_an_edited_folder_is_refused(folder):
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:-1])
    refused = []
    with pytest.raises(ValueError, match="tokenizer.json has .* bytes instead of"):
        with_caches(mlx_lm.load, {}, refused.append)(str(folder))
    assert len(refused) == 1

"""`tqai recommend` and the presets it writes: the best mix, the sweep through the cache, resuming, refusals."""

import itertools
import json

import pytest
import small_model
import tqai

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tqai import models, sensitivity
from tqai.cli import main

from tqai_plugins.core.kv_format import KVFormat
from tqai_plugins.core.preset import Preset

PAIRS = list(itertools.product((2, 4, 8), repeat=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small_model.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def preset(folder, tmp_path_factory):
    """A preset file and what the command printed as JSON."""
    out = tmp_path_factory.mktemp("preset") / "preset.json"
    argv = ["recommend", "--model", folder, "--context", "320", "--out", str(out)]
    assert main([*argv, "--json", str(out.with_name("data.json")), "--plot", str(out.with_name("sweep.png"))]) == 0
    return out, json.loads(out.with_name("data.json").read_text())


def test_best_mixes_are_those_of_trying_all():
    generator = torch.Generator().manual_seed(0)
    cost = {layer: {pair: torch.rand((), generator=generator).item() for pair in PAIRS} for layer in (0, 3, 4)}
    size = {pair: KVFormat(*pair, 64).slot_bytes for pair in PAIRS}
    every = [
        (sum(size[p] for p in mix), sum(cost[layer][p] for layer, p in zip(cost, mix)))
        for mix in itertools.product(PAIRS, repeat=3)
    ]  # fmt: skip
    mixes = sensitivity.best_mixes(cost, 64)
    for limit in (120, 200, 280, 396):
        mix = sensitivity.within_bytes(mixes, limit)
        assert mix.expected == pytest.approx(min(c for b, c in every if b <= limit)) and mix.token_bytes <= limit
        assert mix.token_bytes == sum(size[pair] for pair in mix.widths.values()) and list(mix.widths) == [0, 3, 4]
    for budget in (0.6, 1.5):
        assert sensitivity.within_divergence(mixes, budget).token_bytes == min(b for b, c in every if c <= budget)


def test_more_bits_are_never_expected_to_harm():
    measured = {t: 0.1 for t in sensitivity.trials([0], [2, 4, 8])}
    measured[sensitivity.Trial(0, 2, 8)], measured[sensitivity.Trial(0, 4, 8)] = 0.3, 0.4  # chance
    cost = sensitivity.costs(measured)[0]
    assert cost[4, 8] == cost[2, 8] == pytest.approx(0.3) and cost[8, 8] == pytest.approx(0.1)


def test_the_sweep_is_what_the_cache_does(folder):
    """One layer with the widths of a trial and the other at 8 bits diverges about as the trial says."""
    model, _ = models.load(folder, torch.float32)
    tokens = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(1))
    trial = sensitivity.Trial(1, 3, 8)
    [(_, swept)] = sensitivity.sweep(model, tokens, [trial], {"cache_strategy": "full"})
    with torch.inference_mode():
        cache = tqai.Cache(model.config, bits_k=8, bits_v=8, layer_formats={1: "tqai_k3v8"}, cache_strategy="full")
        found = model(tokens, past_key_values=cache).logits[0, 50:]
        plain = model(tokens).logits[0, 50:]
    assert swept == pytest.approx(sensitivity.divergence(plain, found), rel=0.2) and swept > 1e-3


def test_the_preset_takes_no_more_bytes_and_patch_accepts_it(folder, preset, capsys):
    out, data = preset
    assert out.with_name("sweep.png").read_bytes().startswith(b"\x89PNG")
    assert data["bits"] <= data["like_bits"] and set(data["layers"]) == {"0", "1"}
    assert len(data["sensitivity"]) == 2 * 7 and min(data["sensitivity"].values()) > 0
    mine, uniform = (next(row for row in data["check"] if row["name"] == name) for name in ("preset", "tqai_k4v2"))
    assert mine["bits"] <= uniform["bits"] and mine["kld"] < uniform["kld"], (
        "the first layer of this model is the worse one"
    )
    assert not out.with_name("preset.json.part").exists()
    model, _ = models.load(folder)
    cache = tqai.patch(model, config=out)
    for layer, name in data["layers"].items():
        assert f"tqai_k{cache.layers[int(layer)].options.bits_k}v{cache.layers[int(layer)].options.bits_v}" == name
    assert main(["run", "Hello " * 60, "--model", folder, "--config", str(out), "--max-tokens", "2", "--json"]) == 0
    assert "layer_formats" in json.loads(capsys.readouterr().out)["cache"]


def test_a_budget_in_nats(folder, tmp_path, capsys):
    argv = ["recommend", "--model", folder, "--context", "200", "--check-windows", "0", "--json"]
    found = {}
    for budget in ("0.05", "1.0"):
        assert main([*argv, "--out", str(tmp_path / f"{budget}.json"), "--budget", budget]) == 0
        found[budget] = json.loads(capsys.readouterr().out)
        assert found[budget]["expected"] <= float(budget)
    assert found["0.05"]["bits"] > found["1.0"]["bits"]
    assert main([*argv, "--out", str(tmp_path / "none.json"), "--budget", "1e-9"]) == 2
    assert "no mix of these widths is expected to stay within 1e-09 nats" in capsys.readouterr().err


def test_an_interrupted_sweep_goes_on(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.json"
    argv = ["recommend", "--model", folder, "--context", "200", "--check-windows", "0", "--out", str(out)]
    whole = sensitivity.sweep
    asked = []

    def cut(model, windows, wanted, options):
        asked.append(len(wanted))
        yield from itertools.islice(whole(model, windows, wanted, options), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity, "sweep", cut)
    assert main(argv) == 130 and not out.exists()
    assert main(argv) == 130
    monkeypatch.setattr(sensitivity, "sweep", lambda *given: asked.append(len(given[2])) or whole(*given))
    assert main(argv) == 0
    assert asked == [14, 9, 4] and sorted(p.name for p in tmp_path.iterdir()) == ["p.json"]
    assert "10 of 14 measurements are in" in capsys.readouterr().err
    out.unlink()
    (tmp_path / "p.json.part").write_text(json.dumps({"settings": {"context": 1}, "measured": {}}))
    assert main(argv) == 2 and "is of a sweep with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda d: d.pop("tqai_preset"), "it has no entry 'tqai_preset'"),
        (lambda d: d.update(tqai_preset=2), "its version is 2, this tqai reads 1"),
        (lambda d: d.pop("layers"), "it has no 'layers'"),
        (lambda d: d.update(layers={}), "its layers are not rising numbers from 0 to 1"),
        (lambda d: d["layers"].update({"7": "tqai"}), "its layers are not rising numbers"),
        (lambda d: d["layers"].update({"1": "tqai_k9v9"}), "unknown KV cache format 'tqai_k9v9'"),
        (lambda d: d.update(num_layers="2"), "is no preset of `tqai recommend`"),
    ],
)
def test_files_that_are_no_presets(preset, tmp_path, change, sentence):
    data = json.loads(preset[0].read_text())
    change(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=sentence):
        Preset.read(tmp_path / "p.json")


def test_a_preset_for_another_model(preset):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="with 2 layers and head_dim 32, but this model has 3 layers and head_dim 32"):
        tqai.patch(model, config=preset[0])
    with pytest.raises(ValueError, match="layer_formats has layer 3, which is no full-attention layer of this llama"):
        tqai.patch(model, layer_formats={3: "tqai"})


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--widths", "2,4"), "--widths is '2,4'; expected some of 2, 3, 4, 8 with commas between, 8 among them"),
        (("--widths", "2,6,8"), "--widths is '2,6,8'; expected"),
        (("--like", "tqai_k4"), "unknown KV cache format 'tqai_k4'"),
        (("--context", "10"), "--context is 10; allowed are 64 and more"),
    ],
)
def test_bad_options(options, sentence, capsys):
    assert main(["recommend", "--model", "/no/such/model", *options]) == 2
    assert capsys.readouterr().err.startswith(f"tqai: {sentence}")

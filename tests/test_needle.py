"""`tqai benchmark needle`: the sentence lies where it should, what counts as found, and the command with a small model."""

import functools
import json
import random
from typing import ClassVar

import follower_model
import pytest
import small_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tqai import Cache, models
from tqai.cli import _vllm_server, main
from tqai.cli import benchmark_needle as needle
from transformers import LlamaConfig

from tqai_plugins.torch_kernels import codec


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_the_sentence_lies_at_its_depth_and_is_asked_for_at_the_end():
    cases = needle.make_cases(encode, "hay " * 10, [300, 500], [0, 0.5, 1], 2)
    assert [(case.context, case.depth) for case in cases[::2]] == [(c, d) for c in (300, 500) for d in (0, 0.5, 1)]
    for case in cases:
        asked, answer = bytes(case.asked).decode(), bytes(case.answer).decode()
        sentence = f"{asked}{answer}.\n"
        before, found, after = bytes(case.prompt).decode().partition(sentence)
        assert found and asked.startswith("\nThe pass number of ") and asked.endswith(" is") and answer.strip().isdigit()
        assert len(before) == round(case.depth * len(before + after)) and set(before + after) == set("hay ")
        assert len(case.prompt + case.asked + case.answer) == case.context
    assert len({bytes(case.answer) for case in cases}) == len(cases)


def test_the_default_contexts_are_those_that_the_model_reads():
    config = LlamaConfig(max_position_embeddings=2048)
    assert needle._contexts(None, config) == [512, 1024, 2048] and needle._contexts([2048, 7], config) == [2048, 7]
    assert needle._contexts(None, LlamaConfig(max_position_embeddings=100)) == [100]


def test_found_is_what_would_be_written():
    cases = needle.make_cases(encode, "hay " * 10, [300], [0, 1], 2)
    logits = []
    for i, case in enumerate(cases):
        rows = torch.zeros(len(case.answer), 256)
        rows[torch.arange(len(case.answer)), case.answer] = 5
        if i == 0:
            rows[-1, ord("x")] = 6  # one token of one number is another
        logits.append(rows)
    first, last = needle.cells(cases, list(map(needle.score, cases, logits)))
    assert (first["context"], first["depth"], first["found"]) == (300, 0, 0.5) and last["found"] == 1
    right = (5 - torch.logsumexp(torch.tensor([5.0] + [0.0] * 255), 0)) * len(cases[-1].answer)
    assert last["logprob"] == pytest.approx(right.item(), rel=1e-5) and first["logprob"] < last["logprob"]
    assert needle.mean([first, last], "found") == 0.75 and needle.mean([first, last], "found", depth=1) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small_model.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder, torch.float32)[0]


def test_the_command_reads_codes_and_prints_a_table_json_and_a_plot(folder, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "needle.json", tmp_path / "needle.png"
    argv = ["benchmark", "needle", "--model", folder, "--contexts", "200,240", "--depths", "0.5", "--needles", "1", "--formats", "k4v2:full,k2v2:full"]
    assert main([*argv, "--json", str(out), "--plot", str(png)]) == 0
    data = json.loads(out.read_text())
    assert [row["name"] for row in data["rows"]] == ["uncompressed", "k4v2:full", "k2v2:full"]
    exact, *coded = ([cell["logprob"] for cell in row["cells"]] for row in data["rows"])
    assert len(exact) == 2 and all(cells != exact for cells in coded), "codes were not read"
    assert all(row["vectors_quantized"] > 0 and row["vectors_dequantized"] > 0 for row in data["rows"][1:])
    assert "k2v2:full" in capsys.readouterr().out and png.read_bytes().startswith(b"\x89PNG")
    assert main(["benchmark", "plots", str(tmp_path)]) == 0
    assert main([*argv[:-1], "k4v2:4:1000"]) == 1, "nothing leaves the exact window"
    assert "no codes were read (k4v2:4:1000)" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["residual", "full", "incremental"])
def test_a_prompt_read_once_for_all_caches_is_as_if_each_read_it(model, strategy):
    case = needle.make_cases(encode, "hay " * 10, [300], [0.5], 1)[0]
    make = lambda: Cache(model.config, bits_k=2, bits_v=2, cache_strategy=strategy, residual_window=32)
    found = needle.answers(model, case, {"mine": make, "again": make})
    alone = make()
    with torch.inference_mode():
        model(torch.tensor([case.prompt]), past_key_values=alone)
        logits = model(torch.tensor([case.asked + case.answer[:-1]]), past_key_values=alone, logits_to_keep=len(case.answer)).logits[0]
    for name in ("mine", "again"):
        assert torch.equal(found[name][0], logits) and found[name][1].vectors_dequantized == alone.vectors_dequantized > 0
    assert not torch.equal(found["uncompressed"][0], logits)


def test_known_answers_are_found_through_codes_and_lost_with_them(tmp_path, monkeypatch):
    """A model that answers rightly if and only if it reads one exact place of the cache."""
    model = models.load(str(follower_model.write(tmp_path / "follower")), torch.float32)[0]
    source, cases = random.Random(0), []
    for _ in range(12):
        prompt = follower_model.draw(source, 200)
        at = next(i for i, token in enumerate(prompt) if token // 2 == prompt[-1] // 2)
        if 4 <= at < 100:  # outside the exact tokens
            cases.append(needle.Case(200, 0.5, prompt[:-1], prompt[-1:], follower_model.answer(prompt, 1)))
    assert cases
    new = {name: functools.partial(Cache, model.config, bits_k=bits, bits_v=bits, residual_window=32) for name, bits in (("k8v8", 8), ("k4v4", 4))}

    def shares() -> dict[str, float]:
        found = [{name: needle.score(case, logits)[0] for name, (logits, _) in needle.answers(model, case, new).items()} for case in cases]
        return {name: sum(scores[name] for scores in found) / len(found) for name in found[0]}

    assert shares() == {"uncompressed": 1, "k8v8": 1, "k4v4": 1}
    quantize = codec.quantize
    forgetful = lambda *args, **options: (quantize(*args, **options)[0], torch.zeros_like(quantize(*args, **options)[1]))
    monkeypatch.setattr(codec, "quantize", forgetful)
    assert shares() == {"uncompressed": 1, "k8v8": 0, "k4v4": 0}


class FakeServer:
    """In place of a `vllm serve`: each finds the numbers, or is what `fails` says."""

    fails: ClassVar[dict[str, str]] = {}

    def __init__(self, folder, args, context, options):
        self.dtype = options[1]

    def __enter__(self):
        if self.fails.get(self.dtype) == "start":
            raise OSError("vllm serve ended with code 1")
        return self

    def __exit__(self, *_):
        pass

    def write(self, prompt, forced):
        lost = self.fails.get(self.dtype) == "forgets"
        return torch.nn.functional.one_hot(torch.tensor(forced) + lost, 257) * 9.0

    def counts(self):
        return {"vectors_quantized": 7, "tokens_read": 0 if self.fails.get(self.dtype) == "unread" else 5}


@pytest.mark.parametrize("fails, code", [({}, 0), ({"tqai_k4v2": "unread"}, 1), ({"tqai_k4v2": "start"}, 1), ({"fp8": "start"}, 0), ({"auto": "start"}, 2)])
def test_servers_are_asked_one_after_another(folder, fails, code, tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(_vllm_server, "Server", FakeServer)
    monkeypatch.setattr(needle, "machine", lambda *_: {})  # which has no vLLM
    monkeypatch.setattr(FakeServer, "fails", {"tqai_k8v8": "forgets"} | fails)
    out = tmp_path / "needle.json"
    argv = ["benchmark", "needle", "--runtime", "vllm", "--model", folder, "--contexts", "200", "--depths", "0.5", "--needles", "1"]
    assert main([*argv, "--formats", "fp8,k4v2,k8v8", "--json", str(out)]) == code
    said = capsys.readouterr()
    if code == 2:
        assert said.err == "tqai: vllm serve ended with code 1\n"
        return
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    shares = {name: row["cells"][0]["found"] for name, row in rows.items() if "why" not in row}
    started = [name for name, dtype in {"fp8": "fp8", "k4v2": "tqai_k4v2", "k8v8": "tqai_k8v8"}.items() if fails.get(dtype) != "start"]
    assert shares == {"uncompressed": 1} | {name: float(name != "k8v8") for name in started}
    assert rows["k8v8"]["tokens_read"] == 5 and ("no codes were read (k4v2)" in said.err) == ("unread" in fails.values())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--depths", "0.5,2"], "--depths is '0.5,2'; expected numbers from 0 to 1 with commas between"),
        (["--depths", "half"], "--depths is 'half'; expected numbers from 0 to 1"),
        (["--contexts", "1k"], "--contexts is '1k'; expected whole numbers"),
        (["--contexts", "30"], "--contexts has 30, which has no room for hay"),
        (["--needles", "0"], "--needles is 0; allowed are 1 and more"),
        (["--formats", "k9v9"], "--formats has 'k9v9'"),
    ],
)
def test_bad_options_end_in_one_sentence(folder, options, sentence, capsys):
    assert main(["benchmark", "needle", "--model", folder, *options]) == 2
    assert sentence in capsys.readouterr().err

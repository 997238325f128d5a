"""`tqai benchmark needle`: the sentence lies where it should, what counts as found, and the command with a small model."""

import json

import pytest
import small_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tqai.cli import benchmark_needle as needle
from tqai.cli import main


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


def test_found_is_what_would_be_written():
    cases = needle.make_cases(encode, "hay " * 10, [300], [0, 1], 2)
    logits = []
    for i, case in enumerate(cases):
        rows = torch.zeros(len(case.answer), 256)
        rows[torch.arange(len(case.answer)), case.answer] = 5
        if i == 0:
            rows[-1, ord("x")] = 6  # one token of one number is another
        logits.append(rows)
    first, last = needle.cells(cases, logits)
    assert (first["context"], first["depth"], first["found"]) == (300, 0, 0.5) and last["found"] == 1
    right = (5 - torch.logsumexp(torch.tensor([5.0] + [0.0] * 255), 0)) * len(cases[-1].answer)
    assert last["logprob"] == pytest.approx(right.item(), rel=1e-5) and first["logprob"] < last["logprob"]
    assert needle.mean([first, last], "found") == 0.75 and needle.mean([first, last], "found", depth=1) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small_model.write(tmp_path_factory.mktemp("model")))


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
    assert all(row["vectors_dequantized"] > 0 for row in data["rows"][1:])
    assert "k2v2:full" in capsys.readouterr().out and png.read_bytes().startswith(b"\x89PNG")
    assert main(["benchmark", "plots", str(tmp_path)]) == 0
    assert main([*argv[:-1], "k4v2:4:1000"]) == 1, "nothing leaves the exact window"
    assert "no codes were read (k4v2:4:1000)" in capsys.readouterr().err


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

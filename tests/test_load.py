"""A short version of tests/load.py: many clients at once, some of which leave, and every answer right."""

import importlib.util
import random

import follower_model
import load
import pytest


def check(found: dict, least: int) -> None:
    assert found["wrong answers"] == found["errors"] == 0
    assert found["requests"] >= least and found["left by their clients"] > 0


@pytest.mark.parametrize("options", [None, {"bits_k": 4, "bits_v": 2, "cache_strategy": "full"}])
def test_words_of_a_long_prompt_are_found(tmp_path, options):
    """By the model of --limit in bfloat16, with stock and with coded keys and values: asked 29,000 tokens later, each of 500
    words is found by far, and but for the one whose place is gone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import tqai

    words, length, context = 1 << 15, 3000, 1 << 15
    folder = follower_model.write(tmp_path, words, context)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    cache = tqai.patch(model, **options) if options else transformers.DynamicCache(config=model.config)
    source = random.Random(0)
    *prompt, _ = follower_model.draw(source, length + 1, words=words)

    def read(tokens, first):
        places = torch.arange(first, first + len(tokens))[None]
        return model(torch.tensor([tokens]), past_key_values=cache, position_ids=places, logits_to_keep=500).logits[0]

    with torch.no_grad():
        for first in range(0, length, 500):
            read(prompt[first : first + 500], first)
        places = source.sample(range(1, length - 1), 500)
        if not options:
            for kept in (cache.layers[1].keys, cache.layers[1].values):
                kept[:, :, places[0] + 1] = 0
        asked = [follower_model.START, *(prompt[place] & ~1 for place in places)]  # the first word needs one before it
        logits = read(asked, context - len(asked))
    answers = torch.tensor([[prompt[place + 1] & ~1] for place in places])
    found = logits.gather(1, answers) - logits.scatter(1, answers, -torch.inf).max(1, keepdim=True).values
    assert bool(found[0] > 0) == bool(options) and found[1:].min() > 6  # of 13


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM; it is not installed here")
def test_vllm(tmp_path):
    found = load.vllm(follower_model.write(tmp_path / "model"), "tqai", tmp_path / "log", load.Load(32, 40, 0.2))
    check(found, 20)
    assert found["blocks in use afterwards"] == found["canary"]["failures"] == 0 < found["canary"]["checks"]


@pytest.mark.slow
@pytest.mark.mlx
@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="needs mlx-lm; it is not installed here")
def test_mlx(tmp_path):
    check(load.mlx(follower_model.write(tmp_path / "model"), "tqai", tmp_path / "log", load.Load(6, 30, 0.3)), 3)

"""mlx-lm 0.32.2's own tests of generation (tests/test_generate.py, MIT, Apple), adapted: through codes, on a tiny model."""

import pytest

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_lm.chat
import mlx_models
import tqai
from mlx_lm import batch_generate, generate, load, stream_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from tqai_plugins.mlx_lm_plugin import CompressedKVCache
from tqai_plugins.mlx_lm_plugin.server import with_caches

SAID = ("Write a story about Einstein", "Hi", "What time is it?", "How tall is Mt Everest? " * 4)


@pytest.fixture(scope="module")
def loaded():
    """(model, tokenizer), all of whose caches have a short exact window, so that codes are read."""
    model, tokenizer = mlx_models.load("llama32")
    tqai.patch(model, residual_window=8)
    assert all(isinstance(cache, CompressedKVCache) for cache in make_prompt_cache(model))
    yield model, tokenizer
    tqai.unpatch(model)


@pytest.fixture
def prompts(loaded):
    chat = lambda text: [{"role": "user", "content": text}]
    return [loaded[1].apply_chat_template(chat(text), add_generation_prompt=True) for text in SAID]


def bias(**chances: float):
    return make_logits_processors({int(token[1:]): chance for token, chance in chances.items()})


def test_generate_with_logit_bias(loaded):
    model, tokenizer = loaded
    assert generate(model, tokenizer, "hello", max_tokens=5, logits_processors=bias(_0=2000.0, _1=-20.0)) == tokenizer.decode([0]) * 5


def test_a_processor_sees_all_tokens(loaded):
    model, tokenizer = loaded
    seen = []
    generate(model, tokenizer, "hello", max_tokens=5, logits_processors=[lambda tokens, x: seen.append(len(tokens)) or x])
    assert seen[-1] == len(tokenizer.encode("hello")) + 5


def test_stream_generate_speculative(loaded, prompts):
    """With itself as draft: two drafts are taken, the third token is the model's own."""
    model, tokenizer = loaded
    options = {"max_tokens": 5, "sampler": make_sampler(temp=0.0)}
    found = list(stream_generate(model, tokenizer, prompts[3], draft_model=model, num_draft_tokens=2, **options))
    assert [part.from_draft for part in found] == [True, True, False, True, True]
    assert [part.token for part in found] == [part.token for part in stream_generate(model, tokenizer, prompts[3], **options)]


def test_input_embeddings(loaded, prompts):
    model, tokenizer = loaded
    expected = generate(model, tokenizer, prompts[3], max_tokens=5)
    embeddings, steps = model.model.embed_tokens(mx.array(prompts[3])), []
    text = generate(
        model, tokenizer, prompts[3], max_tokens=5, input_embeddings=embeddings, prefill_step_size=5,
        prompt_progress_callback=lambda done, total: steps.append(done),
    )  # fmt: skip
    assert text == expected and len(steps) > len(embeddings) / 5


@pytest.mark.parametrize("sizes", [{}, {"prefill_batch_size": 2, "prefill_step_size": 8, "completion_batch_size": 3}])
def test_batches_match_single_requests(loaded, prompts, sizes):
    model, tokenizer = loaded
    generator = BatchGenerator(model, max_tokens=1, **sizes)
    uids, found = generator.insert(prompts), {}
    while responses := generator.next_generated():
        assert not found.keys() & {response.uid for response in responses}, "one token each"
        found |= {response.uid: response.logprobs for response in responses}
    for uid, prompt in zip(uids, prompts):
        (alone,) = stream_generate(model, tokenizer, prompt, max_tokens=1)
        assert mx.allclose(found[uid], alone.logprobs, atol=1e-4)


def test_each_request_has_its_length(loaded, prompts):
    model, tokenizer = loaded
    lengths = [2, 3, 4, 25]
    generator = BatchGenerator(model, prefill_batch_size=2, prefill_step_size=8, completion_batch_size=3)
    tokens = {uid: [] for uid in generator.insert(prompts, max_tokens=lengths)}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    for found, prompt, length in zip(tokens.values(), prompts, lengths):
        alone = [part.token for part in stream_generate(model, tokenizer, prompt, max_tokens=length)]
        assert found[: len(alone)] == alone and len(found) == length


def test_batches_with_processors_and_samplers_of_their_own(loaded, prompts):
    model, tokenizer = loaded
    generator = BatchGenerator(model, max_tokens=1, logits_processors=bias(_0=2000.0))
    uids = generator.insert([prompts[0]]) + generator.insert(prompts[1:3], logits_processors=[bias(_1=2000.0), bias(_2=2000.0)])
    assert {r.uid: r.token for r in generator.next_generated()} == dict(zip(uids, (0, 1, 2)))
    generator = BatchGenerator(model, max_tokens=1, sampler=lambda _: mx.array([1]))
    uids = generator.insert([prompts[0]]) + generator.insert(prompts[1:3], samplers=[lambda _: mx.array([2]), lambda _: mx.array([3])])
    assert {r.uid: r.token for r in generator.next_generated()} == dict(zip(uids, (1, 2, 3)))
    texts = batch_generate(model, tokenizer, prompts[:2], max_tokens=1, logits_processors=bias(_0=2000.0)).texts
    assert texts == [tokenizer.decode([0])] * 2


def test_chat(monkeypatch, capsys):
    """mlx_lm.chat: two questions, a reset, and the end."""
    folder, asked, caches = str(mlx_models.folder_of("llama")), iter(["hello " * 40, "and then?", "r", "again", "q"]), []
    make = mlx_lm.chat.make_prompt_cache
    monkeypatch.setattr(mlx_lm.chat, "make_prompt_cache", lambda *a: caches.append(make(*a)) or caches[-1])
    monkeypatch.setattr(mlx_lm.chat, "load", with_caches(load, {}))
    monkeypatch.setattr("builtins.input", lambda *_: next(asked))
    monkeypatch.setattr("sys.argv", ["mlx_lm.chat", "--model", folder, "--max-tokens", "6"])
    mlx_lm.chat.main()
    assert [type(cache[0]) for cache in caches] == [CompressedKVCache] * 2
    assert caches[0][0].offset > 280 > caches[1][0].offset > 0

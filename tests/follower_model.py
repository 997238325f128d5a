"""A Llama whose answers are known: it says which word followed the last one when that stood in the prompt, and goes on so.

Layer 0 finds each token and the one before it by RoPE's fast pairs, layer 1 the place where the last word was the one
before, by the slow ones (an induction head, written by hand; no layer has an MLP). Each answered word needs one exact
place of the cache, wherever it lies, and the two newest, so that a wrong page, slot or head or a lost token shows; and
it wins by so much that what a format, a chunk or a batch of another size rounds does not.

Each word has two spellings, `w7` and `W7`; the model takes them for the same and answers in small letters. So a
speculator that copies the prompt is right about half of the time.

For long prompts `write` takes more words and a longer context. More pairs of RoPE then tell places apart, since six nearly
agree again somewhere in 32,768 tokens, and the words are those of a code, since of so many random ones some would be alike.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

WORDS, LAYERS, KV_HEADS, GROUP, HEAD_DIM = 500, 2, 2, 2, 128
START = 2 * WORDS  # the first token of a prompt, and behind it the end; the words of a longer vocabulary follow
SPECIAL = {START: "start", START + 1: "end"}
SLOW = 35  # pairs of RoPE that hardly turn: the last ones


@dataclass(frozen=True)
class Reach:
    """Up to how many tokens RoPE tells places apart: its theta, how many of its first pairs do that, and the share of the score
    that the first of them has. The next best place scores at least 17 % less."""

    tokens: int
    theta: float
    fast: int
    first: float


REACHES = Reach(1024, 1e8, 6, 1 / 6), Reach(1 << 16, 1e12, 14, 0.4)
CODE = 0o6331141367235453  # generates the BCH code [63, 16, 23]; with a bit of parity, 65,536 words that differ in 24 bits of 64
WIDTH = 64  # of a word's vector; the residual stream holds it, what layer 0 and 1 find, and a constant
HIDDEN = 5 * WIDTH
BIAS = 300.0
SHARPNESS = {"near": 300.0, "same": 100.0}  # the score of what is sought


def draw(source: random.Random, length: int, prefix=(), words: int = WORDS) -> list[int]:
    """A prompt of this many tokens that begins with `prefix`, has no word twice but the last, which asks for its follower."""
    held = [START, *prefix][: length - 1]
    new = source.sample(sorted(set(range(words + 1)) - {START // 2, *(token // 2 for token in held)}), length - 1 - len(held))
    held += [2 * word + source.randrange(2) for word in new]
    return [*held, 2 * (source.choice(held[1:-1]) // 2) if length > 3 else held[-1]]


def answer(prompt: list[int], count: int) -> list[int]:
    """The tokens that follow."""
    after = {a // 2: b // 2 for a, b in zip(prompt, prompt[1:])}
    said, word = [], prompt[-1] // 2
    for _ in range(count):
        word = after[word]
        said.append(2 * word)
    return said


def text(tokens: list[int]) -> str:
    return " ".join(SPECIAL.get(token) or f"{'wW'[token % 2]}{token // 2}" for token in tokens)


def _vectors(generator, words: int):
    """Unit vectors [words, WIDTH]: random ones for a few, for many those of CODE, whose cosines are 1 / 4 at most."""
    import numpy as np

    if words <= WORDS + 1:
        found = generator.standard_normal((words, WIDTH))
        return found / np.linalg.norm(found, axis=1, keepdims=True)
    numbers, made = np.arange(words, dtype=np.uint64), np.zeros(words, np.uint64)
    for bit in range(16):
        made ^= (numbers >> np.uint64(bit) & np.uint64(1)) * np.uint64(CODE << bit)
    bits = (made[:, None] >> np.arange(WIDTH - 1, dtype=np.uint64) & np.uint64(1)).astype(int)
    return (1 - 2 * np.c_[bits, bits.sum(1) % 2]) / WIDTH**0.5


def write(folder: Path, words: int = WORDS, context: int = 1024, biased_pairs: int = 0, **config) -> Path:
    """The checkpoint, with a tokenizer of one token a word, for contexts of so many tokens; at most 65,535 words. biased_pairs: so
    many pairs of RoPE, of those that no query looks at, get large biases of keys; no answer changes."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator, zeros = np.random.default_rng(0), lambda *shape: np.zeros(shape, np.float32)
    vectors = _vectors(generator, words + 1)
    turns = [np.linalg.qr(generator.standard_normal((2 * SLOW, WIDTH)))[0] for _ in range(KV_HEADS)]
    word, before, itself, answered = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(4))
    constant = 4 * WIDTH
    half, heads, vocabulary = HEAD_DIM // 2, KV_HEADS * GROUP, 2 * (words + 1)
    reach = next(reach for reach in REACHES if context <= reach.tokens)
    rates, norm = reach.theta ** (-np.arange(reach.fast) / half), np.full(HIDDEN, HIDDEN**-0.5, np.float32)
    fast = slice(reach.fast)
    shares = np.full(reach.fast, (1 - reach.first) / (reach.fast - 1))
    shares[0] = reach.first

    embedding, head = zeros(vocabulary, HIDDEN), zeros(vocabulary, HIDDEN)
    embedding[:, word], embedding[:, constant] = vectors.repeat(2, 0), 1
    head[0::2, answered] = 30 * vectors
    head[START] = 0
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": norm}
    for layer in range(LAYERS):
        q, k, v, o = (zeros(n, HEAD_DIM, HIDDEN) for n in (heads, KV_HEADS, KV_HEADS, heads))
        for kv, turn in enumerate(turns):
            group = slice(kv * GROUP, (kv + 1) * GROUP)
            if layer == 0:
                amplitude = (SHARPNESS["near"] * 2 * HEAD_DIM**0.5 * shares) ** 0.5  # the constant is 1 / sqrt(2) by then
                turned = rates * (1 - kv)  # the first head finds the token before, the second one the token itself
                k[kv, fast, constant] = amplitude
                q[group, fast, constant] = amplitude * np.cos(turned)
                q[group, half : half + reach.fast, constant] = -amplitude * np.sin(turned)
            else:
                amplitude = (SHARPNESS["same"] * 4 * HEAD_DIM**0.5) ** 0.5  # words have the length 1 / 2 by then
                spread = zeros(HEAD_DIM, WIDTH)
                spread[half - SLOW : half], spread[HEAD_DIM - SLOW :] = amplitude * turn[:SLOW], amplitude * turn[SLOW:]
                k[kv][:, before], q[group, :, itself] = spread, spread
            v[kv, : 2 * SLOW, word] = turn * (2 + 2 * layer) ** 0.5
            place = answered if layer else (before, itself)[kv]
            o[group, : 2 * SLOW, place] = turn / (heads if layer else GROUP)
        prefix = f"model.layers.{layer}."
        if biased_pairs:
            bias = zeros(KV_HEADS, 2, half)
            bias[:, :, reach.fast : reach.fast + biased_pairs] = BIAS
            tensors[f"{prefix}self_attn.k_proj.bias"] = bias.reshape(-1)
            for name, width in (("q", heads * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM), ("o", HIDDEN)):
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = zeros(width)
        flat = {name: x.reshape(-1, HIDDEN) for name, x in (("q", q), ("k", k), ("v", v), ("o", o))}
        flat["o"] = np.ascontiguousarray(flat["o"].T)
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": x for name, x in flat.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = norm
        for name, shape in (("gate", (16, HIDDEN)), ("up", (16, HIDDEN)), ("down", (HIDDEN, 16))):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = zeros(*shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert reach.fast + biased_pairs <= half - SLOW
    sizes = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": HIDDEN,
        "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": heads, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "rope_theta": reach.theta, "rms_norm_eps": 1e-9, "max_position_embeddings": context, "hidden_act": "silu",
        "attention_bias": biased_pairs > 0, "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": START, "eos_token_id": START + 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes | config))
    _write_tokenizer(folder, vocabulary, context)
    return folder


def _write_tokenizer(folder: Path, vocabulary: int, context: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {text([token]): token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="end"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["end"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "end", "unk_token": "end", "model_max_length": context}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

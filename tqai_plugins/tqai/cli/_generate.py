"""What run, compare and demo share: their options, the prompt in the model's chat form, and timed generation."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tqai_plugins.core.activations import CONFIGS, Activations


def add_model(parser) -> None:
    """Give a command --model."""
    parser.add_argument("--model", required=True, help="Hugging Face id, folder, GGUF file or demo")


def add_cache_options(parser, max_tokens: int) -> None:
    """Options of the cache; those left out take the defaults of tqai.Cache."""
    parser.add_argument(
        "--config", metavar="NAME",
        help="a format such as tqai_k4v4, a preset file of recommend, a folder of convert, or " + ", ".join(CONFIGS),
    )  # fmt: skip
    parser.add_argument("--bits-k", type=int, help="bits of a key's coordinate, 1 to 8 (4)")
    parser.add_argument("--bits-v", type=int, help="bits of a value's coordinate, 1 to 8 (2)")
    parser.add_argument(
        "--vector-values", action="store_true", default=None, help="code 2-bit values four coordinates at once, which is closer"
    )
    parser.add_argument("--cache-strategy", help="auto, residual, full or incremental (auto, which is residual)")
    parser.add_argument("--sink-tokens", type=int, help="first tokens kept exact (4 with residual, else 0)")
    parser.add_argument("--residual-window", type=int, help="last tokens kept exact with residual (128)")
    parser.add_argument(
        "--use-qjl", action="store_true", default=None, help="the paper's second stage, which makes answers worse"
    )
    parser.add_argument("--qjl-sketch-size", type=int, help="signs a key with --use-qjl (64)")
    parser.add_argument(
        "--compress-hidden", action="store_true", default=None, help="hidden states between layers, simulated"
    )
    parser.add_argument("--bits-hidden", type=int, help="2 to 8 (8)")
    parser.add_argument("--compress-ffn", action="store_true", default=None, help="feed-forward activations, simulated")
    parser.add_argument("--bits-ffn", type=int, help="2 to 8 (8)")
    parser.add_argument("--backend", help="auto or torch (auto)")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="tokens to generate (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="(%(default)s)")


OPTIONS = (
    "bits_k", "bits_v", "vector_values", "cache_strategy", "sink_tokens", "residual_window", "use_qjl", "qjl_sketch_size",
    "compress_hidden", "bits_hidden", "compress_ffn", "bits_ffn", "backend",
)  # fmt: skip


def cache_options(args) -> dict:
    """The given options for tqai.patch, checked before a model is loaded."""
    from tqai_plugins.transformers_plugin import CacheOptions

    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens is {args.max_tokens}; allowed are 1 and more")
    options, _ = Activations.split(_merged(args))
    CacheOptions.of(**options)
    return _given(args) | ({"config": args.config} if args.config else {})


def activations_of(args) -> Activations:
    """What the given options say about activations."""
    return Activations.split(_merged(args))[1]


def _given(args) -> dict:
    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}


def _merged(args) -> dict:
    from tqai import configurations

    return configurations.merged(args.config, _given(args))


def load(args):
    """Model and tokenizer that the arguments name."""
    import torch
    from tqai import models

    return models.load(args.model, getattr(torch, args.dtype))


def prompt_tokens(model, tokenizer, prompt: str):
    """[1, tokens] on the model's device, in the chat form if the tokenizer has one."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text")
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)


@dataclass(frozen=True)
class Generated:
    """An answer and the time that it took."""

    tokens: list[int]
    text: str
    prompt_seconds: float  # until the first new token
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token, which waits for the prompt."""
        rest = self.seconds - self.prompt_seconds
        return (len(self.tokens) - 1) / rest if len(self.tokens) > 1 else None


class Clock:
    """A streamer for generate() that notes the time of each token, and calls step()."""

    def __init__(self, step):
        self.step, self.times = step, []

    def put(self, tokens) -> None:
        """Take tokens as they come."""
        self.times.append(time.perf_counter())  # the first is the prompt, before anything is computed
        self.step(tokens)

    def end(self) -> None:
        """What a streamer has to have."""
        pass


def generate(model, tokenizer, ids, cache, max_tokens: int, step) -> Generated:
    """Greedy generation after the prompt `ids` [1, tokens]; step(tokens) is called with the prompt and each token."""
    import torch

    clock = Clock(step)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=max_tokens,
            do_sample=False, streamer=clock, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip
    new = out[0, ids.shape[1] :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    start, first, *_, last = *clock.times, clock.times[-1]
    return Generated(new, text, first - start, last - start)

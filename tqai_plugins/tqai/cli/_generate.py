"""What run, compare and demo share: their options, the prompt in the model's chat form, and timed generation."""

from __future__ import annotations

import time
from dataclasses import dataclass


def add_model(parser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face id, folder, GGUF file or demo")


def add_cache_options(parser, max_tokens: int) -> None:
    """Options of the cache; those left out take the defaults of tqai.Cache."""
    parser.add_argument("--config", metavar="NAME", help="widths by format name, such as tqai_k4v2")
    parser.add_argument("--bits-k", type=int, help="bits of a key's coordinate, 1 to 8 (4)")
    parser.add_argument("--bits-v", type=int, help="bits of a value's coordinate, 1 to 8 (2)")
    parser.add_argument("--cache-strategy", help="auto, residual, full or incremental (auto, which is residual)")
    parser.add_argument("--sink-tokens", type=int, help="first tokens kept exact (4 with residual, else 0)")
    parser.add_argument("--residual-window", type=int, help="last tokens kept exact with residual (128)")
    parser.add_argument("--backend", help="auto or torch (auto)")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="tokens to generate (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="(%(default)s)")


def cache_options(args) -> dict:
    """The given options for tqai.Cache, checked before a model is loaded."""
    from tqai_plugins.core.kv_format import parse_name
    from tqai_plugins.transformers_plugin import CacheOptions

    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens is {args.max_tokens}; allowed are 1 and more")
    names = ("bits_k", "bits_v", "cache_strategy", "sink_tokens", "residual_window", "backend")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.config:
        if "bits_k" in options or "bits_v" in options:
            raise ValueError(f"--config {args.config} already says the bits; leave out --bits-k and --bits-v")
        options["bits_k"], options["bits_v"] = parse_name(args.config)
    CacheOptions.of(**options)
    return options


def load(args):
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
        self.times.append(time.perf_counter())  # the first is the prompt, before anything is computed
        self.step(tokens)

    def end(self) -> None:
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

"""A chat and a batch with mlx-lm through a compressed cache: python examples/mlx/chat.py MODEL"""

import sys

import tqai
from mlx_lm import batch_generate, generate, load
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache


def main(path: str) -> None:
    model, tokenizer = load(path)
    tqai.patch(model, bits_k=4, bits_v=2)  # until tqai.unpatch(model)

    ask = lambda text: tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    cache = make_prompt_cache(model)
    for text in ("Name a river in France.", "And one in Spain."):
        print(generate(model, tokenizer, ask(text), max_tokens=60, prompt_cache=cache))
    print(f"{cache[0].offset} tokens in {sum(layer.nbytes for layer in cache) / 1e6:.1f} MB")
    save_prompt_cache("chat.safetensors", cache)
    print(generate(model, tokenizer, ask("And in Italy?"), max_tokens=60, prompt_cache=load_prompt_cache("chat.safetensors")))

    batch = batch_generate(model, tokenizer, [ask("What is snow?"), ask("Count to five.")], max_tokens=60)
    print("\n".join(batch.texts))


if __name__ == "__main__":
    main(*sys.argv[1:])

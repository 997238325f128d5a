"""Texts from vLLM in this process, through a compressed cache: python examples/vllm/offline.py MODEL"""

import sys

from vllm import LLM, SamplingParams


def main(model: str) -> None:
    llm = LLM(model, kv_cache_dtype="tqai", max_model_len=1024, enforce_eager=True)  # or tqai_k4v4, tqai_k8v4 ...
    prompts = ["The capital of France is", "Count: 1, 2, 3, 4, 5,"]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16)):
        print(output.prompt + output.outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])

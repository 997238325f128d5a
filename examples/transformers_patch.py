"""A transformers model with a compressed KV cache: python examples/transformers_patch.py MODEL [PROMPT]"""

import sys

import torch
import tqai
from transformers import AutoModelForCausalLM, AutoTokenizer

name, prompt = sys.argv[1], " ".join(sys.argv[2:]) or "Tell me about the Great Wall of China."
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)

cache = tqai.patch(model, bits_k=4, bits_v=2)
tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=300, do_sample=False)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

length = cache.get_seq_length()
print(f"\n{length} tokens in {cache.nbytes:,} bytes; {cache.vectors_quantized:,} vectors are codes")

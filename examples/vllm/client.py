"""A chat with a running server, streamed, then what it says of its cache: python examples/vllm/client.py [URL]"""

import sys
import urllib.request

from openai import OpenAI


def main(url: str = "http://localhost:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for event in client.chat.completions.create(model=model, messages=messages, max_tokens=32, temperature=0, stream=True):
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()
    for line in urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines():
        if line.startswith("tqai_"):
            print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])

#!/usr/bin/env bash
# vLLM's own server with a compressed cache: examples/vllm/serve.sh MODEL. Every flag of `vllm serve` works; those
# of one host with several GPUs: examples/vllm/serve.sh MODEL --tensor-parallel-size 4 --pipeline-parallel-size 2
exec vllm serve "$1" --kv-cache-dtype tqai --port 8000 \
    --additional-config '{"tqai": {"recent_memory": 0.02}}' "${@:2}"

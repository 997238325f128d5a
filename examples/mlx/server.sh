#!/usr/bin/env bash
# mlx-lm's own server with a compressed cache: examples/mlx/server.sh MODEL. Every flag of mlx_lm.server works.
tqai serve --mlx "$1" --kv-cache-dtype tqai --prompt-cache-bytes 4GB --port 8080 &
server=$!
trap 'kill $server' EXIT
until curl -s localhost:8080/health >/dev/null; do sleep 1; done
for question in "What is the capital of France?" "Name three colours." "Write a haiku."; do
    curl -s localhost:8080/v1/chat/completions -H 'content-type: application/json' \
        -d "{\"messages\": [{\"role\": \"user\", \"content\": \"$question\"}], \"max_tokens\": 64}" &
    requests+=($!)
done
wait "${requests[@]}"

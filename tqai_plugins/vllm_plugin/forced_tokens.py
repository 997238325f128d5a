"""A logits processor that makes a server write given tokens, so that the probabilities it gave them can be compared:
`vllm serve --logits-processors tqai_plugins.vllm_plugin.forced_tokens:ForcedTokens`, then in a request
`"vllm_xargs": {"tqai_forced": "12,345,6"}`. Returned log-probabilities are those of before the processor; with
`"tqai_logits": 7` too, all logits are written to 7.safetensors in the folder that the server's environment names."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from .options import FORCED_TOKENS, KEPT_LOGITS, LOGITS_FOLDER


class ForcedTokens(AdapterLogitsProcessor):
    """0.26 on. Requests without the option are left alone."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        options = params.extra_args or {}
        if not options.get(FORCED_TOKENS):
            return None
        tokens = [int(token) for token in options[FORCED_TOKENS].split(",")]
        folder, number = os.environ.get(LOGITS_FOLDER), options.get(KEPT_LOGITS)
        kept = Kept(Path(folder) / f"{int(number)}.safetensors", len(tokens)) if folder and number is not None else None

        def force(output_tokens, logits):
            at = len(output_tokens)
            if at >= len(tokens):
                return logits
            if kept:
                kept.add(at, logits)
            wanted = logits[tokens[at]].clone()
            logits.fill_(float("-inf"))
            logits[tokens[at]] = wanted
            return logits

        return force


class Kept:
    """The logits of one request of `count` tokens, float32 [count, vocabulary], on their device until the last are there."""

    def __init__(self, path: Path, count: int):
        self.path, self.count = path, count
        self.logits = torch.empty(0)

    def add(self, at: int, logits: torch.Tensor) -> None:
        """Token `at`'s logits [vocabulary]; the last token's write the file."""
        if not len(self.logits):
            self.logits = torch.empty(self.count, *logits.shape, dtype=torch.float32, device=logits.device)
        self.logits[at] = logits
        if at == self.count - 1:
            from safetensors.torch import save_file

            unfinished = self.path.with_suffix(f".{os.getpid()}")  # every rank of tensor parallel writes one
            save_file({"logits": self.logits.cpu()}, unfinished)
            os.replace(unfinished, self.path)

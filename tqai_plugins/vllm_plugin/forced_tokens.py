"""A logits processor that makes a server write given tokens, so that the probabilities it gave them can be compared:
`vllm serve --logits-processors tqai_plugins.vllm_plugin.forced_tokens:ForcedTokens`, then in a request
`"vllm_xargs": {"tqai_forced": "12,345,6"}`. Returned log-probabilities are those of before the processor."""

from __future__ import annotations

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

OPTION = "tqai_forced"


class ForcedTokens(AdapterLogitsProcessor):
    """0.26 on. Requests without the option are left alone."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        forced = (params.extra_args or {}).get(OPTION)
        if not forced:
            return None
        tokens = [int(token) for token in forced.split(",")]

        def force(output_tokens, logits):
            if len(output_tokens) < len(tokens):
                wanted = logits[tokens[len(output_tokens)]].clone()
                logits.fill_(float("-inf"))
                logits[tokens[len(output_tokens)]] = wanted
            return logits

        return force

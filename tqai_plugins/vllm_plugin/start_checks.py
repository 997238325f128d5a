"""What stops `--kv-cache-dtype tqai` before any weight is loaded: each reason is one sentence that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from tqai_plugins.core.kv_format import DEFAULT_NAME, SERVED_NAMES, SERVED_WIDTHS, is_tqai


def name_check(refusal: str | None) -> Callable[[str], str]:
    """A function that returns a cache dtype, and raises ValueError for a tqai name that is not served: with
    `refusal`, if there is one, for all of them."""

    def check_name(name: str) -> str:
        if not isinstance(name, str) or not name.lower().startswith(DEFAULT_NAME):
            return name
        if refusal:
            raise ValueError(refusal)
        if name not in SERVED_NAMES:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), SERVED_NAMES, 1, 0.0)[0]
            widths = ", ".join(map(str, SERVED_WIDTHS[:-1]))
            raise ValueError(
                f"unknown KV cache dtype {name!r}; tqai serves 'tqai' and 'tqai_k<bits>v<bits>' with {widths} or "
                f"{SERVED_WIDTHS[-1]} bits, e.g. {near!r}"
            )
        return name

    return check_name


def check(config) -> None:
    """ValueError for a vllm.config.VllmConfig that cannot be served with the tqai dtype it asks for."""
    from . import presets
    from .options import Options

    model = config.model_config
    name = config.cache_config.cache_dtype
    assert is_tqai(name)
    # Multi-head latent attention stores one latent vector a token, which is compressed already.
    for unserved, what in (
        (model.use_mla, "multi-head latent attention (MLA)"),
        (model.is_encoder_decoder, "cross attention (an encoder and a decoder)"),
        (model.attn_type == "encoder_only", "no KV cache (encoder-only)"),
        (model.uses_alibi, "ALiBi"),
    ):
        if unserved:
            raise ValueError(
                f"--kv-cache-dtype {name} does not serve models with {what}, which {model.model} is; use --kv-cache-dtype auto"
            )
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):  # its steps do not hold the tokens that copies follow
        raise ValueError(f"--kv-cache-dtype {name} does not serve --kv-sharing-fast-prefill; leave that out")
    Options.of(config)
    presets.check(config)
    presets.use_codebooks(config)

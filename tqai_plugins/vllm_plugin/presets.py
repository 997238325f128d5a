"""Formats of single layers: --kv-cache-dtype tqai --additional-config '{"tqai": {"preset": "preset.json"}}'.

vLLM takes one cache dtype for all layers. A preset's layers get their own when the weights are there, before vLLM asks
each layer for its page size: layers of one kind may differ in it, as those of one KV cache group.
"""

from __future__ import annotations

import vllm

from tqai_plugins.core.codebook import use_for
from tqai_plugins.core.kv_format import SERVED_NAMES, is_tqai, parse_name

from . import compat
from .options import Options


def check(config) -> None:
    """ValueError for a VllmConfig whose model cannot be served with the preset that it names."""
    preset = Options.of(config).preset
    if preset is None:
        return
    if not compat.has_formats_of_layers():
        raise ValueError(f"presets need vLLM 0.29 or newer, this is {vllm.__version__}; leave out the tqai option preset")
    model = config.model_config
    text = model.hf_text_config
    preset.check_model(text.num_hidden_layers, model.get_head_size())
    for layer, name in preset.formats:
        if name not in SERVED_NAMES:
            raise ValueError(f"the preset gives layer {layer} the format {name}, which vLLM cannot serve; allowed are {', '.join(SERVED_NAMES)}")
    reason = why_none(config, several_kinds=len(preset.formats) < text.num_hidden_layers)
    if reason:
        raise ValueError(f"vLLM cannot serve a preset together with {reason}; leave out the tqai option preset")


def why_none(config, several_kinds: bool) -> str | None:
    """What keeps single layers of a server from having a format of their own, None if they may."""
    speculative = config.speculative_config
    for unserved, what in (
        # vLLM would pad the pages of all layers to one size: measured, Gemma's preset held 42 % fewer tokens than without.
        (several_kinds, "layers of several kinds, such as sliding windows"),
        (speculative is not None and speculative.method not in ("ngram", "suffix"), "a draft model"),
        (config.kv_transfer_config is not None, "a KV connector"),
    ):
        if unserved:
            return what
    return None


def use_codebooks(config) -> None:
    """Let this process use the codebooks of the options; ValueError for one that this model would not read."""
    options = Options.of(config)
    names = [config.cache_config.cache_dtype, *(name for _, name in (options.preset.formats if options.preset else ()))]
    use_for(options.codebooks, config.model_config.get_head_size(), {bits for name in names for bits in parse_name(name)})


def apply(config) -> None:
    """Give the layers of this process the formats of the preset, if there is one. Once is enough."""
    preset = Options.of(config).preset
    if preset is None:
        return
    formats = dict(preset.formats)
    for name, layer in config.compilation_config.static_forward_context.items():
        wanted = is_tqai(getattr(layer, "kv_cache_dtype", None)) and formats.get(compat.layer_index(name))
        if wanted and layer.kv_cache_dtype != wanted:
            give(layer, wanted)


def give(layer, name: str) -> None:
    """Let a layer have this format, before vLLM asks for its page size."""
    layer.kv_cache_dtype = name
    layer.impl.use_format(name)
    compat.own_page_size(layer)

"""What a model asks of memory, read off the model itself: it is built on torch's meta device, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqai_plugins.core import json_file

from . import models


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a sequence: keys and values of `heads` heads, a recurrent state, or both."""

    heads: int = 0
    head_dim: int = 0
    window: int | None = None  # tokens that a sliding or chunked layer looks back; None is all of them
    state_bytes: int = 0


@dataclass(frozen=True)
class ModelShape:
    """Layers that keep something (KV-shared and MLP layers do not), and sizes in bytes at the model's dtype."""

    name: str
    layers: tuple[CacheLayer, ...]
    weight_bytes: int
    looked_up_bytes: int  # of the weights: an input embedding, of which a token reads one row
    expert_bytes: int  # of the weights: experts of mixture-of-experts layers
    experts: int
    experts_used: int  # by one token
    hidden: int
    inner: int  # widest MLP activation of one token
    max_context: int

    def read_bytes(self, tokens: int) -> float:
        """Bytes of weights that a step of so many tokens reads, each token drawing its experts at random."""
        share = 1 - (1 - self.experts_used / self.experts) ** tokens if self.experts else 1
        return self.weight_bytes - self.looked_up_bytes - self.expert_bytes * (1 - share)


def read(model: str, dtype_bytes: int = 2) -> ModelShape:
    """The shape of a Hugging Face id, a folder, a config.json, a GGUF file or `demo`; no weights are read.

    dtype_bytes is the size of a weight unless the folder's own files or a quantization config say otherwise.
    Raises ValueError for models whose keys and values tqai does not compress, saying why.
    """
    import torch
    config, folder = _config(model)
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{model} is an encoder-decoder model ({config.model_type}); tqai compresses decoder-only models")
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"{model} ({text.model_type}) uses multi-head latent attention: its cache is one short latent a token, which "
            "loses more than it saves when it is quantized; tqai refuses such models"
        )
    with models._quiet_library(), torch.device("meta"):
        built = _build(config, torch.bfloat16)
    if built is None:
        raise ValueError(f"{model} ({config.model_type}) is no causal language model that transformers knows")
    experts = [m for name, m in built.named_modules() if name.endswith(".experts")]
    counted = {id(p): p.numel() for m in experts for p in m.parameters()}
    input_embedding, head = built.get_input_embeddings(), built.get_output_embeddings()
    tied = head is not None and head.weight is input_embedding.weight
    parameters = sum(p.numel() for p in built.parameters())
    looked_up = 0 if tied else input_embedding.weight.numel()
    bits = _weight_bits(config, dtype_bytes)
    coded = parameters - input_embedding.weight.numel() - (0 if tied or head is None else head.weight.numel())
    weight_bytes = int(coded * bits / 8 + (parameters - coded) * dtype_bytes)
    if getattr(config, "quantization_config", None) is not None:
        weight_bytes = _file_bytes(folder) or weight_bytes
    used = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or 1
    return ModelShape(
        name=model,
        layers=_layers(built, config, text),
        weight_bytes=weight_bytes,
        looked_up_bytes=looked_up * dtype_bytes,
        expert_bytes=int(sum(counted.values()) * bits / 8),
        experts=_expert_count(text) if experts else 0,
        experts_used=used,
        hidden=text.hidden_size,
        inner=max(_width(text, "intermediate_size"), used * _width(text, "moe_intermediate_size")),
        max_context=getattr(text, "max_position_embeddings", None) or 4096,
    )


def _build(config, dtype):
    """A model of this config, for text or for images and text, or None if it is of another kind."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind.from_config(config, dtype=dtype).eval()
    return None


def _config(model: str):
    """The model's configuration, and its folder if it has one."""
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if path.suffix == ".json" and path.is_file():
        try:
            given = json_file.read(path)
            return AutoConfig.for_model(given.pop("model_type"), **given), None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{model} is no model configuration that transformers knows: {error}") from error
    where, options = models._locate(model)
    with models._quiet_library():
        try:
            config = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
        except Exception as error:  # each library below raises its own kinds
            raise models._unreadable(model, where, options, error) from error
    return config, Path(where) if Path(where).is_dir() and not options else None


def _file_bytes(folder: Path | None) -> int:
    """Bytes of a folder's safetensors files, 0 if there is none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0


def _weight_bits(config, dtype_bytes: int) -> float:
    """Bits of a weight in the layers, scales included; from the quantization config if there is one."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return 8 * dtype_bytes
    given = given if isinstance(given, dict) else given.to_dict()
    method = given.get("quant_method")
    if method == "fp8":
        return 8.0
    if method == "mxfp4":
        return 4.25
    if method in ("awq", "gptq"):  # one 16-bit scale and one zero point a group
        return given.get("bits", 4) + (16 + given.get("bits", 4)) / max(given.get("group_size", 128), 1)
    raise ValueError(
        f"the size of weights quantized by {method!r} is not known from the config; give the folder with its "
        "safetensors files instead"
    )


def _width(config, name: str) -> int:
    value = getattr(config, name, None)
    return max(value) if isinstance(value, (list, tuple)) else value or 0


def _expert_count(config) -> int:
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if getattr(config, name, None):
            return getattr(config, name)
    raise ValueError(f"{config.model_type} has experts but does not say how many")


def _layers(built, config, text) -> tuple[CacheLayer, ...]:
    """One token through the model on the meta device: what the library's cache then holds, by its shapes."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    try:
        with models._quiet_library(), torch.device("meta"), torch.inference_mode():
            built(torch.zeros(1, 2, dtype=torch.long), past_key_values=cache)
        found = [_filled(layer) for layer in cache.layers]
    except (RuntimeError, TypeError, ValueError):  # a model that looks at numbers, which a meta tensor has not: its config must do
        found = [_configured(text, layer, of) for layer, of in zip(cache.layers, text.per_layer_config)]
    layers = tuple(layer for layer in found if layer.heads or layer.state_bytes)
    if not any(layer.heads and layer.window is None for layer in layers):
        raise ValueError(f"{text.model_type} has no full-attention layer: its cache does not grow, so nothing is saved")
    return layers


def _filled(layer) -> CacheLayer:
    keys = getattr(layer, "keys", None)
    heads, head_dim = (keys.shape[1], keys.shape[3]) if keys is not None else (0, 0)
    kept = sum(state.nbytes for name in ("conv_states", "recurrent_states") for state in _tensors(getattr(layer, name, None)))
    if not heads and not kept and type(layer).__name__ != "DummyLayer":
        raise ValueError("this layer kept nothing")
    return CacheLayer(heads, head_dim, getattr(layer, "sliding_window", None) if heads else None, kept)


def _tensors(held) -> list:
    held = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else [held]
    return [state for state in held if state is not None]


def _configured(config, layer, own) -> CacheLayer:
    kind = type(layer).__name__
    if kind == "DummyLayer":  # reads another layer's keys and values
        return CacheLayer()
    if kind not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise ValueError(f"what a {kind} of {config.model_type} keeps is not known from its config")
    heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    return CacheLayer(heads, head_dim, getattr(layer, "sliding_window", None))

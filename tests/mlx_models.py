"""Small random models for mlx-lm with a byte tokenizer and a chat template: folders that its loaders and server take."""

import functools
import json
import tempfile
from pathlib import Path

BASE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 32768, "tie_word_embeddings": True, "torch_dtype": "float16",
}  # fmt: skip
KINDS = {
    "llama": {},
    "draft": {"model_type": "llama", "num_hidden_layers": 1},
    "llama32": {"model_type": "llama", "torch_dtype": "float32"},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 64, "sliding_window_pattern": 2, "query_pre_attn_scalar": 64},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64, "rope_scaling": None,
        "layer_types": ["sliding_attention", "full_attention"], "torch_dtype": "float32",
    },
    "afm7": {"hidden_dim": 128, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 2, "num_kv_heads": 1},
    "gemma3n": {
        "text_config": BASE | {
            "model_type": "gemma3n_text", "vocab_size": 259, "num_hidden_layers": 5, "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": 259, "sliding_window": 64, "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 16, "altup_num_inputs": 2,
            "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0] * 5,
        }
    },
    # mlx-lm's phi3small sets the logits of tokens 100256 to 100351, whatever the vocabulary; MLX does not check the indices.
    "phi3small": {
        "vocab_size": 100352,
        "layer_norm_epsilon": 1e-5, "ff_intermediate_size": 256, "gegelu_limit": 20.0, "dense_attention_every_n_layers": 2,
        "blocksparse_block_size": 64, "blocksparse_num_local_blocks": 4, "blocksparse_vert_stride": 8,
        "mup_attn_multiplier": 1.0, "mup_use_scaling": True, "mup_embedding_multiplier": 10.0, "mup_width_multiplier": 8.0,
        "rope_embedding_base": 10000.0,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 64, "n_shared_experts": 1, "n_routed_experts": 4, "num_key_value_heads": 4,
        "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 5, "routed_scaling_factor": 1.0,
    },
    "mamba2": {
        "num_heads": 4, "state_size": 16, "conv_kernel": 4, "n_groups": 1, "use_bias": False, "use_conv_bias": True,
        "time_step_limit": [0.0, 1.0], "time_step_rank": "auto", "layer_norm_epsilon": 1e-5, "ssm_state_size": 16,
    },
    "gemma4_text": {
        "num_hidden_layers": 5, "sliding_window": 64, "num_kv_shared_layers": 2, "global_head_dim": 128,
        "sliding_window_pattern": 2, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 260,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _write_tokenizer(folder: Path) -> tuple[int, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE, "model_max_length": 32768,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size(), tokenizer.token_to_id("<|im_end|>")


def write(folder: Path, kind: str, seed: int = 0, **changes) -> Path:
    """A checkpoint of this kind of model, whose greedy tokens depend on their context."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    folder.mkdir(parents=True, exist_ok=True)
    vocab, end = _write_tokenizer(folder)
    config = BASE | {"model_type": kind, "vocab_size": vocab, "eos_token_id": end} | KINDS.get(kind, {}) | changes
    (folder / "config.json").write_text(json.dumps(config))
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    weights = tree_flatten(model_class(args_class.from_dict(config)).parameters())
    made, dtype = {}, getattr(mx, config["torch_dtype"])
    for name, x in weights:
        noise = mx.random.normal(x.shape) * 0.12
        made[name] = (noise if x.ndim > 1 else noise + (0 if "bias" in name or "sink" in name else 1)).astype(dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), made, metadata={"format": "mlx"})
    return folder


@functools.cache
def folder_of(kind: str) -> Path:
    """The folder of a model of this kind, made once a test run."""
    root = Path(tempfile.mkdtemp(prefix="tqai-mlx-"))
    return write(root / kind, kind)


def load(kind: str):
    """(model, tokenizer) by mlx_lm.load."""
    import mlx_lm

    return mlx_lm.load(str(folder_of(kind)))

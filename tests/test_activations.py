"""Compressed activations and named configurations on transformers models: what changes, and that nothing stays."""

import pytest
import tqai

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tqai_plugins.core.activations import CONFIGS, group_size
from tqai_plugins.transformers_plugin import activations

SHAPE = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 64, "n_layer": 3, "n_head": 2, "initializer_range": 0.2, "eos_token_id": None}
KINDS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=16, layer_types=["full_attention"] * 3
    ),
    "phi": lambda: transformers.PhiConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
}
IDS = torch.arange(1, 49)[None]


def made(kind="llama"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(KINDS[kind]()).eval()


@pytest.fixture(scope="module")
def model():
    return made()


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


def traces(model) -> dict:
    """All that a module holds besides its parameters, which hooks would be among."""
    return {
        (name, key): len(value) if hasattr(value, "__len__") else value
        for name, module in model.named_modules() for key, value in vars(module).items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["hidden", "ffn"])
def test_more_bits_come_closer_and_nothing_stays(kind, which):
    model = made(kind)
    before, clean = logits(model), traces(model)
    errors = []
    for bits in (8, 6, 4, 2):
        tqai.patch(model, **{f"compress_{which}": True, f"bits_{which}": bits})
        errors.append((logits(model) - before).norm() / before.norm())
    assert 0 < errors[0] < 0.05 and errors == sorted(errors)
    tqai.unpatch(model)
    assert traces(model) == clean and torch.equal(logits(model), before)
    tqai.unpatch(model)  # again: nothing to do


def test_the_numbers_that_go_on_are_those_of_codes(model):
    """At 2 bits a group of 64 has at most four different levels in the basis of the codes."""
    from tqai_plugins.torch_kernels import codec

    seen = []
    tqai.patch(model, compress_ffn=True, bits_ffn=2)
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    hook.remove()
    tqai.unpatch(model)
    groups = codec.rotate(seen[0].unflatten(-1, (-1, group_size(192))))
    assert groups.shape[-1] == 96 and all(len(set(g.mul(1e4).round().tolist())) <= 4 for g in groups[0].flatten(0, 1))


def test_every_configuration_works_with_generate(model):
    plain = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert len(CONFIGS) == 7
    for name, options in CONFIGS.items():
        cache = tqai.patch(model, config=name, cache_strategy="full")
        assert (cache.options.bits_k, cache.options.bits_v) == (options["bits_k"], options["bits_v"])
        hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
        assert hooks == 2 * ("compress_hidden" in options) + 3 * ("compress_ffn" in options), (
            "between 3 layers, and in each"
        )
        assert model.generate(IDS, past_key_values=cache, max_new_tokens=4, do_sample=False).shape == plain.shape
        assert cache.vectors_dequantized > 0
    tqai.patch(model)
    assert not any(module._forward_pre_hooks for module in model.modules()), "the last patch says it all"


def test_they_are_applied_for_a_while_only(model):
    before = logits(model)
    with activations.applied(model, activations.Activations(compress_hidden=True, bits_hidden=3)):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"config": "all7"}, "config is 'all7'; expected one of kv-only, .* aggressive"),
        ({"config": "all8", "bits_k": 4}, "config 'all8' already says bits_k; leave out one of them"),
        ({"config": "all8", "bits_ffn": 4}, "config 'all8' already says bits_ffn"),
        ({"config": 8}, "config is '8'; expected one of"),
        ({"config": "tqai_k9v1"}, "unknown KV cache format 'tqai_k9v1'"),
        ({"compress_ffn": 1}, "compress_ffn is 1; allowed are True and False"),
        ({"compress_ffn": True, "bits_ffn": 1}, "bits_ffn is 1; allowed are the whole numbers 2 to 8"),
        ({"bits_hidden": 9}, "bits_hidden is 9; allowed"),
    ],
)
def test_refused(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tqai.patch(model, **options)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_in_one_tensor_are_refused():
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="compress_ffn does not work with mixtral"):
        tqai.patch(model, compress_ffn=True)
    tqai.patch(model, compress_hidden=True)
    tqai.unpatch(model)


@pytest.mark.parametrize("size, group", [(576, 96), (640, 128), (1536, 128), (100, 100), (4864, 128)])
def test_groups(size, group):
    assert group_size(size) == group


def test_a_size_that_has_no_group():
    with pytest.raises(ValueError, match="activations have 257 coordinates"):
        group_size(257)

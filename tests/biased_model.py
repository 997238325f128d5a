"""SmolLM2 whose keys have large biases in two layers, as those of Qwen 2 do: `python tests/biased_model.py FOLDER`.

What the biases do to its answers is compensated nowhere; measure compressed caches against the folder's own uncompressed one.
"""

import argparse
from pathlib import Path

LAYERS, CHANNELS, BIAS = (3, 17), 8, 40.0


def write(folder: Path) -> Path:
    """The model in float32, with its tokenizer."""
    import torch
    import transformers
    from tqai import models

    source = models.packaged_folder(models.PACKAGED["demo"])
    config = transformers.AutoConfig.from_pretrained(source, attention_bias=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = transformers.LlamaForCausalLM(config).float()
    missing = model.load_state_dict(stock.state_dict(), strict=False).missing_keys
    assert all(name.endswith("_proj.bias") for name in missing)
    generator = torch.Generator().manual_seed(0)
    for name in missing:
        model.get_parameter(name).data.zero_()
    for layer in LAYERS:
        for head in model.model.layers[layer].self_attn.k_proj.bias.data.view(-1, config.head_dim):
            channels = torch.randperm(config.head_dim, generator=generator)[:CHANNELS]
            head[channels] = BIAS * (torch.randint(0, 2, (CHANNELS,), generator=generator) * 2.0 - 1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)

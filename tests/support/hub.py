"""Tiny decoders of transformers' own, one per family, saved as its save_pretrained does; all values
drawn, none at rest."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

#: family: the configuration's class and what it is told
MODELS = {
    "gpt2": (
        transformers.GPT2Config,
        {
            "vocab_size": 96,
            "n_positions": 16,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_inner": 64,
        },
    ),
    "llama": (
        transformers.LlamaConfig,
        {
            "vocab_size": 96,
            "max_position_embeddings": 16,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "rope_theta": 5000.0,
            "tie_word_embeddings": False,
        },
    ),
    "opt": (
        transformers.OPTConfig,
        {
            "vocab_size": 96,
            "max_position_embeddings": 16,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom": (
        transformers.BloomConfig,
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    ),
}


def model(family: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A model in float32 whose parameters are all drawn from a normal distribution, norms and
    biases too."""
    kind, told = MODELS[family]
    made = transformers.AutoModelForCausalLM.from_config(kind(**{**told, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.05
                + (parameter.dim() == 1) * 0.5
            )
    return made


def save(family: str, folder: Path, **changes) -> Path:
    model(family, **changes).save_pretrained(folder)
    return folder


def logits(folder: Path, vocab: int = 96) -> torch.Tensor:
    """What the model that transformers loads from a folder says to a fixed batch; shape [2, 12,
    vocabulary]."""
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    wrong = {key: value for key, value in told.items() if value}
    assert not wrong, wrong
    tokens = torch.randint(vocab, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return loaded.eval()(tokens).logits

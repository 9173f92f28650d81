"""What the tests of test_alpa share with others."""

from __future__ import annotations

from pathlib import Path

import torch

LAYERS, HEADS, HIDDEN, FFN, VOCAB, POSITIONS = 3, 4, 24, 40, 64, 34


def opt_weights(dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, torch.Tensor]:
    """A singleton's weights, under metaseq's names."""
    layers, hidden, ffn, vocab = (
        sizes.get(name, value)
        for name, value in (("layers", LAYERS), ("hidden", HIDDEN), ("ffn", FFN), ("vocab", VOCAB))
    )
    shapes = {
        "embed_tokens.weight": (vocab, hidden),
        "embed_positions.weight": (POSITIONS, hidden),
        "layer_norm.weight": (hidden,),
        "layer_norm.bias": (hidden,),
    }
    for i in range(layers):
        own = {f"self_attn.{atom}_proj": (hidden, hidden) for atom in ("k", "v", "q", "out")}
        own |= {
            "self_attn_layer_norm": (hidden,),
            "fc1": (ffn, hidden),
            "fc2": (hidden, ffn),
            "final_layer_norm": (hidden,),
        }
        for name, shape in own.items():
            shapes |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(5)
    return {
        f"decoder.{name}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def singleton(folder: Path, weights: dict[str, torch.Tensor], **model: object) -> Path:
    """restored.pt, with these settings of the model."""
    folder.mkdir(exist_ok=True)
    config = {"decoder_attention_heads": HEADS, "share_decoder_input_output_embed": True, **model}
    torch.save({"cfg": {"model": config}, "model": weights}, folder / "restored.pt")
    return folder / "restored.pt"


GPT = {"tp": 2, "pp": 2, "layers": 2, "hidden": 64, "heads": 4, "dtype": "bf16"}

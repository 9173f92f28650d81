"""A GPT-2 of 12 tiny layers with random weights, twice: as transformers has it, and as
Megatron-DeepSpeed saves its weights.

  python examples/tiny_gpt2.py OUT

OUT/hf is a transformers folder, OUT/deepspeed the checkpoint of a pipeline of one stage without an
optimizer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

LAYERS, HIDDEN, HEADS, VOCAB, POSITIONS, EPS, STEP = 12, 16, 4, 64, 16, 1e-5, 3
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": LAYERS,
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_inner": 4 * HIDDEN,
    "n_positions": POSITIONS,
    "vocab_size": VOCAB,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": EPS,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ARGS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": 4 * HIDDEN,
    "padded_vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "layernorm_epsilon": EPS,
    "bias_gelu_fusion": True,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "consumed_train_samples": 48,
}
#: of a layer: transformers' name, Megatron-DeepSpeed's, and the shape there, [out, in]
PARTS = {
    "ln_1": ("input_layernorm", (HIDDEN,)),
    "attn.c_attn": ("self_attention.query_key_value", (3 * HIDDEN, HIDDEN)),
    "attn.c_proj": ("self_attention.dense", (HIDDEN, HIDDEN)),
    "ln_2": ("post_attention_layernorm", (HIDDEN,)),
    "mlp.c_fc": ("mlp.dense_h_to_4h", (4 * HIDDEN, HIDDEN)),
    "mlp.c_proj": ("mlp.dense_4h_to_h", (HIDDEN, 4 * HIDDEN)),
}


def fused(qkv: torch.Tensor) -> torch.Tensor:
    """The rows [q; k; v] as [head, q and k and v, head size]."""
    parts = qkv.view(3, HEADS, HIDDEN // HEADS, *qkv.shape[1:])
    return parts.transpose(0, 1).reshape(qkv.shape)


def main(out: Path) -> None:
    torch.manual_seed(1)
    words, positions = torch.randn(VOCAB, HIDDEN), torch.randn(POSITIONS, HIDDEN)
    norm, norm_bias = torch.randn(HIDDEN), torch.randn(HIDDEN)
    functions = {1: {"word_embeddings.weight": words, "position_embeddings.weight": positions}}
    model = {"transformer.wte.weight": words, "transformer.wpe.weight": positions}
    for i in range(LAYERS):
        layer = functions[i + 3] = {}
        for name, (theirs, shape) in PARTS.items():
            for kind, value in (("weight", torch.randn(shape)), ("bias", torch.randn(shape[0]))):
                layer[f"{theirs}.{kind}"] = fused(value) if name == "attn.c_attn" else value
                model[f"transformer.h.{i}.{name}.{kind}"] = value.t().contiguous()
    functions[LAYERS + 4] = {"weight": norm, "bias": norm_bias}
    model |= {
        "transformer.ln_f.weight": norm,
        "transformer.ln_f.bias": norm_bias,
        "lm_head.weight": words,
    }
    (out / "hf").mkdir(parents=True)
    torch.save(model, out / "hf/pytorch_model.bin")
    (out / "hf/config.json").write_text(json.dumps(CONFIG, indent=1))
    step = out / f"deepspeed/global_step{STEP}"
    step.mkdir(parents=True)
    for number, tensors in functions.items():
        torch.save(tensors, step / f"layer_{number:02d}-model_00-model_states.pt")
    torch.save(
        {
            "module": None,
            "optimizer": None,
            "iteration": STEP,
            "global_steps": STEP,
            "checkpoint_version": 3.0,
            "args": argparse.Namespace(**ARGS),
        },
        step / "mp_rank_00_model_states.pt",
    )
    (out / "deepspeed/latest").write_text(step.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

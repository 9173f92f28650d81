"""Phi-3: computes as LLaMA does, with q, k and v as one tensor, and gate and up as one.

Source: transformers 4.57 (models/phi3)."""

from parammap.families import RMS_NORM, ROTARY, Cell, Config, Family, ModelType
from parammap.families import decoder, in_layer, llama, row
from parammap.tensors.arrangement import STACKED_QKV

FAMILY = Family(
    name="phi3",
    title="Phi-3",
    rows=(
        row("embedding.word.weight", transformers="embed_tokens.weight"),
        *in_layer(
            {"transformers": "layers.{i}."},
            row("attention.out.weight", transformers="self_attn.o_proj.weight"),
            row(
                "attention.qkv.weight", transformers=Cell("self_attn.qkv_proj.weight", STACKED_QKV)
            ),
            row("mlp.fc1.weight", transformers="mlp.gate_up_proj.weight"),
            row("mlp.fc2.weight", transformers="mlp.down_proj.weight"),
            row("input_norm.weight", transformers="input_layernorm.weight"),
            row("post_attention_norm.weight", transformers="post_attention_layernorm.weight"),
        ),
        row("final_norm.weight", transformers="norm.weight"),
        row("output.weight", transformers="lm_head.weight"),
    ),
    shares=(decoder.MEGATRON,),
    together=decoder.TOGETHER,
    norm=RMS_NORM,
    positions=ROTARY,
    gated=True,
    config=Config(
        prefix="model.",
        settings=llama.SETTINGS,
        shapes={"mlp.fc1": ("gate_up", "hidden")},
        types={
            "phi3": ModelType(
                "Phi3ForCausalLM",
                "Phi3Model",
                {**llama.DEFAULTS, "rms_norm_eps": 1e-5},
                as_family={"sliding_window": None, "partial_rotary_factor": 1.0},
            )
        },
    ),
)

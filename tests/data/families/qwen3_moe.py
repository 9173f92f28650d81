"""Qwen3-MoE: LLaMA's layers with norms of q and k, and experts.

Source: transformers 4.57 (models/qwen3_moe)."""

from parammap.families import Config, Family, ModelType, decoder, in_layer, llama, mixture, row
from parammap.tensors.arrangement import SHARD_0

FAMILY = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    rows=(
        llama.WORDS,
        *llama.ATTENTION,
        *in_layer(
            {"transformers": "layers.{i}.mlp."},
            row("mlp.router.weight", transformers="gate.weight"),
            row(
                "mlp.experts.{e}.gate.weight", SHARD_0, transformers="experts.{e}.gate_proj.weight"
            ),
            row("mlp.experts.{e}.up.weight", SHARD_0, transformers="experts.{e}.up_proj.weight"),
            row("mlp.experts.{e}.fc2.weight", transformers="experts.{e}.down_proj.weight"),
        ),
        *llama.NORMS,
        *llama.LAST,
    ),
    shares=(mixture.EXPERTS, decoder.MEGATRON),
    together=(
        frozenset(f"mlp.experts.0.{part}.weight" for part in ("gate", "up", "fc2")),
        *llama.TOGETHER,
    ),
    config=Config(
        prefix="model.",
        settings=llama.SETTINGS,
        sizes={"experts": "num_experts", "expert_ffn": "moe_intermediate_size"},
        shapes={
            "mlp.router": ("experts", "hidden"),
            "mlp.experts.{e}.gate": ("expert_ffn", "hidden"),
            "mlp.experts.{e}.up": ("expert_ffn", "hidden"),
            "mlp.experts.{e}.fc2": ("hidden", "expert_ffn"),
        },
        types={
            "qwen3_moe": ModelType(
                "Qwen3MoeForCausalLM", "Qwen3MoeModel", llama.DEFAULTS, llama.ATTENTION_BIAS
            )
        },
    ),
)

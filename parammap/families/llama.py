"""LLaMA-like models: RMS norms, rotary positions, gate and up. LLaMA, Mistral, Qwen2 and Qwen3 of
transformers, and what Megatron-LM trains so.

Sources: transformers 4.57 (models/{llama,mistral,qwen2,qwen3})."""

from parammap.families import decoder
from parammap.families.family import RMS_NORM, ROTARY, Config, Family, ModelType, in_layer, row
from parammap.tensors.arrangement import SHARD_0

#: transformers' table, without the rows of an MLP
ATTENTION = in_layer(
    {"transformers": "layers.{i}."},
    row("attention.q.{w}", SHARD_0, transformers="self_attn.q_proj.{w}"),
    row("attention.k.{w}", SHARD_0, transformers="self_attn.k_proj.{w}"),
    row("attention.v.{w}", SHARD_0, transformers="self_attn.v_proj.{w}"),
    row("attention.out.{w}", transformers="self_attn.o_proj.{w}"),
    row("attention.q_norm.weight", transformers="self_attn.q_norm.weight"),
    row("attention.k_norm.weight", transformers="self_attn.k_norm.weight"),
)
NORMS = in_layer(
    {"transformers": "layers.{i}."},
    row("input_norm.weight", transformers="input_layernorm.weight"),
    row("post_attention_norm.weight", transformers="post_attention_layernorm.weight"),
)
WORDS = row("embedding.word.weight", transformers="embed_tokens.weight")
LAST = (
    row("final_norm.weight", transformers="norm.weight"),
    row("output.weight", transformers="lm_head.weight"),
)
TOGETHER = (
    decoder.QKV_APART,
    frozenset({"mlp.gate.weight", "mlp.up.weight", "mlp.fc2.weight"}),
    frozenset({"mlp.gate.bias", "mlp.up.bias", "mlp.fc2.bias"}),
    *decoder.TOGETHER,
)

SETTINGS = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings",),
    "tied": ("tie_word_embeddings",),
    "ffn": ("intermediate_size",),
    "groups": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "activation": ("hidden_act",),
    "eps": ("rms_norm_eps",),
    "rope_theta": ("rope_theta",),
    "rope_scaling": ("rope_scaling",),
}
DEFAULTS = {
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
NO_QK_NORM = {r"\.[qk]_norm\.": lambda _: False}
ATTENTION_BIAS = {r"\.attention\.\w+\.bias$": lambda said: said["attention_bias"]}
#: what is told of biases by the canonical names of those in the first layer
_OUT_BIAS, _MLP_BIAS = "layers.0.attention.out.bias", "layers.0.mlp.fc2.bias"

LLAMA = Family(
    name="llama",
    title="LLaMA-like (rotary positions, RMS norms, gated)",
    rows=(
        WORDS,
        *ATTENTION,
        *in_layer(
            {"transformers": "layers.{i}."},
            row("mlp.gate.{w}", SHARD_0, transformers="mlp.gate_proj.{w}"),
            row("mlp.up.{w}", SHARD_0, transformers="mlp.up_proj.{w}"),
            row("mlp.fc2.{w}", transformers="mlp.down_proj.{w}"),
        ),
        *NORMS,
        *LAST,
    ),
    shares=(decoder.MEGATRON,),
    together=TOGETHER,
    norm=RMS_NORM,
    positions=ROTARY,
    gated=True,
    config=Config(
        prefix="model.",
        buffers=(".rotary_emb.inv_freq",),
        settings=SETTINGS,
        types={
            "llama": ModelType(
                "LlamaForCausalLM",
                "LlamaModel",
                DEFAULTS,
                {
                    **NO_QK_NORM,
                    **ATTENTION_BIAS,
                    r"\.mlp\.\w+\.bias$": lambda said: said["mlp_bias"],
                },
                from_tensors={"attention_bias": _OUT_BIAS, "mlp_bias": _MLP_BIAS},
            ),
            "mistral": ModelType(
                "MistralForCausalLM",
                "MistralModel",
                {**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
                {**NO_QK_NORM, r"\.bias$": lambda _: False},
                as_family={"sliding_window": None},
                written_where=None,
            ),
            "qwen2": ModelType(
                "Qwen2ForCausalLM",
                "Qwen2Model",
                DEFAULTS,
                {**NO_QK_NORM, r"\.(out|gate|up|fc2)\.bias$": lambda _: False},
                as_family={"use_sliding_window": False},
                written_where={"layers.0.attention.q.bias": True, _OUT_BIAS: False},
            ),
            "qwen3": ModelType(
                "Qwen3ForCausalLM",
                "Qwen3Model",
                {**DEFAULTS, "head_dim": 128},
                {**ATTENTION_BIAS, r"\.mlp\.\w+\.bias$": lambda _: False},
                as_family={"use_sliding_window": False},
                written_where={"layers.0.attention.q_norm.weight": True},
                from_tensors={"attention_bias": _OUT_BIAS},
            ),
        },
    ),
)

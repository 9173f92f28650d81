"""GPT-like decoders: Megatron-LM's legacy and core GPT, LLaMA-like models and their
mixture-of-experts variants.

One row per tensor of a layer: its canonical name, how it is arranged and cut, and its name in each
dialect. `{i}` is the layer, `{e}` the expert, `{w}` stands for weight and bias alike. Several names
in one dialect mean the same tensor (local and Transformer-Engine fused norms). None: the dialect's
model has no such tensor.

Sources: Megatron-LM core_r0.6.0 … 0.19 (legacy/model, core/models/gpt/gpt_layer_specs.py,
core/transformer/multi_latent_attention.py), MindSpeed-Core-MS r0.1.0 (mindspeed_ms/legacy/model).
"""

from parammap.tensors.arrangement import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    GATE_UP,
    KV_DOWN,
    Q_DOWN,
    QKV,
    QKV_DOWN,
    REPLICATED,
    SHARD_0,
    SHARD_1,
    VOCAB,
)

_LEGACY, _CORE, _MS = (
    "language_model.encoder.layers.{i}.",
    "decoder.layers.{i}.",
    "language_model.encoder.layers.{i}.",
)

#: canonical name: (arrangement, legacy names, core names, MindSpore name)
ROWS_OF_TABLE = {
    "embedding.word.weight": (
        VOCAB,
        ["language_model.embedding.word_embeddings.weight"],
        ["embedding.word_embeddings.weight"],
        "language_model.embedding.word_embeddings.weight",
    ),
    "embedding.position.weight": (
        REPLICATED,
        ["language_model.embedding.position_embeddings.weight"],
        ["embedding.position_embeddings.weight"],
        "language_model.embedding.position_embeddings.weight",
    ),
    "layers.{i}.input_norm.{w}": (
        REPLICATED,
        [_LEGACY + "input_norm.{w}", _LEGACY + "input_layernorm.{w}"],
        [
            _CORE + "input_layernorm.{w}",
            _CORE + "self_attention.linear_qkv_down_proj.layer_norm_{w}",
            _CORE + "self_attention.linear_qkv.layer_norm_{w}",
        ],
        _MS + "input_norm.{norm_w}",
    ),
    "layers.{i}.attention.qkv.{w}": (
        QKV,
        [_LEGACY + "self_attention.query_key_value.{w}"],
        [_CORE + "self_attention.linear_qkv.{w}"],
        _MS + "attention.qkv_proj.{w}",
    ),
    "layers.{i}.attention.q_norm.{w}": (
        REPLICATED,
        [],
        [
            _CORE + "self_attention.q_layernorm.{w}",
            _CORE + "self_attention.linear_q_up_proj.layer_norm_{w}",
        ],
        None,
    ),
    "layers.{i}.attention.k_norm.weight": (
        REPLICATED,
        [],
        [_CORE + "self_attention.k_layernorm.weight"],
        None,
    ),
    "layers.{i}.attention.q_proj.weight": (
        SHARD_0,
        [],
        [_CORE + "self_attention.linear_q_proj.weight"],
        None,
    ),
    "layers.{i}.attention.q_down.weight": (
        Q_DOWN,
        [],
        [_CORE + "self_attention.linear_q_down_proj.weight"],
        None,
    ),
    "layers.{i}.attention.q_up.weight": (
        SHARD_0,
        [],
        [_CORE + "self_attention.linear_q_up_proj.weight"],
        None,
    ),
    "layers.{i}.attention.kv_down.weight": (
        KV_DOWN,
        [],
        [_CORE + "self_attention.linear_kv_down_proj.weight"],
        None,
    ),
    "layers.{i}.attention.kv_up.weight": (
        SHARD_0,
        [],
        [_CORE + "self_attention.linear_kv_up_proj.weight"],
        None,
    ),
    "layers.{i}.attention.kv_norm.{w}": (
        REPLICATED,
        [],
        [
            _CORE + "self_attention.kv_layernorm.{w}",
            _CORE + "self_attention.linear_kv_up_proj.layer_norm_{w}",
        ],
        None,
    ),
    "layers.{i}.attention.qkv_down.weight": (
        QKV_DOWN,
        [],
        [_CORE + "self_attention.linear_qkv_down_proj.weight"],
        None,
    ),
    "layers.{i}.attention.out.weight": (
        SHARD_1,
        [_LEGACY + "self_attention.dense.weight"],
        [_CORE + "self_attention.linear_proj.weight"],
        _MS + "attention.out_proj.weight",
    ),
    "layers.{i}.attention.out.bias": (
        REPLICATED,
        [_LEGACY + "self_attention.dense.bias"],
        [_CORE + "self_attention.linear_proj.bias"],
        _MS + "attention.out_proj.bias",
    ),
    "layers.{i}.post_attention_norm.{w}": (
        REPLICATED,
        [_LEGACY + "post_attention_norm.{w}", _LEGACY + "post_attention_layernorm.{w}"],
        [_CORE + "pre_mlp_layernorm.{w}", _CORE + "mlp.linear_fc1.layer_norm_{w}"],
        _MS + "post_attention_norm.{norm_w}",
    ),
    "layers.{i}.mlp.fc1.{w}": (
        GATE_UP,
        [_LEGACY + "mlp.dense_h_to_4h.{w}"],
        [_CORE + "mlp.linear_fc1.{w}"],
        _MS + "mlp.mapping.{w}",
    ),
    "layers.{i}.mlp.fc2.weight": (
        SHARD_1,
        [_LEGACY + "mlp.dense_4h_to_h.weight"],
        [_CORE + "mlp.linear_fc2.weight"],
        _MS + "mlp.projection.weight",
    ),
    "layers.{i}.mlp.fc2.bias": (
        REPLICATED,
        [_LEGACY + "mlp.dense_4h_to_h.bias"],
        [_CORE + "mlp.linear_fc2.bias"],
        _MS + "mlp.projection.bias",
    ),
    "layers.{i}.mlp.router.weight": (
        REPLICATED,
        [_LEGACY + "mlp.router.weight"],
        [_CORE + "mlp.router.weight"],
        _MS + "mlp.router.gating.weight",
    ),
    "layers.{i}.mlp.router.bias": (
        REPLICATED,
        [_LEGACY + "mlp.router.bias"],
        [_CORE + "mlp.router.bias"],
        None,
    ),
    "layers.{i}.mlp.router.expert_bias": (REPLICATED, [], [_CORE + "mlp.router.expert_bias"], None),
    "layers.{i}.mlp.experts.{e}.fc1.{w}": (
        GATE_UP,
        [_LEGACY + "mlp.local_experts.{e}.dense_h_to_4h.{w}"],
        [
            _CORE + "mlp.experts.local_experts.{e}.linear_fc1.{w}",
            _CORE + "mlp.experts.linear_fc1.{w}{e}",
        ],
        _MS + "mlp.experts.local_experts.{e}.mapping.{w}",
    ),
    "layers.{i}.mlp.experts.{e}.fc2.weight": (
        SHARD_1,
        [_LEGACY + "mlp.local_experts.{e}.dense_4h_to_h.weight"],
        [
            _CORE + "mlp.experts.local_experts.{e}.linear_fc2.weight",
            _CORE + "mlp.experts.linear_fc2.weight{e}",
        ],
        _MS + "mlp.experts.local_experts.{e}.projection.weight",
    ),
    "layers.{i}.mlp.experts.{e}.fc2.bias": (
        REPLICATED,
        [_LEGACY + "mlp.local_experts.{e}.dense_4h_to_h.bias"],
        [
            _CORE + "mlp.experts.local_experts.{e}.linear_fc2.bias",
            _CORE + "mlp.experts.linear_fc2.bias{e}",
        ],
        _MS + "mlp.experts.local_experts.{e}.projection.bias",
    ),
    "layers.{i}.mlp.experts.grouped.fc1": (EXPERTS_FC1, [], [_CORE + "mlp.experts.weight1"], None),
    "layers.{i}.mlp.experts.grouped.fc2": (EXPERTS_FC2, [], [_CORE + "mlp.experts.weight2"], None),
    "layers.{i}.mlp.shared_experts.fc1.weight": (
        GATE_UP,
        [],
        [_CORE + "mlp.shared_experts.linear_fc1.weight"],
        None,
    ),
    "layers.{i}.mlp.shared_experts.fc2.weight": (
        SHARD_1,
        [],
        [_CORE + "mlp.shared_experts.linear_fc2.weight"],
        None,
    ),
    "layers.{i}.mlp.shared_experts.gate_weight": (
        REPLICATED,
        [],
        [_CORE + "mlp.shared_experts.gate_weight"],
        None,
    ),
    "final_norm.{w}": (
        REPLICATED,
        ["language_model.encoder.final_norm.{w}", "language_model.encoder.final_layernorm.{w}"],
        ["decoder.final_layernorm.{w}"],
        "language_model.encoder.final_norm.{norm_w}",
    ),
    "output.weight": (
        VOCAB,
        ["language_model.output_layer.weight", "word_embeddings_for_head.weight"],
        ["output_layer.weight"],
        "language_model.output_layer.weight",
    ),
    "output.bias": (VOCAB, ["language_model.output_layer.bias"], ["output_layer.bias"], None),
}

#: the canonical tensors that every model of the family has in each layer, and once
REQUIRED_IN_LAYER = [
    "input_norm.weight",
    "attention.qkv.weight",
    "attention.out.weight",
    "post_attention_norm.weight",
]
REQUIRED = ["embedding.word.weight", "final_norm.weight"]
#: with multi-latent attention
REQUIRED_IN_LATENT_LAYER = [
    "input_norm.weight",
    "attention.kv_up.weight",
    "attention.out.weight",
    "post_attention_norm.weight",
]

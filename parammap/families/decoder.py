"""What decoders of Megatron-LM and its descendants have in common: the names of legacy models, of
megatron-core's and of MindSpeed-Core-MS's, and those of Megatron-DeepSpeed.

megatron-core's first name is that of local layers, the last that of Transformer Engine's, which
fuse a norm with the linear layer behind it; MindSpeed-Core-MS's first name is LayerNorm's, the last
RMSNorm's. A pipeline of Megatron-DeepSpeed names a parameter by the number of its layer function
and its name there (`4.mlp.dense_h_to_4h.weight`); readers and writers exchange that for
`layers.{i}.…`, `embedding.…` and `final_norm.…`, and for `word_embeddings_for_head.weight`, the
last stage's copy of the word embedding, which is the head of every such model.

Sources: Megatron-LM core_r0.6.0 … 0.19 (legacy/model, core/models/gpt/gpt_layer_specs.py),
MindSpeed-Core-MS r0.1.0 (mindspeed_ms/legacy/model), bigscience-workshop/Megatron-DeepSpeed main
(megatron/model/gpt_model.py, GPTModelPipe; transformer.py)."""

from parammap.families.family import in_layer, row
from parammap.tensors.arrangement import GATE_UP, QKV, REPLICATED, SHARD_1, VOCAB

#: what stands before the names of a layer
LAYER = {
    "legacy": "language_model.encoder.layers.{i}.",
    "core": "decoder.layers.{i}.",
    "mindspore": "language_model.encoder.layers.{i}.",
    "deepspeed": "layers.{i}.",
}

MEGATRON = (
    row(
        "embedding.word.weight",
        VOCAB,
        legacy="language_model.embedding.word_embeddings.weight",
        core="embedding.word_embeddings.weight",
        mindspore="language_model.embedding.word_embeddings.weight",
    ),
    row(
        "embedding.position.weight",
        REPLICATED,
        legacy="language_model.embedding.position_embeddings.weight",
        core="embedding.position_embeddings.weight",
        mindspore="language_model.embedding.position_embeddings.weight",
    ),
    *in_layer(
        LAYER,
        row(
            "input_norm.{w}",
            REPLICATED,
            legacy=("input_norm.{w}", "input_layernorm.{w}"),
            core=(
                "input_layernorm.{w}",
                "self_attention.linear_qkv_down_proj.layer_norm_{w}",
                "self_attention.linear_qkv.layer_norm_{w}",
            ),
            mindspore=("input_norm.{affine}", "input_norm.{w}"),
        ),
        row(
            "attention.qkv.{w}",
            QKV,
            legacy="self_attention.query_key_value.{w}",
            core="self_attention.linear_qkv.{w}",
            mindspore="attention.qkv_proj.{w}",
        ),
        row(
            "attention.q_norm.{w}",
            REPLICATED,
            core=(
                "self_attention.q_layernorm.{w}",
                "self_attention.linear_q_up_proj.layer_norm_{w}",
            ),
        ),
        row("attention.k_norm.weight", REPLICATED, core="self_attention.k_layernorm.weight"),
        row(
            "attention.out.weight",
            SHARD_1,
            legacy="self_attention.dense.weight",
            core="self_attention.linear_proj.weight",
            mindspore="attention.out_proj.weight",
        ),
        row(
            "attention.out.bias",
            REPLICATED,
            legacy="self_attention.dense.bias",
            core="self_attention.linear_proj.bias",
            mindspore="attention.out_proj.bias",
        ),
        row(
            "post_attention_norm.{w}",
            REPLICATED,
            legacy=("post_attention_norm.{w}", "post_attention_layernorm.{w}"),
            core=("pre_mlp_layernorm.{w}", "mlp.linear_fc1.layer_norm_{w}"),
            mindspore=("post_attention_norm.{affine}", "post_attention_norm.{w}"),
        ),
        row(
            "mlp.fc1.{w}",
            GATE_UP,
            legacy="mlp.dense_h_to_4h.{w}",
            core="mlp.linear_fc1.{w}",
            mindspore="mlp.mapping.{w}",
        ),
        row(
            "mlp.fc2.weight",
            SHARD_1,
            legacy="mlp.dense_4h_to_h.weight",
            core="mlp.linear_fc2.weight",
            mindspore="mlp.projection.weight",
        ),
        row(
            "mlp.fc2.bias",
            REPLICATED,
            legacy="mlp.dense_4h_to_h.bias",
            core="mlp.linear_fc2.bias",
            mindspore="mlp.projection.bias",
        ),
    ),
    row(
        "final_norm.{w}",
        REPLICATED,
        legacy=(
            "language_model.encoder.final_norm.{w}",
            "language_model.encoder.final_layernorm.{w}",
        ),
        core="decoder.final_layernorm.{w}",
        mindspore=(
            "language_model.encoder.final_norm.{affine}",
            "language_model.encoder.final_norm.{w}",
        ),
    ),
    row(
        "output.weight",
        VOCAB,
        legacy=("language_model.output_layer.weight", "word_embeddings_for_head.weight"),
        core="output_layer.weight",
        mindspore="language_model.output_layer.weight",
    ),
    row(
        "output.bias",
        VOCAB,
        legacy="language_model.output_layer.bias",
        core="output_layer.bias",
    ),
)

MEGATRON_DEEPSPEED = (
    row("embedding.word.weight", VOCAB, deepspeed="embedding.word_embeddings.weight"),
    *in_layer(
        LAYER,
        row("input_norm.{w}", REPLICATED, deepspeed="input_layernorm.{w}"),
        row("attention.qkv.{w}", QKV, deepspeed="self_attention.query_key_value.{w}"),
        row("attention.out.weight", SHARD_1, deepspeed="self_attention.dense.weight"),
        row("attention.out.bias", REPLICATED, deepspeed="self_attention.dense.bias"),
        row("post_attention_norm.{w}", REPLICATED, deepspeed="post_attention_layernorm.{w}"),
        row("mlp.fc1.{w}", GATE_UP, deepspeed="mlp.dense_h_to_4h.{w}"),
        row("mlp.fc2.weight", SHARD_1, deepspeed="mlp.dense_4h_to_h.weight"),
        row("mlp.fc2.bias", REPLICATED, deepspeed="mlp.dense_4h_to_h.bias"),
    ),
    row("final_norm.{w}", REPLICATED, deepspeed="final_norm.{w}"),
    row("output.weight", VOCAB, deepspeed="word_embeddings_for_head.weight"),
)

#: what belongs together in a layer of any of these
TOGETHER = (
    frozenset({"attention.qkv.weight", "attention.out.weight"}),
    frozenset({"mlp.fc1.weight", "mlp.fc2.weight"}),
    frozenset({"mlp.fc1.bias", "mlp.fc2.bias"}),
    frozenset({"input_norm.bias", "post_attention_norm.bias"}),
)
#: the same of models that have q, k and v apart
QKV_APART = frozenset(
    {"attention.q.weight", "attention.k.weight", "attention.v.weight", "attention.out.weight"}
)
